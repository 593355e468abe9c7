"""The best cuts for nodes in a given order, compiled: dynamic programming over stages and layers.

PURE. First the least pace that any cuts reach (as PipeDream, SOSP 2019, does), then, for that pace and some that are
slower, the cuts with the shortest fill. What a stage takes does not depend on the other stages' cuts, nor do links, so
for each pace the cuts are exact; memory is counted with the microbatches in flight that the schedule needs at least.
"""

from __future__ import annotations

import numpy as np

from orchestrator.planner.compiled import allocating, inner
from orchestrator.planner.fast import memory_bytes
from orchestrator.planner.tables import (
    BDP_SPLIT,
    FIRST_BACKWARD,
    FIRST_FORWARD,
    GPIPE,
    LAST_BACKWARD,
    LAST_FORWARD,
    LAYER_BACKWARD,
    LAYER_FORWARD,
    LAYER_WEIGHT,
    MEMORY,
    ONE_F_ONE_B,
    Floats,
    Ints,
    State,
    Tables,
)

# Paces to try, over the least.
_SLACKS = np.array([1.0, 1.05, 1.2, 1.6])
CUT_EVALUATIONS = len(_SLACKS)
# What a byte short of memory costs: far more than any time.
_SHORT = 1e6


@allocating
def cuts(tables: Tables, state: State) -> Ints:
    """Return the stages' layers for each pace that is tried; [paces, S]. There must not be more stages than layers."""
    num_stages, num_layers = state.size[0], tables.num_layers
    most = num_layers - num_stages + 1
    pace_SK = np.empty((num_stages, most + 1))
    trip_SK = np.empty((num_stages, most + 1))
    _write_costs(tables, state, pace_SK, trip_SK)
    cost_SL = np.empty((num_stages + 1, num_layers + 1))
    size_SL = np.empty((num_stages + 1, num_layers + 1), np.int32)
    least_s = _solve(pace_SK, pace_SK, np.inf, True, cost_SL, size_SL)
    layers_CS = np.empty((len(_SLACKS), num_stages), np.int32)
    for row in range(len(_SLACKS)):
        _solve(pace_SK, trip_SK, least_s * _SLACKS[row] * (1.0 + 1e-12), False, cost_SL, size_SL)
        left = num_layers
        for stage in range(num_stages - 1, -1, -1):
            layers_CS[row, stage] = size_SL[stage + 1, left]
            left -= layers_CS[row, stage]
    return layers_CS


@inner
def _write_costs(tables: Tables, state: State, pace_SK: Floats, trip_SK: Floats) -> None:
    """Write what each stage with k layers takes in the long run, and of a microbatch's round trip."""
    num_stages, node_NF, members_SR = state.size[0], tables.node_NF, state.members_SR
    for stage in range(num_stages):
        count, first, last = state.counts_S[stage], stage == 0, stage + 1 == num_stages
        for k in range(1, pace_SK.shape[1]):
            rate = slowest_s = short = 0.0
            for pick in range(count):
                node = members_SR[stage, pick]
                seconds = k * (node_NF[node, LAYER_FORWARD] + node_NF[node, LAYER_BACKWARD])
                if first:
                    seconds += node_NF[node, FIRST_FORWARD] + node_NF[node, FIRST_BACKWARD]
                if last:
                    seconds += node_NF[node, LAST_FORWARD] + node_NF[node, LAST_BACKWARD]
                rate += 1.0 / seconds
                away_s = seconds - k * node_NF[node, LAYER_WEIGHT] if tables.schedule == BDP_SPLIT else seconds
                slowest_s = max(slowest_s, away_s)
            for pick in range(count):
                node, in_flight = members_SR[stage, pick], 1
                if tables.schedule == ONE_F_ONE_B:
                    in_flight = min(num_stages - stage, tables.num_microbatches)
                elif tables.schedule == GPIPE:
                    in_flight = -(-tables.num_microbatches // count)
                needed = memory_bytes(node_NF, tables.state_bytes, node, k, first, last, in_flight)
                short = max(short, needed / max(node_NF[node, MEMORY], 1.0) - 1.0)
            pace_SK[stage, k] = (1.0 + _SHORT * short) / rate
            trip_SK[stage, k] = slowest_s


@inner
def _solve(pace_SK: Floats, cost_SK: Floats, pace_s: float, is_worst: bool, cost_SL: Floats, size_SL: Ints) -> float:
    """Write, for the first s stages on l layers, the least cost whose stages keep the pace, and the last one's layers.

    The cost is the sum of the stages', or the worst of them.
    """
    num_stages, most, num_layers = pace_SK.shape[0], pace_SK.shape[1] - 1, cost_SL.shape[1] - 1
    cost_SL[:] = np.inf
    cost_SL[0, 0] = 0.0
    for stage in range(num_stages):
        for before in range(stage, num_layers):
            base = cost_SL[stage, before]
            if base == np.inf:
                continue
            for k in range(1, min(most, num_layers - before) + 1):
                if pace_SK[stage, k] > pace_s:
                    # More layers are slower still.
                    break
                cost = max(base, cost_SK[stage, k]) if is_worst else base + cost_SK[stage, k]
                if cost < cost_SL[stage + 1, before + k]:
                    cost_SL[stage + 1, before + k] = cost
                    size_SL[stage + 1, before + k] = k
    return float(cost_SL[num_stages, num_layers])
