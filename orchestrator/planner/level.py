"""Local search that levels stages: nodes move and swap until the slowest stage is as fast as it gets.

PURE. Leximin: a change must leave both stages it touches faster than the slower of them was, so that the sorted rates
of all stages only grow and the search ends.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from orchestrator.planner.problem import Floats

Counts = NDArray[np.int64]

# A gain smaller than this part of the stage's rate is rounding.
_LEAST_GAIN = 1e-9
# Up to so many nodes a stage, trades of two for one are tried: with more, single ones are fine enough.
_FEW = 48


@njit(cache=True)
def level(rate_NS: Floats, stage_N: Counts, least: int, most: int, goal: float, changes: int) -> int:
    """Change `stage_N` until every stage does `goal`, no change helps, or `changes` were made; return how many were.

    rate_NS is what each node does in each stage, microbatches a second, 0 where it may not be; stage_N is each node's
    stage, -1 where it has none. A stage keeps `least` nodes and takes up to `most`. First one node moves or two swap;
    where that helps no more, one is swapped for two.
    """
    num_nodes, num_stages = rate_NS.shape
    total_S = np.zeros(num_stages)
    count_S = np.zeros(num_stages, np.int64)
    for node in range(num_nodes):
        if stage_N[node] >= 0:
            total_S[stage_N[node]] += rate_NS[node, stage_N[node]]
            count_S[stage_N[node]] += 1
    made = 0
    joins, leaves = np.empty(2, np.int64), np.empty(2, np.int64)
    while made < changes:
        order = np.argsort(total_S)
        found = False
        for depth in range(2):
            for low in order:
                if total_S[low] >= goal:
                    break
                if depth == 0:
                    joins[0], leaves[0] = _best_change(rate_NS, stage_N, total_S, count_S, low, least, most)
                    joins[1], leaves[1] = -1, -1
                elif count_S[low] <= _FEW:
                    _best_trade(rate_NS, stage_N, total_S, count_S, low, least, most, joins, leaves)
                else:
                    continue
                if joins[0] < 0:
                    continue
                other = int(stage_N[joins[0]])
                for node in joins:
                    if node >= 0:
                        _move(rate_NS, stage_N, total_S, count_S, int(node), int(low))
                for node in leaves:
                    if node >= 0:
                        _move(rate_NS, stage_N, total_S, count_S, int(node), other)
                found = True
                break
            if found:
                break
        if not found:
            break
        made += 1
    return made


@njit(cache=True)
def _move(rate_NS: Floats, stage_N: Counts, total_S: Floats, count_S: Counts, node: int, stage: int) -> None:
    if stage_N[node] >= 0:
        total_S[stage_N[node]] -= rate_NS[node, stage_N[node]]
        count_S[stage_N[node]] -= 1
    if stage >= 0:
        total_S[stage] += rate_NS[node, stage]
        count_S[stage] += 1
    stage_N[node] = stage


@njit(cache=True)
def _best_trade(
    rate_NS: Floats,
    stage_N: Counts,
    total_S: Floats,
    count_S: Counts,
    low: int,
    least: int,
    most: int,
    joins: Counts,
    leaves: Counts,
) -> None:
    """Set the nodes that should change places, two of the one stage for one of the other; joins[0] is -1 for none."""
    joins[:] = -1
    leaves[:] = -1
    best = total_S[low] * (1 + _LEAST_GAIN)
    ours = np.flatnonzero(stage_N == low)
    for other in range(rate_NS.shape[1]):
        if other == low or count_S[other] > _FEW or total_S[other] <= best:
            continue
        theirs = np.flatnonzero((stage_N == other) & (rate_NS[:, low] > 0.0))
        backs = ours[rate_NS[ours, other] > 0.0]
        for way in range(2):
            # Way 0: one joins and two leave; way 1: two join and one leaves.
            single, pairs = (theirs, backs) if way == 0 else (backs, theirs)
            if (way == 0 and count_S[low] - 1 < least) or (way == 1 and count_S[other] - 1 < least):
                continue
            if (way == 0 and count_S[other] + 1 > most) or (way == 1 and count_S[low] + 1 > most):
                continue
            sign = 1.0 if way == 0 else -1.0
            for one in single:
                for at in range(len(pairs)):
                    for more in range(at):
                        two, three = pairs[at], pairs[more]
                        gain = sign * (rate_NS[one, low] - rate_NS[two, low] - rate_NS[three, low])
                        loss = sign * (rate_NS[one, other] - rate_NS[two, other] - rate_NS[three, other])
                        worst = min(total_S[low] + gain, total_S[other] - loss)
                        if worst > best:
                            best = worst
                            if way == 0:
                                joins[0], joins[1], leaves[0], leaves[1] = one, -1, two, three
                            else:
                                joins[0], joins[1], leaves[0], leaves[1] = two, three, one, -1


@njit(cache=True)
def _best_change(
    rate_NS: Floats, stage_N: Counts, total_S: Floats, count_S: Counts, low: int, least: int, most: int
) -> tuple[int, int]:
    """Return the node that should join the stage and the one that should leave it for the other's, -1 for none."""
    num_nodes = len(stage_N)
    members = np.empty(count_S[low], np.int64)
    size = 0
    for node in range(num_nodes):
        if stage_N[node] == low:
            members[size] = node
            size += 1
    best = total_S[low] * (1 + _LEAST_GAIN)
    joins, leaves = -1, -1
    for node in range(num_nodes):
        other = stage_N[node]
        if other == low or rate_NS[node, low] <= 0.0:
            continue
        ours = total_S[low] + rate_NS[node, low]
        theirs = np.inf if other < 0 else total_S[other] - rate_NS[node, other]
        if count_S[low] < most and (other < 0 or count_S[other] > least) and min(ours, theirs) > best:
            best = min(ours, theirs)
            joins, leaves = node, -1
        for at in range(size):
            member = members[at]
            if other >= 0 and rate_NS[member, other] <= 0.0:
                continue
            back = np.inf if other < 0 else theirs + rate_NS[member, other]
            worst = min(ours - rate_NS[member, low], back)
            if worst > best:
                best = worst
                joins, leaves = node, member
    return joins, leaves
