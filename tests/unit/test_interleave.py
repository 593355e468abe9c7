"""Interleaved plans: when they are made, what they are said to take, and what keeps a run on the one it has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from actors.errors import ConfigError, PlanError
from actors.fleet_spec import Fleet
from actors.interleaved import node_actions, play_chunks
from actors.schedule import Op
from actors.settings import WireConfig
from actors.spec import Plan
from orchestrator.planner.build import make_problem
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.explain import explained_plan
from orchestrator.planner.plan import make_chain, make_plan
from orchestrator.planner.played import pipeline_times
from orchestrator.planner.problem import Placement
from tests.small_fleets import BATCH, WORK, link, node

# Fewer microbatches than it takes to make filling a pipeline of four cheap.
FEW = replace(WORK, activation_checkpointing=True, batch=replace(BATCH, num_microbatches=4))


def apart(names: str, delay_s: float | None = None, rate_mbps: float = 10_000.0) -> Fleet:
    """Return equal nodes on hosts of their own, near to one another unless a delay is given."""
    (times,) = node("").times
    # Next to nothing, so that halves of backwards are not what fills the waits.
    times = replace(times, layer_weight_s=1e-4)
    cards = tuple(replace(node(name), host=name, times=(times,)) for name in names)
    links = () if delay_s is None else tuple(link(a, b, rate_mbps, delay_s) for a in names for b in names if a != b)
    return Fleet(nodes=cards, links=links)


def planned(fleet: Fleet, work=FEW, before: Plan | None = None, **choices) -> Plan:
    return make_plan(fleet, work, WireConfig(), PlanConfig(**choices), before)


def layers(plan: Plan) -> list[int]:
    return [stage.layer_stop - stage.layer_start for stage in plan.stages]


def test_near_nodes_with_few_microbatches_get_several_stages_each() -> None:
    plan = planned(apart("abcd"), stages=4)
    chain = make_chain(apart("abcd"), FEW, WireConfig(), PlanConfig(stages=4))
    assert plan.schedule == "interleaved"
    assert plan.step_s < 0.95 * chain.step_s
    assert plan.num_nodes == 4
    assert len(plan.stages) % 4 == 0
    assert [stage.node for stage in plan.stages] == [stage.node for stage in plan.stages[:4]] * (len(plan.stages) // 4)
    assert sum(layers(plan)) == WORK.model.num_layers
    assert len(plan.links) == len(plan.stages) - 1
    assert plan.alternatives[0].name == "one stage a node"
    assert plan.alternatives[0].step_s == pytest.approx(chain.step_s)
    assert plan.dollars_per_hour == pytest.approx(chain.dollars_per_hour)


def test_it_is_not_chosen_where_it_does_not_pay() -> None:
    # Every microbatch would cross the links twice as often.
    assert planned(apart("abcd", delay_s=0.1, rate_mbps=20), stages=4).schedule != "interleaved"
    # With many microbatches there is little to fill.
    many = replace(WORK, batch=replace(BATCH, num_microbatches=256))
    assert planned(apart("abcd"), many, stages=4).schedule != "interleaved"
    # On one machine the others use what one does not.
    shared = Fleet(nodes=tuple(node(name) for name in "abcd"), links=())
    assert planned(shared, stages=4).schedule != "interleaved"
    assert planned(shared, stages=4, schedule="interleaved").schedule == "interleaved"


def test_a_step_takes_what_its_actions_take() -> None:
    fleet = apart("abc", delay_s=0.004, rate_mbps=400)
    plan = planned(fleet, schedule="interleaved", chunks=2, stages=3)
    index = {card.node: number for number, card in enumerate(fleet.nodes)}
    placement = Placement(
        bounds=(0, *(stage.layer_stop for stage in plan.stages)),
        nodes=tuple((index[stage.node],) for stage in plan.stages),
    )
    pairs = [(own.forward_codec, own.backward_codec) for own in plan.links]
    problem = make_problem(fleet, replace(FEW, schedule="1f1b"), WireConfig(), codecs=pairs)
    orders = [node_actions(seat, 3, 2, 4) for seat in range(3)]
    played = play_chunks(orders, pipeline_times(problem, placement)).step_s
    assert plan.step_s == pytest.approx(played + 2 * 0.004)
    assert plan.tokens_per_s == pytest.approx(FEW.batch.step_tokens / plan.step_s)
    # No layer moved elsewhere makes the step shorter.
    for source, target in ((a, b) for a in range(6) for b in range(6) if a != b):
        sizes = [s - (i == source) + (i == target) for i, s in enumerate(layers(plan))]
        if min(sizes) < 1:
            continue
        moved = planned(fleet, schedule="interleaved", chunks=2, split=tuple(sizes))
        assert layers(moved) == sizes
        assert moved.step_s >= plan.step_s * (1 - 1e-9)


def test_memory_is_what_a_node_holds_at_its_peak() -> None:
    fleet = apart("abcd")
    plan = planned(fleet, schedule="interleaved", chunks=2, stages=4)
    for seat in range(4):
        held, most = Counter[int](), Counter[int]()
        for action in node_actions(seat, 4, 2, 4):
            held[action.chunk] += 1 if action.op is Op.FORWARD else -1
            most |= held
        assert [plan.stages[chunk * 4 + seat].in_flight for chunk in range(2)] == [most[0], most[1]]
    state = 16 * WORK.model.num_params
    assert sum(stage.memory_bytes for stage in plan.stages) > state
    # A node without room for all of its stages gets fewer layers, or there is no plan.
    used = Counter[str]()
    for stage in plan.stages:
        used[stage.node] += stage.memory_bytes
    short = replace(fleet.nodes[0], memory_bytes=int(used["a"] * 0.9))
    tight = planned(replace(fleet, nodes=(short, *fleet.nodes[1:])), schedule="interleaved", chunks=2, stages=4)
    needed = sum(stage.memory_bytes for stage in tight.stages if stage.node == "a")
    assert needed <= short.memory_bytes
    # Room for a chain of theirs, and not for the frames of twice as many stages.
    tiny = replace(
        fleet, nodes=tuple(replace(card, memory_bytes=int(0.9 * max(used.values()))) for card in fleet.nodes)
    )
    assert planned(tiny, schedule="1f1b", stages=4).stages
    with pytest.raises(PlanError, match="2 stages on each of 4 nodes do not fit their memory"):
        planned(tiny, schedule="interleaved", chunks=2, stages=4)


def test_slower_nodes_hold_less_in_all_of_their_stages_together() -> None:
    cards = [replace(node(name, speed), host=name) for name, speed in (("a", 1.0), ("b", 2.0), ("c", 1.0))]
    plan = planned(Fleet(nodes=tuple(cards), links=()), schedule="interleaved", chunks=2, stages=3)
    total = Counter[str]()
    for stage, count in zip(plan.stages, layers(plan), strict=True):
        total[stage.node] += count
    assert total["b"] < min(total["a"], total["c"])


def test_a_run_keeps_its_chunks_unless_another_plan_is_better_by_noise() -> None:
    fleet = apart("abcd")
    before = planned(fleet, schedule="interleaved", chunks=2, stages=4)
    # A node is a little slower now, so that another cut is best, by less than noise.
    times = fleet.nodes[3].times[0]
    slow = replace(times, layer_forward_s=1.2 * times.layer_forward_s, layer_backward_s=1.2 * times.layer_backward_s)
    slower = replace(fleet, nodes=(*fleet.nodes[:3], replace(fleet.nodes[3], times=(slow,))))
    anew = planned(slower, schedule="interleaved", chunks=2, stages=4, noise=0.0)
    assert layers(anew) != layers(before)
    assert layers(planned(slower, before=before, schedule="interleaved", noise=0.5)) == layers(before)
    # Not asked for any more, and as good as what else there is.
    kept = planned(slower, before=before, noise=0.5)
    assert (kept.schedule, layers(kept)) == ("interleaved", layers(before))
    # Something is asked for that it is not.
    assert len(planned(slower, before=before, schedule="interleaved", chunks=3, noise=0.5).stages) == 12
    assert planned(slower, before=before, schedule="interleaved", stages=3, noise=0.5).num_nodes == 3
    # A node is gone.
    left = planned(apart("abc"), before=before, schedule="interleaved", chunks=2)
    assert {stage.node for stage in left.stages} == set("abc")


def test_codecs_are_chosen_for_every_link_within_the_budget() -> None:
    fleet = apart("abcd", delay_s=0.001, rate_mbps=4)
    plan = planned(fleet, schedule="interleaved", chunks=2, stages=4, quality_budget=0.01)
    assert len(plan.links) == 7
    assert plan.loss_share <= 0.01
    assert any(own.forward_codec != "none" for own in plan.links)
    assert [own.source_stage for own in plan.links] == list(range(7))


@pytest.mark.parametrize(
    ("choices", "needle"),
    [
        ({"chunks": 2}, "plan.chunks is 2 and plan.schedule None"),
        ({"schedule": "interleaved", "chunks": 1}, "plan.chunks is 1"),
        ({"schedule": "interleaved", "split": (6, 6)}, "plan.split has 2 stages"),
        ({"schedule": "interleaved", "chunks": 2, "split": (4, 4, 4)}, "plan.split has 3 stages"),
        ({"schedule": "interleaved", "max_replicas": 2}, "do not go together"),
    ],
)
def test_choices_that_contradict_are_refused(choices: dict, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        PlanConfig(**choices)


def test_more_stages_than_layers_are_refused_with_what_to_set() -> None:
    with pytest.raises(PlanError, match="12 layers are too few for 4 stages on each of 4 nodes") as refused:
        planned(apart("abcd"), schedule="interleaved", chunks=4, stages=4)
    assert "plan.chunks" in refused.value.remedy
    with pytest.raises(PlanError, match="the best chain has one node"):
        planned(apart("abcd"), schedule="interleaved", stages=1)
    with pytest.raises(ConfigError, match=r"plan.split has 8 layers, the model 12"):
        planned(apart("abcd"), schedule="interleaved", chunks=2, split=(2, 2, 2, 2))


def test_what_is_asked_for_under_a_rate_keeps_to_it_or_is_refused() -> None:
    # So far apart that each chunk more costs.
    far = apart("abcd", delay_s=0.1, rate_mbps=20)
    fleet = replace(far, nodes=tuple(replace(card, price_per_hour=1.0) for card in far.nodes))
    kept = planned(fleet, schedule="interleaved", chunks=2, stages=2, objective="cheapest", min_tokens_per_s=1.0)
    rate = FEW.batch.step_tokens / kept.step_s
    chain = planned(fleet, stages=2, objective="cheapest", min_tokens_per_s=rate * 1.01)
    assert chain.step_s < kept.step_s
    with pytest.raises(PlanError, match=r"no interleaved plan keeps to plan\.min_tokens_per_s=") as refused:
        planned(
            fleet,
            schedule="interleaved",
            chunks=2,
            stages=2,
            objective="cheapest",
            min_tokens_per_s=rate * 1.01,
        )
    assert f"({rate:,.0f} tokens/s)" in refused.value.remedy


@pytest.mark.parametrize("slowness", [1.0, 1.3, 2.0])
@pytest.mark.parametrize(("names", "chunks"), [("ab", 2), ("ab", 3), ("abc", 2)])
def test_no_layer_moved_makes_the_step_shorter(slowness: float, names: str, chunks: int) -> None:
    cards = tuple(replace(node(name, slowness if name == "b" else 1.0), host=name) for name in names)
    fleet = Fleet(nodes=cards, links=())
    plan = planned(fleet, schedule="interleaved", chunks=chunks, stages=len(names))
    order = [stage.node for stage in plan.stages[: len(names)]]
    pins = {name: str(order.index(name)) for name in names}
    for source in range(len(plan.stages)):
        for target in range(len(plan.stages)):
            sizes = [s - (i == source) + (i == target) for i, s in enumerate(layers(plan))]
            if source == target or min(sizes) < 1:
                continue
            moved = planned(fleet, schedule="interleaved", chunks=chunks, split=tuple(sizes), pins=pins)
            assert [stage.node for stage in moved.stages[: len(names)]] == order
            assert moved.step_s >= plan.step_s * (1 - 1e-9)


def test_two_nodes_have_one_way_for_what_goes_from_one_to_the_other() -> None:
    """Activations of one chunk and gradients of another: all of their bytes are a step's least."""
    fleet = apart("ab", delay_s=0.001, rate_mbps=2)
    plan = planned(fleet, schedule="interleaved", chunks=2, stages=2)
    bytes_0_1 = plan.links[0].frame_bytes_forward + plan.links[1].frame_bytes_backward
    bytes_0_1 += plan.links[2].frame_bytes_forward
    assert plan.step_s >= 4 * bytes_0_1 * 8 / 2e6


