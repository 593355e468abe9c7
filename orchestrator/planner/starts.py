"""Where searches start: nodes in several orders, cut into several numbers of stages.

PURE. An order says which nodes are taken first; those taken are then strung along short links, each to the nearest
that is left, so that near nodes become neighbours and replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Floats, Problem
from orchestrator.planner.tables import link_seconds, most_stages

Groups = tuple[tuple[int, ...], ...]


def starting_groups(problem: Problem, limits: Limits, seed: int) -> Iterator[Groups]:
    """Yield the nodes of each stage of one start after the other, most promising kinds first."""
    orders = node_orders(problem, seed)
    link_s_NN = link_seconds(problem)
    replicas = sorted({1, limits.min_copies, limits.max_replicas, max(1, limits.max_replicas // 2)})
    seen: set[Groups] = set()
    for num_stages in _stage_counts(problem, limits):
        for order in orders:
            for copies in replicas:
                num_nodes = min(problem.num_nodes, num_stages * copies)
                if copies < limits.min_copies or num_nodes < num_stages * max(1, limits.min_copies):
                    continue
                strung = string_nodes(order[:num_nodes], link_s_NN)
                groups = _grouped(problem, strung, num_stages, limits.max_replicas)
                groups = pinned(groups, limits)
                if groups not in seen:
                    seen.add(groups)
                    yield groups


def node_orders(problem: Problem, seed: int) -> list[list[int]]:
    """Return the nodes by speed, memory, price for their speed, speed and links together, as given, and at random."""
    rng = np.random.default_rng(seed)
    near_s_N = link_seconds(problem).mean(axis=1)
    keys = (
        problem.layer_s_N,
        -problem.memory_bytes_N,
        problem.price_N * problem.layer_s_N,
        near_s_N * problem.layer_s_N.mean() + problem.layer_s_N * near_s_N.mean(),
        np.arange(problem.num_nodes),
        rng.random(problem.num_nodes),
    )
    return [np.argsort(key, kind="stable").tolist() for key in keys]


def string_nodes(nodes: Sequence[int], link_s_NN: Floats) -> list[int]:
    """Return the nodes so that each is followed by the nearest of those left."""
    left = np.array(nodes)
    path = [int(left[0])]
    left = left[1:]
    while len(left):
        nearest = int(np.argmin(link_s_NN[path[-1], left]))
        path.append(int(left[nearest]))
        left = np.delete(left, nearest)
    return path


def _stage_counts(problem: Problem, limits: Limits) -> list[int]:
    """Return the numbers of stages to try: all small ones, then about a quarter more each."""
    most = most_stages(problem)
    if limits.num_stages is not None:
        return [limits.num_stages] if limits.num_stages <= most else []
    counts, count = list[int](), 1
    while count <= most:
        counts.append(count)
        count = max(count + 1, count * 5 // 4)
    return sorted({*counts, most}, reverse=True)


def _grouped(problem: Problem, strung: list[int], num_stages: int, max_replicas: int) -> Groups:
    """Return neighbours on the string as the stages' nodes, in equal numbers."""
    size, num_larger = divmod(len(strung), num_stages)
    bounds = [stage * size + min(stage, num_larger) for stage in range(num_stages + 1)]
    return tuple(tuple(strung[a : min(b, a + max_replicas)]) for a, b in pairwise(bounds))


def pinned(groups: Groups, limits: Limits) -> Groups:
    """Return the groups with pinned nodes in their stages, each in the place of one that is moved or left out."""
    stages = [list(group) for group in groups]
    pins = {node: stage % len(stages) for node, stage in limits.pins if -1 <= stage < len(stages)}
    for node, stage in pins.items():
        home = next((s for s, group in enumerate(stages) if node in group), None)
        if home == stage:
            continue
        guest = next((r for r, other in enumerate(stages[stage]) if pins.get(other) != stage), None)
        if guest is None:
            continue
        if home is not None:
            stages[home][stages[home].index(node)] = stages[stage][guest]
        stages[stage][guest] = node
    return tuple(map(tuple, stages))
