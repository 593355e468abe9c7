"""Annealing of groups: which nodes share a stage, with chains and the order of stages found exactly for each candidate.

PURE. Two stages are joined by the matching of their nodes whose worst hop is least (bottleneck assignment), and stages
are put in order by dynamic programming over subsets (Held and Karp, 1962): the inner problems of DT-FM (arXiv
2206.01288). Where every pair of nodes differs this sees gains that no single exchange of seats shows. Seats are counted
as in `grid_moves`.
"""

from __future__ import annotations

import math

import numpy as np

from orchestrator.planner.compiled import inner, outer
from orchestrator.planner.draws import draw_below, draw_share
from orchestrator.planner.grid_moves import LEAST_GAIN_S, Cooling, Floats, Ints, Links, Stream, copy_nodes, sync_s

# The table of subsets has 2^S * S entries.
MOST_ORDERED = 12
# How often a second pair of nodes changes groups with the first.
_SECOND_PAIR = 0.3
# Moves between two updates of temperature and blur.
_PERIOD = 32


def anneal_groups(
    links: Links,
    node_N: Ints,
    num_stages: int,
    num_replicas: int,
    cooling: Cooling,
    length: int,
    limit: int,
    stream: Stream,
) -> Ints:
    """Return the seating of the best groups met, in order and matched, as nodes by seat; for MOST_ORDERED stages.

    A run of `length` moves that ends after `limit` of them, so that a shorter run is the start of a longer one.
    """
    best_N = node_N.copy()
    _anneal(
        links.pair_s_2NN,
        node_N.copy(),
        best_N,
        np.zeros((2, num_stages)),
        np.zeros((2, num_stages, num_stages)),
        np.zeros((1 << num_stages, num_stages)),
        np.zeros((3, num_replicas), np.int64),
        np.zeros(num_replicas),
        cooling,
        length,
        limit,
        stream,
    )
    return seat_groups(links, best_N, num_stages, num_replicas)


def seat_groups(links: Links, node_N: Ints, num_stages: int, num_replicas: int) -> Ints:
    """Return the best seating of the same groups: stages in their best order, nodes in their best chains.

    More stages than MOST_ORDERED stay in the order they have.
    """
    seated_N, match_3R, reach_R = node_N.copy(), np.zeros((3, num_replicas), np.int64), np.zeros(num_replicas)
    if num_stages <= MOST_ORDERED:
        join_SS = np.zeros((num_stages, num_stages))
        path_MS = np.zeros((1 << num_stages, num_stages))
        _order(links.pair_s_2NN, node_N, seated_N, join_SS, path_MS, match_3R, reach_R)
    _match_all(links.pair_s_2NN, seated_N, seated_N.copy(), num_stages, match_3R, reach_R)
    return seated_N


