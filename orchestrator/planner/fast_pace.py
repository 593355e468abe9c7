"""How fast a pipeline with replicas goes, compiled: the largest flow through its nodes and links.

PURE. First each stage's microbatches are dealt to its replicas by their speed, and from each on to all of the next;
where every link and shared way carries its part, no flow is larger. Else the flow is solved for. The specification is
`orchestrator.planner.evaluate`.
"""

from __future__ import annotations

import numpy as np

from orchestrator.planner.compiled import inner
from orchestrator.planner.flow import max_flow_into
from orchestrator.planner.tables import (
    BACKWARD,
    BYTE,
    DOWNLINK,
    FORWARD,
    SHARED,
    UPLINK,
    Counts,
    Floats,
    Scratch,
    State,
    Tables,
)

_ROUNDING = 1e-9
# How often a later moment is tried before microbatches are dealt one by one.
_TRIES = 8


@inner
def sent_and_taken(bytes_LF: Floats, stage: int, num_stages: int, down: float, up: float) -> tuple[float, float]:
    """Return the bytes that a stage sends and takes for one microbatch."""
    sent = taken = 0.0
    if stage + 1 < num_stages:
        sent += down * bytes_LF[stage, FORWARD]
        taken += up * bytes_LF[stage, BACKWARD]
    if stage > 0:
        sent += up * bytes_LF[stage - 1, BACKWARD]
        taken += down * bytes_LF[stage - 1, FORWARD]
    return sent, taken


@inner
def split_into(seconds_R: Floats, num_replicas: int, num_microbatches: int, shares_R: Counts) -> None:
    """Write how many microbatches each replica takes so that the last to finish is earliest; ties to the first."""
    if num_replicas == 1:
        shares_R[0] = num_microbatches
        return
    rate = 0.0
    for replica in range(num_replicas):
        rate += 1.0 / seconds_R[replica]
    # All that replicas finish before a moment is their own, if it is not too much; the others are dealt one by one.
    moment_s, step_s, left = 0.0, num_microbatches / rate * (1.0 - _ROUNDING), num_microbatches
    shares_R[:num_replicas] = 0
    for _ in range(_TRIES):
        rest = num_microbatches
        for replica in range(num_replicas):
            rest -= int((moment_s + step_s) / seconds_R[replica])
        if rest < 0:
            step_s /= 2
            continue
        moment_s += step_s
        step_s, left = rest / rate, rest
        if left * 4 <= num_replicas:
            break
    for replica in range(num_replicas):
        shares_R[replica] = int(moment_s / seconds_R[replica])
    for _ in range(left):
        best, best_s = 0, np.inf
        for replica in range(num_replicas):
            finish_s = (shares_R[replica] + 1) * seconds_R[replica]
            if finish_s < best_s:
                best, best_s = replica, finish_s
        shares_R[best] += 1


@inner
def list_places(tables: Tables, state: State, scratch: Scratch) -> None:
    """Write which different places each stage has, and the slowest of its nodes' own ways there."""
    place_N, members_SR, counts_S, node_NF = tables.place_N, state.members_SR, state.counts_S, tables.node_NF
    slot_P, places_SR, num_places_S = scratch.slot_P, scratch.places_SR, scratch.num_places_S
    out_SR, into_SR = scratch.out_SR, scratch.into_SR
    for stage in range(state.size[0]):
        num_places = 0
        for replica in range(counts_S[stage]):
            node = members_SR[stage, replica]
            place = place_N[node]
            slot = slot_P[place]
            if slot < 0:
                slot = slot_P[place] = num_places
                places_SR[stage, slot] = place
                out_SR[stage, slot] = into_SR[stage, slot] = 0.0
                num_places += 1
            out_SR[stage, slot] = max(out_SR[stage, slot], node_NF[node, UPLINK])
            into_SR[stage, slot] = max(into_SR[stage, slot], node_NF[node, DOWNLINK])
        num_places_S[stage] = num_places
        for slot in range(num_places):
            slot_P[places_SR[stage, slot]] = -1


