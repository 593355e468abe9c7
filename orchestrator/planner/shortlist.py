"""The nodes of a large fleet that a plan of one node a stage may want: few are enough, and quick to search.

PURE. A chain has as many nodes as layers at most, so of thousands only the fastest come into question, those with the
most memory, for what the fast ones cannot hold, where money counts those that do most for it, and those that a person
named.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from orchestrator.planner.objective import Found, Limits
from orchestrator.planner.problem import Ints, Placement, Problem


def shortlist(problem: Problem, limits: Limits, most: int) -> Ints:
    """Return the nodes that come into question, ascending, `most` or few more."""
    room_N = problem.memory_bytes_N - problem.fixed_bytes_N - problem.layer_state_bytes
    able = np.flatnonzero(room_N > problem.layer_saved_bytes_N + problem.flight_bytes_N)
    seconds = problem.layer_s_N[able]
    fastest = able[np.argsort(seconds, kind="stable")]
    kept = [fastest[:most]]
    # The fastest place by itself: a pipeline within it has near links.
    place = problem.place_N[fastest]
    speed_P = np.zeros(problem.num_places)
    for at in range(problem.num_places):
        speed_P[at] = (1 / problem.layer_s_N[fastest[place == at][: problem.num_layers]]).sum()
    kept.append(fastest[place == int(speed_P.argmax())][: problem.num_layers])
    if limits.objective != "throughput" or limits.max_dollars_per_hour < np.inf:
        cheapest = able[np.argsort(problem.price_N[able] * seconds, kind="stable")]
        kept[0] = fastest[: most // 2]
        kept.append(cheapest[: most // 2])
    # The ends of the model, and a model that hardly fits, want room before speed: the roomiest, the fastest of equals.
    roomiest = able[np.lexsort((seconds, -room_N[able]))]
    kept.append(roomiest[: problem.num_layers])
    for end_bytes in (problem.first_state_bytes, problem.last_state_bytes + problem.last_bytes):
        kept.append(fastest[room_N[fastest] > end_bytes][: problem.num_layers])
    named = [node for node, _ in limits.pins] + [node for pair in limits.after for node in pair]
    return np.unique(np.concatenate([*kept, np.array(named, np.int64)])).astype(np.int32)


def part_of(problem: Problem, nodes: Ints) -> Problem:
    """Return the problem of some of its nodes, in their order; places stay."""
    return replace(problem, **{name: value[nodes] for name, value in vars(problem).items() if name.endswith("_N")})


def limits_of_part(limits: Limits, nodes: Ints) -> Limits:
    """Return the limits in the indices of a part of the nodes, which has all that they name."""
    index = {int(node): number for number, node in enumerate(nodes)}
    return replace(
        limits,
        pins=tuple((index[node], stage) for node, stage in limits.pins),
        after=tuple((index[a], index[b]) for a, b in limits.after),
    )


def found_in_part(found: Found, nodes: Ints) -> Found:
    """Return what was found in a part, in the indices of the whole."""
    if found.placement is None:
        return found
    named = tuple(tuple(int(nodes[node]) for node in stage) for stage in found.placement.nodes)
    return replace(found, placement=Placement(bounds=found.placement.bounds, nodes=named))