@outer
def _anneal(
    pair_s_2NN: Floats,
    node_N: Ints,
    best_N: Ints,
    most_2S: Floats,
    join_2SS: Floats,
    path_MS: Floats,
    match_3R: Ints,
    reach_R: Floats,
    cooling: Cooling,
    length: int,
    limit: int,
    stream: Stream,
) -> None:
    """Leave the best groups met in `best_N`; of sync and joins, 0 are those tried and 1 those last accepted."""
    num_stages, num_replicas = path_MS.shape[1], reach_R.size
    for s in range(num_stages):
        _cost_stage(pair_s_2NN, node_N, most_2S, join_2SS, s, match_3R, reach_R)
    _copy_costs(most_2S, join_2SS, 0, 1)
    cost_s, mean_s = _cost(most_2S, join_2SS, path_MS)
    best_s, current_s = cost_s, 0.0
    temperature_s, blur = cooling.hot_s, cooling.first_blur
    for step in range(limit):
        if step % _PERIOD == 0:
            share = step / length
            temperature_s = cooling.hot_s * (cooling.cold_s / cooling.hot_s) ** share
            blur = cooling.first_blur * (cooling.last_blur / cooling.first_blur) ** share
            current_s = (1 - blur) * cost_s + blur * mean_s
        allowed_s = current_s - temperature_s * math.log(1.0 - draw_share(stream))
        seat, other = draw_below(stream, num_stages * num_replicas), draw_below(stream, node_N.size)
        stage, other_stage = seat // num_replicas, other // num_replicas
        if stage == other_stage:
            continue
        is_seated = other_stage < num_stages
        second, other_second = seat, seat
        if is_seated and draw_share(stream) < _SECOND_PAIR:
            second = stage * num_replicas + draw_below(stream, num_replicas)
            other_second = other_stage * num_replicas + draw_below(stream, num_replicas)
        _swap(node_N, seat, other)
        _swap(node_N, second, other_second)
        _cost_stage(pair_s_2NN, node_N, most_2S, join_2SS, stage, match_3R, reach_R)
        if is_seated:
            _cost_stage(pair_s_2NN, node_N, most_2S, join_2SS, other_stage, match_3R, reach_R)
        new_cost_s, new_mean_s = _cost(most_2S, join_2SS, path_MS)
        blurred_s = (1 - blur) * new_cost_s + blur * new_mean_s
        if blurred_s <= allowed_s:
            cost_s, mean_s, current_s = new_cost_s, new_mean_s, blurred_s
            _copy_costs(most_2S, join_2SS, 0, 1)
            if cost_s < best_s - LEAST_GAIN_S:
                best_s = cost_s
                copy_nodes(node_N, best_N)
        else:
            _swap(node_N, second, other_second)
            _swap(node_N, seat, other)
            _copy_costs(most_2S, join_2SS, 1, 0)


@outer
def _order(
    pair_s_2NN: Floats,
    node_N: Ints,
    seated_N: Ints,
    join_SS: Floats,
    path_MS: Floats,
    match_3R: Ints,
    reach_R: Floats,
) -> None:
    """Seat the stages of `node_N` in their best order, in `seated_N`."""
    num_stages, num_replicas = path_MS.shape[1], reach_R.size
    for s in range(num_stages):
        for t in range(s):
            join_SS[s, t] = join_SS[t, s] = _match(pair_s_2NN, node_N, s, t, match_3R, reach_R)
    _shortest_path(join_SS, path_MS)
    mask, after = (1 << num_stages) - 1, -1
    for place in range(num_stages - 1, -1, -1):
        stage, least_s = -1, math.inf
        for s in range(num_stages):
            if mask >> s & 1:
                path_s = path_MS[mask, s] + (join_SS[s, after] if after >= 0 else 0.0)
                if path_s < least_s:
                    stage, least_s = s, path_s
        for r in range(num_replicas):
            seated_N[place * num_replicas + r] = node_N[stage * num_replicas + r]
        mask, after = mask & ~(1 << stage), stage


@outer
def _match_all(pair_s_2NN: Floats, node_N: Ints, old_N: Ints, num_stages: int, match_3R: Ints, reach_R: Floats) -> None:
    """Seat each stage's nodes anew so that each hop's slowest is fastest; `old_N` is a second `node_N`."""
    num_replicas = reach_R.size
    for s in range(1, num_stages):
        _match(pair_s_2NN, node_N, s - 1, s, match_3R, reach_R)
        for r in range(num_replicas):
            node_N[s * num_replicas + match_3R[0, r]] = old_N[s * num_replicas + r]
        for r in range(num_replicas):
            old_N[s * num_replicas + r] = node_N[s * num_replicas + r]


@inner
def _swap(node_N: Ints, a: int, b: int) -> None:
    node = node_N[a]
    node_N[a] = node_N[b]
    node_N[b] = node


@inner
def _copy_costs(most_2S: Floats, join_2SS: Floats, source: int, target: int) -> None:
    for s in range(most_2S.shape[1]):
        most_2S[target, s] = most_2S[source, s]
        for t in range(most_2S.shape[1]):
            join_2SS[target, s, t] = join_2SS[source, s, t]


