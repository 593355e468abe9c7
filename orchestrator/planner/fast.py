"""What a placement costs and how good it is, compiled: `evaluate` and `score` for searches that ask a million times.

PURE. The specification is `orchestrator.planner.evaluate` and `orchestrator.planner.objective`; a property test holds
this to them.
"""

from __future__ import annotations

import math

import numpy as np

from orchestrator.planner.compiled import inner, outer
from orchestrator.planner.evaluate import IN_FLIGHT_MARGIN
from orchestrator.planner.fast_chain import chain_pace, held_up
from orchestrator.planner.fast_pace import list_places, replicas_pace, split_into
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.tables import (
    BACKWARD,
    BDP_SPLIT,
    BYTE,
    COMMIT,
    DELAY,
    DOLLARS,
    DOWNLINK,
    FILL,
    FIRST_BACKWARD,
    FIRST_FORWARD,
    FIXED,
    FLIGHT,
    FORWARD,
    FRAME,
    GPIPE,
    LAST_BACKWARD,
    LAST_FORWARD,
    LAYER_BACKWARD,
    LAYER_FORWARD,
    LAYER_SAVED,
    LAYER_WEIGHT,
    MEMORY,
    ONE_F_ONE_B,
    PACE,
    PRICE,
    PRICE_SUM,
    RATE,
    SHORT,
    SHORT_SHARE,
    STEP,
    SYNC,
    THROUGHPUT,
    UPLINK,
    ZB_H1,
    Floats,
    Rules,
    Scratch,
    State,
    Tables,
    make_rules,
    make_scratch,
    make_state,
    make_tables,
    write_state,
)

# What a placement that is not allowed costs more than one that is, as a part of its cost, at least: a search must get
# through such placements, and leave them.
_REFUSED = 0.05
_ROUNDING = 1e-9


def fast_score(problem: Problem, limits: Limits, placement: Placement) -> float:
    """Return what `score` returns; for many placements of one problem keep tables, rules, state and scratch."""
    most = max(len(nodes) for nodes in placement.nodes)
    state = make_state(problem, most)
    if placement.num_stages > len(state.counts_S):
        return math.inf
    write_state(state, placement)
    return float(score_state(make_tables(problem), make_rules(limits), state, make_scratch(problem, most)))


@outer
def score_state(tables: Tables, rules: Rules, state: State, scratch: Scratch) -> float:
    """Return a placement's score, infinity where it is refused."""
    evaluate_into(tables, state, scratch)
    return value(rules, scratch) if violation(tables, rules, state, scratch) == 0.0 else np.inf


@inner
def value(rules: Rules, scratch: Scratch) -> float:
    """Return what the objective makes of the last evaluation, whether or not the placement is allowed."""
    if rules.objective == THROUGHPUT:
        return scratch.result[STEP]
    if rules.objective == DOLLARS:
        return scratch.result[PRICE_SUM] / 3600 * scratch.result[STEP]
    return scratch.result[PRICE_SUM]


@inner
def energy(rules: Rules, scratch: Scratch, violated: float, strictness: float) -> float:
    """Return what a search makes small: the value, dearer the more is violated, with the step to tell equals apart."""
    step_s = scratch.result[STEP]
    if rules.objective == THROUGHPUT:
        base = step_s
    elif rules.objective == DOLLARS:
        base = scratch.result[PRICE_SUM] / 3600 * step_s + 1e-9 * step_s
    else:
        base = scratch.result[PRICE_SUM] + 1e-9 * step_s
    return base * (1.0 + strictness * violated)


