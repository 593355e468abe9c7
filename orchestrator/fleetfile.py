"""Fleet files: what there is to train on, written down, so that it can be planned for and simulated without hardware.

YAML or JSON; docs/fleet-file.md has the format. A measured fleet is saved as it is and read back exactly; a described
one names GPUs of a catalogue, whose times on this model are estimated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from actors.errors import FleetError
from actors.fleet_spec import Fleet, LinkCard, NodeCard, PartTimes, RegionLink
from actors.settings import BatchSpec
from orchestrator.events import decode, encode
from orchestrator.planner.build import Workload
from orchestrator.planner.validate import require_sound
from orchestrator.runfolder import write_atomic

CATALOGUE = Path(__file__).parents[1] / "conf" / "fleet" / "catalogue.yaml"
_MAX_BYTES = 64 << 20
_MAX_NODES = 100_000
# Of a card's memory, what a driver, a CUDA context and an allocator's holes take.
_USABLE_MEMORY, _CONTEXT_GB = 0.92, 1.0
_NODE_KEYS = {"name", "count", "gpu", "region", "host", "memory_gb", "price_per_hour", "losses_per_hour"}
_NODE_KEYS |= {"uplink_mbps", "downlink_mbps", "speed"}
_LINK_KEYS = {"between", "delay_ms", "rate_mbps", "back_mbps", "shared_mbps"}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of card: dense peak, the share of it that training sustains, memory, and a typical price."""

    peak_tflops: float
    sustained: float
    memory_gb: float
    price_per_hour: float


def save_fleet(path: Path, fleet: Fleet) -> None:
    """Write a fleet as it was measured, to be read back exactly, or edited."""
    if path.suffix == ".json":
        write_atomic(path, json.dumps(encode(fleet), indent=1))
    else:
        write_atomic(path, yaml.safe_dump(encode(fleet), sort_keys=False, width=120))


def load_fleet(path: Path, work: Workload, batches: tuple[BatchSpec, ...]) -> Fleet:
    """Return the fleet of a file; times of catalogue GPUs are estimated for this model and each of these batches.

    Raises FleetError for what cannot be read, cannot be understood, or cannot be.
    """
    document = _read(path)

    def wrong(what: str) -> FleetError:
        return FleetError(f"{path}: {what}", "docs/fleet-file.md has the format, conf/fleet/ examples")

    if not isinstance(document, dict) or not isinstance(document.get("nodes"), list):
        raise wrong("a fleet file has a list of nodes")
    unknown = set(document) - {"nodes", "links", "regions", "catalogue"}
    if unknown:
        raise wrong(f"it has {min(map(str, unknown))}, which is not known")
    named = document.get("catalogue", str(CATALOGUE))
    if not isinstance(named, str):
        raise wrong(f"catalogue is {named}, which names no file")
    # Beside the fleet file, where it is not absolute.
    catalogue = load_catalogue(path.parent / named)
    nodes: list[NodeCard] = []
    for entry in document["nodes"]:
        nodes += _nodes(entry, catalogue, work, batches, wrong)
        if len(nodes) > _MAX_NODES:
            raise wrong(f"it has more than {_MAX_NODES:,} nodes")
    links, regions = _links(document, nodes, wrong)
    fleet = Fleet(nodes=tuple(nodes), links=links, regions=regions)
    require_sound(fleet)
    return fleet


def load_catalogue(path: Path) -> dict[str, Gpu]:
    """Return the GPUs of a catalogue by name."""
    document = _read(path)
    try:
        return {name: decode(Gpu, entry) for name, entry in document.items()}
    except (ValueError, AttributeError) as error:
        raise FleetError(
            f"the catalogue {path} cannot be understood: {error}", f"write it as {CATALOGUE} is"
        ) from error


def estimated_times(gpu: Gpu, work: Workload, batch: BatchSpec, speed: float) -> PartTimes:
    """Return what a card should take for a microbatch, from the operations of this model.

    A multiply and an add for each parameter and token forward, twice that backward (half of it for inputs, half for
    weights); causal attention looks at half of the sequence. Embeddings are looked up, which takes next to nothing.
    """
    model, tokens = work.model, batch.microbatch_tokens
    flops_per_s = gpu.peak_tflops * 1e12 * gpu.sustained * speed
    matrices_s = 2 * model.layer_params * tokens / flops_per_s
    attention_s = 2 * batch.seq_len * model.hidden_size * tokens / flops_per_s
    head_s = 2 * model.head_params * tokens / flops_per_s
    return PartTimes(
        microbatch_size=batch.microbatch_size,
        layer_forward_s=matrices_s + attention_s,
        layer_backward_s=2 * (matrices_s + attention_s),
        layer_weight_s=matrices_s,
        embedding_forward_s=0.0,
        embedding_backward_s=0.0,
        head_forward_s=head_s,
        head_backward_s=2 * head_s,
    )


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases: a few of them can stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not taken")
        return super().compose_node(parent, index)


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FleetError(f"{path} has more than {_MAX_BYTES >> 20} MB", "describe equal nodes as one with a count")
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, _PlainLoader)  # noqa: S506
    except OSError as error:
        raise FleetError(f"the fleet file {path} cannot be read: {error.strerror}", "name one that is there") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())[:200]
        raise FleetError(f"{path} is neither YAML nor JSON: {what}", "docs/fleet-file.md has the format") from error