@inner
def _cost_stage(
    pair_s_2NN: Floats,
    node_N: Ints,
    most_2S: Floats,
    join_2SS: Floats,
    stage: int,
    match_3R: Ints,
    reach_R: Floats,
) -> None:
    """Form the slowest sync of a stage, and its joins with all others."""
    most_s = 0.0
    for r in range(reach_R.size):
        most_s = max(most_s, sync_s(pair_s_2NN, node_N, stage, reach_R.size, r))
    most_2S[0, stage] = most_s
    for s in range(most_2S.shape[1]):
        if s != stage:
            join_s = _match(pair_s_2NN, node_N, stage, s, match_3R, reach_R)
            join_2SS[0, stage, s] = join_s
            join_2SS[0, s, stage] = join_s


@inner
def _match(pair_s_2NN: Floats, node_N: Ints, left: int, right: int, match_3R: Ints, reach_R: Floats) -> float:
    """Match the nodes of two stages so that the worst hop is least; return it.

    Each left node in turn takes the chain of reassignments whose worst hop is least, found as a shortest path is.
    `match_3R` becomes the left replica of each right one, and, for a chain, whence each was reached and whether for
    good.
    """
    num_replicas = reach_R.size
    # No matching can do better than the worst of the nodes' nearest.
    worst_s = 0.0
    for r in range(num_replicas):
        node = node_N[left * num_replicas + r]
        least_s = math.inf
        for q in range(num_replicas):
            least_s = min(least_s, pair_s_2NN[1, node, node_N[right * num_replicas + q]])
        worst_s = max(worst_s, least_s)
        match_3R[0, r] = -1
    for r in range(num_replicas):
        node = node_N[left * num_replicas + r]
        end = -1
        for q in range(num_replicas):
            reach_R[q] = max(worst_s, pair_s_2NN[1, node, node_N[right * num_replicas + q]])
            match_3R[1, q], match_3R[2, q] = -1, 0
            if match_3R[0, q] < 0 and reach_R[q] <= worst_s:
                end = q
                break
        while end < 0:
            near = -1
            for q in range(num_replicas):
                if match_3R[2, q] == 0 and (near < 0 or reach_R[q] < reach_R[near]):
                    near = q
            if match_3R[0, near] < 0:
                end = near
                break
            match_3R[2, near] = 1
            other = node_N[left * num_replicas + match_3R[0, near]]
            for q in range(num_replicas):
                reach_s = max(reach_R[near], pair_s_2NN[1, other, node_N[right * num_replicas + q]])
                if match_3R[2, q] == 0 and reach_s < reach_R[q]:
                    reach_R[q] = reach_s
                    match_3R[1, q] = near
        worst_s = reach_R[end]
        while match_3R[1, end] >= 0:
            match_3R[0, end] = match_3R[0, match_3R[1, end]]
            end = match_3R[1, end]
        match_3R[0, end] = r
    return worst_s


@inner
def _shortest_path(join_SS: Floats, path_MS: Floats) -> float:
    """Return the shortest path over all stages; `path_MS[mask, s]` becomes that over `mask` that ends at s."""
    num_stages = path_MS.shape[1]
    for mask in range(1, 1 << num_stages):
        for s in range(num_stages):
            rest = mask & ~(1 << s)
            if rest == mask:
                continue
            least_s = 0.0 if rest == 0 else math.inf
            for t in range(num_stages):
                if rest >> t & 1:
                    least_s = min(least_s, path_MS[rest, t] + join_SS[t, s])
            path_MS[mask, s] = least_s
    least_s = math.inf
    for s in range(num_stages):
        least_s = min(least_s, path_MS[(1 << num_stages) - 1, s])
    return least_s


@inner
def _cost(most_2S: Floats, join_2SS: Floats, path_MS: Floats) -> tuple[float, float]:
    """Return the cost, and the same with means over stages and over pairs of them."""
    num_stages = most_2S.shape[1]
    slowest_s, mean_s = 0.0, 0.0
    for s in range(num_stages):
        slowest_s = max(slowest_s, most_2S[0, s])
        mean_s += most_2S[0, s] / num_stages
        for t in range(s):
            # S - 1 hops, each the mean of S * (S - 1) / 2 pairs.
            mean_s += join_2SS[0, s, t] * 2 / num_stages
    return slowest_s + _shortest_path(join_2SS[0], path_MS), mean_s
