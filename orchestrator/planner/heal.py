"""Placements after nodes were lost: the same with others in their place, and small repairs of large ones.

PURE. A stage that lost all its nodes gets a spare one or another stage's replica, or its layers go to its neighbours,
whichever costs least. In a large fleet one node more or less changes little: it is worth only a look at the stages
that are slowest and fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.search import Searcher

# How many spare nodes are tried for a stage, the fastest first, and how many stages to take a replica from.
_MOST_SPARES, _MOST_DONORS = 64, 8
# In a large fleet: spare nodes, slowest stages and fastest stages that are looked at.
_FEW_SPARES, _FEW_STAGES = 2, 3


def renumbered(placement: Placement, index_of: Mapping[int, int]) -> Placement:
    """Return a placement in the indices of another fleet; nodes that have none there are lost, and leave gaps."""
    nodes = tuple(tuple(index_of[node] for node in stage if node in index_of) for stage in placement.nodes)
    return Placement(bounds=placement.bounds, nodes=nodes)


def spare_nodes(problem: Problem, placement: Placement) -> list[int]:
    """Return the nodes that hold nothing, the fastest first."""
    used = set(placement.used)
    return [int(node) for node in np.argsort(problem.layer_s_N, kind="stable") if int(node) not in used]


def healed(problem: Problem, limits: Limits, searcher: Searcher, damaged: Placement) -> Placement | None:
    """Return the placement with every stage held by someone; None where no node is left."""
    if not damaged.used:
        return None
    while any(not nodes for nodes in damaged.nodes):
        stage = next(s for s, nodes in enumerate(damaged.nodes) if not nodes)
        ways = list(_ways_to_heal(problem, limits, damaged, stage))
        costs = [searcher.offer(_closed(way)) for way in ways]
        damaged = ways[int(np.argmin(costs))]
    return damaged


def _ways_to_heal(problem: Problem, limits: Limits, damaged: Placement, stage: int) -> Iterator[Placement]:
    for node in spare_nodes(problem, damaged)[:_MOST_SPARES]:
        yield _with_nodes(damaged, {stage: (node,)})
    rich = [s for s, nodes in enumerate(damaged.nodes) if len(nodes) > max(1, limits.min_copies)]
    for donor in sorted(rich, key=lambda s: (-len(damaged.nodes[s]), s))[:_MOST_DONORS]:
        node = damaged.nodes[donor][-1]
        yield _with_nodes(damaged, {stage: (node,), donor: damaged.nodes[donor][:-1]})
    # Or its layers go to the stages before and behind, cut anywhere.
    start, stop = damaged.bounds[stage : stage + 2]
    if stage == 0:
        starts = [(0, *damaged.bounds[2:])]
    elif stage == damaged.num_stages - 1:
        starts = [(*damaged.bounds[:stage], problem.num_layers)]
    else:
        ways = range(start, stop + 1)
        starts = [(*damaged.bounds[:stage], cut, *damaged.bounds[stage + 2 :]) for cut in ways]
    nodes = damaged.nodes[:stage] + damaged.nodes[stage + 1 :]
    for bounds in starts:
        yield Placement(bounds=bounds, nodes=nodes)


def _closed(placement: Placement) -> Placement:
    """Return the placement with the layers of stages that nobody holds added to the stage before, or the first one."""
    held = [s for s, nodes in enumerate(placement.nodes) if nodes]
    bounds = (0, *(placement.bounds[s] for s in held[1:]), placement.bounds[-1])
    return Placement(bounds=bounds, nodes=tuple(placement.nodes[s] for s in held))


def _with_nodes(placement: Placement, changed: Mapping[int, tuple[int, ...]]) -> Placement:
    nodes = tuple(changed.get(stage, nodes) for stage, nodes in enumerate(placement.nodes))
    return Placement(bounds=placement.bounds, nodes=nodes)


def touch_up(problem: Problem, limits: Limits, searcher: Searcher, placement: Placement, evaluations: int) -> Placement:
    """Return a large placement after some repairs, each the best of a few: one node more where it is slow."""
    cost, used = searcher.offer(placement), 1
    while used < evaluations:
        ways = list(_small_repairs(problem, limits, searcher, placement))[: evaluations - used]
        costs = [searcher.offer(way) for way in ways]
        used += len(ways)
        if not costs or min(costs) >= cost:
            break
        cost, placement = min(costs), ways[int(np.argmin(costs))]
        used += 1
        searcher.offer(placement)
    return placement


def _small_repairs(problem: Problem, limits: Limits, searcher: Searcher, placement: Placement) -> Iterator[Placement]:
    """Yield what may help; the searcher's last evaluation must be of this placement."""
    order: list[int] = np.argsort(searcher.scratch.stage_s_S[: placement.num_stages], kind="stable").tolist()
    slow = [s for s in reversed(order) if len(placement.nodes[s]) < limits.max_replicas][:_FEW_STAGES]
    for node in spare_nodes(problem, placement)[:_FEW_SPARES]:
        for stage in slow:
            yield _with_nodes(placement, {stage: (*placement.nodes[stage], node)})
    rich = [s for s in order if len(placement.nodes[s]) > max(1, limits.min_copies)][:_FEW_STAGES]
    for stage in slow[:1]:
        near = set(problem.place_N[list(placement.nodes[stage])].tolist())
        for donor in rich:
            if donor == stage:
                continue
            # One that stands where the stage has others already, if there is one.
            given = placement.nodes[donor]
            node = next((n for n in given if int(problem.place_N[n]) in near), given[-1])
            left = tuple(other for other in given if other != node)
            yield _with_nodes(placement, {stage: (*placement.nodes[stage], node), donor: left})
