"""Small changes of a placement, compiled: the steps of a local search.

PURE. A change is made in place and may break limits; that is for its energy to say.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.compiled import inner
from orchestrator.planner.draws import draw_below, draw_share
from orchestrator.planner.tables import (
    LAYER_BACKWARD,
    LAYER_FORWARD,
    Floats,
    Ints,
    Rules,
    Scratch,
    State,
    Tables,
)

Stream = NDArray[np.uint64]

# How often each is tried: layers between stages, stages change places, nodes of two stages, a node for a spare one, a
# run of stages elsewhere, a run reversed, a node or stage dropped, one added, a replica moved, two stages joined, one
# cut in two; or a node brought behind one that is near to it.
_ODDS = np.array([6.0, 2.0, 3.0, 3.0, 2.0, 1.5, 1.0, 1.5, 5.0, 1.5, 0.4, 0.4])
(_SHIFT, _TRADE, _SWAP, _REPLACE, _RELOCATE, _REVERSE, _DROP, _ADD, _NEAR, _MIGRATE, _JOIN, _CUT) = range(12)
_CHANCES = np.cumsum(_ODDS) / _ODDS.sum()
_CHAIN_ODDS = _ODDS * (np.arange(12) < _MIGRATE)
_CHAIN_CHANCES = np.cumsum(_CHAIN_ODDS) / _CHAIN_ODDS.sum()
# The longest run of stages that moves as one, and the most layers that follow a change of nodes.
_LONGEST_RUN, _MOST_LEVELLED = 3, 4


@inner
def list_spares(state: State, spares_N: Ints, stage_of_N: Ints) -> int:
    """Write which nodes hold nothing, and return how many; `stage_of_N` is -1 throughout, before and after."""
    for stage in range(state.size[0]):
        for replica in range(state.counts_S[stage]):
            stage_of_N[state.members_SR[stage, replica]] = stage
    num_spares = 0
    for node in range(len(stage_of_N)):
        if stage_of_N[node] < 0:
            spares_N[num_spares] = node
            num_spares += 1
        stage_of_N[node] = -1
    return num_spares


@inner
def change(
    tables: Tables, rules: Rules, state: State, scratch: Scratch, spares_N: Ints, num_spares: int, stream: Stream
) -> int:
    """Change a placement at random.

    Returns 0 where nothing could be changed, 1 where the same nodes hold it all, 2 where others do. What bound the
    last evaluation written to `scratch` is more likely to be changed.
    """
    num_stages, layers_S, counts_S, members_SR = state.size[0], state.layers_S, state.counts_S, state.members_SR
    chances = _CHAIN_CHANCES if rules.max_replicas == 1 else _CHANCES
    dice, kind = draw_share(stream), 0
    while dice >= chances[kind]:
        kind += 1
    a = _pick(num_stages, scratch.stage_s_S, stream)
    b = draw_below(stream, num_stages)
    done, level = 1, False
    if kind == _SHIFT:
        if a == b or layers_S[a] < 2:
            return 0
        amount = 1 + draw_below(stream, max(1, layers_S[a] // 4))
        layers_S[a] -= amount
        layers_S[b] += amount
    elif kind == _TRADE:
        if a == b:
            return 0
        _exchange(state, a, b)
    elif kind == _SWAP:
        i, j = draw_below(stream, counts_S[a]), draw_below(stream, counts_S[b])
        # Of the first stage, the first node is where commits are decided.
        if a == b and (a > 0 or i == j):
            return 0
        members_SR[a, i], members_SR[b, j] = members_SR[b, j], members_SR[a, i]
        level = True
    elif kind == _REPLACE:
        if num_spares == 0:
            return 0
        members_SR[a, draw_below(stream, counts_S[a])] = spares_N[draw_below(stream, num_spares)]
        done, level = 2, True
    elif kind == _RELOCATE:
        length = min(1 + draw_below(stream, _LONGEST_RUN), num_stages - 1)
        if length < 1:
            return 0
        start, target = draw_below(stream, num_stages - length + 1), draw_below(stream, num_stages - length + 1)
        if start == target:
            return 0
        _relocate(state, start, length, target)
    elif kind == _REVERSE:
        if a == b:
            return 0
        _turn(state, min(a, b), max(a, b) + 1)
    elif kind == _DROP:
        if counts_S[b] > 1 and counts_S[b] > rules.min_copies:
            drop_replica(state, b, draw_below(stream, counts_S[b]))
        elif num_stages > 1:
            drop_stage(tables, state, b, scratch.weight_S)
        else:
            return 0
        done = 2
    elif kind == _ADD:
        if num_spares == 0:
            return 0
        pick = draw_below(stream, num_spares)
        if rules.max_replicas > counts_S[a] and draw_share(stream) < 0.5:
            members_SR[a, counts_S[a]] = spares_N[pick]
            counts_S[a] += 1
            level = True
        else:
            copies = min(max(1, rules.min_copies), num_spares)
            if num_stages == len(counts_S) or copies > members_SR.shape[1]:
                return 0
            position = draw_below(stream, num_stages + 1)
            open_stage(state, position)
            counts_S[position] = copies
            for copy in range(copies):
                members_SR[position, copy] = spares_N[(pick + copy) % num_spares]
            fill_stage(tables, state, position, scratch.weight_S)
        done = 2
    elif kind == _NEAR:
        done = _bring_near(tables, state, scratch, spares_N, num_spares, stream)
        if done == 0:
            return 0
        level = True
    elif kind == _MIGRATE:
        if a == b or counts_S[b] < 2 or counts_S[a] >= rules.max_replicas:
            return 0
        replica = draw_below(stream, counts_S[b])
        members_SR[a, counts_S[a]] = members_SR[b, replica]
        counts_S[a] += 1
        drop_replica(state, b, replica)
        level = True
    elif kind == _JOIN:
        if b + 1 >= num_stages or counts_S[b] + counts_S[b + 1] > rules.max_replicas:
            return 0
        for replica in range(counts_S[b + 1]):
            members_SR[b, counts_S[b] + replica] = members_SR[b + 1, replica]
        counts_S[b] += counts_S[b + 1]
        layers_S[b] += layers_S[b + 1]
        close_stage(state, b + 1)
    else:
        if counts_S[b] < 2 or layers_S[b] < 2 or num_stages == len(counts_S):
            return 0
        _cut_stage(state, b, stream)
        level = True
    if level and draw_share(stream) < 0.5:
        level_layers(tables, state, 1 + draw_below(stream, _MOST_LEVELLED), scratch.weight_S)
    return done


@inner
def _pick(num_stages: int, weights_S: Floats, stream: Stream) -> int:
    """Return a stage at random, the largest of three for every second draw."""
    stage = draw_below(stream, num_stages)
    if draw_share(stream) < 0.5:
        for _ in range(2):
            other = draw_below(stream, num_stages)
            if weights_S[other] > weights_S[stage]:
                stage = other
    return stage


@inner
def _exchange(state: State, a: int, b: int) -> None:
    """Let two stages change places, with their layers."""
    layers_S, counts_S, members_SR = state.layers_S, state.counts_S, state.members_SR
    for replica in range(max(counts_S[a], counts_S[b])):
        members_SR[a, replica], members_SR[b, replica] = members_SR[b, replica], members_SR[a, replica]
    layers_S[a], layers_S[b] = layers_S[b], layers_S[a]
    counts_S[a], counts_S[b] = counts_S[b], counts_S[a]


@inner
def _turn(state: State, start: int, stop: int) -> None:
    """Reverse the order of stages [start, stop)."""
    low, high = start, stop - 1
    while low < high:
        _exchange(state, low, high)
        low += 1
        high -= 1


@inner
def _relocate(state: State, start: int, length: int, target: int) -> None:
    """Move a run of stages so that it starts at `target`: turned about three times, two runs change places."""
    low, high = min(start, target), max(start, target) + length
    middle = low + length if start < target else high - length
    _turn(state, low, middle)
    _turn(state, middle, high)
    _turn(state, low, high)


@inner
def _bring_near(tables: Tables, state: State, scratch: Scratch, spares_N: Ints, num_spares: int, stream: Stream) -> int:
    """Bring a node behind, or before, one that is near to it; return as `change`."""
    num_stages, counts_S, members_SR = state.size[0], state.counts_S, state.members_SR
    num_near = tables.near_NK.shape[1]
    if num_near == 0:
        return 0
    a = _pick(num_stages, scratch.link_s_S, stream)
    is_behind = draw_share(stream) < 0.5
    if not is_behind:
        a = min(a + 1, num_stages - 1)
    near = tables.near_NK[members_SR[a, draw_below(stream, counts_S[a])], draw_below(stream, num_near)]
    b = a + 1 if is_behind else a - 1
    home, place = -1, 0
    for stage in range(num_stages):
        for replica in range(counts_S[stage]):
            if members_SR[stage, replica] == near:
                home, place = stage, replica
    if home in (a, b):
        return 0
    way = draw_below(stream, 4)
    if home < 0:
        if 0 <= b < num_stages and way < 2:
            members_SR[b, draw_below(stream, counts_S[b])] = near
        elif num_stages < len(counts_S):
            position = max(a, b)
            open_stage(state, position)
            counts_S[position] = 1
            members_SR[position, 0] = near
            fill_stage(tables, state, position, scratch.weight_S)
        else:
            return 0
        return 2
    if way == 0 and 0 <= b < num_stages:
        replica = draw_below(stream, counts_S[b])
        members_SR[b, replica], members_SR[home, place] = near, members_SR[b, replica]
    elif way == 1 and 0 <= b < num_stages:
        _exchange(state, b, home)
    elif way == 2 or home == 0 or home + 1 == num_stages:
        _relocate(state, home, 1, (a if home < a else a + 1) if is_behind else (a - 1 if home < a else a))
    elif home > a:
        # The run between them turned about makes them neighbours.
        _turn(state, a + 1, home + 1)
    else:
        _turn(state, home + 1, a + 1)
    return 1


@inner
def drop_replica(state: State, stage: int, replica: int) -> None:
    """Take one of a stage's nodes away."""
    last = state.counts_S[stage] - 1
    state.members_SR[stage, replica] = state.members_SR[stage, last]
    state.counts_S[stage] = last


