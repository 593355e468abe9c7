"""The best chain there is, by dynamic programming over subsets of the nodes: what the search is measured against.

Exact, for a dozen nodes.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from orchestrator.planner.evaluate import IN_FLIGHT_MARGIN
from orchestrator.planner.fast import memory_bytes
from orchestrator.planner.fast_pace import sent_and_taken
from orchestrator.planner.objective import Found
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.tables import (
    BDP_SPLIT,
    BYTE,
    DELAY,
    DOWNLINK,
    FIRST_BACKWARD,
    FIRST_FORWARD,
    FRAME,
    GPIPE,
    LAST_BACKWARD,
    LAST_FORWARD,
    LAYER_BACKWARD,
    LAYER_FORWARD,
    LAYER_WEIGHT,
    MEMORY,
    ONE_F_ONE_B,
    UPLINK,
    Tables,
    make_tables,
)

# Placements of a subset, head and first layer of which none is better in all that counts; more is an error. 1F1B has
# a round trip for every stretch of stages that counts too.
_MOST_KEPT = 10
_MOST_KEPT_1F1B = 64

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


def best_chain(problem: Problem, *, below: float = math.inf) -> Found:
    """Return the chain with the shortest step, if it is shorter than `below`, which makes the search short.

    For each pace that a chain may have, from the last stage on: of the chains of a subset of nodes that hold layers
    [a, L), those of which no other has both a shorter fill and a shorter wait for microbatches in flight, and under
    1F1B a shorter round trip from its head to each later stage. A chain's cost at a pace that is not its own is more
    than at its own, so that the least over all paces is its cost. Frames must be of one size, and nothing may bind all
    flows between two places.
    """
    assert np.ptp(problem.forward_bytes_L) == 0
    assert np.ptp(problem.backward_bytes_L) == 0
    assert not np.isfinite(problem.shared_bytes_per_s_PP).any()
    tables = make_tables(problem)
    seconds, best = below, None
    num_states = (1 << problem.num_nodes) * problem.num_nodes * (problem.num_layers + 1)
    kept = np.zeros(num_states, np.int32)
    is_1f1b = tables.schedule == ONE_F_ONE_B
    most = _MOST_KEPT_1F1B if is_1f1b else _MOST_KEPT
    trips, waits, parents = (
        np.empty((num_states, most)),
        np.empty((num_states, most)),
        np.empty((num_states, most), int),
    )
    stretches = np.empty((num_states, most, problem.num_nodes if is_1f1b else 0))
    quickest_s = _least_fill(tables, np.inf)[problem.num_layers].min()
    tried = 0
    for pace_s in _paces(tables).tolist():
        if (problem.num_microbatches - 1) * pace_s + quickest_s >= seconds:
            break
        tried += 1
        found, first, parent = _chains_at(tables, pace_s, seconds, kept, trips, waits, stretches, parents)
        if first >= 0:
            seconds, best = float(found), _trace(problem, int(first), int(parent), parents)
    return Found(placement=best, score=seconds if best is not None else math.inf, evaluations=tried)


def _trace(problem: Problem, first: int, parent: int, parents: NDArray[np.int64]) -> Placement:
    """Return the chain of a first node and what was kept to follow it."""
    nodes, bounds = [first], [0]
    while parent >= 0:
        state, slot = divmod(parent, parents.shape[1])
        rest, start = divmod(state, problem.num_layers + 1)
        nodes.append(rest % problem.num_nodes)
        bounds.append(start)
        parent = int(parents[state, slot])
    return Placement(bounds=(*bounds, problem.num_layers), nodes=tuple((node,) for node in nodes))


@njit(cache=True, error_model="numpy")
def _stage_s(tables: Tables, node: int, k: int, first: bool, last: bool) -> tuple[float, float, float]:
    """Return what a stage takes forward, backward, and of a microbatch's round trip."""
    node_NF = tables.node_NF
    forward, backward = k * node_NF[node, LAYER_FORWARD], k * node_NF[node, LAYER_BACKWARD]
    if first:
        forward, backward = forward + node_NF[node, FIRST_FORWARD], backward + node_NF[node, FIRST_BACKWARD]
    if last:
        forward, backward = forward + node_NF[node, LAST_FORWARD], backward + node_NF[node, LAST_BACKWARD]
    away = forward + backward
    if tables.schedule == BDP_SPLIT:
        away -= k * node_NF[node, LAYER_WEIGHT]
    return forward, backward, away