@inner
def replicas_pace(
    tables: Tables, state: State, scratch: Scratch, seconds_SR: Floats, down: float, up: float
) -> tuple[float, float]:
    """Return the seconds a step takes beyond its first microbatch, and those of a microbatch in the long run.

    `down` and `up` are 1.0 where forward or backward frames count, else 0.0. Needs `list_places` and the shares.
    """
    node_NF, place_N, pair_PPF, bytes_LF = tables.node_NF, tables.place_N, tables.pair_PPF, tables.bytes_LF
    members_SR, counts_S, busy_SR, weight_S = state.members_SR, state.counts_S, scratch.busy_SR, scratch.weight_S
    slot_P, places_SR, num_places_S = scratch.slot_P, scratch.places_SR, scratch.num_places_S
    most_SR, whole_SR = scratch.most_SR, scratch.whole_SR
    num_stages = state.size[0]
    alone_s, ceiling = 0.0, np.inf
    for stage in range(num_stages):
        num_places = num_places_S[stage]
        for slot in range(num_places):
            slot_P[places_SR[stage, slot]] = slot
            most_SR[stage, slot] = whole_SR[stage, slot] = 0.0
        sent, taken = sent_and_taken(bytes_LF, stage, num_stages, down, up)
        alone = weight = 0.0
        for replica in range(counts_S[stage]):
            node, seconds = members_SR[stage, replica], seconds_SR[stage, replica]
            busy = max(seconds, max(sent * node_NF[node, UPLINK], taken * node_NF[node, DOWNLINK]))
            speed = 1.0 / busy
            busy_SR[stage, replica] = busy
            alone += 1.0 / seconds
            weight += speed
            slot = slot_P[place_N[node]]
            most_SR[stage, slot] = max(most_SR[stage, slot], speed)
            whole_SR[stage, slot] += speed
        for slot in range(num_places):
            slot_P[places_SR[stage, slot]] = -1
        weight_S[stage] = weight
        scratch.stage_s_S[stage] = max(scratch.stage_s_S[stage], 1.0 / weight)
        alone_s = max(alone_s, 1.0 / alone)
        ceiling = min(ceiling, weight)
    # How many times too much the busiest link would carry.
    excess = 0.0
    for stage in range(num_stages - 1):
        forward_bytes, backward_bytes = down * bytes_LF[stage, FORWARD], up * bytes_LF[stage, BACKWARD]
        worst = 0.0
        for i in range(num_places_S[stage]):
            p, most = places_SR[stage, i], most_SR[stage, i]
            for j in range(num_places_S[stage + 1]):
                q = places_SR[stage + 1, j]
                busy = max(forward_bytes * pair_PPF[p, q, BYTE], backward_bytes * pair_PPF[q, p, BYTE])
                worst = max(worst, most * most_SR[stage + 1, j] * busy)
        worst /= weight_S[stage] * weight_S[stage + 1]
        scratch.link_s_S[stage] = max(scratch.link_s_S[stage], worst)
        excess = max(excess, worst * ceiling)
    # The plain deal, as fast as its busiest link lets it be.
    pace_s = max(1.0, excess) / ceiling
    if tables.has_shared:
        pace_s = max(pace_s, _dealt_shared_s(tables, state, scratch, down, up))
    if pace_s > (1.0 + _ROUNDING) / ceiling:
        num_edges = _write_graph(tables, state, scratch, down, up)
        # Too large to solve for is left at that.
        if num_edges <= len(scratch.tails_E):
            rate, shared_s = _solve(tables, state, scratch, num_edges, down, up)
            pace_s = min(pace_s, max(1.0 / rate, shared_s))
    more_s = 0.0
    for stage in range(num_stages):
        for replica in range(state.counts_S[stage]):
            more_s = max(more_s, (scratch.shares_SR[stage, replica] - 1) * seconds_SR[stage, replica])
    if pace_s > alone_s * (1.0 + _ROUNDING):
        more_s = max(more_s, (tables.num_microbatches - 1) * pace_s)
    return more_s, pace_s


