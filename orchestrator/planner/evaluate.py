"""What a placement costs in time and memory, in closed form: the specification of every search.

PURE. A step fills the pipeline, goes on at the pace of whatever binds, exchanges gradients among replicas, and commits.
Written to be read: the searches have faster forms of it, which tests hold to this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import numpy as np

from actors.list_schedule import IN_FLIGHT_MARGIN
from actors.schedule import FIXED, SPLIT, num_in_flight
from orchestrator.planner.flow import max_flow
from orchestrator.planner.problem import Floats, Placement, Problem
from orchestrator.planner.stretches import slowest_stretch

# A link binds where the flow through links falls short of what the stages alone would do by more than rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a placement costs; seconds, bytes, microbatches a second."""

    step_s: float
    # Microbatches a second once the pipeline is full.
    rate: float
    # The first microbatch down and back; what each adds in the long run; replicas' exchange; the commit's round trip.
    fill_s: float
    pace_s: float
    sync_s: float
    commit_s: float
    # Of each stage's replicas: microbatches kept in flight, microbatches a step, and memory.
    in_flight_SR: tuple[tuple[int, ...], ...]
    shares_S: tuple[tuple[int, ...], ...]
    memory_S: tuple[tuple[float, ...], ...]
    # By how much the worst node is short of memory; 0 where all fit.
    short_bytes: float


def forward_s(problem: Problem, node: int, start: int, stop: int) -> float:
    """Return the seconds of one microbatch forward through layers [start, stop) on a node."""
    return float(
        (stop - start) * problem.layer_forward_s_N[node]
        + (problem.first_forward_s_N[node] if start == 0 else 0.0)
        + (problem.last_forward_s_N[node] if stop == problem.num_layers else 0.0)
    )


def backward_s(problem: Problem, node: int, start: int, stop: int) -> float:
    """Return the seconds of one microbatch backward through layers [start, stop) on a node."""
    return float(
        (stop - start) * problem.layer_backward_s_N[node]
        + (problem.first_backward_s_N[node] if start == 0 else 0.0)
        + (problem.last_backward_s_N[node] if stop == problem.num_layers else 0.0)
    )


def compute_s(problem: Problem, node: int, start: int, stop: int) -> float:
    """Return the seconds of one microbatch forward and backward through layers [start, stop) on a node."""
    return forward_s(problem, node, start, stop) + backward_s(problem, node, start, stop)


def memory_bytes(problem: Problem, node: int, start: int, stop: int, in_flight: int) -> float:
    """Return what layers [start, stop) take on a node with so many microbatches in flight, on the high side."""
    num_layers = stop - start
    total = num_layers * problem.layer_state_bytes + problem.fixed_bytes_N[node]
    total += in_flight * (num_layers * problem.layer_saved_bytes_N[node] + problem.flight_bytes_N[node])
    if start == 0:
        total += problem.first_state_bytes
    if stop == problem.num_layers:
        total += problem.last_state_bytes + problem.last_bytes + in_flight * problem.last_saved_bytes
    return float(total)


def split_microbatches(seconds_R: list[float], num_microbatches: int) -> tuple[int, ...]:
    """Return how many microbatches each replica takes so that the last to finish is earliest; ties to the first."""
    shares = [0] * len(seconds_R)
    for _ in range(num_microbatches):
        replica = min(range(len(shares)), key=lambda r: (shares[r] + 1) * seconds_R[r])
        shares[replica] += 1
    return tuple(shares)