@inner
def violation(tables: Tables, rules: Rules, state: State, scratch: Scratch) -> float:
    """Return by how much the last evaluated placement misses what is allowed and what fits; 0 only where it does not.

    A part for each thing violated, and the parts of memory, money and time that are missing.
    """
    result, num_stages = scratch.result, state.size[0]
    missed = 0.0
    if result[SHORT] > 0.0:
        missed += _REFUSED + result[SHORT_SHARE]
    if result[PRICE_SUM] > rules.max_dollars_per_hour:
        missed += _REFUSED + result[PRICE_SUM] / max(rules.max_dollars_per_hour, 1e-9 * result[PRICE_SUM]) - 1.0
    if result[STEP] > rules.max_step_s:
        missed += _REFUSED + result[STEP] / max(rules.max_step_s, 1e-9 * result[STEP]) - 1.0
    if rules.num_stages > 0 and rules.num_stages != num_stages:
        missed += _REFUSED * abs(rules.num_stages - num_stages)
    for stage in range(num_stages):
        count = state.counts_S[stage]
        if count < rules.min_copies:
            missed += 2.0 * _REFUSED * (rules.min_copies - count)
        if count > rules.max_replicas:
            missed += _REFUSED * (count - rules.max_replicas)
        if rules.min_domains > 1:
            num_domains = 0
            for replica in range(count):
                is_new = True
                domain = tables.domain_N[state.members_SR[stage, replica]]
                for other in range(replica):
                    if tables.domain_N[state.members_SR[stage, other]] == domain:
                        is_new = False
                        break
                num_domains += is_new
            if num_domains < rules.min_domains:
                missed += _REFUSED * (rules.min_domains - num_domains)
    if len(rules.pins_K2) + len(rules.after_K2) > 0:
        missed += _REFUSED * _wrong_places(rules, state, scratch)
    return missed


@inner
def _wrong_places(rules: Rules, state: State, scratch: Scratch) -> int:
    """Return how many pins and orders of nodes are not kept to."""
    num_stages, stage_of_N, wrong = state.size[0], scratch.stage_of_N, 0
    for stage in range(num_stages):
        for replica in range(state.counts_S[stage]):
            stage_of_N[state.members_SR[stage, replica]] = stage
    for row in range(len(rules.pins_K2)):
        node, stage = rules.pins_K2[row, 0], rules.pins_K2[row, 1]
        if stage < -1 or stage >= num_stages:
            wrong += 1
        elif stage_of_N[node] >= 0:
            wrong += stage_of_N[node] != (num_stages - 1 if stage == -1 else stage)
    for row in range(len(rules.after_K2)):
        later, earlier = stage_of_N[rules.after_K2[row, 0]], stage_of_N[rules.after_K2[row, 1]]
        wrong += later >= 0 and earlier >= 0 and later <= earlier
    for stage in range(num_stages):
        for replica in range(state.counts_S[stage]):
            stage_of_N[state.members_SR[stage, replica]] = -1
    return int(wrong)


@inner
def memory_bytes(
    node_NF: Floats, state_bytes: Floats, node: int, num_layers: int, first: bool, last: bool, in_flight: int
) -> float:
    """Return what so many layers take on a node with so many microbatches in flight."""
    total = num_layers * state_bytes[0] + node_NF[node, FIXED]
    total += in_flight * (num_layers * node_NF[node, LAYER_SAVED] + node_NF[node, FLIGHT])
    if first:
        total += state_bytes[1]
    if last:
        total += state_bytes[2] + state_bytes[3] + in_flight * state_bytes[4]
    return total


