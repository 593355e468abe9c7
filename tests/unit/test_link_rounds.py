"""Which links are probed: all of a few nodes, samples of many, and never two on one wire at once."""

import math
from itertools import permutations

import pytest

from actors.fleet_spec import LinkCard
from orchestrator.link_rounds import Spot, probe_rounds, region_links

# A probe over a slow, far link: 5 empty and 2 full calls of 1 MB at 80 ms there and back and 30 Mbit/s.
SLOW_PROBE_S = 5 * 0.08 + 2 * (0.08 + 8 / 30)


def spots(num_nodes: int, num_regions: int, per_host: int = 1) -> list[Spot]:
    return [Spot(node=f"n{i}", host=f"h{i // per_host}", region=f"r{i % num_regions}") for i in range(num_nodes)]


def flat(rounds) -> list[tuple[str, str]]:
    return [probe for probes in rounds for probe in probes]


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 10])
def test_of_a_few_nodes_every_pair_is_probed_both_ways_once(num_nodes: int) -> None:
    nodes = spots(num_nodes, 2)
    assert sorted(flat(probe_rounds(nodes, 1))) == sorted(permutations((s.node for s in nodes), 2))


@pytest.mark.parametrize(("num_nodes", "num_regions", "per_host"), [(11, 1, 1), (64, 8, 1), (64, 4, 8), (64, 64, 1)])
def test_of_many_nodes_each_is_probed_and_each_pair_of_regions(num_nodes: int, num_regions: int, per_host: int) -> None:
    nodes = spots(num_nodes, num_regions, per_host)
    region = {spot.node: spot.region for spot in nodes}
    probes = flat(probe_rounds(nodes, 1))
    assert len(probes) <= num_nodes + 2 * num_regions * num_regions
    between = {(region[a], region[b]) for a, b in probes}
    assert set(permutations({spot.region for spot in nodes}, 2)) <= between
    if num_regions < num_nodes:
        assert {node for probe in probes for node in probe} == {spot.node for spot in nodes}


def test_probes_of_one_round_share_no_machine_and_no_way_between_regions() -> None:
    nodes = spots(64, 4, per_host=2)
    where = {spot.node: spot for spot in nodes}
    for probes in probe_rounds(nodes, 1):
        hosts = [host for a, b in probes for host in {where[a].host, where[b].host}]
        assert len(set(hosts)) == len(hosts)
        ways = [frozenset((where[a].region, where[b].region)) for a, b in probes]
        ways = [way for way in ways if len(way) == 2]
        assert len(set(ways)) == len(ways)


def test_64_nodes_in_8_regions_are_probed_in_under_30_seconds() -> None:
    rounds = probe_rounds(spots(64, 8), 1)
    assert len(rounds) * SLOW_PROBE_S < 30


def test_the_same_seed_draws_the_same_pairs() -> None:
    assert probe_rounds(spots(40, 5), 1) == probe_rounds(spots(40, 5), 1)
    assert probe_rounds(spots(40, 5), 1) != probe_rounds(spots(40, 5), 2)


def test_a_regions_link_is_the_median_of_its_samples() -> None:
    nodes = spots(4, 2)
    cards = [
        LinkCard(source="n0", target="n1", delay_s=0.01, rate_mbps=100.0),
        LinkCard(source="n2", target="n1", delay_s=0.03, rate_mbps=300.0),
        LinkCard(source="n0", target="n3", delay_s=0.02, rate_mbps=110.0),
        LinkCard(source="n1", target="n3", delay_s=0.001, rate_mbps=9000.0),
    ]
    links = {(link.source, link.target): link for link in region_links(nodes, cards)}
    assert links["r0", "r1"].rate_mbps == 110.0
    assert links["r0", "r1"].delay_s == 0.02
    assert links["r1", "r1"].rate_mbps == 9000.0
    assert all(math.isfinite(link.delay_s) for link in links.values())
