"""The best placements there are, by trying them all: what the planner's search is measured against.

Exact, and hopeless for more than a few nodes; `bench.planner_best_chain` goes further, for chains.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from orchestrator.planner.fast import score_state
from orchestrator.planner.objective import Found, Limits
from orchestrator.planner.problem import Problem
from orchestrator.planner.tables import (
    Rules,
    Scratch,
    State,
    Tables,
    copy_state,
    make_rules,
    make_scratch,
    make_state,
    make_tables,
    read_state,
)


def best_of_all(problem: Problem, limits: Limits) -> Found:
    """Return the best of all placements: every number of stages, every cut, every choice of nodes for each stage.

    Of a stage's nodes the order does not count, but for which of the first stage's is first. 6 nodes and 8 layers make
    some 300,000 placements.
    """
    most = max(1, min(limits.max_replicas, problem.num_nodes))
    best, state = make_state(problem, most), make_state(problem, most)
    found, tried = _try_all(make_tables(problem), make_rules(limits), state, best, make_scratch(problem, most))
    placement = read_state(best) if math.isfinite(found) else None
    return Found(placement=placement, score=float(found), evaluations=int(tried))


@njit(cache=True, error_model="numpy")
def _try_all(tables: Tables, rules: Rules, state: State, best: State, scratch: Scratch) -> tuple[float, int]:
    num_nodes, num_layers, members_SR = len(tables.node_NF), tables.num_layers, state.members_SR
    stage_N = np.zeros(num_nodes, np.int64)
    best_score, tried = np.inf, 0
    for num_stages in range(1, min(num_nodes, num_layers) + 1):
        state.size[0] = num_stages
        # Which stage each node has, as digits of a number; the largest digit: none.
        for number in range((num_stages + 1) ** num_nodes):
            state.counts_S[:num_stages] = 0
            fits = True
            for node in range(num_nodes):
                stage_N[node] = number % (num_stages + 1)
                number //= num_stages + 1
                stage = stage_N[node]
                if stage < num_stages:
                    if state.counts_S[stage] == members_SR.shape[1]:
                        fits = False
                        break
                    members_SR[stage, state.counts_S[stage]] = node
                    state.counts_S[stage] += 1
            for stage in range(num_stages):
                fits = fits and state.counts_S[stage] > 0
            if not fits:
                continue
            for first in range(state.counts_S[0]):
                members_SR[0, 0], members_SR[0, first] = members_SR[0, first], members_SR[0, 0]
                state.layers_S[:num_stages] = 1
                state.layers_S[num_stages - 1] = num_layers - num_stages + 1
                while True:
                    tried += 1
                    score = score_state(tables, rules, state, scratch)
                    if score < best_score:
                        best_score = score
                        copy_state(state, best)
                    # The next of all ways to write the layers as a sum.
                    stage = num_stages - 1
                    while stage > 0 and state.layers_S[stage] == 1:
                        stage -= 1
                    if stage == 0:
                        break
                    left = state.layers_S[stage] - 1
                    state.layers_S[stage] = 1
                    state.layers_S[stage - 1] += 1
                    state.layers_S[num_stages - 1] = left
    return best_score, tried
