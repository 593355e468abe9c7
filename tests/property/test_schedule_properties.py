"""What holds of every schedule, number of stages and number of microbatches."""

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.play import play
from actors.schedule import SPLIT, Op, num_in_flight, peak_held, peak_in_flight, stage_actions
from actors.spec import ScheduleName
from tests.schedule_cases import pipeline_times, timed_stages

schedules = st.sampled_from(["gpipe", "1f1b", "zb-h1"])
pipelines = st.tuples(schedules, st.integers(1, 8), st.integers(1, 16))
Pipeline = tuple[ScheduleName, int, int]
# Machines that run tests are slow at times.
relaxed = settings(deadline=None)


@relaxed
@given(pipelines)
def test_each_microbatch_goes_forward_then_backward_once_in_order(pipeline: Pipeline) -> None:
    schedule, num_stages, num_microbatches = pipeline
    for stage in range(num_stages):
        actions = stage_actions(schedule, stage, num_stages, num_microbatches)
        kinds = (Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD) if schedule in SPLIT else (Op.FORWARD, Op.BACKWARD)
        for kind in kinds:
            assert [action.microbatch for action in actions if action.op is kind] == list(range(num_microbatches))
        assert len(actions) == len(kinds) * num_microbatches
        done: set[tuple[Op, int]] = set()
        for action in actions:
            before = kinds[: kinds.index(action.op)]
            assert all((kind, action.microbatch) in done for kind in before)
            done.add((action.op, action.microbatch))


@relaxed
@given(pipelines)
def test_the_peak_in_flight_is_what_memory_is_planned_for(pipeline: Pipeline) -> None:
    schedule, num_stages, num_microbatches = pipeline
    for stage in range(num_stages):
        actions = stage_actions(schedule, stage, num_stages, num_microbatches)
        assert peak_held(actions) == num_in_flight(schedule, stage, num_stages, num_microbatches)


@relaxed
@given(pipelines, st.randoms(use_true_random=False))
def test_all_stages_finish_though_each_waits_for_its_neighbours_and_mailboxes_are_small(
    pipeline: Pipeline, random
) -> None:
    """Stages run in any interleaving; a stage waits where its input is not there, a frame where its window is full."""
    schedule, num_stages, num_microbatches = pipeline
    left = [list(stage_actions(schedule, stage, num_stages, num_microbatches)) for stage in range(num_stages)]
    done: set[tuple[int, Op, int]] = set()

    def is_ready(stage: int) -> bool:
        action = left[stage][0]
        if action.op is Op.FORWARD:
            return stage == 0 or (stage - 1, Op.FORWARD, action.microbatch) in done
        if action.op is Op.WEIGHT_BACKWARD:
            return True
        return stage == num_stages - 1 or (stage + 1, action.op, action.microbatch) in done

    while any(left):
        ready = [stage for stage in range(num_stages) if left[stage] and is_ready(stage)]
        assert ready, f"all stages wait: {left}"
        stage = random.choice(ready)
        action = left[stage].pop(0)
        done.add((stage, action.op, action.microbatch))
        # What waits between two stages never exceeds the window that the receiver gives the sender.
        for sender in range(num_stages - 1):
            sent = sum((sender, Op.FORWARD, m) in done for m in range(num_microbatches))
            taken = sum((sender + 1, Op.FORWARD, m) in done for m in range(num_microbatches))
            assert sent - taken <= num_in_flight(schedule, sender, num_stages, num_microbatches)


@relaxed
@given(st.integers(1, 8), st.integers(1, 16))
def test_zb_h1_has_as_much_in_flight_as_1f1b_and_holds_no_more_than_its_first_stage(
    num_stages: int, num_microbatches: int
) -> None:
    for stage in range(num_stages):
        actions = stage_actions("zb-h1", stage, num_stages, num_microbatches)
        assert peak_in_flight(actions) == num_in_flight("1f1b", stage, num_stages, num_microbatches)
        assert peak_held(actions) == num_in_flight("1f1b", 0, num_stages, num_microbatches)


@relaxed
@given(schedules, pipeline_times(), st.integers(1, 12))
def test_no_times_and_delays_let_a_stage_wait_for_ever(schedule: ScheduleName, times, num_microbatches: int) -> None:
    orders = [stage_actions(schedule, s, times.num_stages, num_microbatches) for s in range(times.num_stages)]
    timings = play(orders, times)
    assert [len(ends) for ends in timings.end_s_SA] == [len(order) for order in orders]


@relaxed
@given(st.integers(1, 8), st.integers(0, 12), st.integers(1, 5), st.integers(0, 4), st.integers(0, 4))
def test_the_bubbles_are_those_of_the_papers(
    num_stages: int, num_more: int, weight: int, input_more: int, forward_more: int
) -> None:
    """Where no half takes longer than a forward or the other half, which is what the paper counts with."""
    num_microbatches = num_stages + num_more
    forward_s, input_s, weight_s = float(weight + forward_more), float(weight + input_more), float(weight)
    times = timed_stages(num_stages, forward_s, input_s, weight_s, send_s=0.0, delay_s=0.0)
    busy_s = num_microbatches * (forward_s + input_s + weight_s)

    def bubble_s(schedule: ScheduleName) -> float:
        orders = [stage_actions(schedule, stage, num_stages, num_microbatches) for stage in range(num_stages)]
        return play(orders, times).step_s - busy_s

    away = num_stages - 1
    assert bubble_s("1f1b") == bubble_s("gpipe") == away * (forward_s + input_s + weight_s)
    assert bubble_s("zb-h1") == away * (forward_s + input_s - weight_s)
