"""What it takes to go from one placement to another: which node fetches which layers, from whom, and for how long.

PURE. A layer's weights and moments come from the node that sends them fastest of those that hold it, or from where
checkpoints are where none does. A node sends and takes one thing after the other: on the high side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.planner.problem import Placement, Problem


@dataclass(frozen=True, kw_only=True)
class StateSizes:
    """What a stage's weights and moments take where they are moved; gradients are not."""

    layer_bytes: float
    first_bytes: float
    last_bytes: float
    # Seconds a byte from where checkpoints are, for what no node holds any more; inf where there is no such place.
    store_byte_s: float


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Layers [start, stop) that a node fetches from another; `source` is None where they come from a checkpoint."""

    node: int
    source: int | None
    start: int
    stop: int
    size_bytes: float


@dataclass(frozen=True, kw_only=True)
class Migration:
    """All that is to be moved, and how long it takes until the last has it; infinity where something is lost."""

    fetches: tuple[Fetch, ...] = ()
    size_bytes: float = 0.0
    transfer_s: float = 0.0


def migration(problem: Problem, old: Placement | None, new: Placement, sizes: StateSizes) -> Migration:
    """Return what nodes must fetch to hold `new`, having what they hold in `old` (nodes that are gone left out)."""
    had = _intervals(old)
    fetches = list[Fetch]()
    for nodes, start, stop in _stages(new):
        for node in nodes:
            before = had.get(node, (0, 0))
            if before != (start, stop):
                fetches.extend(_fetches(problem, old, sizes, node, (start, stop), before))
    busy_s = defaultdict[tuple[int, str], float](float)
    for fetch in fetches:
        seconds = fetch.size_bytes * _byte_s(problem, fetch, sizes)
        if fetch.source is not None:
            delay_s = problem.delay_s_PP[problem.place_N[fetch.source], problem.place_N[fetch.node]]
            seconds += float(delay_s)
            busy_s[fetch.source, "out"] += seconds
        busy_s[fetch.node, "in"] += seconds
    return Migration(
        fetches=tuple(fetches),
        size_bytes=sum(fetch.size_bytes for fetch in fetches),
        transfer_s=max(busy_s.values(), default=0.0),
    )


def _stages(placement: Placement) -> list[tuple[tuple[int, ...], int, int]]:
    return list(zip(placement.nodes, placement.bounds[:-1], placement.bounds[1:], strict=True))


def _intervals(placement: Placement | None) -> dict[int, tuple[int, int]]:
    if placement is None:
        return {}
    return {node: (start, stop) for nodes, start, stop in _stages(placement) for node in nodes}


def _fetches(
    problem: Problem,
    old: Placement | None,
    sizes: StateSizes,
    node: int,
    wanted: tuple[int, int],
    before: tuple[int, int],
) -> list[Fetch]:
    """Return what one node fetches, a run of layers from one source after the other."""
    runs = list[Fetch]()
    for layer in range(*wanted):
        size = _size(problem, sizes, layer, wanted, before)
        if size == 0.0:
            continue
        source = _best_source(problem, old, node, layer)
        last = runs[-1] if runs else None
        if last is not None and last.source == source and last.stop == layer:
            runs[-1] = Fetch(
                node=node, source=source, start=last.start, stop=layer + 1, size_bytes=last.size_bytes + size
            )
        else:
            runs.append(Fetch(node=node, source=source, start=layer, stop=layer + 1, size_bytes=size))
    return runs


def _size(problem: Problem, sizes: StateSizes, layer: int, wanted: tuple[int, int], before: tuple[int, int]) -> float:
    """Return what of a layer, and of the end that goes with it, a node lacks."""
    if before[0] <= layer < before[1]:
        return 0.0
    size = sizes.layer_bytes
    if layer == 0:
        size += sizes.first_bytes
    if layer == problem.num_layers - 1:
        size += sizes.last_bytes
    return size


def _best_source(problem: Problem, old: Placement | None, node: int, layer: int) -> int | None:
    """Return who sends a layer fastest, the first of equals; None where nobody holds it."""
    if old is None:
        return None
    holders: Sequence[int] = next((nodes for nodes, start, stop in _stages(old) if start <= layer < stop), ())
    if not holders:
        return None
    who = np.array(holders)
    byte_s = np.maximum(problem.byte_s_PP[problem.place_N[who], problem.place_N[node]], problem.uplink_byte_s_N[who])
    return int(who[int(np.argmin(byte_s))])


def _byte_s(problem: Problem, fetch: Fetch, sizes: StateSizes) -> float:
    down_s = float(problem.downlink_byte_s_N[fetch.node])
    if fetch.source is None:
        return max(down_s, sizes.store_byte_s)
    between_s = problem.byte_s_PP[problem.place_N[fetch.source], problem.place_N[fetch.node]]
    return max(down_s, float(between_s), float(problem.uplink_byte_s_N[fetch.source]))


def expected_life_s(hazard_per_hour: Sequence[float]) -> float:
    """Return how long it takes on average until the first of these nodes is lost; lives are exponential."""
    total = sum(hazard_per_hour)
    return 3600 / total if total > 0 else math.inf
