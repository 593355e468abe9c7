"""Which consecutive layers each node holds, where frames may go from any node to any that goes on where it ends.

PURE. The rate of such a placement is a maximum flow, as in Helix (Mei et al. 2025), which asks a solver of integer
programs for the best; here simulated annealing (Kirkpatrick et al. 1983) from many starts changes a few intervals at a
time. It is bounded by evaluations and seeded: the same problem, seed and bound give the same placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from orchestrator.planner.draws import draw_share
from orchestrator.planner.flow import Floats, FlowWorkspace, Ints, flow_workspace, max_flow_into
from orchestrator.planner.interval_problem import IntervalProblem, layers_rate

State = NDArray[np.uint64]

# One start may take this share of the evaluations, and all first starts together that share; the rest of them
# continue from the best placement so far.
_RUN_SHARE, _EXPLORE_SHARE = 0.02, 0.7
# A start is given up that no frame passes after this share of its evaluations.
_HOPELESS_SHARE = 0.125
# Of the rate's bound: the first temperature is drawn between these, lower where a placement is continued; the last.
_HOT_LOW, _HOT_HIGH, _CONTINUED, _COLD = 0.005, 0.03, 0.5, 0.0005
# What the layers' smoothed rate counts beside the flow: drawn between the first two, then falling to the last.
_SMOOTH_LOW, _SMOOTH_HIGH, _SMOOTH_LAST = 0.3, 1.0, 0.02
# Moves, as shares: take another node's interval, exchange the two, shift boundaries, snap to two boundaries, any
# interval, reorder two stretches of layers, split an interval; the rest join two.
_COPY, _SWAP, _SHIFT, _SNAP, _ANY, _REORDER, _SPLIT = 0.20, 0.20, 0.20, 0.15, 0.05, 0.10, 0.05
# Nearer to the bound than this part is there.
_CLOSE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Node n holds the layers [starts[n], stops[n]); `rate` is the flow, in the problem's unit."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    rate: float
    num_evaluations: int


class _Scratch(NamedTuple):
    first_node_L: Ints
    next_node_N: Ints
    tails_E: Ints
    heads_E: Ints
    capacities_E: Floats
    no_flows: Floats
    flow: FlowWorkspace
    change_L: Floats
    order_N: Ints
    stage_rate_N: Floats


def interval_problem(num_layers: int, rates_NK: Floats, links_PP: Floats) -> IntervalProblem:
    """Return the problem of these rates and links, checked; raises ValueError where they contradict one another."""
    num_nodes = len(rates_NK)
    if num_layers < 1 or num_nodes < 1:
        raise ValueError("a placement takes at least one layer and one node")
    if rates_NK.ndim != 2 or links_PP.shape != (num_nodes + 2, num_nodes + 2):
        raise ValueError("rates are by node and count of layers, links by node, with the source and the sink last")
    rates_NK = np.array(rates_NK[:, : num_layers + 1], np.float64)
    links_PP = np.array(links_PP, np.float64)
    if not (np.isfinite(rates_NK).all() and (rates_NK >= 0.0).all() and (links_PP >= 0.0).all()):
        raise ValueError("rates are finite and not negative, links not negative")
    counts_K: Ints = np.arange(rates_NK.shape[1], dtype=np.int32)
    longest_N = np.where(rates_NK > 0.0, counts_K, 0).max(axis=1).astype(np.int32)
    if (longest_N == 0).any():
        raise ValueError(f"node {int(longest_N.argmin())} passes nothing, however few layers it holds")
    return IntervalProblem(num_layers, rates_NK, longest_N, links_PP)


def work_bound(problem: IntervalProblem) -> float:
    """Return a rate that no placement exceeds: at rate T a node gives at most max_k k * min(rate(k), T) layers a
    second, and T frames a second need T times all layers; links are left out.

    The largest such T, found from above, where each try bounds the next.
    """
    if int(problem.longest_N.sum()) < problem.num_layers:
        return 0.0
    counts_K: Ints = np.arange(problem.rates_NK.shape[1], dtype=np.int32)
    bound, tried = float(problem.rates_NK.sum()), np.inf
    while bound < tried * (1.0 - 1e-15):
        tried = bound
        bound = float((counts_K * np.minimum(problem.rates_NK, tried)).max(axis=1).sum()) / problem.num_layers
    return min(bound, tried)


def placement_rate(problem: IntervalProblem, starts: tuple[int, ...], stops: tuple[int, ...]) -> float:
    """Return the frames a second that pass this placement; raises ValueError where a node cannot hold its interval."""
    start_N, stop_N = np.array(starts, np.int32), np.array(stops, np.int32)
    if start_N.shape != problem.longest_N.shape or stop_N.shape != problem.longest_N.shape:
        raise ValueError("each node needs one interval")
    if (start_N < 0).any() or (stop_N <= start_N).any() or (stop_N > problem.num_layers).any():
        raise ValueError("an interval ends after it starts, within the layers")
    if (stop_N - start_N > problem.longest_N).any():
        raise ValueError("a node holds no more layers than it can")
    return _rate(problem, start_N, stop_N, _scratch(problem))


def search_intervals(problem: IntervalProblem, *, seed: int, max_evaluations: int) -> Placement:
    """Return the best placement found in so many evaluations; fewer where it reaches `work_bound`.

    Its rate is 0 where none was found that passes anything. Raises ValueError where `max_evaluations` is not positive.
    """
    if max_evaluations < 1:
        raise ValueError("a search takes at least one evaluation")
    state = np.array([seed % 2**64], np.uint64)
    start_N, stop_N = np.zeros_like(problem.longest_N), np.ones_like(problem.longest_N)
    rate, num_evaluations, bound = 0.0, 0, work_bound(problem)
    if bound > 0.0:
        rate, num_evaluations = _search(problem, state, max_evaluations, bound, _scratch(problem), start_N, stop_N)
    return Placement(
        starts=tuple(start_N.tolist()), stops=tuple(stop_N.tolist()), rate=rate, num_evaluations=num_evaluations
    )


def _scratch(problem: IntervalProblem) -> _Scratch:
    num_nodes = len(problem.longest_N)
    most_edges = num_nodes + int(np.count_nonzero(problem.links_PP))
    return _Scratch(
        np.empty(problem.num_layers + 1, np.int32),
        np.empty(num_nodes, np.int32),
        np.empty(most_edges, np.int32),
        np.empty(most_edges, np.int32),
        np.empty(most_edges, np.float64),
        np.empty(0, np.float64),
        flow_workspace(2 * num_nodes + 2, most_edges),
        np.empty(problem.num_layers + 1, np.float64),
        np.empty(num_nodes, np.int32),
        np.empty(num_nodes, np.float64),
    )


# Assigning a slice would do for the next, but takes seconds to compile, as do numpy's reductions.
@njit(cache=True)
def _copy(from_N: Ints, to_N: Ints) -> None:
    for node in range(len(from_N)):
        to_N[node] = from_N[node]


@njit(cache=True)
def _rate(problem: IntervalProblem, start_N: Ints, stop_N: Ints, scratch: _Scratch) -> float:
    """Return the maximum flow: node n is the edge from vertex 2n to 2n + 1, then come the source and the sink."""
    first_node_L, next_node_N, tails_E, heads_E, capacities_E, no_flows, workspace, _, _, _ = scratch
    num_nodes, num_layers, links_PP = len(start_N), problem.num_layers, problem.links_PP
    source, sink = num_nodes, num_nodes + 1
    for layer in range(num_layers + 1):
        first_node_L[layer] = -1
    for node in range(num_nodes):
        next_node_N[node] = first_node_L[start_N[node]]
        first_node_L[start_N[node]] = node
    edges = 0
    for node in range(num_nodes):
        tails_E[edges], heads_E[edges] = 2 * node, 2 * node + 1
        capacities_E[edges] = problem.rates_NK[node, stop_N[node] - start_N[node]]
        edges += 1
        if start_N[node] == 0 and links_PP[source, node] > 0.0:
            tails_E[edges], heads_E[edges] = 2 * source, 2 * node
            capacities_E[edges] = links_PP[source, node]
            edges += 1
        if stop_N[node] == num_layers:
            if links_PP[node, sink] > 0.0:
                tails_E[edges], heads_E[edges] = 2 * node + 1, 2 * source + 1
                capacities_E[edges] = links_PP[node, sink]
                edges += 1
            continue
        other = first_node_L[stop_N[node]]
        while other >= 0:
            if links_PP[node, other] > 0.0:
                tails_E[edges], heads_E[edges] = 2 * node + 1, 2 * other
                capacities_E[edges] = links_PP[node, other]
                edges += 1
            other = next_node_N[other]
    return max_flow_into(
        2 * num_nodes + 2,
        tails_E[:edges],
        heads_E[:edges],
        capacities_E[:edges],
        2 * source,
        2 * source + 1,
        workspace,
        no_flows,
    )


@njit(cache=True)
def _draw_start(problem: IntervalProblem, start_N: Ints, stop_N: Ints, scratch: _Scratch, state: State) -> None:
    """Cut the layers into a random count of even stages; each node, in random order, joins the weakest that it fits."""
    num_layers, longest_N, links_PP = problem.num_layers, problem.longest_N, problem.links_PP
    num_nodes = len(longest_N)
    order_N, rate_S = scratch.order_N, scratch.stage_rate_N
    fewest = num_layers
    for node in range(num_nodes):
        order_N[node] = node
        rate_S[node] = 0.0
        fewest = min(fewest, (num_layers - 1) // longest_N[node] + 1)
    fewest = min(fewest, num_nodes)
    most = max(fewest, min(num_nodes, num_layers))
    stages = fewest + int(draw_share(state) * (most - fewest + 1))
    for last in range(num_nodes - 1, -1, -1):
        place = int(draw_share(state) * (last + 1))
        node = order_N[place]
        order_N[place] = order_N[last]
        longest, weakest = longest_N[node], -1
        for stage in range(stages):
            if num_layers * (stage + 1) // stages - num_layers * stage // stages > longest:
                continue
            if stage == 0 and links_PP[num_nodes, node] == 0.0:
                continue
            if stage == stages - 1 and links_PP[node, num_nodes + 1] == 0.0:
                continue
            if weakest < 0 or rate_S[stage] < rate_S[weakest]:
                weakest = stage
        if weakest >= 0:
            start_N[node] = num_layers * weakest // stages
            stop_N[node] = num_layers * (weakest + 1) // stages
            rate_S[weakest] += problem.rates_NK[node, stop_N[node] - start_N[node]]
        else:
            start_N[node] = int(draw_share(state) * (num_layers - longest + 1))
            stop_N[node] = start_N[node] + longest


@njit(cache=True)
def _move(problem: IntervalProblem, start_N: Ints, stop_N: Ints, state: State) -> bool:
    """Change some intervals at random; False where the move drawn does not fit: then they may be changed in part."""
    num_layers, longest_N, num_nodes = problem.num_layers, problem.longest_N, len(start_N)
    node, other = int(draw_share(state) * num_nodes), int(draw_share(state) * num_nodes)
    start, stop = start_N[node], stop_N[node]
    kind = draw_share(state)
    if kind < _COPY + _SWAP:
        start_N[node], stop_N[node] = start_N[other], stop_N[other]
        if kind >= _COPY:
            start_N[other], stop_N[other] = start, stop
        fits = stop_N[node] - start_N[node] <= longest_N[node] and stop_N[other] - start_N[other] <= longest_N[other]
        return fits and (start_N[node] != start or stop_N[node] != stop)
    kind -= _COPY + _SWAP
    if kind < _SHIFT:
        # All boundaries from one to another move together: what the first gains the last loses.
        first = start if draw_share(state) < 0.5 else stop
        last = first
        if draw_share(state) < 0.7:
            last = start_N[other] if draw_share(state) < 0.5 else stop_N[other]
        if first > last:
            first, last = last, first
        step = 1 if draw_share(state) < 0.5 else 2
        if draw_share(state) < 0.5:
            step = -step
        for each in range(num_nodes):
            start, stop = start_N[each], stop_N[each]
            if start > 0 and first <= start <= last:
                start_N[each] = start + step
                if start + step <= 0:
                    return False
            if stop < num_layers and first <= stop <= last:
                stop_N[each] = stop + step
                if stop + step >= num_layers:
                    return False
            if not 0 < stop_N[each] - start_N[each] <= longest_N[each]:
                return False
        return True
    kind -= _SHIFT
    if kind < _SNAP + _ANY:
        if kind < _SNAP:
            third = int(draw_share(state) * num_nodes)
            start = start_N[other] if draw_share(state) < 0.5 else stop_N[other]
            stop = start_N[third] if draw_share(state) < 0.5 else stop_N[third]
            start = 0 if draw_share(state) < 0.1 else start
            stop = num_layers if draw_share(state) < 0.1 else stop
        else:
            length = 1 + int(draw_share(state) * longest_N[node])
            start = int(draw_share(state) * (num_layers - length + 1))
            stop = start + length
        start_N[node], stop_N[node] = start, stop
        return 0 < stop - start <= longest_N[node]
    kind -= _SNAP + _ANY
    if kind < _REORDER:
        # What lies within one interval changes places with what lies between it and another boundary.
        end = start_N[other] if draw_share(state) < 0.5 else stop_N[other]
        first, middle, last = min(start, end), stop if end > stop else start, max(stop, end)
        for each in range(num_nodes):
            if first <= start_N[each] and stop_N[each] <= middle:
                start_N[each] += last - middle
                stop_N[each] += last - middle
            elif middle <= start_N[each] and stop_N[each] <= last:
                start_N[each] -= middle - first
                stop_N[each] -= middle - first
        return not start <= end <= stop
    kind -= _REORDER
    if kind < _SPLIT:
        # Some nodes of one interval keep its first part, the others its second.
        middle = start + 1 + int(draw_share(state) * (stop - start - 1))
        for each in range(num_nodes):
            if start_N[each] == start and stop_N[each] == stop:
                if draw_share(state) < 0.5:
                    stop_N[each] = middle
                else:
                    start_N[each] = middle
        return stop - start > 1
    # All nodes of two intervals, one of which goes on where the other ends, take both.
    num_next, last = 0, stop
    for each in range(num_nodes):
        if start_N[each] == stop:
            num_next += 1
            if draw_share(state) * num_next < 1.0:
                last = stop_N[each]
    for each in range(num_nodes):
        if (start_N[each] == start and stop_N[each] == stop) or (start_N[each] == stop and stop_N[each] == last):
            start_N[each], stop_N[each] = start, last
            if last - start > longest_N[each]:
                return False
    return num_next > 0


@njit(cache=True)
def _search(
    problem: IntervalProblem,
    state: State,
    max_evaluations: int,
    bound: float,
    scratch: _Scratch,
    best_start_N: Ints,
    best_stop_N: Ints,
) -> tuple[float, int]:
    """Write the best placement, and return its rate and the evaluations spent."""
    num_nodes = len(problem.longest_N)
    start_N, kept_start_N = np.empty(num_nodes, np.int32), np.empty(num_nodes, np.int32)
    stop_N, kept_stop_N = np.empty(num_nodes, np.int32), np.empty(num_nodes, np.int32)
    best, evaluations = -1.0, 0
    run_evaluations = max(1, int(_RUN_SHARE * max_evaluations))
    enough = bound * (1.0 - _CLOSE)
    while evaluations < max_evaluations and best < enough:
        hot = bound * _HOT_LOW * (_HOT_HIGH / _HOT_LOW) ** draw_share(state)
        smooth = _SMOOTH_LOW * (_SMOOTH_HIGH / _SMOOTH_LOW) ** draw_share(state)
        if evaluations < _EXPLORE_SHARE * max_evaluations or best <= 0.0:
            _draw_start(problem, start_N, stop_N, scratch, state)
        else:
            _copy(best_start_N, start_N)
            _copy(best_stop_N, stop_N)
            hot *= _CONTINUED
        first_evaluation, run_best, current, weight, temperature = evaluations, 0.0, -np.inf, smooth, hot
        current_smooth = 0.0
        while evaluations < max_evaluations and best < enough:
            spent = (evaluations - first_evaluation) / run_evaluations
            if spent >= 1.0 or (run_best <= 0.0 and spent > _HOPELESS_SHARE):
                break
            _copy(start_N, kept_start_N)
            _copy(stop_N, kept_stop_N)
            evaluations += 1
            if current >= 0.0 and not _move(problem, start_N, stop_N, state):
                _copy(kept_start_N, start_N)
                _copy(kept_stop_N, stop_N)
                continue
            temperature = hot * (_COLD * bound / hot) ** spent
            weight = smooth + (_SMOOTH_LAST - smooth) * spent
            asked = current + weight * current_smooth + temperature * np.log(1.0 - draw_share(state))
            least, smoothed = layers_rate(problem, start_N, stop_N, bound, scratch.change_L)
            # The least bounds the flow: most moves need no flow to be refused.
            rate = -1.0
            if least + weight * smoothed >= asked:
                rate = _rate(problem, start_N, stop_N, scratch)
            if rate < 0.0 or rate + weight * smoothed < asked:
                _copy(kept_start_N, start_N)
                _copy(kept_stop_N, stop_N)
                continue
            current, current_smooth = rate, smoothed
            run_best = max(run_best, rate)
            if rate > best:
                best = rate
                _copy(start_N, best_start_N)
                _copy(stop_N, best_stop_N)
    return best, evaluations
