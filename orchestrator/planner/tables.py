"""A problem, its limits and a placement as plain arrays, for compiled code.

PURE. One row per node and one per pair of places, so that what a stage needs of them lies together in memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.compiled import inner
from orchestrator.planner.flow import FlowWorkspace, flow_workspace
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Placement, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Counts = NDArray[np.int64]

# Columns of `node_NF`.
LAYER_FORWARD, LAYER_BACKWARD, FIRST_FORWARD, FIRST_BACKWARD, LAST_FORWARD, LAST_BACKWARD, LAYER_WEIGHT = range(7)
MEMORY, LAYER_SAVED, FLIGHT, FIXED, UPLINK, DOWNLINK, PRICE = range(7, 14)
# Of `pair_PPF`; FRAME: seconds of a byte of a frame that is alone on its way.
DELAY, BYTE, SHARED, FRAME = range(4)
# Of `bytes_LF`.
FORWARD, BACKWARD = range(2)
SCHEDULES = ("gpipe", "1f1b", "bdp", "bdp-split", "zb-h1")
GPIPE, ONE_F_ONE_B, BDP, BDP_SPLIT, ZB_H1 = range(5)
OBJECTIVES = ("throughput", "dollars", "cheapest")
THROUGHPUT, DOLLARS, CHEAPEST = range(3)
# What `evaluate_into` leaves in `Scratch.result`; SHORT_SHARE: what all nodes are short of, in parts of theirs.
STEP, RATE, FILL, PACE, SYNC, COMMIT, SHORT, SHORT_SHARE, PRICE_SUM = range(9)
# A larger graph of replicas is not solved for its flow; see `orchestrator.planner.fast_pace`.
MOST_EDGES = 100_000
# How many of a node's nearest are known to a search, and the largest fleet in which they are looked for.
NUM_NEAR, MOST_STRUNG = 10, 1000


class Tables(NamedTuple):
    """A Problem. Axes: N nodes, P places, L layers, F columns."""

    num_layers: int
    num_microbatches: int
    schedule: int
    # Layer, first, last; then what the last stage has once.
    state_bytes: Floats
    # Layer, first, last.
    sync_bytes: Floats
    node_NF: Floats
    place_N: Ints
    domain_N: Ints
    pair_PPF: Floats
    bytes_LF: Floats
    # Each node's nearest others, nearest first; K of them.
    near_NK: Ints
    # Whether anything binds all flows between two places together.
    has_shared: bool


class Rules(NamedTuple):
    """Limits. `num_stages` is 0 where it is free; rows of `pins_K2` are node and stage, of `after_K2` node and node."""

    objective: int
    num_stages: int
    max_replicas: int
    min_copies: int
    min_domains: int
    max_dollars_per_hour: float
    max_step_s: float
    pins_K2: Ints
    after_K2: Ints


class State(NamedTuple):
    """A placement: stage s has layers_S[s] layers, after those of the stages before, on members_SR[s, : counts_S[s]].

    Arrays are as long as the largest placement needs; size[0] is the number of stages.
    """

    size: Ints
    layers_S: Ints
    counts_S: Ints
    members_SR: Ints


class Scratch(NamedTuple):
    """What an evaluation writes: its result, figures by stage and replica, and memory that holds nothing afterwards."""

    result: Floats
    # A microbatch's round trip from each stage on, and the part beyond that stage; the latter of chains only.
    trip_S: Floats
    beyond_S: Floats
    # Seconds a microbatch in the long run of the stage alone, and of the link that leaves it.
    stage_s_S: Floats
    link_s_S: Floats
    window_SR: Counts
    shares_SR: Counts
    forward_SR: Floats
    backward_SR: Floats
    total_SR: Floats
    busy_SR: Floats
    weight_S: Floats
    # The different places of a stage: how many, which, and of the nodes there the slowest ways out and in, the largest
    # and the whole rate.
    num_places_S: Counts
    places_SR: Ints
    out_SR: Floats
    into_SR: Floats
    most_SR: Floats
    whole_SR: Floats
    # Where in its stage's list a place stands, or -1.
    slot_P: Ints
    load_PP: Floats
    stage_of_N: Ints
    tails_E: Ints
    heads_E: Ints
    capacities_E: Floats
    flows_E: Floats
    flow: FlowWorkspace


def make_tables(problem: Problem) -> Tables:
    """Return a problem as arrays."""
    columns = (
        problem.layer_forward_s_N,
        problem.layer_backward_s_N,
        problem.first_forward_s_N,
        problem.first_backward_s_N,
        problem.last_forward_s_N,
        problem.last_backward_s_N,
        problem.layer_weight_s_N,
        problem.memory_bytes_N,
        problem.layer_saved_bytes_N,
        problem.flight_bytes_N,
        problem.fixed_bytes_N,
        problem.uplink_byte_s_N,
        problem.downlink_byte_s_N,
        problem.price_N,
    )
    pairs = (problem.delay_s_PP, problem.byte_s_PP, problem.shared_bytes_per_s_PP, problem.frame_byte_s_PP)
    state = (
        problem.layer_state_bytes,
        problem.first_state_bytes,
        problem.last_state_bytes,
        problem.last_bytes,
        problem.last_saved_bytes,
    )
    return Tables(
        num_layers=problem.num_layers,
        num_microbatches=problem.num_microbatches,
        schedule=SCHEDULES.index(problem.schedule),
        state_bytes=np.array(state, np.float64),
        sync_bytes=np.array((problem.layer_sync_bytes, problem.first_sync_bytes, problem.last_sync_bytes), np.float64),
        node_NF=np.ascontiguousarray(np.stack(columns, axis=-1), np.float64),
        place_N=np.ascontiguousarray(problem.place_N, np.int32),
        domain_N=np.ascontiguousarray(problem.domain_N, np.int32),
        pair_PPF=np.ascontiguousarray(np.stack(pairs, axis=-1), np.float64),
        bytes_LF=np.ascontiguousarray(
            np.stack((problem.forward_bytes_L, problem.backward_bytes_L), axis=-1), np.float64
        ),
        near_NK=_nearest(problem),
        has_shared=bool(np.isfinite(problem.shared_bytes_per_s_PP).any()),
    )


def link_seconds(problem: Problem) -> Floats:
    """Return how long a microbatch's frames take from each node to each other and back."""
    near = np.ix_(problem.place_N, problem.place_N)
    own_s_NN = np.maximum(problem.uplink_byte_s_N[:, None], problem.downlink_byte_s_N[None, :])
    byte_s_NN = np.maximum(problem.frame_byte_s_PP[near], own_s_NN)
    delay_s_NN = problem.delay_s_PP[near]
    there_s_NN = delay_s_NN + problem.forward_bytes_L[0] * byte_s_NN
    back_s_NN = delay_s_NN + problem.backward_bytes_L[0] * byte_s_NN
    return there_s_NN + back_s_NN.T


