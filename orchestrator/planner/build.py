"""From a fleet, a model and a batch to the arrays that a planner searches over.

PURE. Times are what nodes measured; memory is counted from the shapes, on the high side: what fits here must fit there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from actors.codecs import CODECS
from actors.errors import PlanError
from actors.fleet_spec import Fleet, LinkCard, NodeCard, PartTimes, RegionLink
from actors.frame import wire_bytes
from actors.model.spec import ModelSpec
from actors.schedule import SPLIT
from actors.settings import BatchSpec, WireConfig
from actors.spec import ScheduleName
from orchestrator.planner.memory import (
    FLOAT32_BYTES,
    STATE_BYTES_PER_PARAM,
    block_bytes,
    flight_bytes,
    halved_block_bytes,
    head_passing_bytes,
    head_saved_bytes,
    passing_bytes,
    raw_frame_bytes,
)
from orchestrator.planner.problem import Floats, Problem

_SYNC_BYTES_PER_PARAM = 4
# A frame exists encoded, as chunks in the window, and decoded, at each end.
FRAME_COPIES = 6
# Where no link was measured: two nodes of one machine or one rack.
NEAR_LINK_DELAY_S, NEAR_LINK_RATE_MBPS = 0.0005, 4000.0
BITS_PER_MEGABIT = 1e6

_Link = TypeVar("_Link", LinkCard, RegionLink)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be run: everything that a stage's cost depends on besides its node and its layers."""

    model: ModelSpec
    batch: BatchSpec
    schedule: ScheduleName
    activation_checkpointing: bool
    document_mask: bool = True


@dataclass(frozen=True, kw_only=True)
class LinkTable:
    """The links between places; row to column."""

    place_of: tuple[int, ...]
    delay_s_PP: Floats
    rate_mbps_PP: Floats
    shared_mbps_PP: Floats


def make_problem(
    fleet: Fleet, work: Workload, wire: WireConfig, *, codecs: Sequence[tuple[str, str]] | None = None
) -> Problem:
    """Return the fleet on this workload as arrays.

    `codecs` gives each link's, forward and backward, by the stage it comes from, instead of what `wire` says. Raises
    PlanError where a node was not timed with this microbatch size.
    """
    model, batch, nodes = work.model, work.batch, fleet.nodes
    times = [_times_of(node, batch.microbatch_size) for node in nodes]

    def column(values: Sequence[float]) -> Floats:
        return np.array(values, dtype=np.float64)

    again = [t.layer_forward_s if work.activation_checkpointing else 0.0 for t in times]
    sizes = [node.boundary_bytes for node in nodes]
    frame_N = column([raw_frame_bytes(model, batch, size) for size in sizes])
    block_N = column([block_bytes(model, batch, size, work.document_mask) for size in sizes])
    halved_N = column([halved_block_bytes(model, batch, size) for size in sizes])
    saved_N = frame_N if work.activation_checkpointing else block_N
    if work.schedule in SPLIT:
        # A block that was computed again keeps more between its halves than before them.
        saved_N = np.maximum(saved_N, halved_N)
    fixed_N = FRAME_COPIES * frame_N + passing_bytes(model, batch, in_halves=work.schedule in SPLIT)
    is_float32 = all(size == FLOAT32_BYTES for size in sizes)
    table = link_table(fleet)
    frames = [_frame_bytes(fleet, work, wire, stage, codecs) for stage in range(model.num_layers)]
    return Problem(
        num_layers=model.num_layers,
        num_microbatches=batch.num_microbatches,
        schedule=work.schedule,
        layer_forward_s_N=column([t.layer_forward_s for t in times]),
        layer_backward_s_N=column([t.layer_backward_s + more for t, more in zip(times, again, strict=True)]),
        first_forward_s_N=column([t.embedding_forward_s for t in times]),
        first_backward_s_N=column([t.embedding_backward_s for t in times]),
        last_forward_s_N=column([t.head_forward_s for t in times]),
        last_backward_s_N=column([t.head_backward_s for t in times]),
        layer_weight_s_N=column([t.layer_weight_s for t in times]),
        memory_bytes_N=column([node.memory_bytes for node in nodes]),
        layer_state_bytes=float(STATE_BYTES_PER_PARAM * model.layer_params),
        first_state_bytes=float(STATE_BYTES_PER_PARAM * model.embedding_params),
        last_state_bytes=float(STATE_BYTES_PER_PARAM * model.head_params),
        raw_frame_bytes_N=frame_N,
        layer_saved_bytes_N=saved_N,
        layer_halved_bytes_N=halved_N,
        flight_bytes_N=column([flight_bytes(model, batch, size, work.document_mask) for size in sizes]),
        fixed_bytes_N=fixed_N + (block_N if work.activation_checkpointing else 0.0),
        last_bytes=head_passing_bytes(model, batch, is_float32=is_float32),
        last_saved_bytes=head_saved_bytes(model, batch),
        place_N=np.array(table.place_of, dtype=np.int32),
        delay_s_PP=table.delay_s_PP,
        byte_s_PP=8 / (table.rate_mbps_PP * BITS_PER_MEGABIT),
        shared_bytes_per_s_PP=table.shared_mbps_PP * BITS_PER_MEGABIT / 8,
        uplink_byte_s_N=column([_byte_s(node.uplink_mbps) for node in nodes]),
        downlink_byte_s_N=column([_byte_s(node.downlink_mbps) for node in nodes]),
        forward_bytes_L=column([forward for forward, _ in frames]),
        backward_bytes_L=column([backward for _, backward in frames]),
        layer_sync_bytes=float(_SYNC_BYTES_PER_PARAM * model.layer_params),
        first_sync_bytes=float(_SYNC_BYTES_PER_PARAM * model.embedding_params),
        last_sync_bytes=float(_SYNC_BYTES_PER_PARAM * model.head_params),
        price_N=column([node.price_per_hour for node in nodes]),
        domain_N=np.array(_numbered([f"{node.region}/{node.host}" for node in nodes]), dtype=np.int32),
    )