@njit(cache=True, error_model="numpy")
def _own_s(tables: Tables, node: int, first: bool, last: bool, down: float, up: float) -> float:
    """Return how long a node's own way out or in is busy; any stage between the ends stands for all."""
    stage, num_stages = 0 if first else 1, 1 if first and last else (2 if first or last else 3)
    sent, taken = sent_and_taken(tables.bytes_LF, stage, num_stages, down, up)
    return max(sent * tables.node_NF[node, UPLINK], taken * tables.node_NF[node, DOWNLINK])


@njit(cache=True, error_model="numpy")
def _busy_s(tables: Tables, node: int, k: int, first: bool, last: bool) -> tuple[float, float]:
    """Return what binds the pace at a stage: of GPipe the forward phase and the backward, else both and nothing."""
    forward, backward, _ = _stage_s(tables, node, k, first, last)
    if tables.schedule == GPIPE:
        return (
            max(forward, _own_s(tables, node, first, last, 1.0, 0.0)),
            max(backward, _own_s(tables, node, first, last, 0.0, 1.0)),
        )
    return max(forward + backward, _own_s(tables, node, first, last, 1.0, 1.0)), 0.0


@njit(cache=True, error_model="numpy")
def _link_s(tables: Tables, node: int, other: int) -> tuple[float, float, float]:
    """Return what binds the pace on a link, as of `_busy_s`, and what it adds to a round trip."""
    p, q, pair_PPF = tables.place_N[node], tables.place_N[other], tables.pair_PPF
    there, back = tables.bytes_LF[0, 0] * pair_PPF[p, q, BYTE], tables.bytes_LF[0, 1] * pair_PPF[q, p, BYTE]
    node_NF, ways = tables.node_NF, pair_PPF[p, q, DELAY] + pair_PPF[q, p, DELAY]
    down_s = max(pair_PPF[p, q, FRAME], max(node_NF[node, UPLINK], node_NF[other, DOWNLINK]))
    up_s = max(pair_PPF[q, p, FRAME], max(node_NF[other, UPLINK], node_NF[node, DOWNLINK]))
    away = ways + tables.bytes_LF[0, 0] * down_s + tables.bytes_LF[0, 1] * up_s
    if tables.schedule == GPIPE:
        return there, back, away
    return max(there, back), 0.0, away


@njit(cache=True, error_model="numpy")
def _paces(tables: Tables) -> Floats:
    """Return all paces that a chain may have, or the first phase of GPipe, ascending."""
    num_nodes, num_layers = len(tables.node_NF), tables.num_layers
    paces = np.empty(num_nodes * num_layers * 4 + num_nodes * num_nodes)
    count = 0
    for node in range(num_nodes):
        for k in range(1, num_layers + 1):
            for ends in range(4):
                paces[count] = _busy_s(tables, node, k, ends % 2 == 1, ends >= 2)[0]
                count += 1
        for other in range(num_nodes):
            paces[count] = _link_s(tables, node, other)[0]
            count += 1
    return np.unique(paces)


@njit(cache=True, error_model="numpy")
def _least_fill(tables: Tables, pace_s: float) -> Floats:
    """Return at least how long a microbatch is away in stages of layers [0, a) before each node; [a, node].

    Nodes may come twice, so it is less than what is possible. Row L holds the whole chain.
    """
    num_nodes, num_layers = len(tables.node_NF), tables.num_layers
    fill_LN = np.full((num_layers + 1, num_nodes), np.inf)
    fill_LN[0] = 0.0
    for stop in range(1, num_layers + 1):
        last = stop == num_layers
        for node in range(num_nodes):
            for k in range(1, stop + 1):
                first = k == stop
                if _busy_s(tables, node, k, first, last)[0] > pace_s:
                    continue
                away = _stage_s(tables, node, k, first, last)[2] + fill_LN[stop - k, node]
                if last:
                    fill_LN[stop, node] = min(fill_LN[stop, node], away)
                    continue
                for other in range(num_nodes):
                    binds, _, link = _link_s(tables, node, other)
                    if binds <= pace_s:
                        fill_LN[stop, other] = min(fill_LN[stop, other], away + link)
    return fill_LN


