"""Stages for a large fleet: places in a row, each with the layers that its nodes are worth, cut into whole stages.

PURE. Were nodes a fluid, each would be worth its layers a second over the fleet's rate, and stages laid along the row
of places would all do that rate, with one crossing of each link. Whole nodes and layers come near it; what rounding
leaves, `level` evens out between stages of one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.classes import room
from orchestrator.planner.evaluate import IN_FLIGHT_MARGIN
from orchestrator.planner.level import level
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Floats, Placement, Problem
from orchestrator.planner.walk import Walk, walks

Counts = NDArray[np.int64]
# A plan counts on so much less memory, as a part of it, than there is.
_SLACK = -1e-12
# What is left to gain by levelling, as a part of the rate.
_LEVEL_ENOUGH = 2e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class Workers:
    """The nodes that a plan may use, what a layer takes on each, and how many layers each is given at most."""

    nodes: Counts
    layer_s_N: Floats
    most_layers_N: Counts
    # Microbatches a second, were nodes a fluid.
    rate: float
    # How long a microbatch is thought to be away from the first stage: what is in flight there takes memory.
    trip_s: float


def workers(
    problem: Problem, limits: Limits, nodes: Counts, *, longest: int, caution: float, early: bool = False
) -> Workers | None:
    """Return those of `nodes` that can hold a layer, or None; `early`: with the memory for what is in flight anywhere.

    `caution`: how many times as long as in a fluid a microbatch is thought to be away; 0: memory in flight is not
    looked at. Where replicas are limited, nodes too slow to make up a stage are left out.
    """
    size = problem.num_layers
    most = min(longest, size - (limits.num_stages or 1) + 1)
    if limits.num_stages is not None:
        most = -(-size // limits.num_stages)
    fits_N = np.minimum(room(problem, 1.0, size, slack=_SLACK).layers_N, most)
    nodes = nodes[fits_N[nodes] >= (most if limits.num_stages is not None else 1)]
    if not len(nodes):
        return None
    rate, nodes = _fluid_rate(problem, limits, nodes)
    # Little's law: each node has one microbatch at a time.
    trip_s = caution * len(nodes) / rate
    team = Workers(nodes=nodes, layer_s_N=problem.layer_s_N, most_layers_N=fits_N, rate=rate, trip_s=trip_s)
    # Who cannot have enough in flight, at the end or, where early ones are wanted, at the start, is not counted on.
    start = 1 if early else max(size - 2, 1)
    able = stage_fits(problem, team, nodes, start, start + 1) if size > 2 else np.ones(len(nodes), np.bool_)
    if able.all() or not able.any():
        return team
    rate, nodes = _fluid_rate(problem, limits, nodes[able])
    return replace(team, nodes=nodes, rate=rate)


def _fluid_rate(problem: Problem, limits: Limits, nodes: Counts) -> tuple[float, Counts]:
    """Return the rate of nodes as a fluid, and those that a stage of few replicas can do with."""
    speed = 1 / problem.layer_s_N[nodes]
    ends = (problem.first_s_N + problem.last_s_N)[nodes] * speed
    layers = problem.num_layers + float((ends * speed).sum() / speed.sum())
    order = np.argsort(-speed, kind="stable")
    rates = np.minimum(np.cumsum(speed[order]) / layers, limits.max_replicas * speed[order])
    count = int(np.argmax(rates)) + 1
    return float(rates[count - 1]), np.sort(nodes[order[:count]])


def team_walks(problem: Problem, team: Workers, rng: np.random.Generator) -> list[Walk]:
    """Return orders of the team's places in which a pipeline may pass them, the best first."""
    place = problem.place_N[team.nodes]
    speed_P = np.bincount(place, weights=1 / team.layer_s_N[team.nodes], minlength=problem.num_places)
    count_P = np.bincount(place, minlength=problem.num_places)
    # As many nodes as a stage of one layer has.
    replicas_P = np.maximum(1.0, count_P * np.minimum(1.0, team.rate / np.maximum(speed_P, 1e-30)))
    layers_P = speed_P / speed_P.sum() * problem.num_layers
    return walks(problem, np.flatnonzero(count_P), team.rate, replicas_P, layers_P, rng)


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Nodes in a row; which run of nodes of one place each is of, -1 for none; and each place's rank in the row."""

    queue: Counts
    run_N: Counts
    rank_P: Counts


