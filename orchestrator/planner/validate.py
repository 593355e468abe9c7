"""Whether a fleet's figures can be: a planner's answer to nonsense would be nonsense.

PURE. One line for the first thing that is wrong, with the name to look for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

from actors.errors import FleetError
from actors.fleet_spec import Fleet, LinkCard, NodeCard, RegionLink

# What a node may have none of; of everything else it must have some.
_MAY_BE_ZERO = ("price_per_hour", "losses_per_hour", "copy_mbps", "uplink_mbps", "downlink_mbps")
_REMEDY = "correct it in the fleet file, or probe again"


def require_sound(fleet: Fleet) -> None:
    """Raise FleetError for the first figure or name in a fleet that cannot be."""
    for wrong in _wrongs(fleet):
        raise FleetError(wrong, _REMEDY)


def _wrongs(fleet: Fleet) -> Iterator[str]:
    if not fleet.nodes:
        yield "the fleet has no nodes"
    seen: set[str] = set()
    for node in fleet.nodes:
        if not node.node:
            yield "a node of the fleet has no name"
        if node.node in seen:
            yield f"the fleet has two nodes named {node.node}"
        seen.add(node.node)
        yield from _wrongs_of_node(node)
    regions = {node.region for node in fleet.nodes}
    for link in fleet.links:
        yield from _wrongs_of_link(link, f"the link {link.source} -> {link.target}")
        for end in (link.source, link.target):
            if end not in seen:
                yield f"the link {link.source} -> {link.target} names {end}, which is no node of the fleet"
        if link.source == link.target:
            yield f"{link.source} has a link to itself"
    for link in fleet.regions:
        where = f"the link between regions {link.source} -> {link.target}"
        yield from _wrongs_of_link(link, where)
        for end in (link.source, link.target):
            if end not in regions:
                yield f"{where} names {end}, where no node is (regions: {', '.join(sorted(regions))})"
        if not _is_number(link.shared_mbps) or link.shared_mbps < 0:
            yield f"{where} shares {link.shared_mbps} Mbit/s"
        if fleet.links and link.shared_mbps:
            yield (
                f"{where} has shared_mbps, which is not counted where links of two nodes are given: leave out either"
            )


def _wrongs_of_node(node: NodeCard) -> Iterator[str]:
    if not node.times:
        yield f"{node.node} was not timed"
    for times in node.times:
        for part, value in asdict(times).items():
            # Noise may make a backward's weight part come out as nothing.
            least = 0.0 if part not in ("microbatch_size", "layer_forward_s", "layer_backward_s") else None
            if not _is_number(value) or value < 0 or (least is None and value == 0):
                yield f"{node.node} has {part}={value}"
        if times.layer_weight_s > times.layer_backward_s:
            yield f"{node.node} has layer_weight_s={times.layer_weight_s}, more than layer_backward_s"
    sizes = [times.microbatch_size for times in node.times]
    if len(set(sizes)) < len(sizes):
        yield f"{node.node} has two sets of times for one microbatch_size"
    if not _is_number(node.memory_bytes) or node.memory_bytes <= 0:
        yield f"{node.node} has memory_bytes={node.memory_bytes}"
    if node.boundary_bytes not in (2, 4):
        yield f"{node.node} has boundary_bytes={node.boundary_bytes}, which is neither 2 nor 4"
    for key in _MAY_BE_ZERO:
        value = getattr(node, key)
        if not _is_number(value) or value < 0:
            yield f"{node.node} has {key}={value}"


def _wrongs_of_link(link: LinkCard | RegionLink, name: str) -> Iterator[str]:
    if not _is_number(link.rate_mbps) or link.rate_mbps <= 0:
        yield f"{name} has a rate of {link.rate_mbps} Mbit/s"
    if not _is_number(link.delay_s) or link.delay_s < 0:
        yield f"{name} has a delay of {link.delay_s} s"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