@njit(cache=True, error_model="numpy")
def _chains_at(
    tables: Tables,
    pace_s: float,
    below: float,
    kept: Ints,
    trips: Floats,
    waits: Floats,
    stretches: NDArray[np.float64],
    parents: NDArray[np.int64],
) -> tuple[float, int, int]:
    """Return the shortest step of the chains that keep this pace, if it is below, its first node, and what follows.

    -1 where there is none, or where nothing follows.

    States are subset, head and first layer; `waits` are what microbatches in flight make of the rest of a step, or of
    GPipe the backward phase; `stretches` the round trips from the head to each later stage but the last.
    """
    new_stretches = np.empty(stretches.shape[2])
    num_nodes, num_layers, num_microbatches = len(tables.node_NF), tables.num_layers, tables.num_microbatches
    fill_LN = _least_fill(tables, pace_s)
    best, best_first, best_parent = below, -1, -1
    if fill_LN[num_layers].min() + (num_microbatches - 1) * pace_s >= best:
        return best, best_first, best_parent
    kept[:] = 0
    for mask in range(1 << num_nodes):
        num_stages = 1
        for node in range(num_nodes):
            num_stages += (mask >> node) & 1
        # The subset's heads, or for none a single round with nothing behind.
        for head in range(num_nodes if mask else 1):
            if mask and not (mask >> head) & 1:
                continue
            for stop in range(1, num_layers + 1) if mask else range(num_layers, num_layers + 1):
                source = (mask * num_nodes + head) * (num_layers + 1) + stop
                for slot in range(kept[source] if mask else 1):
                    trip = trips[source, slot] if mask else 0.0
                    wait = waits[source, slot] if mask else 0.0
                    for node in range(num_nodes):
                        if (mask >> node) & 1:
                            continue
                        link_binds = link_up = link = 0.0
                        if mask:
                            link_binds, link_up, link = _link_s(tables, node, head)
                        if link_binds > pace_s:
                            continue
                        for k in range(1, stop + 1):
                            start = stop - k
                            first, last = start == 0, mask == 0
                            binds, up = _busy_s(tables, node, k, first, last)
                            if binds > pace_s:
                                continue
                            new_trip = trip + link + _stage_s(tables, node, k, first, last)[2]
                            new_wait = _wait(
                                tables, node, k, first, last, num_stages, new_trip, pace_s, max(wait, 0.0), up, link_up
                            )
                            if new_wait < 0.0:
                                continue
                            num_stretches = 0
                            if len(new_stretches) and not last:
                                num_stretches = num_stages - 1
                                own = new_stretches[0] = _stage_s(tables, node, k, first, last)[2]
                                for later in range(1, num_stretches):
                                    new_stretches[later] = own + link + stretches[source, slot, later - 1]
                                held_up = _held_up(new_stretches[:num_stretches], num_microbatches, num_stages, pace_s)
                                new_wait = max(new_wait, held_up)
                            rest = (num_microbatches - 1) * pace_s
                            rest = rest + new_wait if tables.schedule == GPIPE else max(rest, new_wait)
                            if new_trip + fill_LN[start, node] + rest >= best:
                                continue
                            new_mask = mask | (1 << node)
                            target = (new_mask * num_nodes + node) * (num_layers + 1) + start
                            parent = source * trips.shape[1] + slot if mask else -1
                            if first:
                                step = new_trip + rest + _commit_s(tables, node, new_mask, num_stages)
                                if step < best:
                                    best, best_first, best_parent = step, node, parent
                            else:
                                new = new_stretches[:num_stretches]
                                _keep(kept, trips, waits, stretches, parents, target, new_trip, new_wait, new, parent)
    return best, best_first, best_parent