@inner
def open_stage(state: State, position: int) -> None:
    """Make room for a stage at a position: it has no layers and no nodes yet."""
    layers_S, counts_S, members_SR = state.layers_S, state.counts_S, state.members_SR
    for stage in range(state.size[0], position, -1):
        layers_S[stage], counts_S[stage] = layers_S[stage - 1], counts_S[stage - 1]
        for replica in range(counts_S[stage]):
            members_SR[stage, replica] = members_SR[stage - 1, replica]
    layers_S[position] = counts_S[position] = 0
    state.size[0] += 1


@inner
def close_stage(state: State, position: int) -> None:
    """Take a stage out, and its layers and nodes with it."""
    layers_S, counts_S, members_SR = state.layers_S, state.counts_S, state.members_SR
    for stage in range(position, state.size[0] - 1):
        layers_S[stage], counts_S[stage] = layers_S[stage + 1], counts_S[stage + 1]
        for replica in range(counts_S[stage]):
            members_SR[stage, replica] = members_SR[stage + 1, replica]
    state.size[0] -= 1


@inner
def speed(tables: Tables, state: State, stage: int) -> float:
    """Return how many layers a second a stage's nodes do together."""
    node_NF, members_SR, total = tables.node_NF, state.members_SR, 0.0
    for replica in range(state.counts_S[stage]):
        node = members_SR[stage, replica]
        total += 1.0 / (node_NF[node, LAYER_FORWARD] + node_NF[node, LAYER_BACKWARD])
    return total