def _nearest(problem: Problem) -> Ints:
    """Return each node's nearest others by their links, and of those as near the fastest; none for large fleets."""
    if problem.num_nodes > MOST_STRUNG:
        return np.zeros((problem.num_nodes, 0), np.int32)
    seconds_NN = link_seconds(problem) + problem.layer_s_N[None, :]
    np.fill_diagonal(seconds_NN, np.inf)
    most = min(NUM_NEAR, problem.num_nodes - 1)
    return np.ascontiguousarray(np.argsort(seconds_NN, axis=1, kind="stable")[:, :most], np.int32)


def make_rules(limits: Limits) -> Rules:
    """Return limits as arrays."""
    return Rules(
        objective=OBJECTIVES.index(limits.objective),
        num_stages=limits.num_stages or 0,
        max_replicas=limits.max_replicas,
        min_copies=limits.min_copies,
        min_domains=limits.min_domains,
        max_dollars_per_hour=float(limits.max_dollars_per_hour),
        max_step_s=float(limits.max_step_s),
        pins_K2=np.array(limits.pins, np.int32).reshape(-1, 2),
        after_K2=np.array(limits.after, np.int32).reshape(-1, 2),
    )


def most_stages(problem: Problem) -> int:
    """Return how many stages a placement has at most."""
    return min(problem.num_layers, problem.num_nodes)