def link_table(fleet: Fleet) -> LinkTable:
    """Return delay and rate between places.

    What was measured of a pair of nodes counts first, then of the other direction, then what stands for their regions;
    where nothing does, the worst of what was measured, and where nothing was, a near link.
    """
    regions = [node.region for node in fleet.nodes]
    by_region = {(link.source, link.target): link for link in fleet.regions}
    # A link for each pair of nodes where pairs were measured, else one for each pair of regions.
    if fleet.links:
        ends = [(node.node, node.region) for node in fleet.nodes]
        place_of = tuple(range(len(ends)))
    else:
        ends = [(region, region) for region in dict.fromkeys(regions)]
        place_of = tuple(_numbered(regions))
    by_node = {(link.source, link.target): link for link in fleet.links}
    worst = _worst(fleet)
    near = LinkCard(source="", target="", delay_s=NEAR_LINK_DELAY_S, rate_mbps=NEAR_LINK_RATE_MBPS)
    num_places = len(ends)
    delay_s, rate_mbps = np.zeros((num_places, num_places)), np.full((num_places, num_places), np.inf)
    shared_mbps = np.full((num_places, num_places), np.inf)
    for p, (source, source_region) in enumerate(ends):
        for q, (target, target_region) in enumerate(ends):
            between = _either(by_region, source_region, target_region)
            is_near = p == q or (source_region == target_region and not fleet.links)
            default = near if is_near else worst
            link = _either(by_node, source, target) or between or default
            delay_s[p, q], rate_mbps[p, q] = link.delay_s, link.rate_mbps
            if between is not None and between.shared_mbps and not fleet.links:
                shared_mbps[p, q] = between.shared_mbps
    return LinkTable(place_of=place_of, delay_s_PP=delay_s, rate_mbps_PP=rate_mbps, shared_mbps_PP=shared_mbps)


def _either(links: Mapping[tuple[str, str], _Link], source: str, target: str) -> _Link | None:
    return links.get((source, target)) or links.get((target, source))


def _worst(fleet: Fleet) -> LinkCard:
    known: list[LinkCard | RegionLink] = [*fleet.links, *fleet.regions]
    return LinkCard(
        source="",
        target="",
        delay_s=max((link.delay_s for link in known), default=NEAR_LINK_DELAY_S),
        rate_mbps=min((link.rate_mbps for link in known), default=NEAR_LINK_RATE_MBPS),
    )


def _times_of(node: NodeCard, microbatch_size: int) -> PartTimes:
    times = node.times_at(microbatch_size)
    if times is None:
        known = ", ".join(str(t.microbatch_size) for t in node.times) or "none"
        raise PlanError(
            f"{node.node} was not timed with microbatches of {microbatch_size} sequences (timed: {known})",
            f"set batch.microbatch_size to one of these, or probe with batch.microbatch_size={microbatch_size}",
        )
    return times


def _frame_bytes(
    fleet: Fleet, work: Workload, wire: WireConfig, stage: int, codecs: Sequence[tuple[str, str]] | None
) -> tuple[float, float]:
    """Return what a microbatch's frame takes forward and backward, headers included."""
    num_elements = work.batch.microbatch_tokens * work.model.hidden_size
    # A codec that keeps the element type sends more from a CPU: where the fleet is mixed, the larger counts.
    dtype = torch.float32 if any(node.boundary_bytes == 4 for node in fleet.nodes) else torch.bfloat16
    names = wire.codecs_of(stage) if codecs is None else codecs[min(stage, len(codecs) - 1)]
    forward, backward = (
        wire_bytes(CODECS[name].size_bytes(num_elements, dtype), wire.min_chunk_bytes) for name in names
    )
    return float(forward), float(backward)


def _byte_s(mbps: float) -> float:
    return 8 / (mbps * BITS_PER_MEGABIT) if mbps else 0.0


def _numbered(names: Sequence[str]) -> list[int]:
    """Return each name's place in the order of first appearance."""
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names]
