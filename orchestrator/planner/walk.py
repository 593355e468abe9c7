"""In which order a pipeline passes through places, so that the links it crosses carry the flow.

PURE. A short path through all places: the nearest place next, from several starts, then 2-opt (Croes 1958): a link that
would have to carry more than it can is as long as the logarithm of how much more, others are as long as their delay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from orchestrator.planner.problem import Floats, Problem

# A link too thin by a factor of e is worse than any delay.
_THIN = 1e3
_STARTS, _PLAIN_STARTS = 48, 8
_NOISE = 0.3
# Where two places share a stage, fewer nodes face each other than in two stages of their own.
_FACING = 0.25

Counts = NDArray[np.int64]


def link_rates(problem: Problem, replicas_P: Floats) -> Floats:
    """Return how many microbatches a second each pair of places may pass, when so many nodes of each face each other.

    By what all flows between the two carry, and by what each two nodes do.
    """
    down, up = float(problem.forward_bytes_L[0]), float(problem.backward_bytes_L[0])
    with np.errstate(divide="ignore"):
        shared = np.minimum(problem.shared_bytes_per_s_PP / down, problem.shared_bytes_per_s_PP.T / up)
        single = 1 / np.maximum(down * problem.byte_s_PP, up * problem.byte_s_PP.T)
    return np.minimum(shared, _FACING * replicas_P[:, None] * replicas_P * single)


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """Places in an order; microbatches a second that its links pass, were nodes a fluid; its length, if they do."""

    places: Counts
    rate: float
    length: float


def walks(
    problem: Problem, places: Counts, rate: float, replicas_P: Floats, layers_P: Floats, rng: np.random.Generator
) -> list[Walk]:
    """Return some, the best first, for places that hold so many layers each at that rate."""
    near = np.ix_(places, places)
    rates_PP = np.minimum(link_rates(problem, replicas_P)[near], 1e30)
    rates_PP = np.maximum(np.minimum(rates_PP, rates_PP.T), 1e-30)
    length_PP = _THIN * np.maximum(0.0, np.log(rate / rates_PP))
    length_PP += np.maximum(problem.delay_s_PP[near], problem.delay_s_PP[near].T)
    found: dict[tuple[int, ...], Walk] = {}
    for attempt in range(_STARTS if len(places) > 2 else 1):
        # The first from several places, then as if links were a little longer or shorter.
        noise = rng.uniform(1 - _NOISE, 1 + _NOISE, length_PP.shape) if attempt >= _PLAIN_STARTS else np.ones(1)
        order = _short_path(length_PP * np.minimum(noise, noise.T), int(rng.integers(len(places))))
        passed = min(rate, _row_rate(order, layers_P[places], rates_PP))
        length = float(length_PP[order[:-1], order[1:]].sum())
        found[tuple(order.tolist())] = Walk(places=places[order], rate=passed, length=length)
    return sorted(found.values(), key=lambda walk: (-walk.rate, walk.length, tuple(walk.places.tolist())))


@njit(cache=True)
def _row_rate(order: Counts, layers_P: Floats, rates_PP: Floats) -> float:
    """Return the rate at which the first pair of places is full, for stages of one layer filled along the row.

    Each layer is done by the one or more places whose part of the row it falls in, and what they pass on goes to those
    of the next layer in the same order.
    """
    size = len(order)
    ends = np.cumsum(layers_P[order])
    num_layers = int(np.ceil(ends[-1] - 1e-9))
    load_PP = np.zeros(rates_PP.shape)
    most = 0.0
    for layer in range(num_layers - 1):
        # Where in the row this layer and the next one are at, and how much of each is passed.
        here, there, passed = 0, 0, 0.0
        while here < size - 1 and ends[here] <= layer:
            here += 1
        while there < size - 1 and ends[there] <= layer + 1:
            there += 1
        while passed < 1.0 - 1e-9:
            upto = min(1.0, ends[here] - layer if here < size - 1 else 1.0)
            upto = min(upto, ends[there] - layer - 1 if there < size - 1 else 1.0)
            if here != there:
                load_PP[here, there] += upto - passed
                most = max(most, load_PP[here, there] / rates_PP[order[here], order[there]])
            passed = upto
            if passed >= 1.0 - 1e-9:
                break
            if here < size - 1 and ends[here] - layer <= passed:
                here += 1
            if there < size - 1 and ends[there] - layer - 1 <= passed:
                there += 1
    return 1 / most if most > 0 else np.inf


@njit(cache=True)
def _short_path(length_PP: Floats, start: int) -> Counts:
    """Return a path through all points that no reversal of a part of it makes shorter."""
    size = len(length_PP)
    order = np.empty(size, np.int64)
    taken = np.zeros(size, np.bool_)
    order[0] = start
    taken[start] = True
    for at in range(1, size):
        nearest = -1
        for point in range(size):
            if not taken[point] and (
                nearest < 0 or length_PP[order[at - 1], point] < length_PP[order[at - 1], nearest]
            ):
                nearest = point
        order[at] = nearest
        taken[nearest] = True
    improved = True
    while improved:
        improved = False
        for i in range(size - 1):
            for j in range(i + 1, size):
                # Reverse the part from i to j: the links before it and after it change.
                before, after = 0.0, 0.0
                if i > 0:
                    before += length_PP[order[i - 1], order[i]]
                    after += length_PP[order[i - 1], order[j]]
                if j + 1 < size:
                    before += length_PP[order[j], order[j + 1]]
                    after += length_PP[order[i], order[j + 1]]
                if after < before - 1e-12:
                    order[i : j + 1] = order[i : j + 1][::-1].copy()
                    improved = True
    return order