def make_state(problem: Problem, most_replicas: int) -> State:
    """Return an empty placement with room for any of so many replicas a stage at most."""
    stages = most_stages(problem)
    replicas = max(1, min(most_replicas, problem.num_nodes))
    return State(
        np.zeros(1, np.int32),
        np.zeros(stages, np.int32),
        np.zeros(stages, np.int32),
        np.zeros((stages, replicas), np.int32),
    )


def write_state(state: State, placement: Placement) -> None:
    """Put a placement into a state that has room for it."""
    state.size[0] = placement.num_stages
    state.layers_S[: placement.num_stages] = np.diff(placement.bounds)
    for stage, nodes in enumerate(placement.nodes):
        state.counts_S[stage] = len(nodes)
        state.members_SR[stage, : len(nodes)] = nodes


def read_state(state: State) -> Placement:
    """Return a state's placement."""
    num_stages = int(state.size[0])
    return Placement(
        bounds=(0, *np.cumsum(state.layers_S[:num_stages]).tolist()),
        nodes=tuple(tuple(state.members_SR[s, : state.counts_S[s]].tolist()) for s in range(num_stages)),
    )


def make_scratch(problem: Problem, most_replicas: int) -> Scratch:
    """Return what evaluations of this problem write, with room for so many replicas a stage at most."""
    stages, nodes, places = most_stages(problem), problem.num_nodes, problem.num_places
    replicas = max(1, min(most_replicas, nodes))
    # No more than all nodes are in two stages next to each other, in the worst case half in each.
    half = min(replicas, math.ceil(nodes / 2))
    edges = min(3 * nodes + nodes * half, MOST_EDGES) if replicas > 1 else 1
    vertices = 2 + 2 * nodes if replicas > 1 else 1

    def floats(*shape: int) -> Floats:
        return np.zeros(shape, np.float64)

    return Scratch(
        result=floats(9),
        trip_S=floats(stages),
        beyond_S=floats(stages),
        stage_s_S=floats(stages),
        link_s_S=floats(stages),
        window_SR=np.zeros((stages, replicas), np.int64),
        shares_SR=np.zeros((stages, replicas), np.int64),
        forward_SR=floats(stages, replicas),
        backward_SR=floats(stages, replicas),
        total_SR=floats(stages, replicas),
        busy_SR=floats(stages, replicas),
        weight_S=floats(stages),
        num_places_S=np.zeros(stages, np.int64),
        places_SR=np.zeros((stages, replicas), np.int32),
        out_SR=floats(stages, replicas),
        into_SR=floats(stages, replicas),
        most_SR=floats(stages, replicas),
        whole_SR=floats(stages, replicas),
        slot_P=np.full(places, -1, np.int32),
        load_PP=floats(places, places),
        stage_of_N=np.full(nodes, -1, np.int32),
        tails_E=np.zeros(edges, np.int32),
        heads_E=np.zeros(edges, np.int32),
        capacities_E=floats(edges),
        flows_E=floats(edges),
        flow=flow_workspace(vertices, edges),
    )


@inner
def copy_state(source: State, target: State) -> None:
    """Make `target` the placement that `source` is."""
    num_stages = source.size[0]
    target.size[0] = num_stages
    for stage in range(num_stages):
        target.layers_S[stage] = source.layers_S[stage]
        count = source.counts_S[stage]
        target.counts_S[stage] = count
        for replica in range(count):
            target.members_SR[stage, replica] = source.members_SR[stage, replica]