def evaluate(problem: Problem, placement: Placement) -> Evaluation:
    """Return what a placement costs.

    The pace of a full pipeline is that of its slowest stage or link. A schedule that keeps w microbatches in flight at
    a stage, of which each is away for a round trip, is held to w a round trip (Little's law). GPipe does all forwards,
    then all backwards, so each phase has a pace of its own. The orders of 1F1B and ZB-H1 bind stretches of stages
    too, where each has one node; replicas take what is ready.
    """
    spans = list(pairwise(placement.bounds))
    stages = list(zip(spans, placement.nodes, strict=True))
    forward_SR = [[forward_s(problem, node, *span) for node in nodes] for span, nodes in stages]
    backward_SR = [[backward_s(problem, node, *span) for node in nodes] for span, nodes in stages]
    total_SR = [[f + b for f, b in zip(*parts, strict=True)] for parts in zip(forward_SR, backward_SR, strict=True)]
    shares = tuple(split_microbatches(seconds, problem.num_microbatches) for seconds in total_SR)
    trip_S, beyond_S = round_trips(problem, placement, total_SR)
    if problem.schedule == "gpipe":
        down = _pace(LinkUse(problem, placement, True, False), forward_SR, shares)
        up = _pace(LinkUse(problem, placement, False, True), backward_SR, shares)
        more_s, pace_s = down[0] + up[0], down[1] + up[1]
    else:
        more_s, pace_s = _pace(LinkUse(problem, placement, True, True), total_SR, shares)
    windows = _windows(problem, placement, total_SR, trip_S, pace_s)
    rate = 1 / pace_s
    held_SR = [[min(pair) for pair in zip(*stage, strict=True)] for stage in zip(windows, shares, strict=True)]
    for trip_s, in_flight, split in zip(trip_S, held_SR, shares, strict=True):
        held = sum(in_flight)
        # Each replica starts with one of its own.
        num_more = problem.num_microbatches - sum(share > 0 for share in split)
        if held <= num_more:
            rounds, rest = divmod(num_more, held)
            more_s = max(more_s, rounds * max(trip_s, held * pace_s) + rest * pace_s)
            rate = min(rate, held / trip_s)
    if problem.schedule in ("1f1b", "zb-h1") and len(placement.used) == placement.num_stages:
        held_up_s, slowest = slowest_stretch(np.array(trip_S), np.array(beyond_S), problem.num_microbatches, pace_s)
        if slowest is not None:
            more_s, rate = max(more_s, held_up_s), min(rate, slowest.count / slowest.seconds)
    sync_s = max(_sync_s(problem, *stage) for stage in stages)
    first_place = problem.place_N[placement.nodes[0][0]]
    delays = [problem.delay_s_PP[first_place, problem.place_N[node]] for node in placement.used]
    commit_s = 2 * float(max(delays)) if len(placement.used) > 1 else 0.0
    memory = tuple(
        tuple(memory_bytes(problem, node, *span, held) for node, held in zip(nodes, in_flight, strict=True))
        for (span, nodes), in_flight in zip(stages, held_SR, strict=True)
    )
    short = max(
        used - problem.memory_bytes_N[node]
        for nodes, sizes in zip(placement.nodes, memory, strict=True)
        for node, used in zip(nodes, sizes, strict=True)
    )
    return Evaluation(
        step_s=trip_S[0] + more_s + sync_s + commit_s,
        rate=rate,
        fill_s=trip_S[0],
        pace_s=pace_s,
        sync_s=sync_s,
        commit_s=commit_s,
        in_flight_SR=windows,
        shares_S=shares,
        memory_S=memory,
        short_bytes=max(0.0, float(short)),
    )


def round_trips(problem: Problem, placement: Placement, total_SR: list[list[float]]) -> tuple[list[float], list[float]]:
    """Return, for each stage, how long a microbatch is away from its forward to the end of its backward there.

    And the part of that which is beyond the stage itself. By the slowest replica and the slowest link between replicas.
    With the backward split, the part that makes weight gradients is done while others are away, so it does not count.
    """
    byte_s = problem.frame_byte_s_PP
    trips: list[float] = []
    beyond: list[float] = []
    trip_s = 0.0
    for stage in reversed(range(placement.num_stages)):
        span = (placement.bounds[stage], placement.bounds[stage + 1])
        seconds = total_SR[stage]
        if problem.schedule in SPLIT:
            num_layers = span[1] - span[0]
            seconds = [
                s - num_layers * float(problem.layer_weight_s_N[n])
                for s, n in zip(seconds, placement.nodes[stage], strict=True)
            ]
        if stage + 1 < placement.num_stages:
            here, there = (_slowest_ways(problem, placement.nodes[stage + end]) for end in (0, 1))
            trip_s += max(
                problem.delay_s_PP[p, q]
                + problem.delay_s_PP[q, p]
                + problem.forward_bytes_L[stage] * max(byte_s[p, q], ours.out, theirs.into)
                + problem.backward_bytes_L[stage] * max(byte_s[q, p], theirs.out, ours.into)
                for p, ours in here.items()
                for q, theirs in there.items()
            )
        beyond.append(float(trip_s))
        trip_s += max(seconds)
        trips.append(float(trip_s))
    return trips[::-1], beyond[::-1]


class _Ways(NamedTuple):
    """Seconds of a byte on a node's own way out, and in."""

    out: float
    into: float


def _slowest_ways(problem: Problem, nodes: Sequence[int]) -> dict[int, _Ways]:
    """Return each place of some nodes with the slowest of their own ways there."""
    ways: dict[int, _Ways] = {}
    for node in nodes:
        own = _Ways(float(problem.uplink_byte_s_N[node]), float(problem.downlink_byte_s_N[node]))
        place = int(problem.place_N[node])
        ways[place] = _Ways(*map(max, own, ways.get(place, own)))
    return ways


