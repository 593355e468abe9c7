"""What holds a placement back: the stage, link, place pair or round trip that sets its pace.

PURE.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

import numpy as np

from orchestrator.planner.evaluate import Evaluation, compute_s, round_trips
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.stretches import slowest_stretch

# How much a thing's own time may fall short of the pace and still be what sets it.
_CLOSE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What binds: a stage's compute, the link from a stage to the next, or the round trip from a stage to a later one.

    A round trip binds because only `count` microbatches go through in one.
    """

    kind: Literal["stage", "link", "round trip"]
    stage: int
    last: int
    count: int
    # What it alone would take for a microbatch.
    seconds: float


def what_binds(problem: Problem, placement: Placement, found: Evaluation) -> Binding:
    """Return what sets the pace of a placement."""
    if found.rate < (1 - _CLOSE) / found.pace_s:
        return _slowest_trip(problem, placement, found)
    stage_s = [
        1 / sum(1 / compute_s(problem, node, *placement.bounds[stage : stage + 2]) for node in nodes)
        for stage, nodes in enumerate(placement.nodes)
    ]
    slowest = max(range(len(stage_s)), key=stage_s.__getitem__)
    link_s = [_link_s(problem, placement, stage) for stage in range(placement.num_stages - 1)]
    # Where no stage explains the pace, a way that several flows share does. GPipe's pace is of two phases, so there the
    # links themselves decide.
    is_explained = problem.schedule == "gpipe" or stage_s[slowest] >= found.pace_s * (1 - _CLOSE)
    if link_s and (max(link_s) > stage_s[slowest] or not is_explained):
        thinnest = max(range(len(link_s)), key=link_s.__getitem__)
        return Binding(kind="link", stage=thinnest, last=thinnest + 1, count=1, seconds=link_s[thinnest])
    return Binding(kind="stage", stage=slowest, last=slowest, count=1, seconds=stage_s[slowest])


def _slowest_trip(problem: Problem, placement: Placement, found: Evaluation) -> Binding:
    """Return the round trip in which the fewest microbatches a second go through."""
    stages = zip(pairwise(placement.bounds), placement.nodes, strict=True)
    total_SR = [[compute_s(problem, node, *span) for node in nodes] for span, nodes in stages]
    trip_S, beyond_S = round_trips(problem, placement, total_SR)
    held = [
        sum(min(pair) for pair in zip(*stage, strict=True))
        for stage in zip(found.in_flight_SR, found.shares_S, strict=True)
    ]
    stage = min(range(placement.num_stages), key=lambda s: held[s] / trip_S[s])
    last = placement.num_stages - 1
    if problem.schedule == "1f1b" and len(placement.used) == placement.num_stages:
        pace_s = max(found.pace_s, trip_S[stage] / held[stage])
        _, stretch = slowest_stretch(np.array(trip_S), np.array(beyond_S), problem.num_microbatches, pace_s)
        if stretch is not None:
            return Binding(
                kind="round trip",
                stage=stretch.first,
                last=stretch.last,
                count=stretch.count,
                seconds=stretch.seconds,
            )
    return Binding(kind="round trip", stage=stage, last=last, count=held[stage], seconds=trip_S[stage])


def _link_s(problem: Problem, placement: Placement, stage: int) -> float:
    """Return how long a microbatch keeps the link to the next stage busy, in its busier direction, on the best pair.

    With what the pair of places shares among all flows of the pipeline counted in.
    """
    byte_s_PP = np.maximum(problem.byte_s_PP, 1 / problem.shared_bytes_per_s_PP)

    def busy_s(source: int, target: int) -> float:
        p, q = problem.place_N[source], problem.place_N[target]
        down, up = problem.forward_bytes_L[stage] * byte_s_PP[p, q], problem.backward_bytes_L[stage] * byte_s_PP[q, p]
        return float(max(down, up))

    return min(busy_s(*pair) for pair in product(placement.nodes[stage], placement.nodes[stage + 1]))
