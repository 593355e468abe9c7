"""What a connection carries besides its rate on paper: windows, losses; and how long replicas exchange gradients.

PURE.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from actors.settings import WireConfig
from orchestrator.planner.assemble import chunk_and_window_bytes
from orchestrator.planner.problem import Placement, Problem

# Of the rate of a loss-limited connection: sqrt(3 / 2), for a receiver that acknowledges each segment.
_MATHIS = math.sqrt(1.5)


def loss_limited_bytes_per_s(round_trip_s: float, loss_share: float, *, num_streams: int, segment_bytes: int) -> float:
    """Return what TCP connections side by side carry where they halve their window at each loss; inf without loss.

    Mathis, Semke, Mahdavi, Ott: The macroscopic behavior of the TCP congestion avoidance algorithm, 1997.
    """
    if loss_share <= 0 or round_trip_s <= 0:
        return math.inf
    return num_streams * segment_bytes / round_trip_s * _MATHIS / math.sqrt(loss_share)


def window_limited_bytes_per_s(bytes_per_s: float, round_trip_s: float, wire: WireConfig) -> float:
    """Return what a link carries that keeps one window of chunks under way until they are acknowledged."""
    if not math.isfinite(bytes_per_s):
        return bytes_per_s
    chunk_bytes, window_bytes = chunk_and_window_bytes(bytes_per_s / 125_000, wire)
    # A chunk is acknowledged when its last byte is there.
    return min(bytes_per_s, window_bytes / (round_trip_s + chunk_bytes / bytes_per_s))


def sync_s(problem: Problem, placement: Placement, stage: int) -> float:
    """Return how long a stage's replicas take to average their gradients once all of them are done.

    Each sends a part to every other and gets the mean back, at the slowest of: one node's sending to all others over
    its link to the farthest, its own way out or in, and what two places may carry together.
    """
    nodes = placement.nodes[stage]
    if len(nodes) == 1:
        return 0.0
    start, stop = placement.bounds[stage], placement.bounds[stage + 1]
    size = (stop - start) * problem.layer_sync_bytes
    size += problem.first_sync_bytes * (start == 0) + problem.last_sync_bytes * (stop == problem.num_layers)
    part_bytes = size / len(nodes)
    sent_bytes = part_bytes * (len(nodes) - 1)
    counts = Counter(int(problem.place_N[node]) for node in nodes)
    slowest_s = 0.0
    for p, num_p in counts.items():
        for q, num_q in counts.items():
            if p == q and num_p == 1:
                continue
            num_flows = num_p * (num_q - (p == q))
            slowest_s = max(
                slowest_s,
                problem.delay_s_PP[p, q] + sent_bytes * problem.byte_s_PP[p, q],
                problem.delay_s_PP[p, q] + num_flows * part_bytes / problem.shared_bytes_per_s_PP[p, q],
            )
    own = np.maximum(problem.uplink_byte_s_N[list(nodes)], problem.downlink_byte_s_N[list(nodes)])
    return 2 * float(max(slowest_s, sent_bytes * own.max()))