class LinkUse:
    """What one microbatch takes of links and of nodes' own ways out and in, in the directions that count."""

    def __init__(self, problem: Problem, placement: Placement, down: bool, up: bool) -> None:
        self.problem, self.placement = problem, placement
        self.down_L = problem.forward_bytes_L * down
        self.up_L = problem.backward_bytes_L * up

    def edge_s(self, stage: int, source: int, target: int) -> float:
        """Return how long the link between two nodes is busy for one microbatch, in its busier direction."""
        p, q = self.problem.place_N[source], self.problem.place_N[target]
        byte_s = self.problem.byte_s_PP
        return float(max(self.down_L[stage] * byte_s[p, q], self.up_L[stage] * byte_s[q, p]))

    def own_s(self, stage: int, node: int) -> float:
        """Return how long the busier of a node's own ways is busy for one microbatch."""
        return max(self.ways_s(stage, node))

    def ways_s(self, stage: int, node: int) -> tuple[float, float]:
        """Return how long a node's own way out and its way in are busy for one microbatch."""
        has_next, has_previous = stage + 1 < self.placement.num_stages, stage > 0
        sent = has_next * self.down_L[stage] + (self.up_L[stage - 1] if has_previous else 0.0)
        taken = has_next * self.up_L[stage] + (self.down_L[stage - 1] if has_previous else 0.0)
        problem = self.problem
        return float(sent * problem.uplink_byte_s_N[node]), float(taken * problem.downlink_byte_s_N[node])

    def shared_s(self, fractions: list[tuple[int, int, int, float]]) -> float:
        """Return how long the busiest pair of places is busy for one microbatch of which these fractions go where."""
        return float(self.shared_s_PP(fractions).max())

    def shared_s_PP(self, fractions: list[tuple[int, int, int, float]]) -> Floats:
        """Return how long each pair of places is busy, as `shared_s`."""
        load_PP = np.zeros_like(self.problem.delay_s_PP)
        for stage, source, target, fraction in fractions:
            p, q = self.problem.place_N[source], self.problem.place_N[target]
            load_PP[p, q] += fraction * self.down_L[stage]
            load_PP[q, p] += fraction * self.up_L[stage]
        return load_PP / self.problem.shared_bytes_per_s_PP


def _pace(use: LinkUse, seconds_SR: list[list[float]], shares: tuple[tuple[int, ...], ...]) -> tuple[float, float]:
    """Return the seconds that a step takes beyond its first microbatch, and the seconds a microbatch in the long run.

    Where stages bind, by whole microbatches a replica; where links bind, by the largest flow through nodes and links
    (a microbatch may take any replica of the next stage), or as each stage's replicas are dealt their parts by speed,
    whoever sends: the flow knows nothing of ways that links share.
    """
    nodes = use.placement.nodes
    busy_SR = [
        [max(s, use.own_s(stage, node)) for node, s in zip(nodes[stage], seconds, strict=True)]
        for stage, seconds in enumerate(seconds_SR)
    ]
    pace_s = _dealt_s(use, busy_SR)
    # A chain has but one way to be dealt.
    if any(len(stage) > 1 for stage in nodes):
        pace_s = min(pace_s, _flow_s(use, busy_SR))
    more_s = max(
        max((share - 1) * s for share, s in zip(split, seconds, strict=True))
        for split, seconds in zip(shares, seconds_SR, strict=True)
    )
    if pace_s > max(1 / sum(1 / s for s in seconds) for seconds in seconds_SR) * (1 + _ROUNDING):
        more_s = max(more_s, (use.problem.num_microbatches - 1) * pace_s)
    return more_s, pace_s


def dealt(placement: Placement, busy_SR: list[list[float]]) -> list[tuple[int, int, int, float]]:
    """Return which part goes over each link, as stage and nodes, where parts go by the speeds of both ends."""
    nodes = placement.nodes
    part_SR = [[1 / s / sum(1 / other for other in busy) for s in busy] for busy in busy_SR]
    return [
        (stage, source, target, ours * theirs)
        for stage in range(len(nodes) - 1)
        for source, ours in zip(nodes[stage], part_SR[stage], strict=True)
        for target, theirs in zip(nodes[stage + 1], part_SR[stage + 1], strict=True)
    ]


def _dealt_s(use: LinkUse, busy_SR: list[list[float]]) -> float:
    """Return the seconds a microbatch where a part goes from each node to each of the next stage's, by their speeds."""
    fractions = dealt(use.placement, busy_SR)
    slowest_s = max(1 / sum(1 / s for s in busy) for busy in busy_SR)
    edge_s = max((part * use.edge_s(*link) for *link, part in fractions), default=0.0)
    return max(slowest_s, edge_s, use.shared_s(fractions))


