"""What holds of every schedule, number of stages and number of microbatches."""

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.schedule import Op, num_in_flight, stage_actions
from actors.spec import ScheduleName

schedules = st.sampled_from(["gpipe", "1f1b"])
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
        forwards = [action.microbatch for action in actions if action.op is Op.FORWARD]
        backwards = [action.microbatch for action in actions if action.op is Op.BACKWARD]
        assert forwards == backwards == list(range(num_microbatches))
        done: set[int] = set()
        for action in actions:
            assert action.op is Op.FORWARD or action.microbatch in done
            done.add(action.microbatch)


@relaxed
@given(pipelines)
def test_the_peak_in_flight_is_what_memory_is_planned_for(pipeline: Pipeline) -> None:
    schedule, num_stages, num_microbatches = pipeline
    for stage in range(num_stages):
        in_flight = peak = 0
        for action in stage_actions(schedule, stage, num_stages, num_microbatches):
            in_flight += 1 if action.op is Op.FORWARD else -1
            peak = max(peak, in_flight)
        assert peak == num_in_flight(schedule, stage, num_stages, num_microbatches)
        assert in_flight == 0


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
        return stage == num_stages - 1 or (stage + 1, Op.BACKWARD, action.microbatch) in done

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
