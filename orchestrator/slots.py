"""The places for stages that a cluster has: its nodes as Ray lists them, in; slots, out.

PURE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.errors import FleetError
from actors.fleet_spec import Offer
from orchestrator.config import FleetConfig

_EMBEDDED_NODES = 4


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place for one node actor."""

    node: str
    ray_node_id: str
    region: str
    offer: Offer
    num_gpus: int
    num_threads: int
    # How many places take their memory from the same machine, this one included; of a GPU's, it has its own.
    num_sharing: int


def slots_on(ray_nodes: Sequence[Mapping[str, Any]], config: FleetConfig, *, embedded: bool) -> list[Slot]:
    """Return the places to train on: on this machine as many as asked, on a cluster one a GPU.

    On a cluster without a GPU, one a node that has a CPU.
    """
    alive = sorted((node for node in ray_nodes if node["Alive"]), key=lambda node: node["NodeID"])
    needs_gpu = any(int(node["Resources"].get("GPU", 0)) for node in alive)
    found: list[tuple[Mapping[str, Any], int, int, int]] = []
    for ray_node in alive:
        resources = ray_node["Resources"]
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        # The head of a cluster of GPUs often has none: a stage there would hold all others up.
        if num_gpus == 0 and (needs_gpu or num_cpus == 0):
            continue
        places = num_gpus or ((config.nodes or _EMBEDDED_NODES) if embedded else 1)
        threads = config.threads or max(1, num_cpus // places)
        found += [(ray_node, min(1, num_gpus), threads, 1 if num_gpus else places)] * places
    return [_slot(config, node_name(i), *place) for i, place in enumerate(found)]


def node_name(number: int) -> str:
    """Return the name of a run's place of that number."""
    return f"node-{number}"


def _slot(
    config: FleetConfig, name: str, ray_node: Mapping[str, Any], num_gpus: int, num_threads: int, num_sharing: int
) -> Slot:
    region, offer = region_and_offer(config, ray_node["Labels"])
    return Slot(
        node=name,
        ray_node_id=ray_node["NodeID"],
        region=region,
        offer=offer,
        num_gpus=num_gpus,
        num_threads=num_threads,
        num_sharing=num_sharing,
    )


def region_and_offer(config: FleetConfig, labels: Mapping[str, str]) -> tuple[str, Offer]:
    """Return where a node is and what is known of it, by its Ray labels, else by the configuration."""
    region = labels.get("region", "local")
    price = config.region_prices.get(region, config.price_per_hour)
    return region, Offer(
        price_per_hour=_number(labels, "price", price, "dollars an hour"),
        losses_per_hour=_number(labels, "losses-per-hour", 0.0, "1 / its mean life in hours"),
        uplink_mbps=_number(labels, "uplink-mbps", 0.0, "Mbit/s"),
        downlink_mbps=_number(labels, "downlink-mbps", 0.0, "Mbit/s"),
    )


def _number(labels: Mapping[str, str], label: str, default: float, unit: str) -> float:
    """Return a label's number; FleetError where it has none that can be."""
    text = labels.get(label)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise FleetError(f"a node's Ray label {label} is {text!r}", f"make it {unit}")
    return value
