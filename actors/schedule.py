"""What a stage does in one step, in order.

PURE. A schedule is a list of actions for each stage; the same list drives the node and the simulator. In every schedule
forwards run in microbatch order, and so do backwards; where the backward is split, so does each of its halves. So the
gradients of weights, which backwards or their second halves add up, are summed in the order of a plain loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from actors.errors import ScheduleError
from actors.spec import ScheduleName

# The schedules whose stages know their order before the step begins, and those whose backwards come in halves.
FIXED: Final = frozenset[ScheduleName](("gpipe", "1f1b", "zb-h1"))
SPLIT: Final = frozenset[ScheduleName](("zb-h1", "bdp-split"))


class Op(Enum):
    """One kind of action.

    A backward may be split (zero bubble, Qi et al., arXiv 2401.10241): its first half makes the gradient that the stage
    before waits for, its second half the gradients of the weights, for which nobody waits.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_BACKWARD = "I"
    WEIGHT_BACKWARD = "W"


@dataclass(frozen=True)
class Action:
    """Run `op` of one microbatch."""

    op: Op
    microbatch: int


def stage_actions(schedule: ScheduleName, stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Return what `stage` does in one step.

    GPipe (Huang et al., arXiv 1811.06965): all forwards, then all backwards. 1F1B (PipeDream-flush, Narayanan et al.,
    arXiv 2006.09503): warm-up, then one forward and one backward in turn, then cool-down. ZB-H1 (Qi et al., arXiv
    2401.10241): 1F1B with the backward split, and the second halves of stage s put off by s microbatches: as many more
    activations as this holds, the earlier stages hold in flight, and the s halves left at the end fill the time in
    which a 1F1B stage waits for the gradient to go on to stage 0. Raises ScheduleError for the others, which depend on
    times: see actors.list_schedule.
    """
    _require_fixed(schedule)
    if schedule == "zb-h1":
        return _zb_h1(stage, num_stages, num_microbatches)
    warmup = num_in_flight(schedule, stage, num_stages, num_microbatches)
    forwards = [Action(Op.FORWARD, m) for m in range(num_microbatches)]
    backwards = [Action(Op.BACKWARD, m) for m in range(num_microbatches)]
    steady = [action for pair in zip(backwards, forwards[warmup:], strict=False) for action in pair]
    cooldown = backwards[num_microbatches - warmup :]
    return (*forwards[:warmup], *steady, *cooldown)


def num_in_flight(schedule: ScheduleName, stage: int, num_stages: int, num_microbatches: int) -> int:
    """Return how many microbatches' activations `stage` holds at the peak; ScheduleError as stage_actions.

    All of them under GPipe, S - s under 1F1B; under ZB-H1 S at every stage, in flight or for a half put off.
    """
    _require_fixed(schedule)
    held = {"gpipe": num_microbatches, "zb-h1": num_stages}.get(schedule, num_stages - stage)
    return min(held, num_microbatches)


def _require_fixed(schedule: ScheduleName) -> None:
    if schedule not in FIXED:
        raise ScheduleError(
            f"the schedule {schedule} has no order of its own: what a stage does depends on what arrives",
            "set plan.schedule to 1f1b, zb-h1 or gpipe for a fixed order",
        )


def _zb_h1(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    warmup = min(num_stages - stage, num_microbatches)
    actions = [Action(Op.FORWARD, m) for m in range(warmup)]
    for m in range(num_microbatches):
        actions.append(Action(Op.INPUT_BACKWARD, m))
        if m >= stage:
            actions.append(Action(Op.WEIGHT_BACKWARD, m - stage))
        if warmup + m < num_microbatches:
            actions.append(Action(Op.FORWARD, warmup + m))
    left = range(max(0, num_microbatches - stage), num_microbatches)
    return (*actions, *(Action(Op.WEIGHT_BACKWARD, m) for m in left))


def peak_held(actions: Iterable[Action]) -> int:
    """Return how many microbatches' activations a stage holds at most that runs these actions, in this order.

    A microbatch is held from its forward to the end of its backward, or of its second half: on the high side, for the
    first half lets go of some activations.
    """
    held = peak = 0
    for action in actions:
        held += action.op is Op.FORWARD
        peak = max(peak, held)
        held -= action.op in (Op.BACKWARD, Op.WEIGHT_BACKWARD)
    return peak


def peak_in_flight(actions: Iterable[Action]) -> int:
    """Return how many microbatches are at most between forward and the end of the backward, or of its first half."""
    in_flight = peak = 0
    for action in actions:
        in_flight += action.op is Op.FORWARD
        peak = max(peak, in_flight)
        in_flight -= action.op in (Op.BACKWARD, Op.INPUT_BACKWARD)
    return peak
