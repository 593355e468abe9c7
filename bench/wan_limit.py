"""What a case allows when everything overlaps, and how a run compares with it.

PURE: tau is the compute period of the slowest stage, t_f and t_b a frame's bytes over its link's rate each way, M
microbatches. A step then takes the way of the first microbatch down and up all stages and links, and M - 1 periods of
whatever is slowest:

    sum of stage times + sum over links of (t_f + t_b + round trip) + (M - 1) max(tau, every t_f, every t_b)

No order is shorter where the last stage is the slowest, as where all are alike: it waits for the way down and is waited
for on the way up. Behind a slower stage in the middle, work of those after it may hide in part, so a step may come out
a little below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    """A link as a frame sees it, in seconds."""

    forward_s: float
    backward_s: float
    round_trip_s: float


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The shortest step that a schedule allows, and what it is made of."""

    step_s: float
    period_s: float
    # "compute", or which link, where frames are slower than any stage.
    binds: str


def link_times(frame_bytes: tuple[float, float], rate_mbps: float, delay_s: float) -> LinkTimes:
    """Return a frame's times each way; `rate_mbps` 0 is unlimited."""
    forward_s, backward_s = (8e-6 * size / rate_mbps if rate_mbps else 0.0 for size in frame_bytes)
    return LinkTimes(forward_s=forward_s, backward_s=backward_s, round_trip_s=2 * delay_s)


def step_limit(stage_s: Sequence[float], links: Sequence[LinkTimes], num_microbatches: int) -> Limit:
    """Return the limit of stages that take `stage_s` for a microbatch's forward and backward together."""
    periods = [(max(stage_s), "compute")]
    periods += [(max(link.forward_s, link.backward_s), f"link {i} -> {i + 1}") for i, link in enumerate(links)]
    period_s, binds = max(periods, key=lambda pair: pair[0])
    way_s = sum(stage_s) + sum(link.forward_s + link.backward_s + link.round_trip_s for link in links)
    return Limit(step_s=way_s + (num_microbatches - 1) * period_s, period_s=period_s, binds=binds)
