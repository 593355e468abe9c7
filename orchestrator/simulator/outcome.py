"""What a long run is judged by: its rules, and what it came to.

PURE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from actors.errors import UserError
from orchestrator.simulator.step import StepSimulation

EventName = Literal["placed", "node_lost", "node_joined", "healed", "moved", "waiting", "stopped"]

Recovery = Literal["rollback", "step", "microbatches"]


@dataclass(frozen=True, kw_only=True)
class RunRules:
    """What an interruption costs, and how the run answers; by default as the runtime is today."""

    # Until a lost node is noticed; to place, probe and plan anew; what a node reads of a checkpoint a second.
    notice_s: float = 15.0
    restart_s: float = 30.0
    load_mbps: float = 1000.0
    # Steps from one checkpoint to the next, and how long one is in writing, beside training, before it is whole.
    checkpoint_steps: int = 100
    checkpoint_write_s: float = 30.0
    # Today, a rollback. Else a stage goes on with the replicas that are left: the step in flight is run again; or it
    # goes on, and they do again those microbatches of it that the lost node had done.
    recovery: Recovery = "rollback"
    # How often at most a run takes in what has come by planning anew between two steps; today only when it is placed
    # anew: inf.
    replan_every_s: float = math.inf
    # Whether nodes cost while they are there, or only while the run has a use for them.
    pays_idle: bool = True
    # Up to so many nodes every placement is simulated; of a larger one, what a loss changes is estimated.
    exact_nodes: int = 256

    def __post_init__(self) -> None:
        values = (self.notice_s, self.restart_s, self.checkpoint_write_s)
        if min(values) < 0 or not all(map(math.isfinite, values)) or not self.load_mbps > 0 or self.replan_every_s <= 0:
            raise UserError("a time of the run's rules is negative or not finite", "set each to 0 or more")
        if self.checkpoint_steps < 1:
            raise UserError(f"checkpoint_steps is {self.checkpoint_steps}", "set it to 1 or more")


@dataclass(frozen=True, kw_only=True)
class RunPoint:
    """How things stand from a moment on."""

    time_s: float
    nodes_here: int
    nodes_used: int
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something that happened, at a step."""

    time_s: float
    step: int
    name: EventName
    text: str


@dataclass(frozen=True, kw_only=True)
class RunStretch:
    """Steps that followed one another undisturbed; a later stretch from an earlier step takes them back."""

    first_step: int
    num_steps: int
    begin_s: float
    step_s: float
    # What had been paid when it began, and what is paid from then on.
    dollars: float
    dollars_per_s: float
    nodes_used: int


@dataclass(frozen=True, kw_only=True)
class RunSimulation:
    """What a run came to."""

    duration_s: float
    steps: int
    # Of the steps that count at the end.
    tokens: int
    dollars: float
    # Done and thrown away: whole steps, and the time of those and of steps in flight; time in which nothing ran.
    lost_steps: int
    lost_s: float
    down_s: float
    losses: int
    replans: int
    # How often the runtime would have given up (guard.max_rebuilds) and been started again.
    stops: int
    points: tuple[RunPoint, ...]
    events: tuple[RunEvent, ...]
    stretches: tuple[RunStretch, ...]
    # The step of the last placement that ran, for its timeline; None where none ever did.
    last_step: StepSimulation | None

    @property
    def tokens_per_s(self) -> float:
        """Goodput: useful tokens over all of the time."""
        return self.tokens / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def dollars_per_mtoken(self) -> float:
        return self.dollars * 1e6 / self.tokens if self.tokens else math.inf