@njit(cache=True, error_model="numpy")
def _wait(
    tables: Tables,
    node: int,
    k: int,
    first: bool,
    last: bool,
    num_stages: int,
    trip_s: float,
    pace_s: float,
    wait: float,
    up: float,
    link_up: float,
) -> float:
    """Return what a chain with this stage in front waits; -1 where the stage does not fit its node."""
    num_microbatches, node_NF, state_bytes = tables.num_microbatches, tables.node_NF, tables.state_bytes
    memory = node_NF[node, MEMORY]
    window = num_microbatches
    if tables.schedule == ONE_F_ONE_B:
        window = min(num_stages, num_microbatches)
    elif tables.schedule != GPIPE:
        empty = memory_bytes(node_NF, state_bytes, node, k, first, last, 0)
        each = memory_bytes(node_NF, state_bytes, node, k, first, last, 1) - empty
        wanted = min(float(num_microbatches), math.ceil(IN_FLIGHT_MARGIN * trip_s / pace_s))
        window = max(1, int(min(wanted, (memory - empty) // each)))
    if memory_bytes(node_NF, state_bytes, node, k, first, last, window) > memory:
        return -1.0
    if tables.schedule == GPIPE:
        return max(wait, (num_microbatches - 1) * max(up, link_up))
    if window <= num_microbatches - 1:
        rounds = (num_microbatches - 1) // window
        rest = num_microbatches - 1 - rounds * window
        wait = max(wait, rounds * max(trip_s, window * pace_s) + rest * pace_s)
    return wait


@njit(cache=True, error_model="numpy")
def _held_up(stretch_s: Floats, num_microbatches: int, num_stages: int, pace_s: float) -> float:
    """Return what 1F1B takes beyond the first microbatch because of round trips from its stage to later ones."""
    most = 0.0
    for later in range(1, len(stretch_s)):
        count = later + 1
        rounds = (num_microbatches - (num_stages - later)) // count
        if rounds > 0:
            rest = num_microbatches - 1 - rounds * count
            most = max(most, rounds * max(stretch_s[later], count * pace_s) + rest * pace_s)
    return most


@njit(cache=True, error_model="numpy")
def _commit_s(tables: Tables, home: int, mask: int, num_stages: int) -> float:
    if num_stages == 1:
        return 0.0
    slowest = 0.0
    for node in range(len(tables.node_NF)):
        if (mask >> node) & 1:
            slowest = max(slowest, tables.pair_PPF[tables.place_N[home], tables.place_N[node], DELAY])
    return 2 * slowest


@njit(cache=True, error_model="numpy")
def _keep(
    kept: Ints,
    trips: Floats,
    waits: Floats,
    stretches: NDArray[np.float64],
    parents: NDArray[np.int64],
    state: int,
    trip: float,
    wait: float,
    stretch_s: Floats,
    parent: int,
) -> None:
    """Keep a chain unless another is as good in all; those it beats in all go."""
    count, size, left = kept[state], len(stretch_s), 0
    for slot in range(count):
        is_as_good = trips[state, slot] <= trip and waits[state, slot] <= wait
        if is_as_good and (stretches[state, slot, :size] <= stretch_s).all():
            return
    for slot in range(count):
        is_better = trips[state, slot] < trip or waits[state, slot] < wait
        if is_better or (stretches[state, slot, :size] < stretch_s).any():
            trips[state, left], waits[state, left] = trips[state, slot], waits[state, slot]
            stretches[state, left, :size] = stretches[state, slot, :size]
            parents[state, left] = parents[state, slot]
            left += 1
    if left == trips.shape[1]:
        raise ValueError("more chains are to be kept than there is room for: raise _MOST_KEPT or _MOST_KEPT_1F1B")
    trips[state, left], waits[state, left], parents[state, left] = trip, wait, parent
    stretches[state, left, :size] = stretch_s
    kept[state] = left + 1
