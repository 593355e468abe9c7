"""How 1F1B's fixed order lets a stretch of stages hold up the whole pipeline.

PURE. Stage s does its forward of microbatch m + S - s after its backward of m, and stage t its backward of m after its
forward of m + S - t - 1. So between the two, once a round trip, t - s + 1 microbatches go through: a long link in the
middle is hidden by few of them, however many stage 0 keeps in flight. Every cycle of waits that turns round at more
than two stages is made of such stretches, so none is slower than the slowest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.planner.problem import Floats


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Stages that a microbatch goes down and back in so long, and how many go through meanwhile."""

    first: int
    last: int
    seconds: float
    count: int


def slowest_stretch(
    trip_S: Floats, beyond_S: Floats, num_microbatches: int, pace_s: float
) -> tuple[float, Stretch | None]:
    """Return what a step of a chain under 1F1B takes at least beyond its first microbatch, and the slowest stretch.

    Where no stretch is slower than `pace_s`, the pace of the slowest stage or link: 0 and None. `trip_S` is a
    microbatch's time from its forward at a stage to the end of its backward there, `beyond_S` the part of that beyond
    the stage itself. Stretches down to the last stage are left out, since every schedule's windows have those.
    """
    num_stages, more_s, slowest = len(trip_S), 0.0, None
    for first in range(num_stages - 2):
        counts = np.arange(2, num_stages - first)
        seconds = trip_S[first] - beyond_S[first + 1 : num_stages - 1]
        # Its own warm-up is over before stage t waits for stage s.
        rounds = (num_microbatches - (num_stages - first + 1 - counts)) // counts
        held_up = (seconds > counts * pace_s) & (rounds > 0)
        if not held_up.any():
            continue
        rest = num_microbatches - 1 - rounds * counts
        more_s = max(more_s, float((rounds * seconds + rest * pace_s)[held_up].max()))
        at = int(np.argmax(np.where(held_up, seconds / counts, 0.0)))
        if slowest is None or seconds[at] / counts[at] > slowest.seconds / slowest.count:
            slowest = Stretch(first=first, last=first + 1 + at, seconds=float(seconds[at]), count=int(counts[at]))
    return more_s, slowest
