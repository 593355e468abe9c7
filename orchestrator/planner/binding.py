"""What holds a placement back: the stage, link, way or round trip that sets its pace.

PURE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

import numpy as np

from orchestrator.planner.evaluate import Evaluation, LinkUse, compute_s, dealt, round_trips
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.stretches import slowest_stretch

# How much a thing's own time may fall short of the pace and still be what sets it.
_CLOSE = 1e-6
# With more links than this between replicas, what places share is not looked at.
_MOST_LINKS = 100_000


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What binds, and at which stage.

    A stage's compute; the link from it to the next, between `nodes`; a node's own way out or in, all neighbours
    counted; what two places share; or the round trip from the stage to a `last` one, in which only `count` microbatches
    go through.
    """

    kind: Literal["stage", "link", "uplink", "downlink", "shared way", "round trip"]
    stage: int
    # What it alone would take for a microbatch.
    seconds: float
    nodes: tuple[int, ...]
    last: int = -1
    count: int = 1


def what_binds(problem: Problem, placement: Placement, found: Evaluation) -> Binding:
    """Return what sets the pace of a placement."""
    if found.rate < (1 - _CLOSE) / found.pace_s:
        return _slowest_trip(problem, placement, found)
    # The first of equals: what computes before what carries.
    return max(_candidates(problem, placement), key=lambda one: one.seconds * (1 + _CLOSE * (one.kind == "stage")))


def _candidates(problem: Problem, placement: Placement) -> Iterator[Binding]:
    """Yield all that a microbatch keeps busy, each with its seconds."""
    use = LinkUse(problem, placement, True, True)
    busy_SR: list[list[float]] = []
    for stage, nodes in enumerate(placement.nodes):
        seconds = [compute_s(problem, node, *placement.bounds[stage : stage + 2]) for node in nodes]
        yield Binding(kind="stage", stage=stage, seconds=1 / sum(1 / s for s in seconds), nodes=nodes)
        own = [use.own_s(stage, node) for node in nodes]
        busy_SR.append([max(pair) for pair in zip(seconds, own, strict=True)])
        slowest = max(range(len(nodes)), key=own.__getitem__)
        if own[slowest] > seconds[slowest]:
            sent_s, _ = use.ways_s(stage, nodes[slowest])
            together_s = 1 / sum(1 / s for s in busy_SR[-1])
            kind = "uplink" if sent_s == own[slowest] else "downlink"
            yield Binding(kind=kind, stage=stage, seconds=together_s, nodes=(nodes[slowest],))
    for stage, pair in enumerate(pairwise(placement.nodes)):
        # Replicas share the link by their speeds; what is left of it is the best pair's.
        source, target = min(product(*pair), key=lambda ends: use.edge_s(stage, *ends))
        yield Binding(kind="link", stage=stage, seconds=use.edge_s(stage, source, target), nodes=(source, target))
    is_shared = bool(np.isfinite(problem.shared_bytes_per_s_PP).any())
    num_links = sum(len(here) * len(there) for here, there in pairwise(placement.nodes))
    if is_shared and 0 < num_links <= _MOST_LINKS:
        fractions = dealt(placement, busy_SR)
        seconds_PP = use.shared_s_PP(fractions)
        p, q = np.unravel_index(int(seconds_PP.argmax()), seconds_PP.shape)
        for stage, source, target, _ in fractions:
            if {int(problem.place_N[source]), int(problem.place_N[target])} == {int(p), int(q)}:
                seconds = float(seconds_PP[p, q])
                yield Binding(kind="shared way", stage=stage, seconds=seconds, nodes=(source, target))
                break


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
    if problem.schedule in ("1f1b", "zb-h1") and len(placement.used) == placement.num_stages:
        pace_s = max(found.pace_s, trip_S[stage] / held[stage])
        _, stretch = slowest_stretch(np.array(trip_S), np.array(beyond_S), problem.num_microbatches, pace_s)
        if stretch is not None:
            return Binding(
                kind="round trip",
                stage=stretch.first,
                last=stretch.last,
                count=stretch.count,
                seconds=stretch.seconds,
                nodes=placement.nodes[stretch.first],
            )
    return Binding(
        kind="round trip",
        stage=stage,
        last=last,
        count=held[stage],
        seconds=trip_S[stage],
        nodes=placement.nodes[stage],
    )
