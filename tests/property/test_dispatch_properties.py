"""Whatever arrives when, a stage does everything once, in order, within its memory, and never sticks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dispatch import Dispatch
from actors.list_schedule import Limits, dispatched
from actors.play import PipelineTimes
from actors.schedule import Action, Op, peak_held


@given(
    st.sampled_from(["bdp", "bdp-split"]), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.booleans()
)
def test_any_arrivals_are_dealt_with(schedule, num_microbatches: int, in_flight: int, seed: int, is_last: bool) -> None:
    chance = random.Random(seed)
    dispatch = Dispatch(schedule, num_microbatches, in_flight)
    activations, gradients, done = 0, 0, list[Action]()
    while not dispatch.is_done:
        forwards = sum(action.op is Op.FORWARD for action in done)
        forward, backward = dispatch.wanted_activation, dispatch.wanted_gradient
        has_gradient = backward is not None and (is_last or backward < gradients)
        action = dispatch.next(has_activation=forward is not None and forward < activations, has_gradient=has_gradient)
        if action is not None:
            done.append(action)
            continue
        # It must wait: for something that can come.
        assert forward is not None or (backward is not None and not is_last)
        coming = [kind for kind, wanted in (("a", forward), ("g", None if is_last else backward)) if wanted is not None]
        if chance.choice(coming) == "a":
            activations = chance.randint(activations, num_microbatches)
        else:
            gradients = chance.randint(gradients, forwards)
    assert peak_held(done) <= in_flight
    ops = [Op.FORWARD, Op.BACKWARD] if schedule == "bdp" else [Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD]
    for op in ops:
        assert [action.microbatch for action in done if action.op is op] == list(range(num_microbatches))
    assert len(done) == len(ops) * num_microbatches


@given(st.sampled_from(["bdp", "bdp-split"]), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32))
def test_what_is_foreseen_is_what_stages_come_to(schedule, num_microbatches: int, num_stages: int, seed: int) -> None:
    # Draws of a continuum, for of two things that arrive at one moment either may be known first.
    chance = random.Random(seed)

    def draw(count: int, most: float) -> tuple[float, ...]:
        return tuple(chance.uniform(0.01, most) for _ in range(count))

    stages, links = [draw(num_stages, 2.0) for _ in range(3)], [draw(num_stages - 1, 3.0) for _ in range(4)]
    times = PipelineTimes(
        forward_s_S=stages[0],
        input_backward_s_S=stages[1],
        weight_backward_s_S=stages[2],
        send_down_s_L=links[0],
        delay_down_s_L=links[1],
        send_up_s_L=links[2],
        delay_up_s_L=links[3],
    )
    in_flight = tuple(chance.randint(1, num_microbatches) for _ in range(num_stages))
    found = dispatched(schedule, times, num_microbatches, Limits(in_flight_S=in_flight, held_S=in_flight))
    # Each stage, told at its own times what had arrived by then, picks the same.
    for stage, (order, starts) in enumerate(zip(found.orders, found.timings.start_s_SA, strict=True)):
        dispatch = Dispatch(schedule, num_microbatches, in_flight[stage])
        for action, start_s in zip(order, starts, strict=True):
            forward, backward = dispatch.wanted_activation, dispatch.wanted_gradient
            arrived = [
                wanted is not None and _arrival_s(found, times, stage, op, wanted) <= start_s
                for op, wanted in ((Op.FORWARD, forward), (Op.BACKWARD, backward))
            ]
            assert dispatch.next(has_activation=arrived[0], has_gradient=arrived[1]) == action
        assert dispatch.is_done


def _arrival_s(found, times: PipelineTimes, stage: int, op: Op, microbatch: int) -> float:
    """When what a forward or backward needs is there, by the ends of the neighbours' actions; links are queues."""
    is_forward = op is Op.FORWARD
    source = stage - 1 if is_forward else stage + 1
    if source < 0:
        return 0.0
    if source == len(found.orders):
        source, sends, delay_s = stage, False, 0.0
    else:
        sends, link = True, min(source, stage)
        send_s = (times.send_down_s_L if is_forward else times.send_up_s_L)[link]
        delay_s = (times.delay_down_s_L if is_forward else times.delay_up_s_L)[link]
    wanted = (Op.FORWARD,) if is_forward or not sends else (Op.BACKWARD, Op.INPUT_BACKWARD)
    free_s = 0.0
    for action, end_s in zip(found.orders[source], found.timings.end_s_SA[source], strict=True):
        if action.op in wanted:
            free_s = max(free_s, end_s) + send_s if sends else end_s
            if action.microbatch == microbatch:
                return free_s + delay_s
    raise AssertionError("it never arrives")


def test_an_activation_goes_before_a_gradient_and_weights_wait_for_both() -> None:
    dispatch = Dispatch("bdp-split", 3, 2)
    both = {"has_activation": True, "has_gradient": True}
    taken = [dispatch.next(**both) for _ in range(3)]
    # Two are held, so a third forward must wait for the weights of the first.
    assert taken == [Action(Op.FORWARD, 0), Action(Op.FORWARD, 1), Action(Op.INPUT_BACKWARD, 0)]
    assert dispatch.wanted_activation is None
    assert dispatch.next(has_activation=True, has_gradient=False) == Action(Op.WEIGHT_BACKWARD, 0)
    assert dispatch.next(**both) == Action(Op.FORWARD, 2)
    with pytest.raises(AssertionError, match="nothing would ever run"):
        Dispatch("bdp", 3, 0)
