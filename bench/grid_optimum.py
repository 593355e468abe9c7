"""The least cost that any seating has, by trying all groups: what the seat search is measured against.

Exact, from the objective's definition, and hopeless for more than 12 nodes or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from orchestrator.planner.grid_cost import GridObjective, round_trip_s

Group = tuple[int, ...]


def best_grid_cost_s(objective: GridObjective, num_stages: int, num_replicas: int) -> float:
    """Return the least cost of all groups, in all orders, with all chains."""
    num_nodes = objective.num_nodes
    sync_s_NN, hop_s_NN = (
        np.array(
            [
                [round_trip_s(objective, a, b, size_bytes) if a != b else 0.0 for b in range(num_nodes)]
                for a in range(num_nodes)
            ]
        )
        for size_bytes in (objective.sync_bytes / num_replicas, objective.hop_bytes)
    )
    group_s: dict[Group, float] = {
        group: float(sync_s_NN[np.ix_(group, group)].sum(axis=1).max())
        for group in combinations(range(num_nodes), num_replicas)
    }
    chains_QR = np.array(list(permutations(range(num_replicas))))
    hop_s: dict[tuple[Group, Group], float] = {}
    for a, b in combinations(group_s, 2):
        if not set(a) & set(b):
            joined_s_QR = hop_s_NN[np.array(a), np.array(b)[chains_QR]]
            hop_s[a, b] = hop_s[b, a] = float(joined_s_QR.max(axis=1).min())
    # Of an order and its reverse only one counts.
    orders_QS = np.array([order for order in permutations(range(num_stages)) if order[0] <= order[-1]])
    least_s = math.inf
    for seated in combinations(range(num_nodes), num_stages * num_replicas):
        for groups in _partitions(seated, num_replicas):
            sync_s = max(group_s[group] for group in groups)
            if sync_s >= least_s:
                continue
            hop_s_SS = np.array([[hop_s.get((a, b), 0.0) for b in groups] for a in groups])
            path_s_Q = hop_s_SS[orders_QS[:, :-1], orders_QS[:, 1:]].sum(axis=1)
            least_s = min(least_s, sync_s + float(path_s_Q.min()))
    return least_s


def _partitions(nodes: Group, size: int) -> Iterator[tuple[Group, ...]]:
    """Yield every way to part the nodes into groups of this size, each way once."""
    if not nodes:
        yield ()
        return
    for others in combinations(nodes[1:], size - 1):
        left = tuple(node for node in nodes[1:] if node not in others)
        for groups in _partitions(left, size):
            yield ((nodes[0], *others), *groups)
