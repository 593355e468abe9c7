"""What a stage does in one step, in order.

PURE. A schedule is a list of actions for each stage; the same list drives the node and the simulator. In every schedule
forwards and backwards each run in microbatch order, so gradients are summed in the order of a plain loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from actors.spec import ScheduleName


class Op(Enum):
    """One kind of action."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True)
class Action:
    """Run `op` of one microbatch."""

    op: Op
    microbatch: int


def stage_actions(schedule: ScheduleName, stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Return what `stage` does in one step.

    GPipe (Huang et al., arXiv 1811.06965): all forwards, then all backwards. 1F1B (PipeDream-flush, Narayanan et al.,
    arXiv 2006.09503): warm-up, then one forward and one backward in turn, then cool-down.
    """
    warmup = num_in_flight(schedule, stage, num_stages, num_microbatches)
    forwards = [Action(Op.FORWARD, m) for m in range(num_microbatches)]
    backwards = [Action(Op.BACKWARD, m) for m in range(num_microbatches)]
    steady = [action for pair in zip(backwards, forwards[warmup:], strict=False) for action in pair]
    cooldown = backwards[num_microbatches - warmup :]
    return (*forwards[:warmup], *steady, *cooldown)


def num_in_flight(schedule: ScheduleName, stage: int, num_stages: int, num_microbatches: int) -> int:
    """Return how many microbatches' activations `stage` holds at the peak."""
    return num_microbatches if schedule == "gpipe" else min(num_stages - stage, num_microbatches)