@inner
def drop_stage(tables: Tables, state: State, position: int, speed_S: Floats) -> None:
    """Take a stage out and give its layers, one after the other, to whichever of the others is soonest done with it."""
    left = state.layers_S[position]
    close_stage(state, position)
    num_stages, layers_S = state.size[0], state.layers_S
    for stage in range(num_stages):
        speed_S[stage] = speed(tables, state, stage)
    for _ in range(left):
        best, best_s = 0, np.inf
        for stage in range(num_stages):
            seconds = (layers_S[stage] + 1) / speed_S[stage]
            if seconds < best_s:
                best, best_s = stage, seconds
        layers_S[best] += 1


@inner
def fill_stage(tables: Tables, state: State, position: int, speed_S: Floats) -> None:
    """Give an empty stage layers of those that take longest, as long as it is sooner done with them; one at least.

    Where no stage can spare a layer, the stage is taken out again.
    """
    num_stages, layers_S = state.size[0], state.layers_S
    for stage in range(num_stages):
        speed_S[stage] = speed(tables, state, stage)
    while True:
        slowest, slowest_s = -1, -1.0
        for stage in range(num_stages):
            seconds = layers_S[stage] / speed_S[stage]
            if stage != position and layers_S[stage] > 1 and seconds > slowest_s:
                slowest, slowest_s = stage, seconds
        if slowest < 0 or (layers_S[position] > 0 and (layers_S[position] + 1) / speed_S[position] >= slowest_s):
            break
        layers_S[slowest] -= 1
        layers_S[position] += 1
    if layers_S[position] == 0:
        close_stage(state, position)


@inner
def level_layers(tables: Tables, state: State, most_moved: int, speed_S: Floats) -> None:
    """Move layers, one at a time, from the stage that takes longest to the one soonest done with one more."""
    num_stages, layers_S = state.size[0], state.layers_S
    for stage in range(num_stages):
        speed_S[stage] = speed(tables, state, stage)
    for _ in range(most_moved):
        slowest, slowest_s, fastest, fastest_s = -1, 0.0, -1, np.inf
        for stage in range(num_stages):
            now_s, then_s = layers_S[stage] / speed_S[stage], (layers_S[stage] + 1) / speed_S[stage]
            if now_s > slowest_s and layers_S[stage] > 1:
                slowest, slowest_s = stage, now_s
            if then_s < fastest_s:
                fastest, fastest_s = stage, then_s
        if slowest < 0 or fastest_s >= slowest_s:
            break
        layers_S[slowest] -= 1
        layers_S[fastest] += 1


@inner
def _cut_stage(state: State, stage: int, stream: Stream) -> None:
    """Cut a stage in two: some of its layers and some of its nodes go to a new one behind it."""
    count = state.counts_S[stage]
    for last in range(count - 1, 0, -1):
        other = draw_below(stream, last + 1)
        members_SR = state.members_SR
        members_SR[stage, last], members_SR[stage, other] = members_SR[stage, other], members_SR[stage, last]
    kept = 1 + draw_below(stream, count - 1)
    layers = min(max(1, state.layers_S[stage] * kept // count), state.layers_S[stage] - 1)
    open_stage(state, stage + 1)
    for replica in range(kept, count):
        state.members_SR[stage + 1, replica - kept] = state.members_SR[stage, replica]
    state.counts_S[stage + 1], state.counts_S[stage] = count - kept, kept
    state.layers_S[stage + 1], state.layers_S[stage] = state.layers_S[stage] - layers, layers
