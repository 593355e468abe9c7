"""Nodes that a bound need not tell apart, summed: a place's nodes that hold equally many layers.

PURE. What many nodes can do together is the sum of what each can: nodes of slightly different speeds add up without
loss, so that thousands of nodes come to a few classes for each place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Floats, Problem

Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]

# Nodes whose figures agree to so much are of one class, with the best figure of the class where it is no sum.
_STEP = 1.02
# Up to so many replicas a stage, not all nodes may be used, and the fast ones are told apart.
_FEW_REPLICAS = 64
# What sums in another order may differ by, as a part of them.
ROUNDING = 1e-12
# Stands for no time at all: a layer that takes nothing has no finite rate.
_LEAST_S = 1e-12


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What counts of a microbatch: both ways together, or, where a schedule parts them, forward or backward alone."""

    down: bool
    up: bool

    def layer_s_N(self, problem: Problem) -> Floats:
        return problem.layer_forward_s_N * self.down + problem.layer_backward_s_N * self.up

    def first_s_N(self, problem: Problem) -> Floats:
        return problem.first_forward_s_N * self.down + problem.first_backward_s_N * self.up

    def last_s_N(self, problem: Problem) -> Floats:
        return problem.last_forward_s_N * self.down + problem.last_backward_s_N * self.up

    def down_bytes(self, problem: Problem) -> float:
        """Return the smallest frame of any link: which stage ends at a cut is not known to a bound."""
        return float(problem.forward_bytes_L[:-1].min()) * self.down if problem.num_layers > 1 else 0.0

    def up_bytes(self, problem: Problem) -> float:
        return float(problem.backward_bytes_L[:-1].min()) * self.up if problem.num_layers > 1 else 0.0


