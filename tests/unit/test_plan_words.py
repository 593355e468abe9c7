"""What a plan says of itself: what binds, what would help, what it is compared with, how good it can be."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from actors.errors import PlanError
from actors.fleet_spec import Fleet, NodeCard, RegionLink
from actors.settings import BatchSpec, WireConfig
from bench.planner_fleets import MODEL_8B, synthetic_fleet, synthetic_problem
from orchestrator.planner.binding import what_binds
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.explain import explained_plan
from orchestrator.planner.objective import Limits
from orchestrator.planner.plan import find, make_plan
from orchestrator.planner.problem import Placement
from tests.part_times import part_times
from tests.planner_problems import uniform_problem
from tests.small_fleets import MODEL, WORK, fleet, link, need, node, plan

THREE = Placement(bounds=(0, 1, 2, 3), nodes=((0,), (1,), (2,)))
PAIRS = Placement(bounds=(0, 2, 3), nodes=((0, 1), (2,)))


def test_the_way_that_binds_is_named() -> None:
    problem = uniform_problem(num_nodes=3, num_layers=3, num_microbatches=32, frame_bytes=10.0, byte_s=0.1)
    free = replace(problem, schedule="bdp")
    kinds = {
        "stage": free,
        "link": replace(free, byte_s_PP=np.where(np.arange(3)[:, None] == 1, 2.0, 0.1) * (1 - np.eye(3))),
        "uplink": replace(free, uplink_byte_s_N=np.array([0.0, 0.5, 0.0])),
        "downlink": replace(free, downlink_byte_s_N=np.array([0.0, 0.0, 0.9])),
        "shared way": replace(free, shared_bytes_per_s_PP=np.full((3, 3), 0.5)),
    }
    for kind, made in kinds.items():
        found = evaluate(made, THREE)
        binding = what_binds(made, THREE, found)
        assert binding.kind == kind
        assert binding.seconds == pytest.approx(found.pace_s), kind
    # Both its neighbours' frames leave by it.
    assert what_binds(kinds["uplink"], THREE, evaluate(kinds["uplink"], THREE)).nodes == (1,)
    assert what_binds(kinds["downlink"], THREE, evaluate(kinds["downlink"], THREE)).nodes == (2,)
    # Two of three layers on two nodes, one on one.
    assert what_binds(free, PAIRS, evaluate(free, PAIRS)).stage == 0


def with_uplink(card: NodeCard, mbps: float) -> NodeCard:
    return replace(card, uplink_mbps=mbps, estimated=True)


def test_a_narrow_uplink_is_what_binds_and_what_is_to_be_doubled() -> None:
    near = (link("a", "b", 1000.0, 0.001),)
    cards = (with_uplink(node("a"), 0.1), with_uplink(node("b"), 0.0))
    made = explained_plan(Fleet(nodes=cards, links=near), WORK, WireConfig(), PlanConfig(stages=2))
    assert made.binds == "the uplink of a (0.1 Mbit/s), stage 0"
    assert any(words.startswith("twice the uplink of a: ") for words in made.advice)


def test_what_regions_share_is_what_binds() -> None:
    cards = (replace(node("a"), region="x"), replace(node("b"), region="y"))
    way = RegionLink(source="x", target="y", delay_s=0.001, rate_mbps=1000.0, shared_mbps=0.1)
    near = [replace(way, source=r, target=r, shared_mbps=0.0) for r in "xy"]
    far = Fleet(nodes=cards, links=(), regions=(way, *near))
    made = explained_plan(far, WORK, WireConfig(), PlanConfig(stages=2))
    assert made.binds == "what x and y share (0.1 Mbit/s)"
    assert any(words.startswith("twice what x and y share: ") for words in made.advice)


def test_the_even_split_is_of_the_plans_own_nodes() -> None:
    cheap = [replace(node(name, 1.5, price=1.0), estimated=True) for name in "ab"]
    dear = [replace(node(name, 0.2, price=9.0), estimated=True) for name in "cd"]
    made = plan(Fleet(nodes=(*cheap, *dear), links=()), max_dollars_per_hour=2.0, stages=2)
    assert {stage.node for stage in made.stages} == {"a", "b"}
    # Two equal nodes are split evenly, bar the ends.
    assert made.step_s <= made.even_step_s < 1.2 * made.step_s


def test_a_node_that_costs_nothing_is_planned_for() -> None:
    for config in (PlanConfig(objective="dollars"), PlanConfig(objective="cheapest", min_tokens_per_s=1.0)):
        these = fleet(node("a", price=0.0), node("b", price=2.0))
        made = explained_plan(these, WORK, WireConfig(), config)
        assert [stage.node for stage in made.stages] == ["a"]
        assert made.dollars_per_hour == 0.0


def test_what_is_short_is_said_of_the_smallest_microbatch_that_may_be_chosen() -> None:
    small = replace(WORK, batch=BatchSpec(seq_len=32, microbatch_size=1, num_microbatches=16))
    card = replace(node("a"), times=tuple(replace(t, microbatch_size=1) for t in node("a").times))
    enough = need(card, 0, 12, in_flight=1, work=small)
    card = replace(card, memory_bytes=enough - 1_000_000)
    with pytest.raises(PlanError, match=r"stage 0 \(layers 0-11\) needs .* short"):
        make_plan(fleet(card), WORK, WireConfig(), PlanConfig(microbatch_sizes=(1,)))


def test_a_tie_goes_to_the_batchs_own_microbatches_and_to_bdp() -> None:
    card = replace(node("a"), estimated=True)
    # A microbatch of one takes half as long as one of two, so that nothing is gained.
    half = part_times(1, layer_forward_s=0.005, layer_backward_s=0.01, embedding_s=0.005, head_s=0.01)
    both = replace(card, times=(half, card.times[0]))
    made = plan(fleet(both), microbatch_sizes=(1, 2))
    assert (made.microbatch_size, made.schedule) == (2, "bdp")


def test_a_quality_budget_below_every_codecs_cost_means_no_codec() -> None:
    made = plan(fleet(node("a"), node("b")), stages=2, quality_budget=1e-6)
    assert [(each.forward_codec, each.backward_codec) for each in made.links] == [("none", "none")]
    assert made.loss_share == 0.0


@pytest.mark.parametrize("num_nodes", [90, 260])
def test_more_replicas_allowed_are_never_worse(num_nodes: int) -> None:
    problem = synthetic_problem(synthetic_fleet(num_nodes, 4, MODEL_8B, seed=3), MODEL_8B, 16)
    config = PlanConfig(evaluations=4000)
    scores = [find(problem, config, Limits(max_replicas=most)).score for most in (1, 2, 8, 200)]
    assert scores[0] < np.inf
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in pairwise(scores))


def test_a_large_fleets_chain_is_of_nodes_that_it_has() -> None:
    problem = synthetic_problem(synthetic_fleet(400, 5, MODEL_8B, seed=1), MODEL_8B, 16)
    pinned = int(np.argmax(problem.layer_s_N))
    free = find(problem, PlanConfig(evaluations=4000), Limits()).placement
    held = find(problem, PlanConfig(evaluations=4000), Limits(pins=((pinned, 0),), after=((3, pinned),))).placement
    assert free is not None
    assert held is not None
    assert pinned not in free.used
    assert pinned not in held.used or held.nodes[0] == (pinned,)
    assert MODEL.num_layers != problem.num_layers == held.bounds[-1]
