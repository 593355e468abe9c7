"""Where a model fits nowhere: which stage is short of memory, by how much, and the smallest change that would fit.

PURE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from actors.errors import PlanError
from actors.fleet_spec import Fleet, NodeCard, PartTimes
from actors.schedule import FIXED, num_in_flight
from actors.settings import BatchSpec, WireConfig
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.problem import Floats, Ints, Problem

_MOST_NEW_NODES = 16
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """The cut that is least short of memory, and its worst stage."""

    nodes: tuple[int, ...]
    bounds: tuple[int, ...]
    # Of the worst stage; 0 or less where all fit.
    short_bytes: float
    worst_stage: int


def no_fit(
    fleet: Fleet, work: Workload, wire: WireConfig, num_stages: int | None, split: tuple[int, ...] | None = None
) -> PlanError:
    """Return the error that says what does not fit, by how much, and what would help."""
    problem = make_problem(fleet, work, wire)
    short = least_short(problem, num_stages) if split is None else _short_of(problem, split)
    stage = short.worst_stage
    start, stop = short.bounds[stage : stage + 2]
    card = fleet.nodes[short.nodes[stage]]
    needed = problem.memory_bytes_N[short.nodes[stage]] + short.short_bytes
    which = "the model fits no plan: in the one that is least short,"
    if split is not None:
        which = f"with plan.split={','.join(map(str, split))}"
    message = (
        f"{which} stage {stage} (layers {start}-{stop - 1}) needs {needed / _GB:.2f} GB, {card.node} ({card.device}) "
        f"has {card.memory_bytes / _GB:.2f} GB free: {short.short_bytes / _GB:.2f} GB short"
    )
    if split is not None and least_short(problem, len(split)).short_bytes <= 0:
        return PlanError(message, f"set plan.stages={len(split)} instead of plan.split: another cut fits")
    for change, changed_fleet, changed_work, changed_stages in _changes(fleet, work, num_stages):
        if least_short(make_problem(changed_fleet, changed_work, wire), changed_stages).short_bytes <= 0:
            return PlanError(message, f"it would fit with {change}")
    return PlanError(
        message,
        "train a smaller model, with a smaller batch.seq_len and train.activation_checkpointing=true, or on nodes with "
        "more memory",
    )


def may_fit(problem: Problem) -> bool:
    """Return False where all nodes together have no room for all layers, whatever is put where: nothing to search for.

    Each with one microbatch in flight, and without the ends.
    """
    each_N = problem.layer_state_bytes + problem.layer_saved_bytes_N
    free_N = problem.memory_bytes_N - problem.fixed_bytes_N - problem.flight_bytes_N
    return bool(np.maximum(0, np.floor(free_N / each_N)).sum() >= problem.num_layers)


def least_short(problem: Problem, num_stages: int | None) -> Shortage:
    """Return the cut over the roomiest nodes, in their order, whose worst stage is least short of memory.

    1F1B's windows, GPipe's, or one microbatch where a schedule may keep so few. Exact for these nodes in this order, to
    a byte: with so much more on each node all layers find room, with less they do not.
    """
    most = min(problem.num_nodes, problem.num_layers)
    counts = [num_stages] if num_stages is not None else range(1, most + 1)
    return min((_least_short_chain(problem, count) for count in counts), key=lambda short: short.short_bytes)


def _least_short_chain(problem: Problem, num_stages: int) -> Shortage:
    nodes_S, each_S, free_S = _needs(problem, num_stages)

    def room_S(short_bytes: float) -> Floats:
        return np.floor((free_S + short_bytes) / each_S)

    def all_find_room(short_bytes: float) -> bool:
        room = room_S(short_bytes)
        return bool(room.min() >= 1 and room.sum() >= problem.num_layers)

    low, high = -float(problem.memory_bytes_N.max()) - 1, float((problem.num_layers * each_S - free_S).max()) + 1
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if all_find_room(middle) else (middle, high)
    room = np.minimum(room_S(high), problem.num_layers)
    sizes = np.ones(num_stages, dtype=np.int64)
    # What is over after one layer each goes to the first stages that have room.
    for stage in range(num_stages):
        sizes[stage] += min(problem.num_layers - sizes.sum(), int(room[stage]) - 1)
    return _shortage(nodes_S, sizes, sizes * each_S - free_S)


def split_fits(problem: Problem, split: tuple[int, ...]) -> bool:
    """Return whether the roomiest nodes have room for a given split."""
    return _short_of(problem, split).short_bytes <= 0


def _short_of(problem: Problem, split: tuple[int, ...]) -> Shortage:
    """Return the shortage of a given split on the roomiest nodes, in their order."""
    nodes_S, each_S, free_S = _needs(problem, len(split))
    sizes = np.array(split, dtype=np.int64)
    return _shortage(nodes_S, sizes, sizes * each_S - free_S)


def _needs(problem: Problem, num_stages: int) -> tuple[Ints, Floats, Floats]:
    """Return the roomiest nodes in their order, what each layer takes there, and what is free for layers."""
    nodes_S = np.sort(np.argsort(-problem.memory_bytes_N, kind="stable")[:num_stages]).astype(np.int32)
    window_S = np.full(num_stages, 1)
    if problem.schedule in FIXED:
        window_S[:] = [
            num_in_flight(problem.schedule, stage, num_stages, problem.num_microbatches) for stage in range(num_stages)
        ]
    each_S = problem.layer_state_bytes + window_S * problem.layer_saved_bytes_N[nodes_S]
    once_S = problem.fixed_bytes_N[nodes_S] + window_S * problem.flight_bytes_N[nodes_S]
    once_S[0] += problem.first_state_bytes
    once_S[-1] += problem.last_state_bytes + problem.last_bytes + window_S[-1] * problem.last_saved_bytes
    return nodes_S, each_S, problem.memory_bytes_N[nodes_S] - once_S


def _shortage(nodes_S: Ints, sizes_S: NDArray[np.int64], short_S: Floats) -> Shortage:
    return Shortage(
        nodes=tuple(int(node) for node in nodes_S),
        bounds=(0, *(int(stop) for stop in np.cumsum(sizes_S))),
        short_bytes=float(short_S.max()),
        worst_stage=int(short_S.argmax()),
    )


def _changes(fleet: Fleet, work: Workload, num_stages: int | None) -> Iterator[tuple[str, Fleet, Workload, int | None]]:
    """Yield changes, the smallest first: in words, and what is then planned."""
    if work.schedule in ("gpipe", "zb-h1"):
        yield "plan.schedule=1f1b", fleet, replace(work, schedule="1f1b"), num_stages
    elif work.schedule == "bdp-split":
        yield "plan.schedule=bdp", fleet, replace(work, schedule="bdp"), num_stages
    smaller = [size for size in range(work.batch.microbatch_size - 1, 0, -1) if work.batch.microbatch_size % size == 0]
    recomputing = replace(work, activation_checkpointing=True)
    for size in smaller:
        words, timed, batch = _with_microbatch(fleet, work.batch, size)
        yield words, timed, replace(work, batch=batch), num_stages
    if not work.activation_checkpointing:
        yield "train.activation_checkpointing=true", fleet, recomputing, num_stages
        for size in smaller:
            words, timed, batch = _with_microbatch(fleet, work.batch, size)
            words = f"train.activation_checkpointing=true {words}"
            yield words, timed, replace(recomputing, batch=batch), num_stages
    if num_stages is not None and num_stages < min(len(fleet.nodes), work.model.num_layers):
        yield "plan.stages left to the planner", fleet, work, None
    roomiest = max(fleet.nodes, key=lambda node: node.memory_bytes)
    for count in range(1, _MOST_NEW_NODES + 1):
        more = tuple(replace(roomiest, node=f"{roomiest.node}+{number}") for number in range(count))
        words = f"{count} more node{'s' if count > 1 else ''} like {roomiest.node} ({roomiest.device})"
        yield words, replace(fleet, nodes=(*fleet.nodes, *more)), work, None


def _with_microbatch(fleet: Fleet, batch: BatchSpec, size: int) -> tuple[str, Fleet, BatchSpec]:
    """Return a smaller microbatch of the same step, in words and as a batch, on nodes that need no times for it."""
    more = batch.num_microbatches * batch.microbatch_size // size
    smaller = replace(batch, microbatch_size=size, num_microbatches=more)
    nodes = tuple(_timed_as(node, size) for node in fleet.nodes)
    return f"batch.microbatch_size={size} batch.num_microbatches={more}", replace(fleet, nodes=nodes), smaller


def _timed_as(node: NodeCard, microbatch_size: int) -> NodeCard:
    """Return the node with its times said to be of another microbatch: only its memory is looked at."""
    times: PartTimes = replace(node.times[0], microbatch_size=microbatch_size)
    return replace(node, times=(times,))
