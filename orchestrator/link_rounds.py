"""Which links are probed, and which of them at the same time.

PURE. Of a few nodes every pair is measured, both ways. Of many, each node to one near it, and each pair of regions by
a few samples: so N nodes in R regions cost O(N + R^2) probes. Probes of one round share no machine and no pair of
regions, so that none takes the wire of another.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from actors.fleet_spec import LinkCard, RegionLink

# Every pair of up to this many nodes is probed.
MAX_ALL_PAIRS = 10
_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Spot:
    """Where a node is: its name, its machine, its region."""

    node: str
    host: str
    region: str


Probe = tuple[str, str]


def probe_rounds(spots: Sequence[Spot], seed: int) -> tuple[tuple[Probe, ...], ...]:
    """Return the links to probe, source and target, as rounds to do one after another."""
    probes = _all_pairs(spots) if len(spots) <= MAX_ALL_PAIRS else _samples(spots, random.Random(seed))  # noqa: S311
    where = {spot.node: spot for spot in spots}
    rounds: list[list[Probe]] = []
    busy: list[set[object]] = []
    for source, target in probes:
        needs = _shared_things(where[source], where[target])
        free = next((number for number, taken in enumerate(busy) if not taken & needs), len(rounds))
        if free == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[free].append((source, target))
        busy[free] |= needs
    return tuple(tuple(probes) for probes in rounds)


def region_links(spots: Sequence[Spot], cards: Sequence[LinkCard]) -> tuple[RegionLink, ...]:
    """Return what probes of single pairs say of their regions: the median rate and delay of each."""
    region = {spot.node: spot.region for spot in spots}
    of: defaultdict[tuple[str, str], list[LinkCard]] = defaultdict(list)
    for card in cards:
        of[region[card.source], region[card.target]].append(card)
    return tuple(
        RegionLink(
            source=source,
            target=target,
            delay_s=statistics.median(card.delay_s for card in samples),
            rate_mbps=statistics.median(card.rate_mbps for card in samples),
        )
        for (source, target), samples in of.items()
    )


def _shared_things(source: Spot, target: Spot) -> set[object]:
    """Return what a probe must have to itself: both machines and, between regions, that way."""
    things: set[object] = {("host", source.host), ("host", target.host)}
    if source.region != target.region:
        things.add(("regions", frozenset((source.region, target.region))))
    return things


def _all_pairs(spots: Sequence[Spot]) -> list[Probe]:
    return [(a.node, b.node) for a in spots for b in spots if a != b]


def _samples(spots: Sequence[Spot], random_state: random.Random) -> list[Probe]:
    """Return a probe from each node to the next of its region, and a few between each two regions, each way."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for spot in spots:
        members[spot.region].append(spot.node)
    probes: list[Probe] = []
    for nodes in members.values():
        probes += [(a, b) for a, b in zip(nodes, [*nodes[1:], nodes[0]], strict=True) if a != b]
    for source in members:
        for target in members:
            if source != target:
                count = min(_SAMPLES, len(members[source]), len(members[target]))
                sources = random_state.sample(members[source], count)
                probes += zip(sources, random_state.sample(members[target], count), strict=True)
    return probes
