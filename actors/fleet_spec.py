"""What there is to train on, as it crosses an actor boundary: nodes and links, and the orders that measure them.

PURE.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.model.spec import ModelSpec
from actors.settings import BatchSpec


@dataclass(frozen=True, kw_only=True)
class PartTimes:
    """Seconds of one microbatch of this many sequences in the model's parts on one node."""

    microbatch_size: int
    layer_forward_s: float
    layer_backward_s: float
    # Of the layer's backward, what makes the gradients of its weights: it may run later.
    layer_weight_s: float
    embedding_forward_s: float
    embedding_backward_s: float
    head_forward_s: float
    head_backward_s: float


@dataclass(frozen=True, kw_only=True)
class NodeCard:
    """What one node is and what it measured of itself on this model's own layers."""

    node: str
    host: str
    region: str
    device: str
    # Element bytes of boundary tensors: 4 on CPU, 2 on CUDA.
    boundary_bytes: int
    # What training may use, of the device's memory.
    memory_bytes: int
    # One entry for each microbatch size that was timed.
    times: tuple[PartTimes, ...]
    price_per_hour: float = 0.0
    # How often an hour a node like this one is lost: 1 / its mean life.
    losses_per_hour: float = 0.0
    # Between host and device, the slower way; 0: the device is the host, or it was not measured.
    copy_mbps: float = 0.0
    # All that the node may send, and take, at once, whoever the peers; 0: no limit is known.
    uplink_mbps: float = 0.0
    downlink_mbps: float = 0.0
    # Whether the times come from a catalogue instead of from the node itself.
    estimated: bool = False

    def times_at(self, microbatch_size: int) -> PartTimes | None:
        """Return what was timed with microbatches of this many sequences; None where nothing was."""
        return next((times for times in self.times if times.microbatch_size == microbatch_size), None)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What is known of a node without measuring it: dollars, how often such nodes are lost, limits of its network."""

    price_per_hour: float = 0.0
    losses_per_hour: float = 0.0
    uplink_mbps: float = 0.0
    downlink_mbps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LinkCard:
    """One direction between two nodes, as measured."""

    source: str
    target: str
    delay_s: float
    rate_mbps: float


@dataclass(frozen=True, kw_only=True)
class RegionLink:
    """One direction from nodes of one region to nodes of another, or of the same: stands for links not measured."""

    source: str
    target: str
    delay_s: float
    rate_mbps: float
    # All flows between the two regions together; 0: no limit is known.
    shared_mbps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What there is to train on: nodes in a fixed order, and the links that were measured, of nodes and of regions."""

    nodes: tuple[NodeCard, ...]
    links: tuple[LinkCard, ...]
    regions: tuple[RegionLink, ...] = ()

    def part(self, nodes: tuple[NodeCard, ...]) -> Fleet:
        """Return the fleet of some of its nodes, with the links among them and among their regions."""
        names, regions = {node.node for node in nodes}, {node.region for node in nodes}
        return Fleet(
            nodes=nodes,
            links=tuple(link for link in self.links if link.source in names and link.target in names),
            regions=tuple(link for link in self.regions if link.source in regions and link.target in regions),
        )


@dataclass(frozen=True, kw_only=True)
class ProbeOrder:
    """Measure yourself on this model and microbatch."""

    model: ModelSpec
    batch: BatchSpec
    # Whether attention keeps to documents, which takes longer.
    document_mask: bool
    # Microbatch sizes to time besides the batch's own; what does not fit into memory is left out.
    microbatch_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LinkProbeOrder:
    """Measure your link to another node."""

    target: str
    actor_name: str
    size_bytes: int
    timeout_s: float