def node_order(problem: Problem, team: Workers, order: Counts) -> Runs:
    """Return the nodes along the row of places.

    Nodes with too little memory for the flight of the first stages come on the way back along the row. Within a place
    they stand by how much they hold, by turns the most or least first, so that where two places meet, nodes alike meet;
    the ends of the model go to nodes with much memory.
    """
    early = (
        stage_fits(problem, team, team.nodes, 1, 2) if problem.num_layers > 2 else np.ones(len(team.nodes), np.bool_)
    )
    runs = [(team.nodes[early], place) for place in order.tolist()]
    runs += [(team.nodes[~early], place) for place in order[::-1].tolist()]
    runs = [(nodes[problem.place_N[nodes] == place], place) for nodes, place in runs]
    runs = [(nodes, place) for nodes, place in runs if len(nodes)]
    run_N = np.full(problem.num_nodes, -1)
    parts: list[Counts] = []
    for turn, (nodes, _) in enumerate(runs):
        ranked = nodes[np.lexsort((team.layer_s_N[nodes], -team.most_layers_N[nodes]))]
        backward = turn % 2 == 1 or (turn == len(runs) - 1 and turn > 0)
        parts.append(ranked[::-1] if backward else ranked)
        run_N[nodes] = turn
    rank_P = np.full(problem.num_places, -1)
    rank_P[order] = np.arange(len(order))
    return Runs(queue=np.concatenate(parts), run_N=run_N, rank_P=rank_P)


def stage_rates(problem: Problem, nodes: Counts, start: int, stop: int, stage: int) -> Floats:
    """Return the microbatches a second of each of these nodes with layers [start, stop), as stage number `stage`."""
    first, last = start == 0, stop == problem.num_layers
    seconds = (stop - start) * problem.layer_s_N[nodes]
    seconds = seconds + first * problem.first_s_N[nodes] + last * problem.last_s_N[nodes]
    down, up = problem.forward_bytes_L, problem.backward_bytes_L
    sent = (not last) * down[stage] + (not first) * up[stage - 1]
    taken = (not last) * up[stage] + (not first) * down[stage - 1]
    own = np.maximum(sent * problem.uplink_byte_s_N[nodes], taken * problem.downlink_byte_s_N[nodes])
    return 1 / np.maximum(seconds, own)


def stage_fits(problem: Problem, team: Workers, nodes: Counts, start: int, stop: int) -> NDArray[np.bool_]:
    """Return which of these nodes may hold layers [start, stop), with what is in flight there.

    A microbatch is away for the part of the trip that is left. A node keeps in flight what it does in that time, or,
    where that is less, what it has to do in a step.
    """
    layers, count = stop - start, problem.num_microbatches
    seconds = layers * team.layer_s_N[nodes]
    left_s = IN_FLIGHT_MARGIN * team.trip_s * (problem.num_layers - start) / problem.num_layers
    flight = np.minimum(np.ceil(count / (seconds * team.rate)) + 1, count)
    if problem.schedule != "gpipe":
        flight = np.minimum(np.maximum(1, np.ceil(left_s / seconds)), flight)
    used = layers * problem.layer_state_bytes + problem.fixed_bytes_N[nodes]
    used = used + flight * (layers * problem.layer_saved_bytes_N[nodes] + problem.flight_bytes_N[nodes])
    used = used + problem.first_state_bytes * (start == 0)
    last = problem.last_state_bytes + problem.last_bytes + flight * problem.last_saved_bytes
    used = used + last * (stop == problem.num_layers)
    return (team.most_layers_N[nodes] >= layers) & (used <= problem.memory_bytes_N[nodes] * (1 + _SLACK))


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """Stages as they were cut: bounds, and each node's stage, -1 for none."""

    bounds: tuple[int, ...]
    stage_N: Counts