@outer
def evaluate_into(tables: Tables, state: State, scratch: Scratch) -> None:
    """Write what a placement costs into `scratch.result`, and its stages' figures beside."""
    num_stages, num_microbatches, schedule = state.size[0], tables.num_microbatches, tables.schedule
    node_NF, place_N, pair_PPF, state_bytes = tables.node_NF, tables.place_N, tables.pair_PPF, tables.state_bytes
    layers_S, counts_S, members_SR = state.layers_S, state.counts_S, state.members_SR
    result, trip_S, shares_SR, window_SR = scratch.result, scratch.trip_S, scratch.shares_SR, scratch.window_SR
    is_chain = True
    for stage in range(num_stages):
        is_chain = is_chain and counts_S[stage] == 1
    if is_chain:
        more_s, pace_s = chain_pace(tables, state, scratch)
    else:
        more_s, pace_s = _groups_pace(tables, state, scratch)
    rate, sync_s, commit_s, price, short, short_share = 1.0 / pace_s, 0.0, 0.0, 0.0, -np.inf, 0.0
    home = place_N[members_SR[0, 0]]
    for stage in range(num_stages):
        count = counts_S[stage]
        num_layers = layers_S[stage]
        first, last = stage == 0, stage + 1 == num_stages
        needed = IN_FLIGHT_MARGIN * trip_S[stage] / pace_s * (1.0 - _ROUNDING)
        speed = 0.0
        if not is_chain:
            for replica in range(count):
                speed += 1.0 / scratch.total_SR[stage, replica]
        held, num_more = 0, num_microbatches
        for replica in range(count):
            node, share = members_SR[stage, replica], shares_SR[stage, replica]
            if schedule == GPIPE:
                window = num_microbatches
            elif schedule == ONE_F_ONE_B:
                window = min(num_stages - stage, num_microbatches)
            elif schedule == ZB_H1:
                window = min(num_stages, num_microbatches)
            else:
                # A part by speed of what the round trip needs, and no more than memory allows.
                wanted = needed if is_chain else needed / (scratch.total_SR[stage, replica] * speed)
                most = min(float(num_microbatches), math.ceil(wanted))
                empty = memory_bytes(node_NF, state_bytes, node, num_layers, first, last, 0)
                each = memory_bytes(node_NF, state_bytes, node, num_layers, first, last, 1) - empty
                if each > 0.0:
                    most = min(most, (node_NF[node, MEMORY] - empty) // each)
                window = max(1, int(most))
            window_SR[stage, replica] = window
            in_flight = min(window, share)
            held += in_flight
            num_more -= share > 0
            memory = node_NF[node, MEMORY]
            missing = memory_bytes(node_NF, state_bytes, node, num_layers, first, last, in_flight) - memory
            short = max(short, missing)
            if missing > 0.0:
                short_share += missing / max(memory, 1e-3 * missing)
            price += node_NF[node, PRICE]
            commit_s = max(commit_s, pair_PPF[home, place_N[node], DELAY])
        if held <= num_more:
            rounds = num_more // held
            rest = num_more - rounds * held
            more_s = max(more_s, rounds * max(trip_S[stage], held * pace_s) + rest * pace_s)
            rate = min(rate, held / trip_S[stage])
        if count > 1:
            sync_s = max(sync_s, _sync_s(tables, state, scratch, stage, num_layers, first, last))
    if is_chain and schedule in (ONE_F_ONE_B, ZB_H1) and num_stages > 2:
        held_up_s, slowest_s = held_up(tables, num_stages, scratch, pace_s)
        if slowest_s > 0.0:
            more_s, rate = max(more_s, held_up_s), min(rate, 1.0 / slowest_s)
    if num_stages == 1 and counts_S[0] == 1:
        commit_s = 0.0
    result[STEP] = trip_S[0] + more_s + sync_s + 2 * commit_s
    result[RATE], result[FILL], result[PACE], result[SYNC] = rate, trip_S[0], pace_s, sync_s
    result[COMMIT], result[SHORT], result[SHORT_SHARE], result[PRICE_SUM] = 2 * commit_s, short, short_share, price


@inner
def _groups_pace(tables: Tables, state: State, scratch: Scratch) -> tuple[float, float]:
    """Write round trips and shares of microbatches; return what `replicas_pace` does, of both phases for GPipe."""
    num_stages, node_NF = state.size[0], tables.node_NF
    layers_S, counts_S, members_SR = state.layers_S, state.counts_S, state.members_SR
    forward_SR, backward_SR, total_SR = scratch.forward_SR, scratch.backward_SR, scratch.total_SR
    pair_PPF, bytes_LF = tables.pair_PPF, tables.bytes_LF
    is_split = tables.schedule in (BDP_SPLIT, ZB_H1)
    places_SR, num_places_S = scratch.places_SR, scratch.num_places_S
    out_SR, into_SR = scratch.out_SR, scratch.into_SR
    list_places(tables, state, scratch)
    trip_s = 0.0
    for stage in range(num_stages - 1, -1, -1):
        num_layers = layers_S[stage]
        slowest_s = 0.0
        for replica in range(counts_S[stage]):
            node = members_SR[stage, replica]
            forward, backward = num_layers * node_NF[node, LAYER_FORWARD], num_layers * node_NF[node, LAYER_BACKWARD]
            if stage == 0:
                forward, backward = forward + node_NF[node, FIRST_FORWARD], backward + node_NF[node, FIRST_BACKWARD]
            if stage + 1 == num_stages:
                forward, backward = forward + node_NF[node, LAST_FORWARD], backward + node_NF[node, LAST_BACKWARD]
            seconds = forward + backward
            forward_SR[stage, replica], backward_SR[stage, replica] = forward, backward
            total_SR[stage, replica] = seconds
            if is_split:
                seconds -= num_layers * node_NF[node, LAYER_WEIGHT]
            slowest_s = max(slowest_s, seconds)
        trip_s += slowest_s
        if stage + 1 < num_stages:
            slowest_s, forward_bytes, backward_bytes = 0.0, bytes_LF[stage, FORWARD], bytes_LF[stage, BACKWARD]
            for i in range(num_places_S[stage]):
                p = places_SR[stage, i]
                for j in range(num_places_S[stage + 1]):
                    q = places_SR[stage + 1, j]
                    delays_s = pair_PPF[p, q, DELAY] + pair_PPF[q, p, DELAY]
                    down_byte_s = max(pair_PPF[p, q, FRAME], max(out_SR[stage, i], into_SR[stage + 1, j]))
                    up_byte_s = max(pair_PPF[q, p, FRAME], max(out_SR[stage + 1, j], into_SR[stage, i]))
                    slowest_s = max(slowest_s, delays_s + forward_bytes * down_byte_s + backward_bytes * up_byte_s)
            trip_s += slowest_s
        scratch.trip_S[stage] = trip_s
        split_into(total_SR[stage], counts_S[stage], tables.num_microbatches, scratch.shares_SR[stage])
        scratch.stage_s_S[stage] = scratch.link_s_S[stage] = 0.0
    if tables.schedule == GPIPE:
        down_s, down_pace_s = replicas_pace(tables, state, scratch, forward_SR, 1.0, 0.0)
        up_s, up_pace_s = replicas_pace(tables, state, scratch, backward_SR, 0.0, 1.0)
        return down_s + up_s, down_pace_s + up_pace_s
    return replicas_pace(tables, state, scratch, total_SR, 1.0, 1.0)


@inner
def _sync_s(
    tables: Tables, state: State, scratch: Scratch, stage: int, num_layers: int, first: bool, last: bool
) -> float:
    """Return how long a stage's replicas take to average their gradients."""
    node_NF, place_N, pair_PPF, members_SR = tables.node_NF, tables.place_N, tables.pair_PPF, state.members_SR
    places_SR, num_places, count = scratch.places_SR, scratch.num_places_S[stage], state.counts_S[stage]
    size = num_layers * tables.sync_bytes[0] + tables.sync_bytes[1] * first + tables.sync_bytes[2] * last
    sent = size * (count - 1) / count
    slowest_s = own = 0.0
    for i in range(num_places):
        p = places_SR[stage, i]
        for j in range(num_places):
            if i != j:
                q = places_SR[stage, j]
                slowest_s = max(slowest_s, pair_PPF[p, q, DELAY] + sent * pair_PPF[p, q, BYTE])
    for replica in range(count):
        node = members_SR[stage, replica]
        own = max(own, max(node_NF[node, UPLINK], node_NF[node, DOWNLINK]))
        if num_places < count:
            # Two nodes of one place exchange over what lies within it.
            p = place_N[node]
            for other in range(replica):
                if place_N[members_SR[stage, other]] == p:
                    slowest_s = max(slowest_s, pair_PPF[p, p, DELAY] + sent * pair_PPF[p, p, BYTE])
                    break
    return 2 * max(slowest_s, sent * own)
