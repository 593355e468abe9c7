"""What a stage does in one step, in order.

PURE. A schedule is a list of actions for each stage; the same list drives the node and the simulator. In every schedule
forwards run in microbatch order, and so do backwards; where the backward is split, so does each of its halves. So the
gradients of weights, which backwards or their second halves add up, are summed in the order of a plain loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from actors.errors import ScheduleError
from actors.spec import ScheduleName


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
    arXiv 2006.09503): warm-up, then one forward and one backward in turn, then cool-down. Raises ScheduleError for the
    others, which depend on times: see actors.list_schedule.
    """
    warmup = num_in_flight(schedule, stage, num_stages, num_microbatches)
    forwards = [Action(Op.FORWARD, m) for m in range(num_microbatches)]
    backwards = [Action(Op.BACKWARD, m) for m in range(num_microbatches)]
    steady = [action for pair in zip(backwards, forwards[warmup:], strict=False) for action in pair]
    cooldown = backwards[num_microbatches - warmup :]
    return (*forwards[:warmup], *steady, *cooldown)


def num_in_flight(schedule: ScheduleName, stage: int, num_stages: int, num_microbatches: int) -> int:
    """Return how many microbatches' activations `stage` holds at the peak; ScheduleError as stage_actions."""
    if schedule not in ("gpipe", "1f1b"):
        raise ScheduleError(
            f"the schedule {schedule} has no order of its own: what a stage does depends on what arrives",
            "set plan.schedule to 1f1b or gpipe for a fixed order",
        )
    return num_microbatches if schedule == "gpipe" else min(num_stages - stage, num_microbatches)


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
