"""What a stage's time goes into, and how much of it.

PURE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Cause(Enum):
    """What a stage's time goes into; the value is its name for people, the order that of a table."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHTS = "weight gradients"
    COMMIT = "commit"
    # Interleaved: its node runs another of its stages, or waits in one.
    TURN = "node's other stages"
    BUBBLE = "fill and drain"
    SLOWER = "slower stage"
    IN_FLIGHT = "few in flight"
    CODEC = "encode, decode"
    BUSY = "link busy"
    DELAY = "link delay"
    WINDOW = "window full"
    ROOM = "no room at peer"
    DRIVER = "driver"
    OTHER = "other"


# A stage, or the (source, target) of a link, or nothing.
Place = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a stage's time: why, where what it waited for was going on, and how long."""

    cause: Cause
    place: Place
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """All of a stage's time in some steps; the parts add up to it."""

    stage: int
    num_steps: int
    parts: tuple[Part, ...]
    # How many stages its node has: each has a part of what the node lost.
    num_on_node: int = 1

    @property
    def total_s(self) -> float:
        return math.fsum(part.seconds for part in self.parts)

    def seconds(self, *causes: Cause) -> float:
        """Return what went into these causes, wherever it was."""
        return math.fsum(part.seconds for part in self.parts if part.cause in causes)

    def share(self, *causes: Cause) -> float:
        """Return the same as a share of all; 0 where there is nothing."""
        total_s = self.total_s
        return self.seconds(*causes) / total_s if total_s > 0 else 0.0

    def node_share(self, *causes: Cause) -> float:
        """Return the same of the node, as if its other stages were as this one: over all stages the mean is right."""
        return self.num_on_node * self.share(*causes)
