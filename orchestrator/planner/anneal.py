"""Local search over placements, compiled: simulated annealing, and a descent that tries every small change.

PURE. Kirkpatrick, Gelatt and Vecchi (Science 220, 1983) with temperatures as parts of the current cost. All randomness
comes from a stream that the caller seeds; the end of a search is a number of evaluations. One compiled function does
both, since to compile the cost model once more takes longer than most searches.
"""

from __future__ import annotations

import math

import numpy as np

from orchestrator.planner.compiled import inner, outer
from orchestrator.planner.draws import draw_share
from orchestrator.planner.fast import energy, evaluate_into, value, violation
from orchestrator.planner.moves import Stream, change, drop_replica, drop_stage, list_spares
from orchestrator.planner.tables import (
    STEP,
    Counts,
    Floats,
    Ints,
    Rules,
    Scratch,
    State,
    Tables,
    copy_state,
)

# After so many evaluations the temperature is set anew.
_STRIDE = 32
# How often two changes are made as one.
_TWO_AT_ONCE = 0.25
_ROUNDING = 1e-12
# What a descent tries in turn: a layer from each stage to each other; each node for each spare one or one of another
# stage; each replica or stage dropped; each spare node added to each stage.
_SHIFT, _SWAP, _DROP, _ADD, _NUM_KINDS = range(5)
# Its place among them: kind, stage, other stage or node, replica of each, and whether anything helped in this round.
_KIND, _A, _B, _I, _J, _HELPED, CURSOR_SIZE = range(7)


@outer
def explore(
    tables: Tables,
    rules: Rules,
    current: State,
    trial: State,
    best: State,
    best_marks: Floats,
    marks: Floats,
    scratch: Scratch,
    spares_N: Ints,
    cursor: Counts,
    stream: Stream,
    evaluations: int,
    hot: float,
    cold: float,
    strictness: float,
) -> tuple[int, float]:
    """Search from `current`, which ends elsewhere; whatever beats `best` on the way is kept there.

    A change for the worse by a part x of the cost is taken with probability exp(-x / t), t from `hot` to `cold`; where
    `hot` is 0 every small change is tried in turn instead, until none helps. `marks` become the score, infinity where
    it is refused, and the step of the last that was evaluated; `best_marks` are the best's. Returns how many
    evaluations were used (at least the one of `current`) and the energy of `current`.
    """
    is_descent = hot == 0.0
    copy_state(current, trial)
    cursor[:] = 0
    temperature, cooling = hot, 1.0
    if not is_descent:
        cooling = (cold / hot) ** (_STRIDE / max(evaluations, 1))
    num_spares = list_spares(current, spares_N, scratch.stage_of_N)
    current_e, done, used, tried, is_listed = np.inf, 1, 0, 0, True
    while used < evaluations and tried < evaluations:
        if used > 0:
            if is_descent:
                done = _next_change(tables, rules, current, trial, scratch, spares_N, num_spares, cursor)
                if done < 0:
                    break
            else:
                tried += 1
                if tried % _STRIDE == 0:
                    temperature *= cooling
                done = change(tables, rules, trial, scratch, spares_N, num_spares, stream)
                if done > 0 and draw_share(stream) < _TWO_AT_ONCE:
                    if done == 2:
                        num_spares = list_spares(trial, spares_N, scratch.stage_of_N)
                        is_listed = False
                    done = max(done, change(tables, rules, trial, scratch, spares_N, num_spares, stream))
            if done == 0:
                continue
        used += 1
        evaluate_into(tables, trial, scratch)
        missed = violation(tables, rules, trial, scratch)
        marks[0], marks[1] = value(rules, scratch) if missed == 0.0 else np.inf, scratch.result[STEP]
        trial_e = energy(rules, scratch, missed, strictness)
        is_taken = trial_e < current_e * (1.0 - _ROUNDING)
        if not is_taken and not is_descent:
            worse = (trial_e - current_e) / max(current_e, 1e-300)
            is_taken = worse <= 0.0 or worse < -temperature * math.log(max(draw_share(stream), 1e-300))
        if is_taken or used == 1:
            # Refused ones score infinity; of equals the shorter step is better, as where only money counts.
            is_equal = marks[0] == best_marks[0] and marks[0] < np.inf
            if marks[0] < best_marks[0] or (is_equal and marks[1] < best_marks[1]):
                best_marks[0], best_marks[1] = marks[0], marks[1]
                copy_state(trial, best)
            copy_state(trial, current)
            current_e = trial_e
            if done == 2:
                num_spares = list_spares(current, spares_N, scratch.stage_of_N)
            if used > 1:
                cursor[_HELPED] = 1
                if done == 2:
                    # The other stages and nodes that were to come are others now.
                    cursor[_B] = np.iinfo(np.int32).max
        else:
            copy_state(current, trial)
            if not is_listed:
                num_spares = list_spares(current, spares_N, scratch.stage_of_N)
        is_listed = True
    return used, current_e


