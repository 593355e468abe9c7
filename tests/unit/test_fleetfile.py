"""Fleet files: described and measured fleets, and one clear line for each thing that cannot be."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from actors.errors import FleetError
from actors.fleet_spec import Fleet, LinkCard, NodeCard, RegionLink
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec, WireConfig
from orchestrator.fleetfile import CATALOGUE, load_catalogue, load_fleet, save_fleet
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.validate import require_sound
from tests.part_times import part_times

BATCH = BatchSpec(seq_len=64, microbatch_size=2, num_microbatches=4)
WORK = Workload(model=ModelSpec(), batch=BATCH, schedule="1f1b", activation_checkpointing=False)
EXAMPLES = sorted(set((Path(__file__).parents[2] / "conf" / "fleet").glob("*.yaml")) - {CATALOGUE})


def load(path: Path, *batches: BatchSpec) -> Fleet:
    return load_fleet(path, WORK, batches or (BATCH,))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return path


def measured(name: str = "a", **changes: object) -> NodeCard:
    times = part_times(2, layer_forward_s=0.0123, layer_backward_s=0.0234, embedding_s=0.003, head_s=0.004)
    card = NodeCard(
        node=name,
        host="h",
        region="r",
        device="d",
        boundary_bytes=4,
        memory_bytes=10**9,
        times=(times,),
        price_per_hour=0.1,
        losses_per_hour=0.01,
    )
    return replace(card, **changes)


def test_a_described_fleet_has_its_nodes_links_and_estimated_times(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
nodes:
  - {name: eu, count: 2, gpu: A100-80GB, region: eu, speed: 0.5, price_per_hour: 1.5}
  - {name: us, gpu: T4, region: us, uplink_mbps: 80}
links:
  - {between: all, delay_ms: 40, rate_mbps: 100, back_mbps: 50}
  - {between: [us, eu], delay_ms: 50, rate_mbps: 200}
  - {between: each, delay_ms: 1, rate_mbps: 5000}
""",
    )
    wide = replace(BATCH, microbatch_size=4, num_microbatches=2)
    fleet = load(path, BATCH, wide)
    assert [(node.node, node.device, node.region) for node in fleet.nodes] == [
        ("eu-0", "A100-80GB", "eu"),
        ("eu-1", "A100-80GB", "eu"),
        ("us", "T4", "us"),
    ]
    assert all(node.estimated for node in fleet.nodes)
    assert fleet.nodes[0].price_per_hour == 1.5
    a100, t4 = fleet.nodes[0].times_at(2), fleet.nodes[2].times_at(2)
    assert a100 is not None
    assert t4 is not None
    # By hand: 2 operations for each parameter and token, and causal attention, at half of what an A100 sustains.
    model = WORK.model
    operations = 2 * model.layer_params * 128 + 2 * 64 * model.hidden_size * 128
    assert a100.layer_forward_s == pytest.approx(operations / (312e12 * 0.5 * 0.5))
    assert t4.layer_forward_s / a100.layer_forward_s == pytest.approx(312 * 0.5 * 0.5 / (65 * 0.35))
    assert fleet.nodes[0].times_at(4).layer_forward_s == pytest.approx(2 * a100.layer_forward_s)
    links = {(link.source, link.target): (link.delay_s, link.rate_mbps) for link in fleet.regions}
    assert links["eu", "us"] == (0.05, 200.0)
    assert links["eu", "eu"] == (0.001, 5000.0)
    problem = make_problem(fleet, WORK, WireConfig())
    assert problem.num_places == 2
    assert problem.uplink_byte_s_N[2] == pytest.approx(8 / 80e6)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_measured_fleet_is_read_back_exactly(tmp_path: Path, suffix: str) -> None:
    link = LinkCard(source="a", target="b", delay_s=0.1 + 0.2, rate_mbps=1 / 3)
    region = RegionLink(source="r", target="r", delay_s=0.0, rate_mbps=7.0)
    shared = replace(region, shared_mbps=9.0)
    for links, regions in (((link,), (region,)), ((), (shared,))):
        fleet = Fleet(nodes=(measured(), measured("b")), links=links, regions=regions)
        path = tmp_path / f"fleet{suffix}"
        save_fleet(path, fleet)
        assert load(path) == fleet
    with pytest.raises(FleetError, match="r -> r has shared_mbps, which is not counted where links of two nodes"):
        require_sound(Fleet(nodes=(measured(), measured("b")), links=(link,), regions=(shared,)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_sound(path: Path) -> None:
    fleet = load(path)
    assert len(fleet.nodes) >= 14
    assert {node.device for node in fleet.nodes} <= set(load_catalogue(CATALOGUE))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: []", "the fleet has no nodes"),
        ("nodes: {a: 1}", "has a list of nodes"),
        ("- 1", "has a list of nodes"),
        ("nodes: [3]", "3 is no node"),
        ("nodes: [", "neither YAML nor JSON"),
        ("a: &x [1]\nb: [*x, *x]", "aliases are not taken"),
        ("nodes: [{name: a, gpu: A10O-80GB}]", "did you mean A100-80GB?"),
        ("nodes: [{name: a, gpu: T4, pirce_per_hour: 1}]", "did you mean price_per_hour?"),
        ("nodes: [{name: a, gpu: T4, count: 0}]", "count=0"),
        ("nodes: [{name: a, gpu: T4, count: 1000000000}]", "count=1000000000"),
        ("nodes: [{name: a, gpu: T4, price_per_hour: -1}]", "price_per_hour=-1"),
        ("nodes: [{name: a, gpu: T4, price_per_hour: cheap}]", "which is no number"),
        ("nodes: [{name: a, gpu: T4, losses_per_hour: .nan}]", "losses_per_hour=nan"),
        ("nodes: [{name: a, gpu: T4, memory_gb: 0}]", "memory_bytes=0"),
        ("nodes: [{name: a, gpu: T4, memory_gb: .nan}]", "memory_gb=nan"),
        ("nodes: [{name: a, gpu: T4, memory_gb: .inf}]", "memory_gb=inf"),
        ("nodes: [{name: a, gpu: T4}]\n1: 2\nx: 3", "1, which is not known"),
        ("nodes: [{name: a, gpu: T4}]\ncatalogue: 5", "catalogue is 5"),
        ("nodes: [{name: a, gpu: T4}]\ncatalogue: none.yaml", "none.yaml cannot be read"),
        ("nodes: [{name: a, gpu: T4, speed: 0}]", "speed=0"),
        ("nodes: [{name: a, gpu: T4}, {name: a, gpu: T4}]", "two nodes named a"),
        ("nodes: [{name: a, gpu: T4}]\nlinks: [{between: [here, there], delay_ms: 1, rate_mbps: 1}]", "there"),
        ("nodes: [{name: a, gpu: T4}]\nlinks: [{between: each, delay_ms: 1, rate_mbps: 0}]", "rate of 0.0 Mbit/s"),
        ("nodes: [{name: a, gpu: T4}]\nlinks: [{between: each, delay_ms: -1, rate_mbps: 1}]", "delay of -0.001 s"),
        ("nodes: [{name: a, gpu: T4}]\nlinks: [{between: each, rate_mbps: 1}]", "delay_ms"),
        ("nodes: [{name: a, gpu: T4}]\nlinks: [{between: here, delay_ms: 1, rate_mbps: 1}]", "between two regions"),
        ("nodes: [{name: a, gpu: T4}]\nlinks: [{source: a, target: a, delay_s: 1.0, rate_mbps: 1.0}]", "to itself"),
        ("nodes: [{name: a, gpu: T4}]\nlinks: [{source: a, target: b, delay_s: 1.0, rate_mbps: 1.0}]", "no node"),
        ("nodes: [{node: a, times: []}]", "node a"),
        ("nodes: [{name: a, gpu: T4}]\nhosts: []", "hosts, which is not known"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(FleetError) as caught:
        load(written(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FleetError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")
    monkeypatch.setattr("orchestrator.fleetfile._MAX_BYTES", 10)
    with pytest.raises(FleetError, match="has more than"):
        load(written(tmp_path, "nodes: [{name: a, gpu: T4}]"))


def test_a_json_number_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    save_fleet(path, Fleet(nodes=(measured(),), links=()))
    document = json.loads(path.read_text())
    document["nodes"][0]["times"][0]["layer_forward_s"] = None
    path.write_text(json.dumps(document))
    with pytest.raises(FleetError, match="layer_forward_s=nan"):
        load(path)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (measured(times=()), "was not timed"),
        (measured(node=""), "has no name"),
        (measured(memory_bytes=-5), "memory_bytes=-5"),
        (measured(boundary_bytes=3), "neither 2 nor 4"),
        (measured(uplink_mbps=math.inf), "uplink_mbps=inf"),
        (measured(copy_mbps=-1.0), "copy_mbps=-1"),
    ],
)
def test_a_node_whose_figures_cannot_be_is_named(node: NodeCard, words: str) -> None:
    with pytest.raises(FleetError, match=words):
        require_sound(Fleet(nodes=(node,), links=()))


@pytest.mark.parametrize("changed", ["layer_forward_s", "layer_backward_s", "head_forward_s"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_times_that_cannot_be_are_named(changed: str, value: float) -> None:
    card = measured()
    broken = replace(card, times=(replace(card.times[0], **{changed: value}),))
    with pytest.raises(FleetError, match=changed):
        require_sound(Fleet(nodes=(broken,), links=()))
