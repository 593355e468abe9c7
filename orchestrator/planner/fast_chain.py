"""How fast a chain goes, one node a stage, compiled: the commonest case, and the one that searches ask most often.

PURE. The specification is `orchestrator.planner.evaluate`.
"""

from __future__ import annotations

from orchestrator.planner.compiled import inner
from orchestrator.planner.fast_pace import clear_load, list_places, sent_and_taken
from orchestrator.planner.tables import (
    BACKWARD,
    BDP_SPLIT,
    BYTE,
    DELAY,
    DOWNLINK,
    FIRST_BACKWARD,
    FIRST_FORWARD,
    FORWARD,
    FRAME,
    GPIPE,
    LAST_BACKWARD,
    LAST_FORWARD,
    LAYER_BACKWARD,
    LAYER_FORWARD,
    LAYER_WEIGHT,
    UPLINK,
    ZB_H1,
    Scratch,
    State,
    Tables,
)


@inner
def chain_pace(tables: Tables, state: State, scratch: Scratch) -> tuple[float, float]:
    """Write each stage's round trip and its one node's share of the microbatches.

    Returns the seconds a step takes beyond its first microbatch, and those of a microbatch in the long run.
    """
    num_stages, num_microbatches, schedule = state.size[0], tables.num_microbatches, tables.schedule
    node_NF, place_N, pair_PPF, bytes_LF = tables.node_NF, tables.place_N, tables.pair_PPF, tables.bytes_LF
    layers_S, members_SR, shares_SR = state.layers_S, state.members_SR, scratch.shares_SR
    trip_S, stage_s_S, link_s_S = scratch.trip_S, scratch.stage_s_S, scratch.link_s_S
    # Both directions at once but for GPipe, whose phases have a pace of their own.
    trip_s = pace_s = down_s = up_s = 0.0
    next_place = next_node = 0
    for stage in range(num_stages - 1, -1, -1):
        node, num_layers = members_SR[stage, 0], layers_S[stage]
        place = place_N[node]
        forward, backward = num_layers * node_NF[node, LAYER_FORWARD], num_layers * node_NF[node, LAYER_BACKWARD]
        if stage == 0:
            forward, backward = forward + node_NF[node, FIRST_FORWARD], backward + node_NF[node, FIRST_BACKWARD]
        if stage + 1 == num_stages:
            forward, backward = forward + node_NF[node, LAST_FORWARD], backward + node_NF[node, LAST_BACKWARD]
        seconds = forward + backward
        there_s = back_s = link_s = 0.0
        if stage + 1 < num_stages:
            there_s = bytes_LF[stage, FORWARD] * pair_PPF[place, next_place, BYTE]
            back_s = bytes_LF[stage, BACKWARD] * pair_PPF[next_place, place, BYTE]
            link_s = max(there_s, back_s)
            delays_s = pair_PPF[place, next_place, DELAY] + pair_PPF[next_place, place, DELAY]
            down_byte_s, up_byte_s = pair_PPF[place, next_place, FRAME], pair_PPF[next_place, place, FRAME]
            down_byte_s = max(down_byte_s, max(node_NF[node, UPLINK], node_NF[next_node, DOWNLINK]))
            up_byte_s = max(up_byte_s, max(node_NF[next_node, UPLINK], node_NF[node, DOWNLINK]))
            trip_s += delays_s + bytes_LF[stage, FORWARD] * down_byte_s + bytes_LF[stage, BACKWARD] * up_byte_s
        scratch.beyond_S[stage] = trip_s
        is_split = schedule in (BDP_SPLIT, ZB_H1)
        trip_s += seconds - num_layers * node_NF[node, LAYER_WEIGHT] if is_split else seconds
        uplink, downlink = node_NF[node, UPLINK], node_NF[node, DOWNLINK]
        busy_s = seconds
        if uplink > 0.0 or downlink > 0.0:
            sent, taken = sent_and_taken(bytes_LF, stage, num_stages, 1.0, 1.0)
            busy_s = max(busy_s, max(sent * uplink, taken * downlink))
            if schedule == GPIPE:
                sent, taken = sent_and_taken(bytes_LF, stage, num_stages, 1.0, 0.0)
                forward = max(forward, max(sent * uplink, taken * downlink))
                sent, taken = sent_and_taken(bytes_LF, stage, num_stages, 0.0, 1.0)
                backward = max(backward, max(sent * uplink, taken * downlink))
        pace_s = max(pace_s, max(busy_s, link_s))
        down_s, up_s = max(down_s, max(forward, there_s)), max(up_s, max(backward, back_s))
        trip_S[stage], stage_s_S[stage], link_s_S[stage] = trip_s, busy_s, link_s
        shares_SR[stage, 0] = num_microbatches
        next_place, next_node = place, node
    if tables.has_shared:
        list_places(tables, state, scratch)
        if schedule == GPIPE:
            down_s = max(down_s, _shared_s(tables, state, scratch, 1.0, 0.0))
            up_s = max(up_s, _shared_s(tables, state, scratch, 0.0, 1.0))
        else:
            pace_s = max(pace_s, _shared_s(tables, state, scratch, 1.0, 1.0))
    if schedule == GPIPE:
        pace_s = down_s + up_s
    return (num_microbatches - 1) * pace_s, pace_s


@inner
def _shared_s(tables: Tables, state: State, scratch: Scratch, down: float, up: float) -> float:
    """Return how long the busiest pair of places is busy for one microbatch."""
    place_N, members_SR, load_PP, bytes_LF = tables.place_N, state.members_SR, scratch.load_PP, tables.bytes_LF
    for stage in range(state.size[0] - 1):
        p, q = place_N[members_SR[stage, 0]], place_N[members_SR[stage + 1, 0]]
        load_PP[p, q] += down * bytes_LF[stage, FORWARD]
        load_PP[q, p] += up * bytes_LF[stage, BACKWARD]
    return clear_load(tables, state, scratch)


@inner
def held_up(tables: Tables, num_stages: int, scratch: Scratch, pace_s: float) -> tuple[float, float]:
    """Return what `slowest_stretch` finds of 1F1B: what a step takes beyond its first microbatch, and the slowest pace.

    0 and 0 where no stretch is slower than `pace_s`. Needs the round trips of `chain_pace`.
    """
    trip_S, beyond_S, over_S = scratch.trip_S, scratch.beyond_S, scratch.weight_S
    # By how much the worst stretch from each stage on is over its count of paces: most stages need no closer look.
    over_s = 0.0
    for first in range(num_stages - 2, -1, -1):
        link_s = beyond_S[first] - trip_S[first + 1]
        over_s = trip_S[first] - beyond_S[first] - pace_s + max(0.0, link_s + over_s if first + 2 < num_stages else 0.0)
        over_S[first] = over_s
    more_s = slowest_s = 0.0
    for first in range(num_stages - 2):
        if over_S[first] <= 0.0:
            continue
        for last in range(first + 1, num_stages - 1):
            count = last - first + 1
            seconds = trip_S[first] - beyond_S[last]
            if seconds > count * pace_s:
                rounds = (tables.num_microbatches - (num_stages - last)) // count
                if rounds > 0:
                    rest = tables.num_microbatches - 1 - rounds * count
                    more_s = max(more_s, rounds * seconds + rest * pace_s)
                    slowest_s = max(slowest_s, seconds / count)
    return more_s, slowest_s