@inner
def _next_change(
    tables: Tables,
    rules: Rules,
    current: State,
    trial: State,
    scratch: Scratch,
    spares_N: Ints,
    num_spares: int,
    cursor: Counts,
) -> int:
    """Make the next small change of `trial`, which is as `current`; return as `change`, or -1 where all were made."""
    counts_S = current.counts_S
    while True:
        num_stages = current.size[0]
        kind, a, b, i, j = cursor[_KIND], cursor[_A], cursor[_B], cursor[_I], cursor[_J]
        if kind == _NUM_KINDS:
            if cursor[_HELPED] == 0:
                return -1
            cursor[:] = 0
            continue
        if a >= num_stages:
            cursor[_KIND], cursor[_A], cursor[_B] = kind + 1, 0, 0
            continue
        num_others = num_stages
        if kind == _SWAP:
            num_others += num_spares
        elif kind == _DROP:
            num_others = counts_S[a]
        elif kind == _ADD:
            num_others = num_spares
        if b >= num_others:
            cursor[_A], cursor[_B], cursor[_I], cursor[_J] = a + 1, 0, 0, 0
            continue
        if kind != _SWAP:
            cursor[_B] = b + 1
        else:
            inner_count = counts_S[b] if b < num_stages else 1
            cursor[_J] = j + 1
            if j + 1 >= inner_count:
                cursor[_I], cursor[_J] = i + 1, 0
                if i + 1 >= counts_S[a]:
                    cursor[_B], cursor[_I] = b + 1, 0
        done = _small_change(tables, rules, trial, scratch, spares_N, kind, a, b, i, j)
        if done > 0:
            return done


@inner
def _small_change(
    tables: Tables,
    rules: Rules,
    state: State,
    scratch: Scratch,
    spares_N: Ints,
    kind: int,
    a: int,
    b: int,
    i: int,
    j: int,
) -> int:
    """Make one change; return what `change` does."""
    num_stages, layers_S, counts_S, members_SR = state.size[0], state.layers_S, state.counts_S, state.members_SR
    if kind == _SHIFT:
        if a == b or layers_S[a] < 2:
            return 0
        layers_S[a] -= 1
        layers_S[b] += 1
        return 1
    if kind == _SWAP:
        if i >= counts_S[a]:
            return 0
        if b >= num_stages:
            members_SR[a, i] = spares_N[b - num_stages]
            return 2
        # Within the first stage, too: its first node is where commits are decided.
        if b < a or (a == b and (a > 0 or i > 0 or j == 0)) or j >= counts_S[b]:
            return 0
        members_SR[a, i], members_SR[b, j] = members_SR[b, j], members_SR[a, i]
        return 1
    if kind == _DROP:
        if counts_S[a] > 1:
            drop_replica(state, a, b)
        elif num_stages > 1:
            drop_stage(tables, state, a, scratch.weight_S)
        else:
            return 0
        return 2
    if counts_S[a] >= rules.max_replicas:
        return 0
    members_SR[a, counts_S[a]] = spares_N[b]
    counts_S[a] += 1
    return 2