def cut_stages(problem: Problem, limits: Limits, team: Workers, runs: Runs) -> Cut | None:
    """Return the nodes in their order, cut into stages that do about the team's rate each; None where they run out.

    A stage has as many layers as all its nodes hold. What one stage has too much, the next has less. The last stage's
    nodes, which must hold the head, are set aside first.
    """
    size, rate = problem.num_layers, team.rate
    final = 1 if limits.num_stages is None else size // limits.num_stages
    last = _for_the_last(problem, limits, team, runs, size - final)
    if not len(last):
        return None
    stage_N = np.full(problem.num_nodes, -1, np.int64)
    if final == size:
        stage_N[last] = 0
        return Cut(bounds=(0, size), stage_N=stage_N)
    queue = runs.queue[~np.isin(runs.queue, last)]
    bounds, carried = [0], 0.0
    while bounds[-1] < size - final:
        if not len(queue):
            return None
        start, stage = bounds[-1], len(bounds) - 1
        lengths: Sequence[int] = range(min(size - final - start, int(team.most_layers_N[queue].max())), 0, -1)
        if limits.num_stages is not None:
            lengths = [-(-(size - start) // (limits.num_stages - stage))]
        # Not from runs far along the row, which would be far away.
        near = queue[runs.run_N[queue] <= runs.run_N[queue].min() + 1]
        length, count, able, sums = 0, 0, np.zeros(0, np.int64), np.zeros(0)
        for length in lengths:
            able = np.flatnonzero(stage_fits(problem, team, near, start, start + length))
            sums = np.cumsum(stage_rates(problem, near[able], start, start + length, stage))
            count = _nearest(sums, max(rate + carried / length, 0.5 * rate), limits.max_replicas)
            # Longer than one layer only where the next nodes in the row all hold as much.
            in_row = count > 0 and able[count - 1] == count - 1 and sums[count - 1] > 0.7 * rate
            if in_row or length == lengths[-1]:
                break
        if not count:
            return None
        carried += length * (rate - float(sums[count - 1]))
        stage_N[near[able[:count]]] = stage
        queue = queue[stage_N[queue] < 0]
        bounds.append(start + length)
    stage_N[last] = len(bounds) - 1
    return Cut(bounds=(*bounds, size), stage_N=stage_N)


def _nearest(sums: Floats, wanted: float, most: int) -> int:
    """Return how many come nearest to what is wanted."""
    count = int(np.searchsorted(sums, wanted)) + 1
    if 1 < count <= len(sums) and sums[count - 1] - wanted > wanted - sums[count - 2]:
        count -= 1
    return min(count, len(sums), most)


def _for_the_last(problem: Problem, limits: Limits, team: Workers, runs: Runs, start: int) -> Counts:
    """Return nodes for the last stage: from the row's end, the last place's first."""
    size = problem.num_layers
    behind = runs.queue[::-1]
    at_the_end = problem.place_N[behind] == problem.place_N[behind[0]]
    behind = np.concatenate([behind[at_the_end], behind[~at_the_end]])
    able = behind[stage_fits(problem, team, behind, start, size)]
    stage = 0 if start == 0 else 1
    sums = np.cumsum(stage_rates(problem, able, start, size, stage))
    return able[: len(able) if start == 0 else _nearest(sums, team.rate, limits.max_replicas)][: limits.max_replicas]


def levelled(
    problem: Problem, limits: Limits, team: Workers, runs: Runs, cut: Cut, *, reach: int, changes: int
) -> tuple[Placement, int]:
    """Return the stages with nodes moved until all are about equally fast, and how many changes that took.

    A node stays among the stages of its run, or at most `reach` beside them: what crosses between places hardly
    changes.
    """
    nodes = team.nodes
    rate_NS = allowed_rates(problem, team, runs, cut, reach)
    stage = cut.stage_N[nodes].copy()
    placed = np.flatnonzero(stage >= 0)
    totals = np.bincount(stage[placed], weights=rate_NS[placed, stage[placed]], minlength=rate_NS.shape[1])
    goal = float(totals.mean()) * (1 - _LEVEL_ENOUGH)
    made = level(rate_NS, stage, max(1, limits.min_copies), limits.max_replicas, goal, changes)
    return placement_of(problem, team, runs, cut.bounds, nodes, stage), made


def placement_of(
    problem: Problem, team: Workers, runs: Runs, bounds: tuple[int, ...], nodes: Counts, stage: Counts
) -> Placement:
    """Return the placement; replicas of a stage along the row: flow that fills them in order then hardly crosses."""
    rank = runs.rank_P[problem.place_N[nodes]]
    members: list[tuple[int, ...]] = []
    for s in range(len(bounds) - 1):
        own = np.flatnonzero(stage == s)
        ranked = own[np.lexsort((nodes[own], team.layer_s_N[nodes[own]], rank[own]))]
        members.append(tuple(nodes[ranked].tolist()))
    return Placement(bounds=bounds, nodes=tuple(members))


def allowed_rates(problem: Problem, team: Workers, runs: Runs, cut: Cut, reach: int) -> Floats:
    """Return what each of the team's nodes does in each stage, 0 where it does not fit or its run is far away."""
    num_stages = len(cut.bounds) - 1
    nodes = team.nodes
    run = runs.run_N[nodes]
    placed = np.flatnonzero(cut.stage_N[nodes] >= 0)
    first_Q, last_Q = np.full(run.max() + 1, num_stages), np.full(run.max() + 1, -1)
    np.minimum.at(first_Q, run[placed], cut.stage_N[nodes[placed]])
    np.maximum.at(last_Q, run[placed], cut.stage_N[nodes[placed]])
    first_Q, last_Q = first_Q - reach, last_Q + reach
    rate_NS = np.zeros((len(nodes), num_stages))
    for stage in range(num_stages):
        start, stop = cut.bounds[stage], cut.bounds[stage + 1]
        near = np.flatnonzero(((first_Q <= stage) & (stage <= last_Q))[run])
        fits = stage_fits(problem, team, nodes[near], start, stop) | (cut.stage_N[nodes[near]] == stage)
        able = near[fits]
        rate_NS[able, stage] = stage_rates(problem, nodes[able], start, stop, stage)
    return rate_NS
