"""What a grid of seats costs in communication, by definition: the objective of the seat search, and its judge.

PURE. Nothing here is shared with the search, whose costs are corrected from move to move.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from actors.errors import PlanError


@dataclass(frozen=True, kw_only=True, eq=False)
class GridObjective:
    """What a step's communication takes where each of S stages has R replicas: `sync + path`, in seconds.

    `sync` is the slowest node's exchange with the others of its stage, to and from each a part of 1 / R (a parameter
    server sharded over the replicas); `path` is the sum, over the stages in order, of the slowest hop among R chains,
    there and back. This is the objective of DT-FM (arXiv 2206.01288), which writes `sync + 2 * path` for links that are
    the same both ways. Compute, memory and overlap are not in it.
    """

    # [a, b]: from node a to node b; the diagonal is not read.
    delay_s_NN: NDArray[np.float64]
    rate_mbps_NN: NDArray[np.float64]
    # Of one stage's parameters; of one replica's boundary tensors, one way.
    sync_bytes: float
    hop_bytes: float

    def __post_init__(self) -> None:
        if self.delay_s_NN.ndim != 2 or len(set(self.delay_s_NN.shape + self.rate_mbps_NN.shape)) != 1:
            raise PlanError(
                f"delays are {self.delay_s_NN.shape}, rates {self.rate_mbps_NN.shape}",
                "give both as one square matrix over the same nodes",
            )
        if not self.num_nodes:
            raise PlanError("the fleet has no nodes", "add nodes")
        apart_NN = ~np.eye(self.num_nodes, dtype=bool)
        bad_NN = apart_NN & ~(np.isfinite(self.delay_s_NN) & (self.delay_s_NN >= 0))
        if bad_NN.any():
            a, b = (int(i) for i in np.argwhere(bad_NN)[0])
            raise PlanError(
                f"the delay from node {a} to node {b} is {self.delay_s_NN[a, b]} s", "probe it again, or set 0 or more"
            )
        bad_NN = apart_NN & ~(np.isfinite(self.rate_mbps_NN) & (self.rate_mbps_NN > 0))
        if bad_NN.any():
            a, b = (int(i) for i in np.argwhere(bad_NN)[0])
            raise PlanError(
                f"the rate from node {a} to node {b} is {self.rate_mbps_NN[a, b]} Mbit/s",
                "probe it again, or set more than 0",
            )
        for name, size_bytes in (("sync_bytes", self.sync_bytes), ("hop_bytes", self.hop_bytes)):
            if not (np.isfinite(size_bytes) and size_bytes >= 0):
                raise PlanError(f"{name} is {size_bytes}", f"set {name} to 0 or more")

    @property
    def num_nodes(self) -> int:
        return self.delay_s_NN.shape[0]


def seated_cost_s(objective: GridObjective, seats_SR: NDArray[np.int64]) -> float:
    """Return the cost of these seats, `seats_SR[s, r]` being the node of stage s in chain r, by the definition."""
    num_replicas = seats_SR.shape[1]
    if len(set(seats_SR.flat)) != seats_SR.size:
        raise ValueError("a node sits twice")
    sync_s = max(
        sum(
            round_trip_s(objective, int(node), int(other), objective.sync_bytes / num_replicas)
            for other in stage
            if other != node
        )
        for stage in seats_SR
        for node in stage
    )
    path_s = sum(
        max(
            round_trip_s(objective, int(node), int(following), objective.hop_bytes)
            for node, following in zip(stage, after, strict=True)
        )
        for stage, after in pairwise(seats_SR)
    )
    return float(sync_s + path_s)


def round_trip_s(objective: GridObjective, node: int, other: int, size_bytes: float) -> float:
    """Return the time that `size_bytes` take from node to other, and as many back."""
    seconds = 0.0
    for source, target in ((node, other), (other, node)):
        bytes_per_s = objective.rate_mbps_NN[source, target] * 125_000
        seconds += objective.delay_s_NN[source, target] + size_bytes / bytes_per_s
    return float(seconds)
