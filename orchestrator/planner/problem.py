"""What is planned over, as arrays: a fleet on one model, microbatch size, schedule and set of codecs.

PURE. Searches and bounds see only this; `orchestrator.planner.evaluate` says what a placement costs in it.
Axes: N nodes, P places (the ends of links: each node of a small fleet, each region of a large one), L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from actors.spec import ScheduleName

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A fleet and a model as a planner sees them; times in seconds, sizes in bytes, one microbatch where not said.

    A stage of k layers takes k times the layer's figure, and the first and the last stage their extra on top: the
    embedding, the norm and head.
    """

    num_layers: int
    num_microbatches: int
    schedule: ScheduleName
    # Forward and backward of one microbatch on each node; 0 backward extra where a node computes nothing there.
    layer_forward_s_N: Floats
    layer_backward_s_N: Floats
    first_forward_s_N: Floats
    first_backward_s_N: Floats
    last_forward_s_N: Floats
    last_backward_s_N: Floats
    # Of the backward time, what makes weight gradients and may run later.
    layer_weight_s_N: Floats
    # Memory: what a node has, what a stage's weights with gradient and moments take (microbatch or not), what a
    # microbatch in flight keeps for each layer and for the stage, and what is there once: frames, as many of the size
    # here as build.FRAME_COPIES, and what passes. The last stage has the head's besides: once, and of each microbatch.
    memory_bytes_N: Floats
    raw_frame_bytes_N: Floats
    layer_state_bytes: float
    first_state_bytes: float
    last_state_bytes: float
    layer_saved_bytes_N: Floats
    # Of what a layer keeps, what it still does once the first half of a backward is done.
    layer_halved_bytes_N: Floats
    flight_bytes_N: Floats
    fixed_bytes_N: Floats
    last_bytes: float
    last_saved_bytes: float
    # Links: from row to column; seconds for one byte of one flow between two nodes.
    place_N: Ints
    delay_s_PP: Floats
    byte_s_PP: Floats
    # What all flows between two places together may carry; inf where nothing is known to bind.
    shared_bytes_per_s_PP: Floats
    # A node's own way out and in, whoever the peer; 0 where no limit is known.
    uplink_byte_s_N: Floats
    downlink_byte_s_N: Floats
    # A microbatch's frame on the link from stage s to the next, and back; L entries, the last unused.
    forward_bytes_L: Floats
    backward_bytes_L: Floats
    # What replicas of a stage exchange for each layer in a step, and for the ends.
    layer_sync_bytes: float
    first_sync_bytes: float
    last_sync_bytes: float
    # Dollars an hour.
    price_N: Floats
    # Nodes of one failure domain fall together.
    domain_N: Ints

    @property
    def num_nodes(self) -> int:
        return len(self.layer_forward_s_N)

    @property
    def num_places(self) -> int:
        return len(self.delay_s_PP)

    @property
    def frame_byte_s_PP(self) -> Floats:
        """Seconds of one byte of a frame that is alone on its way, but for its ends' own ways out and in."""
        return np.maximum(self.byte_s_PP, 1 / self.shared_bytes_per_s_PP)

    @property
    def layer_s_N(self) -> Floats:
        """Forward and backward of one layer."""
        return self.layer_forward_s_N + self.layer_backward_s_N

    @property
    def first_s_N(self) -> Floats:
        return self.first_forward_s_N + self.first_backward_s_N

    @property
    def last_s_N(self) -> Floats:
        return self.last_forward_s_N + self.last_backward_s_N


def even_sizes(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the sizes of stages that differ by one layer at most, the larger ones first."""
    size, num_larger = divmod(num_layers, num_stages)
    return tuple(size + (stage < num_larger) for stage in range(num_stages))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who holds what: stage s has layers [bounds[s], bounds[s + 1]) on each of the nodes[s], indices into a Problem."""

    bounds: tuple[int, ...]
    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.bounds) == len(self.nodes) + 1

    @property
    def num_stages(self) -> int:
        return len(self.nodes)

    @property
    def used(self) -> tuple[int, ...]:
        """All nodes that hold something, stage by stage."""
        return tuple(chain.from_iterable(self.nodes))