def test_an_uplink_that_all_stages_of_a_node_share_is_counted() -> None:
    fleet = apart("abc", delay_s=0.001, rate_mbps=1000)
    wide = planned(fleet, schedule="interleaved", chunks=2, stages=3)
    narrow = replace(fleet, nodes=(fleet.nodes[0], replace(fleet.nodes[1], uplink_mbps=0.2), fleet.nodes[2]))
    thin = planned(narrow, schedule="interleaved", chunks=2, stages=3, pins={"b": "1"})
    sent = sum(own.frame_bytes_forward for own in thin.links if own.source_stage % 3 == 1)
    sent += sum(own.frame_bytes_backward for own in thin.links if own.target_stage % 3 == 1)
    assert thin.step_s >= 4 * sent * 8 / 2e5
    assert thin.step_s > 1.5 * wide.step_s


def test_a_plan_that_is_explained_is_the_plan_that_is_made() -> None:
    fleet = apart("abcd")
    explained = explained_plan(fleet, FEW, WireConfig(), PlanConfig(stages=4))
    made = planned(fleet, stages=4)
    assert (explained.schedule, layers(explained), explained.step_s) == (made.schedule, layers(made), made.step_s)
    assert explained.tokens_per_s <= explained.bound_tokens_per_s * (1 + 1e-9)
    assert [a.name for a in explained.alternatives][:2] == ["one stage a node", "even split, same nodes"]


def test_what_sets_the_pace_is_the_slowest_node_with_all_of_its_stages() -> None:
    cards = tuple(replace(node(name, 3.0 if name == "b" else 1.0), host=name) for name in "ab")
    sizes = (3, 3, 3, 3)
    plan = planned(Fleet(nodes=cards, links=()), schedule="interleaved", chunks=2, split=sizes)
    seat = [stage.node for stage in plan.stages].index("b")
    assert plan.binds == f"stages {seat}, {seat + 2} (b)"
