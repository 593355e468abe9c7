"""What holds of every schedule, those for long delays among them, whatever stages and links take."""

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.list_schedule import Limits, ListScheduleName, bandwidth_delay_limits, list_schedule, make_orders
from actors.play import PipelineTimes, Timings, play
from actors.schedule import SPLIT, Action, Op, peak_held, peak_in_flight
from actors.spec import ScheduleName
from tests.schedule_cases import LIST_SCHEDULES, SCHEDULES, pipeline_times

# Machines that run tests are slow at times.
relaxed = settings(deadline=None, max_examples=60)
microbatches = st.integers(1, 10)


@relaxed
@given(SCHEDULES, pipeline_times(), microbatches)
def test_each_stage_does_all_of_every_microbatch_once_each_kind_in_microbatch_order(
    schedule: ScheduleName, times: PipelineTimes, num_microbatches: int
) -> None:
    """So weight gradients, which B and W make, are summed in the order of a plain loop."""
    for order in make_orders(schedule, times, num_microbatches):
        kinds = "FIW" if schedule in SPLIT else "FB"
        for kind in kinds:
            assert [a.microbatch for a in order if a.op.value == kind] == list(range(num_microbatches))
        assert len(order) == len(kinds) * num_microbatches
        place = {(action.op.value, action.microbatch): n for n, action in enumerate(order)}
        for microbatch in range(num_microbatches):
            places = [place[kind, microbatch] for kind in kinds]
            assert places == sorted(places)


@relaxed
@given(SCHEDULES, pipeline_times(), microbatches, st.randoms(use_true_random=False))
def test_stages_that_block_until_their_input_is_there_all_finish(
    schedule: ScheduleName, times: PipelineTimes, num_microbatches: int, random
) -> None:
    """Whatever the true speeds turn out to be: stages go on in any interleaving."""
    left = [list(order) for order in make_orders(schedule, times, num_microbatches)]
    # (stage, what has come to it, microbatch)
    arrived = {(0, "activation", m) for m in range(num_microbatches)}

    def needs(stage: int, action: Action) -> tuple[int, str, int] | None:
        if action.op is Op.WEIGHT_BACKWARD:
            return None
        return stage, "activation" if action.op is Op.FORWARD else "gradient", action.microbatch

    while any(left):
        ready = [s for s, actions in enumerate(left) if actions and needs(s, actions[0]) in {None, *arrived}]
        assert ready, f"all stages wait: {left}"
        stage = random.choice(ready)
        action = left[stage].pop(0)
        if action.op is Op.FORWARD:
            is_last = stage + 1 == len(left)
            arrived.add(
                (stage, "gradient", action.microbatch) if is_last else (stage + 1, "activation", action.microbatch)
            )
        elif action.op is not Op.WEIGHT_BACKWARD:
            arrived.add((stage - 1, "gradient", action.microbatch))


@st.composite
def limited(draw: st.DrawFn) -> tuple[ListScheduleName, PipelineTimes, int, Limits]:
    schedule, times, num_microbatches = draw(LIST_SCHEDULES), draw(pipeline_times()), draw(microbatches)
    counts = st.lists(st.integers(1, num_microbatches), min_size=times.num_stages, max_size=times.num_stages)
    return schedule, times, num_microbatches, Limits(in_flight_S=tuple(draw(counts)), held_S=tuple(draw(counts)))


@relaxed
@given(limited())
def test_limits_hold_at_every_moment_and_the_counts_are_those_of_the_timings(case) -> None:
    schedule, times, num_microbatches, limits = case
    found = list_schedule(schedule, times, num_microbatches, limits)
    for stage, order in enumerate(found.orders):
        in_flight = _most_at_once(order, found.timings, stage, (Op.BACKWARD, Op.INPUT_BACKWARD))
        held = _most_at_once(order, found.timings, stage, (Op.BACKWARD, Op.WEIGHT_BACKWARD))
        assert in_flight == peak_in_flight(order) <= limits.in_flight_S[stage]
        assert held == peak_held(order) <= limits.held_S[stage]


def _most_at_once(order, timings: Timings, stage: int, last: tuple[Op, ...]) -> int:
    """Return how many microbatches at most are at one moment between their forward's start and the last's end."""
    # Actions that take no time still come one after another, so moments are told apart by place, then by time.
    starts = {a.microbatch: n for n, a in enumerate(order) if a.op is Op.FORWARD}
    ends = {a.microbatch: n for n, a in enumerate(order) if a.op in last}
    for microbatch, n in ends.items():
        assert timings.start_s_SA[stage][starts[microbatch]] <= timings.end_s_SA[stage][n]
    return max(sum(starts[m] <= n <= ends[m] for m in starts) for n in range(len(order)))


@relaxed
@given(limited())
def test_the_scheduler_foresees_what_playing_its_orders_gives(case) -> None:
    schedule, times, num_microbatches, limits = case
    found = list_schedule(schedule, times, num_microbatches, limits)
    assert play(found.orders, times) == found.timings


@relaxed
@given(SCHEDULES, pipeline_times(), microbatches)
def test_a_stage_does_one_thing_at_a_time_and_only_with_what_has_reached_it(
    schedule: ScheduleName, times: PipelineTimes, num_microbatches: int
) -> None:
    orders = make_orders(schedule, times, num_microbatches)
    timings = play(orders, times)
    begins: dict[tuple[int, str, int], float] = {}
    ends: dict[tuple[int, str, int], float] = {}
    for stage, order in enumerate(orders):
        free_s = 0.0
        for n, action in enumerate(order):
            start_s, end_s = timings.start_s_SA[stage][n], timings.end_s_SA[stage][n]
            assert start_s >= free_s
            assert end_s == start_s + times.action_s(stage, action.op)
            free_s = end_s
            kind = "B" if action.op is Op.INPUT_BACKWARD else action.op.value
            begins[stage, kind, action.microbatch], ends[stage, kind, action.microbatch] = start_s, end_s
    for link in range(times.num_stages - 1):
        for m in range(num_microbatches):
            # Of what was sent before, each frame holds the link for its send time.
            for first in range(m + 1):
                down_s = (m - first + 1) * times.send_down_s_L[link] + times.delay_down_s_L[link]
                assert begins[link + 1, "F", m] >= ends[link, "F", first] + down_s - 1e-9
                up_s = (m - first + 1) * times.send_up_s_L[link] + times.delay_up_s_L[link]
                assert begins[link, "B", m] >= ends[link + 1, "B", first] + up_s - 1e-9
    assert timings.step_s >= num_microbatches * max(times.stage_s(s) for s in range(times.num_stages)) - 1e-9


@relaxed
@given(LIST_SCHEDULES, pipeline_times(), microbatches, st.data())
def test_windows_stay_within_memory_and_microbatches_and_hold_at_least_what_is_in_flight(
    schedule: ListScheduleName, times: PipelineTimes, num_microbatches: int, data: st.DataObject
) -> None:
    room_S = tuple(data.draw(st.integers(1, 12)) for _ in range(times.num_stages))
    limits = bandwidth_delay_limits(schedule, times, num_microbatches, room_S)
    for in_flight, held, room in zip(limits.in_flight_S, limits.held_S, room_S, strict=True):
        assert 1 <= in_flight <= held <= min(room, num_microbatches)
        assert schedule == "bdp-split" or held == in_flight
