"""Annealing of a grid of seats, by exchanges of runs of seats along chains and by reversals of stages.

PURE. A cost that is a maximum of maxima stays put under most moves. What is annealed is therefore
`(1 - blur) * cost + blur * mean`, the mean over seats standing in for each maximum, with a blur that falls with the
temperature. A move costs only the stages and hops that it touches. Seats are counted stage by stage, seat =
stage * R + replica; nodes beyond S * R are spare.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.compiled import inner, outer
from orchestrator.planner.draws import draw_below, draw_share

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Stream = NDArray[np.uint64]

# Shares of the moves: a node for another stage's; a node for one of its own stage, which joins chains anew; a longer
# run of a chain for another's elsewhere; the tails of two chains; the rest reverses stages.
_NODE, _MATCH, _RUN, _TAIL = 0.44, 0.24, 0.20, 0.07
# How often a node is moved because it makes a stage or a hop slow, and how often it is moved beside a near node.
_SLOW, _NEAR = 0.8, 0.8
# How often a longer run is seated in reverse.
_REVERSED = 0.3
# Less is rounding.
LEAST_GAIN_S = 1e-12
# Moves between two updates of temperature and blur; sums are formed afresh then, so that rounding does not gather.
_PERIOD = 128


class Links(NamedTuple):
    """What two nodes cost each other, there and back, in seconds."""

    # In a stage's sync and as a hop, (2, N, N).
    pair_s_2NN: Floats
    # Of each node the others, nearest by hop first, (N, N - 1).
    near_NN: Ints


class Cooling(NamedTuple):
    """How temperature (in the objective's seconds) and blur fall, geometrically, over a whole run."""

    hot_s: float
    cold_s: float
    first_blur: float
    last_blur: float


class _Move(NamedTuple):
    """`size` seats of a chain from a stage on, for as many of another chain from another stage on.

    Or, where `spare` is a seat, one seat for that one. Or, where `chain` is -1, stages `stage` to `other_stage` in
    reverse, `size` of them. Nothing where `size` is 0.
    """

    stage: int
    chain: int
    other_stage: int
    other_chain: int
    size: int
    is_reversed: bool
    spare: int


def anneal_grid(
    links: Links,
    node_N: Ints,
    num_stages: int,
    num_replicas: int,
    cooling: Cooling,
    length: int,
    limit: int,
    stream: Stream,
) -> Ints:
    """Return the cheapest seating met on the way from `node_N`, as nodes by seat.

    A run of `length` moves that ends after `limit` of them, so that a shorter run is the start of a longer one.
    """
    best_N = node_N.copy()
    # A row for each stage: its seats' sync, the largest and the mean of them, and those of the hops to the next stage;
    # of the seating tried, and of that last accepted.
    sums_SK, kept_SK = (np.zeros((num_stages, num_replicas + 4)) for _ in range(2))
    _anneal(links, node_N.copy(), np.argsort(node_N), best_N, sums_SK, kept_SK, cooling, length, limit, stream)
    return best_N


@outer
def _anneal(
    links: Links,
    node_N: Ints,
    seat_N: Ints,
    best_N: Ints,
    sums_SK: Floats,
    kept_SK: Floats,
    cooling: Cooling,
    length: int,
    limit: int,
    stream: Stream,
) -> None:
    pair_s_2NN = links.pair_s_2NN
    num_stages, num_replicas = sums_SK.shape[0], sums_SK.shape[1] - 4
    best_s, current_s = math.inf, 0.0
    temperature_s, blur = cooling.hot_s, cooling.first_blur
    for step in range(limit):
        if step % _PERIOD == 0:
            share = step / length
            temperature_s = cooling.hot_s * (cooling.cold_s / cooling.hot_s) ** share
            blur = cooling.first_blur * (cooling.last_blur / cooling.first_blur) ** share
            _add_up_sync(pair_s_2NN, node_N, sums_SK)
            _sum_up(pair_s_2NN, node_N, sums_SK, 0, num_stages)
            _copy_sums(sums_SK, kept_SK, 0, num_stages)
            cost_s, mean_s = _cost(sums_SK)
            current_s = (1 - blur) * cost_s + blur * mean_s
            if cost_s < best_s:
                best_s = cost_s
                copy_nodes(node_N, best_N)
        allowed_s = current_s - temperature_s * math.log(1.0 - draw_share(stream))
        move = _draw_move(links, node_N, seat_N, sums_SK, stream)
        if move.size == 0:
            continue
        num_pairs = move.size if move.chain >= 0 else move.size // 2 * num_replicas
        for k in range(num_pairs):
            a, b = _pair(move, num_replicas, k)
            _exchange(pair_s_2NN, node_N, seat_N, sums_SK, a, b)
        # Two ranges of stages are touched, the second empty where they are one.
        first = min(move.stage, move.other_stage)
        middle = first + move.size
        second = max(middle, max(move.stage, move.other_stage))
        end = max(second, max(move.stage, move.other_stage) + move.size) if move.chain >= 0 else second
        _sum_up(pair_s_2NN, node_N, sums_SK, first, middle)
        _sum_up(pair_s_2NN, node_N, sums_SK, second, end)
        cost_s, mean_s = _cost(sums_SK)
        blurred_s = (1 - blur) * cost_s + blur * mean_s
        if blurred_s <= allowed_s:
            current_s = blurred_s
            _copy_sums(sums_SK, kept_SK, first, middle)
            _copy_sums(sums_SK, kept_SK, second, end)
            if cost_s < best_s - LEAST_GAIN_S:
                best_s = cost_s
                copy_nodes(node_N, best_N)
        else:
            for k in range(num_pairs):
                a, b = _pair(move, num_replicas, k)
                _swap(node_N, seat_N, a, b)
            _copy_sums(kept_SK, sums_SK, first, middle)
            _copy_sums(kept_SK, sums_SK, second, end)


@inner
def copy_nodes(source_N: Ints, target_N: Ints) -> None:
    """Copy nodes by seat; a loop, since a slice takes seconds to compile."""
    for i in range(source_N.size):
        target_N[i] = source_N[i]


@inner
def _draw_move(links: Links, node_N: Ints, seat_N: Ints, sums_SK: Floats, stream: Stream) -> _Move:
    num_stages, num_replicas = sums_SK.shape[0], sums_SK.shape[1] - 4
    kind = draw_share(stream)
    if kind < _NODE + _MATCH or num_stages == 1:
        seat = _seat_to_move(links.pair_s_2NN, node_N, sums_SK, stream)
        stage, chain = seat // num_replicas, seat % num_replicas
        if kind < _NODE:
            other = _seat_beside(links.near_NN, node_N, seat_N, num_stages, num_replicas, seat, stream)
            if other >= num_stages * num_replicas:
                return _Move(stage, chain, stage, 0, 1, False, other)
            other_stage, other_chain = other // num_replicas, other % num_replicas
        else:
            other_stage, other_chain = stage, draw_below(stream, num_replicas)
        is_move = stage != other_stage or chain != other_chain
        return _Move(stage, chain, other_stage, other_chain, 1 if is_move else 0, False, -1)
    if kind >= _NODE + _MATCH + _RUN + _TAIL:
        a, b = draw_below(stream, num_stages), draw_below(stream, num_stages)
        size = 1 + abs(b - a) if a != b else 0
        return _Move(min(a, b), -1, max(a, b), -1, size, False, -1)
    chain, other_chain = draw_below(stream, num_replicas), draw_below(stream, num_replicas)
    if kind >= _NODE + _MATCH + _RUN:
        stage = 1 + draw_below(stream, num_stages - 1)
        size = num_stages - stage if chain != other_chain else 0
        return _Move(stage, chain, stage, other_chain, size, False, -1)
    size = min(num_stages - 1, 2 + draw_below(stream, max(num_stages // 2 - 1, 1)))
    stage, other_stage = draw_below(stream, num_stages - size + 1), draw_below(stream, num_stages - size + 1)
    is_reversed = stage != other_stage and draw_share(stream) < _REVERSED
    if chain == other_chain and abs(stage - other_stage) < size:
        size = 0
    return _Move(stage, chain, other_stage, other_chain, size, is_reversed, -1)


@inner
def _pair(move: _Move, num_replicas: int, k: int) -> tuple[int, int]:
    """Return the k-th pair of seats that a move exchanges; no seat is in two of them."""
    if move.chain < 0:
        stage, chain = k // num_replicas, k % num_replicas
        return (move.stage + stage) * num_replicas + chain, (move.other_stage - stage) * num_replicas + chain
    seat = (move.stage + k) * num_replicas + move.chain
    if move.spare >= 0:
        return seat, move.spare
    other_stage = move.other_stage + (move.size - 1 - k if move.is_reversed else k)
    return seat, other_stage * num_replicas + move.other_chain


@inner
def _seat_to_move(pair_s_2NN: Floats, node_N: Ints, sums_SK: Floats, stream: Stream) -> int:
    """Return a seat: mostly one that makes a hop or the slowest stage slow."""
    num_stages, num_replicas = sums_SK.shape[0], sums_SK.shape[1] - 4
    if draw_share(stream) >= _SLOW:
        return draw_below(stream, num_stages * num_replicas)
    stage = draw_below(stream, num_stages) - 1
    worst, worst_s = 0, -1.0
    if stage >= 0:
        for r in range(num_replicas):
            seat = stage * num_replicas + r
            hop_s = pair_s_2NN[1, node_N[seat], node_N[seat + num_replicas]]
            if hop_s > worst_s:
                worst, worst_s = seat, hop_s
        return worst if draw_share(stream) < 0.5 else worst + num_replicas
    stage = 0
    for s in range(1, num_stages):
        if sums_SK[s, num_replicas] > sums_SK[stage, num_replicas]:
            stage = s
    for r in range(num_replicas):
        if sums_SK[stage, r] > worst_s:
            worst, worst_s = stage * num_replicas + r, sums_SK[stage, r]
    return worst


@inner
def _seat_beside(
    near_NN: Ints, node_N: Ints, seat_N: Ints, num_stages: int, num_replicas: int, seat: int, stream: Stream
) -> int:
    """Return a seat to exchange `seat` for: mostly that of a node near to one that `seat` hops to."""
    if num_stages == 1 or draw_share(stream) >= _NEAR:
        return draw_below(stream, node_N.size)
    is_last = seat >= (num_stages - 1) * num_replicas
    is_after = seat < num_replicas or (not is_last and draw_share(stream) < 0.5)
    neighbour = node_N[seat + num_replicas if is_after else seat - num_replicas]
    share = draw_share(stream)
    return int(seat_N[near_NN[neighbour, int(near_NN.shape[1] * share * share * share)]])


@inner
def _swap(node_N: Ints, seat_N: Ints, a: int, b: int) -> None:
    node, other = node_N[b], node_N[a]
    node_N[a], node_N[b] = node, other
    seat_N[node], seat_N[other] = a, b


@inner
def _exchange(pair_s_2NN: Floats, node_N: Ints, seat_N: Ints, sums_SK: Floats, a: int, b: int) -> None:
    """Exchange the nodes of two seats, and correct the sync of their stages' seats."""
    num_stages, num_replicas = sums_SK.shape[0], sums_SK.shape[1] - 4
    stage, other_stage = a // num_replicas, b // num_replicas
    replica, other_replica = a % num_replicas, b % num_replicas
    _swap(node_N, seat_N, a, b)
    if stage == other_stage:
        sync_s = sums_SK[stage, replica]
        sums_SK[stage, replica] = sums_SK[stage, other_replica]
        sums_SK[stage, other_replica] = sync_s
        return
    _replace(pair_s_2NN, node_N, sums_SK, stage, replica, node_N[b])
    if other_stage < num_stages:
        _replace(pair_s_2NN, node_N, sums_SK, other_stage, other_replica, node_N[a])


@inner
def _replace(pair_s_2NN: Floats, node_N: Ints, sums_SK: Floats, stage: int, replica: int, old: int) -> None:
    """Correct the sync of a stage's seats where the node of one has taken the place of `old`."""
    num_replicas = sums_SK.shape[1] - 4
    start = stage * num_replicas
    node = node_N[start + replica]
    own_s = 0.0
    for r in range(num_replicas):
        if r != replica:
            other = node_N[start + r]
            added_s = pair_s_2NN[0, node, other]
            sums_SK[stage, r] += added_s - pair_s_2NN[0, old, other]
            own_s += added_s
    sums_SK[stage, replica] = own_s


@inner
def _add_up_sync(pair_s_2NN: Floats, node_N: Ints, sums_SK: Floats) -> None:
    """Form the sync of every seat afresh."""
    num_replicas = sums_SK.shape[1] - 4
    for s in range(sums_SK.shape[0]):
        for r in range(num_replicas):
            sums_SK[s, r] = sync_s(pair_s_2NN, node_N, s, num_replicas, r)


@inner
def sync_s(pair_s_2NN: Floats, node_N: Ints, stage: int, num_replicas: int, replica: int) -> float:
    """Return what a seat's node takes to exchange with all others of its stage."""
    total_s = 0.0
    for seat in range(stage * num_replicas, stage * num_replicas + num_replicas):
        total_s += pair_s_2NN[0, node_N[stage * num_replicas + replica], node_N[seat]]
    return total_s


@inner
def _sum_up(pair_s_2NN: Floats, node_N: Ints, sums_SK: Floats, first: int, end: int) -> None:
    """Form largest and mean of stages [first, end), from their seats' sync, and of the hops to and from them."""
    num_replicas = sums_SK.shape[1] - 4
    for s in range(first, end):
        most_s, total_s = 0.0, 0.0
        for r in range(num_replicas):
            most_s = max(most_s, sums_SK[s, r])
            total_s += sums_SK[s, r]
        sums_SK[s, num_replicas] = most_s
        sums_SK[s, num_replicas + 1] = total_s / num_replicas
    for s in range(max(first - 1, 0), min(end, sums_SK.shape[0] - 1)):
        most_s, total_s = 0.0, 0.0
        for seat in range(s * num_replicas, s * num_replicas + num_replicas):
            hop_s = pair_s_2NN[1, node_N[seat], node_N[seat + num_replicas]]
            most_s = max(most_s, hop_s)
            total_s += hop_s
        sums_SK[s, num_replicas + 2] = most_s
        sums_SK[s, num_replicas + 3] = total_s / num_replicas


@inner
def _copy_sums(source_SK: Floats, target_SK: Floats, first: int, end: int) -> None:
    """Copy what `_sum_up` formed."""
    for s in range(max(first - 1, 0), end):
        for k in range(source_SK.shape[1]):
            target_SK[s, k] = source_SK[s, k]


@inner
def _cost(sums_SK: Floats) -> tuple[float, float]:
    """Return the cost, and the same with means in the place of the largest."""
    num_stages, num_replicas = sums_SK.shape[0], sums_SK.shape[1] - 4
    slowest_s, path_s, mean_s = 0.0, 0.0, 0.0
    for s in range(num_stages):
        slowest_s = max(slowest_s, sums_SK[s, num_replicas])
        path_s += sums_SK[s, num_replicas + 2]
        mean_s += (sums_SK[s, num_replicas] + sums_SK[s, num_replicas + 1]) / (2 * num_stages)
        mean_s += sums_SK[s, num_replicas + 3]
    return slowest_s + path_s, mean_s