_Wrong = Callable[[str], FleetError]


def _nodes(
    entry: Any, catalogue: Mapping[str, Gpu], work: Workload, batches: tuple[BatchSpec, ...], wrong: _Wrong
) -> list[NodeCard]:
    """Return the nodes of one entry: one that was measured, or a number of equal ones that are described."""
    if not isinstance(entry, dict):
        raise wrong(f"{str(entry)[:40]} is no node")
    if "times" in entry:
        try:
            return [decode(NodeCard, entry)]
        except ValueError as error:
            raise wrong(f"node {entry.get('node')}: {error}") from error
    name = str(entry.get("name", ""))
    unknown = set(entry) - _NODE_KEYS
    if unknown:
        key = min(str(key) for key in unknown)
        nearest = get_close_matches(key, _NODE_KEYS, n=1)
        raise wrong(f"node {name} has {key}, which is not known" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    if not name or "gpu" not in entry:
        raise wrong(f"a node has a name and a gpu; this one has {', '.join(map(str, entry)) or 'nothing'}")
    gpu = catalogue.get(str(entry["gpu"]))
    if gpu is None:
        nearest = get_close_matches(str(entry["gpu"]), catalogue, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the catalogue has {', '.join(sorted(catalogue))}"
        raise wrong(f"node {name} has a gpu {entry['gpu']}, which the catalogue does not have; {hint}")
    count = entry.get("count", 1)
    if not isinstance(count, int) or not 0 < count <= _MAX_NODES:
        raise wrong(f"node {name} has count={count}")

    def number(key: str, default: float) -> float:
        value = entry.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong(f"node {name} has {key}={value}, which is no number")
        if not math.isfinite(value):
            raise wrong(f"node {name} has {key}={value}")
        return float(value)

    speed = number("speed", 1.0)
    if not speed > 0:
        raise wrong(f"node {name} has speed={speed}")
    memory_gb = number("memory_gb", gpu.memory_gb * _USABLE_MEMORY - _CONTEXT_GB)
    region = str(entry.get("region", "here"))
    names = [name] if count == 1 else [f"{name}-{index}" for index in range(count)]
    return [
        NodeCard(
            node=own,
            host=str(entry.get("host", own)),
            region=region,
            device=str(entry["gpu"]),
            boundary_bytes=2,
            memory_bytes=int(memory_gb * 1e9),
            times=tuple(estimated_times(gpu, work, batch, speed) for batch in batches),
            price_per_hour=number("price_per_hour", gpu.price_per_hour),
            losses_per_hour=number("losses_per_hour", 0.0),
            uplink_mbps=number("uplink_mbps", 0.0),
            downlink_mbps=number("downlink_mbps", 0.0),
            estimated=True,
        )
        for own in names
    ]


def _links(
    document: Mapping[str, Any], nodes: list[NodeCard], wrong: _Wrong
) -> tuple[tuple[LinkCard, ...], tuple[RegionLink, ...]]:
    """Return the links of nodes and of regions; of two entries for one pair the later counts."""
    regions = list(dict.fromkeys(node.region for node in nodes))
    of_nodes: dict[tuple[str, str], LinkCard] = {}
    of_regions: dict[tuple[str, str], RegionLink] = {}
    try:
        for link in (decode(RegionLink, entry) for entry in document.get("regions") or ()):
            of_regions[link.source, link.target] = link
        for entry in document.get("links") or ():
            if "source" in entry:
                link = decode(LinkCard, entry)
                of_nodes[link.source, link.target] = link
                continue
            for a, b in _pairs(entry, regions, wrong):
                for source, target, rate_key in ((a, b, "rate_mbps"), (b, a, "back_mbps")):
                    of_regions[source, target] = _region_link(entry, source, target, rate_key)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise wrong(f"a link cannot be understood: {error}") from error
    return tuple(of_nodes.values()), tuple(of_regions.values())


def _pairs(entry: Mapping[str, Any], regions: list[str], wrong: _Wrong) -> list[tuple[str, str]]:
    """Return the pairs of regions that an entry is for: the two it names, all that differ, or each with itself."""
    unknown = set(entry) - _LINK_KEYS
    if unknown:
        raise wrong(f"a link has {min(map(str, unknown))}, which is not known")
    between = entry.get("between")
    if between == "all":
        return list(combinations(regions, 2))
    if between == "each":
        return [(region, region) for region in regions]
    if not isinstance(between, list) or len(between) != 2:
        raise wrong(f"a link is between two regions, between all, or within each; this one says {between}")
    return [(str(between[0]), str(between[1]))]


def _region_link(entry: Mapping[str, Any], source: str, target: str, rate_key: str) -> RegionLink:
    rate_mbps = float(entry["rate_mbps"])
    if source != target:
        rate_mbps = float(entry.get(rate_key, rate_mbps))
    return RegionLink(
        source=source,
        target=target,
        delay_s=float(entry["delay_ms"]) / 1e3,
        rate_mbps=rate_mbps,
        shared_mbps=float(entry.get("shared_mbps", 0.0)),
    )
