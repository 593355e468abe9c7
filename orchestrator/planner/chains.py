"""How fast a chain of single nodes can be at best: whole layers, counted.

PURE. In a chain each stage is one node and passes every microbatch, so that at a pace of tau seconds a node holds no
more layers than it does in tau. If all nodes that links of that pace join hold fewer than L layers together, no chain
is that fast. Bisection on tau (Khachaturyan's parametric search for min-max partitions, without the order of nodes).
"""

from __future__ import annotations

import numpy as np

from orchestrator.planner.classes import ROUNDING, Counts, Floats, Phase, least_in_flight, phases, room
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Problem

_HALVINGS = 60


def chain_rate(problem: Problem, limits: Limits) -> float:
    """Return a rate in microbatches a second that no chain of single nodes passes; 0 where none fits."""
    paces = [_least_pace(problem, limits, phase) for phase in phases(problem)]
    return 1 / sum(paces) if np.isfinite(paces).all() and sum(paces) > 0 else (0.0 if sum(paces) else np.inf)


def _least_pace(problem: Problem, limits: Limits, phase: Phase) -> float:
    """Return the longest pace known to be out of reach, in seconds a microbatch."""
    search = _Chains(problem, limits, phase)
    high = float((problem.num_layers * search.layer_s_N + search.first_s_N + search.last_s_N).max())
    high = max(high, search.slowest_link_s, 1e-9)
    if not search.may_reach(high):
        return np.inf
    low = high * 1e-12
    if search.may_reach(low):
        return 0.0
    for _ in range(_HALVINGS):
        middle = np.sqrt(low * high) if high > 2 * low else (low + high) / 2
        if search.may_reach(middle):
            high = middle
        else:
            low = middle
    return low


class _Chains:
    def __init__(self, problem: Problem, limits: Limits, phase: Phase) -> None:
        self.problem, self.limits = problem, limits
        size = problem.num_layers
        self.layer_s_N = phase.layer_s_N(problem)
        self.first_s_N, self.last_s_N = phase.first_s_N(problem), phase.last_s_N(problem)
        most_layers = size - (limits.num_stages or 1) + 1
        self.room = room(problem, float(least_in_flight(problem, limits)), most_layers, slack=ROUNDING)
        down, up = phase.down_bytes(problem), phase.up_bytes(problem)
        self.link_s_PP = np.maximum(down * problem.byte_s_PP, up * problem.byte_s_PP.T)
        with np.errstate(divide="ignore"):
            shared_s = max(down, up) and np.maximum(
                down / problem.shared_bytes_per_s_PP, up / problem.shared_bytes_per_s_PP.T
            )
        self.link_s_PP = np.maximum(self.link_s_PP, shared_s)
        up_s, down_s = problem.uplink_byte_s_N, problem.downlink_byte_s_N
        # Own ways: between two others; as the first, which only sends forward and takes backward; as the last.
        self.inner_own_s_N = (down + up) * np.maximum(up_s, down_s)
        self.first_own_s_N = np.maximum(down * up_s, up * down_s)
        self.last_own_s_N = np.maximum(up * up_s, down * down_s)
        own_s = float(self.inner_own_s_N.max())
        self.slowest_link_s = max(own_s, float(self.link_s_PP.max()) if problem.num_places > 1 else 0.0)
        self.slowest_link_s = max(self.slowest_link_s, float(np.diag(self.link_s_PP).max()))

    def may_reach(self, pace_s: float) -> bool:
        """Return False only where no chain has that pace."""
        pace_s *= 1 + ROUNDING
        size, holds = self.problem.num_layers, self.room
        whole = size * self.layer_s_N + self.first_s_N + self.last_s_N <= pace_s
        if (whole & (holds.layers_N == size)).any() and self.limits.num_stages in (None, 1):
            return True
        inner_N = self._layers(pace_s, 0.0, self.inner_own_s_N)
        first_N = np.where(holds.first_N, self._layers(pace_s, self.first_s_N, self.first_own_s_N), 0)
        last_N = np.where(holds.last_N, self._layers(pace_s, self.last_s_N, self.last_own_s_N), 0)
        return any(
            self._covers(inner_N[part], first_N[part], last_N[part], self.problem.price_N[part])
            for part in self._joined(pace_s)
        )

    def _layers(self, pace_s: float, more_s_N: Floats | float, own_s_N: Floats) -> Counts:
        """Return how many layers each node does in time, within its memory, in an interval that is not all of them."""
        with np.errstate(divide="ignore", invalid="ignore"):
            layers_N = np.floor((pace_s - more_s_N) / self.layer_s_N)
        layers_N = np.where(self.layer_s_N > 0, layers_N, np.where(pace_s >= more_s_N, self.problem.num_layers, 0))
        most_N = np.minimum(self.room.layers_N, self.problem.num_layers - 1)
        return np.where(own_s_N <= pace_s, np.clip(layers_N, 0, most_N), 0).astype(np.int64)

    def _covers(self, inner_N: Counts, first_N: Counts, last_N: Counts, price_N: Floats) -> bool:
        """Return False only where one first, one last and others between do not hold all layers."""
        size = self.problem.num_layers
        if not first_N.any() or not last_N.any() or len(inner_N) < 2:
            return False
        # What it costs to have a node at an end rather than between, which may even gain.
        first_loss = np.where(first_N > 0, inner_N - first_N, size)
        last_loss = np.where(last_N > 0, inner_N - last_N, size)
        best_first, best_last = np.argsort(first_loss)[:2], np.argsort(last_loss)[:2]
        loss = min(first_loss[i] + last_loss[j] for i in best_first for j in best_last if i != j)
        gain_N = np.maximum(inner_N, np.maximum(first_N, last_N))
        order = np.argsort(-gain_N, kind="stable")
        most = self.limits.num_stages or size
        # The ends may be among those left out: they are then counted on top.
        top = int(gain_N[order[:most]].sum())
        if min(int(inner_N.sum()) - int(loss), top) < size:
            return False
        return self._affordable(gain_N, price_N)

    def _affordable(self, gain_N: Counts, price_N: Floats) -> bool:
        """Return False only where even parts of nodes that cost the budget together do not hold all layers."""
        useful = gain_N > 0
        gain, price = gain_N[useful].astype(np.float64), price_N[useful]
        order = np.argsort(price / gain, kind="stable")
        before = np.cumsum(gain[order]) - gain[order]
        parts = np.clip((self.problem.num_layers - before) / gain[order], 0.0, 1.0)
        return float((parts * price[order]).sum()) <= self.limits.max_dollars_per_hour * (1 + ROUNDING)

    def _joined(self, pace_s: float) -> list[Counts]:
        """Return the nodes of each group of places that links of this pace join, in either direction."""
        near_PP = self.link_s_PP <= pace_s
        near_PP |= near_PP.T
        label_P = np.full(self.problem.num_places, -1)
        for place in range(self.problem.num_places):
            if label_P[place] >= 0:
                continue
            label_P[place] = place
            edge = np.array([place])
            while len(edge):
                edge = np.flatnonzero(near_PP[edge].any(axis=0) & (label_P < 0))
                label_P[edge] = place
        of_node = label_P[self.problem.place_N]
        return [np.flatnonzero(of_node == label) for label in np.unique(of_node)]
