"""Nodes that each hold consecutive layers, as arrays, and what a layer's nodes let through together.

PURE.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from orchestrator.planner.flow import Floats, Ints


class IntervalProblem(NamedTuple):
    """What is to be placed; `interval_problem` makes one.

    Node n holding k consecutive layers passes rates_NK[n, k] frames a second, k up to longest_N[n]. From node a to node
    b pass links_PP[a, b], where row N is the source of frames and column N + 1 their sink; 0 where there is no link.
    """

    num_layers: int
    rates_NK: Floats
    longest_N: Ints
    links_PP: Floats


@njit(cache=True)
def layers_rate(
    problem: IntervalProblem, start_N: Ints, stop_N: Ints, bound: float, change_L: Floats
) -> tuple[float, float]:
    """Return the least rate of any layer, which bounds the flow, and the layers' power mean of degree -4, its smooth
    stand-in: it tells of two placements with the same least which leaves more to build on."""
    num_layers = problem.num_layers
    for layer in range(num_layers + 1):
        change_L[layer] = 0.0
    for node in range(len(start_N)):
        rate = min(bound, problem.rates_NK[node, stop_N[node] - start_N[node]])
        change_L[start_N[node]] += rate
        change_L[stop_N[node]] -= rate
    least, rate, total = np.inf, 0.0, 0.0
    for layer in range(num_layers):
        rate += change_L[layer]
        least = min(least, rate)
        square = (bound / min(bound, max(rate, 1e-3 * bound))) ** 2
        total += square * square
    return max(least, 0.0), bound * (num_layers / total) ** 0.25