def phases(problem: Problem) -> tuple[Phase, ...]:
    """Return what a bound takes one after the other: GPipe does all forwards, then all backwards."""
    if problem.schedule == "gpipe":
        return Phase(down=True, up=False), Phase(down=False, up=True)
    return (Phase(down=True, up=True),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Room:
    """How many layers each node holds at most, and whether it can hold an end; with so many microbatches in flight."""

    layers_N: Counts
    first_N: Bools
    last_N: Bools


def least_in_flight(problem: Problem, limits: Limits) -> int:
    """Return what any plan has in flight at every replica: none where one may be left without a microbatch."""
    if limits.max_replicas > 1:
        return 0
    return problem.num_microbatches if problem.schedule == "gpipe" else 1


def room(problem: Problem, in_flight_N: Floats | float, most_layers: int, *, slack: float) -> Room:
    """Return how many layers fit on each node, up to `most_layers`, by the memory that `evaluate` counts.

    An interval of all layers has both ends, one of all but one has an end, shorter ones may have none. Each
    node's memory counts as `slack` more, as a part of it: above 0 for a bound, below for a plan, lest rounding harm.
    """
    size = problem.num_layers
    each_N = problem.layer_state_bytes + in_flight_N * problem.layer_saved_bytes_N
    free_N = problem.memory_bytes_N * (1 + slack) - problem.fixed_bytes_N - in_flight_N * problem.flight_bytes_N
    first_bytes = problem.first_state_bytes
    last_bytes = problem.last_state_bytes + problem.last_bytes + in_flight_N * problem.last_saved_bytes

    def fit_N(more_bytes: Floats | float, most: int) -> Counts:
        layers_N = np.floor(np.maximum(free_N - more_bytes, -1.0) / np.maximum(each_N, 1e-300))
        return np.clip(layers_N, -1, max(most, 0)).astype(np.int64)

    inner_N = fit_N(0.0, min(size - 2, most_layers))
    with_first_N, with_last_N = (fit_N(more, min(size - 1, most_layers)) for more in (first_bytes, last_bytes))
    whole_N = fit_N(first_bytes + last_bytes, size) == size if most_layers >= size else np.zeros(len(free_N), np.bool_)
    layers_N = np.maximum(inner_N, np.maximum(with_first_N, with_last_N))
    return Room(
        layers_N=np.maximum(np.where(whole_N, size, layers_N), 0),
        first_N=(with_first_N > 0) | whole_N,
        last_N=(with_last_N > 0) | whole_N,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """Sums and best figures over the nodes of each of C classes.

    Layers a second of all; how many layers an end is worth; what one node holds; bytes a second of all out and in;
    dollars an hour and nodes for each layer a second.
    """

    keys: tuple[tuple[int, ...], ...]
    nodes_C: Counts
    place_C: Counts
    speed_C: Floats
    first_layers_C: Floats
    last_layers_C: Floats
    layers_C: Counts
    first_C: Bools
    last_C: Bools
    uplink_C: Floats
    downlink_C: Floats
    # What the nodes' links to others carry, out and in, in microbatches a second.
    out_C: Floats
    in_C: Floats
    dollars_C: Floats
    share_C: Floats


def classify(problem: Problem, limits: Limits, phase: Phase, links: tuple[Floats, Floats]) -> Classes:
    """Return the classes of the nodes that can hold a layer; which class a node is of depends on that node alone.

    `links` is what each node's links to others carry, out and in, in microbatches a second.
    """
    most_layers = problem.num_layers - (limits.num_stages or 1) + 1
    holds = room(problem, float(least_in_flight(problem, limits)), most_layers, slack=ROUNDING)
    usable = np.flatnonzero(holds.layers_N > 0)
    layer_s = np.maximum(phase.layer_s_N(problem), _LEAST_S)
    speed = 1 / layer_s
    first, last = phase.first_s_N(problem) / layer_s, phase.last_s_N(problem) / layer_s
    dollars = problem.price_N * layer_s
    columns = [problem.place_N, holds.layers_N, holds.first_N, holds.last_N, _bucket(first), _bucket(last)]
    if limits.max_dollars_per_hour < np.inf:
        columns.append(_bucket(dollars))
    if limits.max_replicas <= _FEW_REPLICAS:
        columns.append(_bucket(speed))
    table = np.stack([np.asarray(column, np.int64)[usable] for column in columns])
    keys, of_node = _distinct(table)

    def total(values: Floats) -> Floats:
        return np.bincount(of_node, weights=values[usable], minlength=len(keys)).astype(np.float64)

    def least(values: Floats) -> Floats:
        found = np.full(len(keys), np.inf)
        np.minimum.at(found, of_node, values[usable])
        return found

    with np.errstate(divide="ignore"):
        uplink, downlink = 1 / problem.uplink_byte_s_N, 1 / problem.downlink_byte_s_N
    return Classes(
        keys=tuple(tuple(int(part) for part in key) for key in keys),
        nodes_C=np.bincount(of_node, minlength=len(keys)),
        place_C=keys[:, 0],
        speed_C=total(speed),
        first_layers_C=least(first),
        last_layers_C=least(last),
        layers_C=keys[:, 1],
        first_C=keys[:, 2] > 0,
        last_C=keys[:, 3] > 0,
        uplink_C=total(uplink),
        downlink_C=total(downlink),
        out_C=total(links[0]),
        in_C=total(links[1]),
        dollars_C=least(dollars),
        share_C=least(layer_s),
    )


def _distinct(table: Counts) -> tuple[Counts, Counts]:
    """Return the different columns of a table, as rows, and which of them each column is."""
    if not table.shape[1]:
        return table.T, np.zeros(0, np.int64)
    number = np.zeros(table.shape[1], np.int64)
    for row in table:
        # Few values each, so that their product stays far below what an integer holds.
        values, value_of = np.unique(row, return_inverse=True)
        number = number * len(values) + value_of.reshape(-1)
    _, first, of_column = np.unique(number, return_index=True, return_inverse=True)
    return table.T[first], of_column.reshape(-1)


def _bucket(values: Floats) -> Counts:
    """Return the number of each value's step on a scale of its own, whatever the other values are."""
    positive = np.maximum(values, 1e-30)
    return np.where(values > 0, np.floor(np.log(positive) / np.log(_STEP)), -(10**9)).astype(np.int64)