@inner
def _write_graph(tables: Tables, state: State, scratch: Scratch, down: float, up: float) -> int:
    """Write the graph of nodes and links; return its edges, or how many they would be where there is no room for them.

    Vertices: source, sink, then a way in and a way out of each replica, stage by stage. In the order of `evaluate`,
    since shared links are judged by the one flow that this order gives.
    """
    num_stages = state.size[0]
    num_edges, num_used = state.counts_S[0] + state.counts_S[num_stages - 1], 0
    for stage in range(num_stages):
        num_used += state.counts_S[stage]
        if stage + 1 < num_stages:
            num_edges += state.counts_S[stage] * state.counts_S[stage + 1]
    num_edges += num_used
    if num_edges > len(scratch.tails_E):
        return num_edges
    place_N, pair_PPF, bytes_LF = tables.place_N, tables.pair_PPF, tables.bytes_LF
    members_SR, counts_S, busy_SR = state.members_SR, state.counts_S, scratch.busy_SR
    tails, heads, capacities = scratch.tails_E, scratch.heads_E, scratch.capacities_E
    edge = 0
    for replica in range(counts_S[0]):
        tails[edge], heads[edge], capacities[edge] = 0, 2 + 2 * replica, np.inf
        edge += 1
    first_of_last = num_used - counts_S[num_stages - 1]
    for replica in range(counts_S[num_stages - 1]):
        tails[edge], heads[edge], capacities[edge] = 3 + 2 * (first_of_last + replica), 1, np.inf
        edge += 1
    vertex = 2
    for stage in range(num_stages):
        for replica in range(counts_S[stage]):
            tails[edge], heads[edge], capacities[edge] = vertex, vertex + 1, 1.0 / busy_SR[stage, replica]
            vertex += 2
            edge += 1
    vertex = 2
    for stage in range(num_stages - 1):
        forward_bytes, backward_bytes = down * bytes_LF[stage, FORWARD], up * bytes_LF[stage, BACKWARD]
        next_vertex = vertex + 2 * counts_S[stage]
        for i in range(counts_S[stage]):
            p = place_N[members_SR[stage, i]]
            for j in range(counts_S[stage + 1]):
                q = place_N[members_SR[stage + 1, j]]
                seconds = max(forward_bytes * pair_PPF[p, q, BYTE], backward_bytes * pair_PPF[q, p, BYTE])
                tails[edge], heads[edge] = vertex + 2 * i + 1, next_vertex + 2 * j
                capacities[edge] = 1.0 / seconds if seconds > 0.0 else np.inf
                edge += 1
        vertex = next_vertex
    return num_edges


@inner
def _solve(
    tables: Tables, state: State, scratch: Scratch, num_edges: int, down: float, up: float
) -> tuple[float, float]:
    """Return the flow's rate, and how long the busiest pair of places is busy for one microbatch."""
    num_stages, num_used = state.size[0], 0
    for stage in range(num_stages):
        num_used += state.counts_S[stage]
    flows = scratch.flows_E[: num_edges if tables.has_shared else 0]
    rate = max_flow_into(
        2 + 2 * num_used,
        scratch.tails_E[:num_edges],
        scratch.heads_E[:num_edges],
        scratch.capacities_E[:num_edges],
        0,
        1,
        scratch.flow,
        flows,
    )
    if not tables.has_shared:
        return rate, 0.0
    first_link = state.counts_S[0] + state.counts_S[num_stages - 1] + num_used
    edge = first_link
    for stage in range(num_stages - 1):
        for i in range(state.counts_S[stage]):
            p = tables.place_N[state.members_SR[stage, i]]
            for j in range(state.counts_S[stage + 1]):
                q = tables.place_N[state.members_SR[stage + 1, j]]
                part = flows[edge] / rate
                scratch.load_PP[p, q] += part * (down * tables.bytes_LF[stage, FORWARD])
                scratch.load_PP[q, p] += part * (up * tables.bytes_LF[stage, BACKWARD])
                edge += 1
    return rate, clear_load(tables, state, scratch)


@inner
def _dealt_shared_s(tables: Tables, state: State, scratch: Scratch, down: float, up: float) -> float:
    """Return how long the busiest pair of places is busy where each stage's microbatches are dealt by speed."""
    for stage in range(state.size[0] - 1):
        for i in range(scratch.num_places_S[stage]):
            p, share = scratch.places_SR[stage, i], scratch.whole_SR[stage, i] / scratch.weight_S[stage]
            for j in range(scratch.num_places_S[stage + 1]):
                q = scratch.places_SR[stage + 1, j]
                part = share * (scratch.whole_SR[stage + 1, j] / scratch.weight_S[stage + 1])
                scratch.load_PP[p, q] += part * (down * tables.bytes_LF[stage, FORWARD])
                scratch.load_PP[q, p] += part * (up * tables.bytes_LF[stage, BACKWARD])
    return clear_load(tables, state, scratch)


@inner
def clear_load(tables: Tables, state: State, scratch: Scratch) -> float:
    """Return how long the busiest pair of places is busy with what was loaded on links of stages; unload them."""
    busiest_s = 0.0
    for stage in range(state.size[0] - 1):
        for i in range(scratch.num_places_S[stage]):
            p = scratch.places_SR[stage, i]
            for j in range(scratch.num_places_S[stage + 1]):
                q = scratch.places_SR[stage + 1, j]
                busiest_s = max(busiest_s, scratch.load_PP[p, q] / tables.pair_PPF[p, q, SHARED])
                busiest_s = max(busiest_s, scratch.load_PP[q, p] / tables.pair_PPF[q, p, SHARED])
                scratch.load_PP[p, q] = scratch.load_PP[q, p] = 0.0
    return busiest_s
