"""What holds a placement back: the stage, link, place pair or round trip that sets its pace.

PURE.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from orchestrator.planner.evaluate import Evaluation, compute_s
from orchestrator.planner.problem import Placement, Problem

# How much a thing's own time may fall short of the pace and still be what sets it.
_CLOSE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What binds: a stage's compute, the link from a stage to the next, or the round trip from a stage and back."""

    kind: Literal["stage", "link", "round trip"]
    stage: int
    # What it alone would take for a microbatch.
    seconds: float


def what_binds(problem: Problem, placement: Placement, found: Evaluation) -> Binding:
    """Return what sets the pace of a placement."""
    if found.rate < (1 - _CLOSE) / found.pace_s:
        held = [
            sum(min(window, share) for share in split)
            for window, split in zip(found.in_flight_S, found.shares_S, strict=True)
        ]
        # The first stage's trip is the whole pipeline's, and every later one is part of it.
        stage = min(range(placement.num_stages), key=lambda s: held[s] / _trip_s(problem, placement, found, s))
        return Binding(kind="round trip", stage=stage, seconds=_trip_s(problem, placement, found, stage))
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
        return Binding(kind="link", stage=thinnest, seconds=link_s[thinnest])
    return Binding(kind="stage", stage=slowest, seconds=stage_s[slowest])


def _trip_s(problem: Problem, placement: Placement, found: Evaluation, stage: int) -> float:
    """Return a microbatch's time from its forward at a stage to its backward there, by the slowest replicas."""
    total_s = 0.0
    for later in range(stage, placement.num_stages):
        span = placement.bounds[later : later + 2]
        total_s += max(compute_s(problem, node, *span) for node in placement.nodes[later])
        if later + 1 < placement.num_stages:
            total_s += max(
                _pair_s(problem, later, a, b) for a in placement.nodes[later] for b in placement.nodes[later + 1]
            )
    return total_s


def _pair_s(problem: Problem, stage: int, source: int, target: int) -> float:
    p, q = problem.place_N[source], problem.place_N[target]
    frames_s = problem.forward_bytes_L[stage] * problem.byte_s_PP[p, q]
    frames_s += problem.backward_bytes_L[stage] * problem.byte_s_PP[q, p]
    return float(problem.delay_s_PP[p, q] + problem.delay_s_PP[q, p] + frames_s)


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
