"""What holds of interleaved 1F1B for every number of nodes, chunks and microbatches."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import ScheduleError
from actors.interleaved import ChunkAction, most_in_flight, node_actions, play_chunks
from actors.play import PipelineTimes, play
from actors.schedule import Op, stage_actions
from tests.schedule_cases import pipeline_times, timed_stages

# Nodes, chunks of each, microbatches.
pipelines = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 14))
Pipeline = tuple[int, int, int]
# Machines that run tests are slow at times.
relaxed = settings(deadline=None)


def orders_of(num_nodes: int, num_chunks: int, num_microbatches: int) -> list[tuple[ChunkAction, ...]]:
    return [node_actions(node, num_nodes, num_chunks, num_microbatches) for node in range(num_nodes)]


def peak(actions: tuple[ChunkAction, ...]) -> int:
    held = most = 0
    for action in actions:
        held += 1 if action.op is Op.FORWARD else -1
        most = max(most, held)
    assert held == 0
    return most


@relaxed
@given(pipelines)
def test_each_chunk_does_each_microbatch_forward_then_backward_once_in_order(pipeline: Pipeline) -> None:
    _, num_chunks, num_microbatches = pipeline
    for actions in orders_of(*pipeline):
        assert len(actions) == 2 * num_chunks * num_microbatches
        for chunk in range(num_chunks):
            for op in (Op.FORWARD, Op.BACKWARD):
                done = [action.microbatch for action in actions if action.chunk == chunk and action.op is op]
                assert done == list(range(num_microbatches))


@relaxed
@given(pipelines)
def test_what_is_in_flight_is_what_memory_is_planned_for(pipeline: Pipeline) -> None:
    num_nodes, _, num_microbatches = pipeline
    for node, actions in enumerate(orders_of(*pipeline)):
        assert peak(actions) <= most_in_flight(node, *pipeline)
        if num_microbatches % num_nodes == 0:
            assert peak(actions) == most_in_flight(node, *pipeline)


@st.composite
def timed_pipelines(draw: st.DrawFn) -> tuple[Pipeline, PipelineTimes]:
    num_nodes, num_chunks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    times = draw(pipeline_times(max_stages=num_nodes * num_chunks, min_stages=num_nodes * num_chunks))
    return (num_nodes, num_chunks, draw(st.integers(1, 10))), times


@relaxed
@given(timed_pipelines())
def test_no_times_and_delays_let_a_node_wait_for_ever(case: tuple[Pipeline, PipelineTimes]) -> None:
    pipeline, times = case
    num_nodes, num_chunks, num_microbatches = pipeline
    orders = orders_of(*pipeline)
    timings = play_chunks(orders, times)
    ended: dict[tuple[Op, int, int], float] = {}
    for node, (order, starts, ends) in enumerate(zip(orders, timings.start_s_SA, timings.end_s_SA, strict=True)):
        assert len(ends) == len(order)
        # A node does one thing at a time, whatever chunk it is of.
        assert all(end_s <= start_s for end_s, start_s in zip(ends, starts[1:], strict=False))
        for action, end_s in zip(order, ends, strict=True):
            ended[action.op, action.chunk * num_nodes + node, action.microbatch] = end_s
    for microbatch in range(num_microbatches):
        way = [ended[Op.FORWARD, stage, microbatch] for stage in range(num_nodes * num_chunks)]
        way += [ended[Op.BACKWARD, stage, microbatch] for stage in reversed(range(num_nodes * num_chunks))]
        assert all(before <= after for before, after in pairwise(way))


@relaxed
@given(pipeline_times(), st.integers(1, 12))
def test_nodes_of_one_chunk_play_as_stages_do(times: PipelineTimes, num_microbatches: int) -> None:
    num_stages = times.num_stages
    plain = [stage_actions("1f1b", stage, num_stages, num_microbatches) for stage in range(num_stages)]
    chunked = play_chunks([tuple(ChunkAction(a.op, 0, a.microbatch) for a in order) for order in plain], times)
    assert chunked == play(plain, times)


@relaxed
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_the_bubble_is_that_of_1f1b_over_the_number_of_chunks(
    num_nodes: int, num_chunks: int, num_groups: int, forward: int, backward: int
) -> None:
    num_microbatches = num_groups * num_nodes
    # Of one chunk.
    part_s = float(forward + 2 * backward)
    times = timed_stages(
        num_nodes * num_chunks, float(forward), float(backward), float(backward), send_s=0.0, delay_s=0.0
    )
    step_s = play_chunks(orders_of(num_nodes, num_chunks, num_microbatches), times).step_s
    assert step_s - num_chunks * num_microbatches * part_s == (num_nodes - 1) * part_s


def test_orders_that_wait_for_each_other_are_refused() -> None:
    times = timed_stages(2, 1.0, 1.0, 1.0, send_s=0.0, delay_s=0.0)
    first = (ChunkAction(Op.BACKWARD, 0, 0), ChunkAction(Op.FORWARD, 0, 0))
    with pytest.raises(ScheduleError, match="node 0 waits for ever before B0 of its chunk 0"):
        play_chunks([first, node_actions(1, 2, 1, 1)], times)