def _flow_s(use: LinkUse, busy_SR: list[list[float]]) -> float:
    """Return the seconds a microbatch of the largest flow through nodes and links."""
    nodes = use.placement.nodes
    links = [(s, i, j) for s in range(len(nodes) - 1) for i in range(len(nodes[s])) for j in range(len(nodes[s + 1]))]
    edge_s = [use.edge_s(s, nodes[s][i], nodes[s + 1][j]) for s, i, j in links]
    # Each replica is an edge from its way in to its way out.
    replicas = [(s, r) for s in range(len(nodes)) for r in range(len(nodes[s]))]
    ids = {replica: 2 + 2 * n for n, replica in enumerate(replicas)}
    edges = [(0, ids[0, r], np.inf) for r in range(len(nodes[0]))]
    edges += [(ids[len(nodes) - 1, r] + 1, 1, np.inf) for r in range(len(nodes[-1]))]
    edges += [(ids[s, r], ids[s, r] + 1, 1 / busy_SR[s][r]) for s, r in ids]
    first_link = len(edges)
    edges += [
        (ids[s, i] + 1, ids[s + 1, j], 1 / seconds if seconds else np.inf)
        for (s, i, j), seconds in zip(links, edge_s, strict=True)
    ]
    tails, heads, capacities = zip(*edges, strict=True)
    rate, flows = max_flow(
        2 + 2 * len(ids), np.array(tails, np.int32), np.array(heads, np.int32), np.array(capacities, np.float64), 0, 1
    )
    fractions = [
        (s, nodes[s][i], nodes[s + 1][j], float(flow) / float(rate))
        for (s, i, j), flow in zip(links, flows[first_link:], strict=True)
    ]
    return max(1 / float(rate), use.shared_s(fractions))


def _windows(
    problem: Problem, placement: Placement, total_SR: list[list[float]], trip_S: list[float], pace_s: float
) -> tuple[tuple[int, ...], ...]:
    """Return how many microbatches each replica of a stage keeps in flight.

    A schedule that may choose keeps what the round trip needs, of which each replica has a part by its speed, and no
    more than its memory allows.
    """
    num_stages, num_microbatches = placement.num_stages, problem.num_microbatches
    if problem.schedule in FIXED:
        return tuple(
            (num_in_flight(problem.schedule, stage, num_stages, num_microbatches),) * len(nodes)
            for stage, nodes in enumerate(placement.nodes)
        )
    windows: list[tuple[int, ...]] = []
    for stage, (nodes, seconds, trip_s) in enumerate(zip(placement.nodes, total_SR, trip_S, strict=True)):
        span = (placement.bounds[stage], placement.bounds[stage + 1])
        # What all replicas keep together, times the rounding that a whole number may come with.
        needed = IN_FLIGHT_MARGIN * trip_s / pace_s * (1 - _ROUNDING)
        speed = sum(1 / s for s in seconds)
        wanted = [ceil(needed / (s * speed)) for s in seconds]
        rooms = [_room(problem, node, *span) for node in nodes]
        windows.append(tuple(max(1, min(num_microbatches, *both)) for both in zip(wanted, rooms, strict=True)))
    return tuple(windows)


def _room(problem: Problem, node: int, start: int, stop: int) -> int:
    """Return how many microbatches in flight a node's memory allows."""
    empty = memory_bytes(problem, node, start, stop, 0)
    each = memory_bytes(problem, node, start, stop, 1) - empty
    return int((problem.memory_bytes_N[node] - empty) // each)


def _sync_s(problem: Problem, span: tuple[int, int], nodes: tuple[int, ...]) -> float:
    """Return how long replicas take to average their gradients: each sends a part to every other, and gets it back.

    Reduce-scatter and all-gather sent directly, as DT-FM counts it (arXiv 2206.01288), at the slowest of their links.
    """
    if len(nodes) == 1:
        return 0.0
    start, stop = span
    size = (stop - start) * problem.layer_sync_bytes
    size += problem.first_sync_bytes * (start == 0) + problem.last_sync_bytes * (stop == problem.num_layers)
    sent = size * (len(nodes) - 1) / len(nodes)
    places = problem.place_N[list(nodes)]
    pairs = [(p, q) for i, p in enumerate(places) for j, q in enumerate(places) if i != j]
    slowest_s = max(max(problem.delay_s_PP[p, q] + sent * problem.byte_s_PP[p, q] for p, q in pairs), 0.0)
    own_s = sent * max(max(problem.uplink_byte_s_N[n], problem.downlink_byte_s_N[n]) for n in nodes)
    return float(2 * max(slowest_s, own_s))
