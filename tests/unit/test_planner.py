"""Plans: how the model is cut, what it is said to cost, and what is said where nothing fits."""

import math
from dataclasses import replace

import pytest
import torch

from actors.codecs import CODECS
from actors.errors import ConfigError, PlanError
from actors.fleet_spec import Fleet
from actors.schedule import SPLIT
from actors.settings import BatchSpec, WireConfig
from orchestrator.planner.assemble import chunk_and_window_bytes
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.plan import even_split, make_plan
from tests.small_fleets import BATCH, MODEL, WORK, fleet, link, need, node, plan, seconds, sizes


def test_a_stages_time_is_its_layers_and_the_ends_that_it_has() -> None:
    a = node("a")
    assert seconds(a, 4, 6) == pytest.approx(2 * 0.03)
    assert seconds(a, 0, 2) == pytest.approx(2 * 0.03 + 0.01)
    assert seconds(a, 10, 12) == pytest.approx(2 * 0.03 + 0.02)
    assert seconds(a, 4, 6, replace(WORK, activation_checkpointing=True)) == pytest.approx(2 * 0.04)


def test_memory_holds_at_least_the_weights_their_moments_and_the_logits() -> None:
    a = node("a")
    middle, last = need(a, 4, 8, in_flight=2), need(a, 8, 12, in_flight=1)
    assert middle > 16 * MODEL.stage_params(4, 8)
    assert last > 16 * MODEL.stage_params(8, 12) + 2 * 4 * BATCH.microbatch_tokens * MODEL.vocab_size


def test_memory_follows_what_is_in_flight() -> None:
    a = node("a")
    assert need(a, 3, 6, in_flight=8) > need(a, 3, 6, in_flight=4) > need(a, 3, 6, in_flight=2)
    # The head keeps of each its log-softmax, in float32, and what norm and head take.
    more = [need(a, start, stop, in_flight=3) - need(a, start, stop, in_flight=2) for start, stop in ((8, 12), (4, 8))]
    assert more[0] - more[1] == 4 * BATCH.microbatch_tokens * (MODEL.vocab_size + 2 * MODEL.hidden_size + 2)
    recomputing = replace(WORK, activation_checkpointing=True)
    assert need(a, 3, 6, in_flight=8) > need(a, 3, 6, in_flight=8, work=recomputing)
    gpipe, one_f = (plan(fleet(a, node("b")), stages=2, schedule=schedule) for schedule in ("gpipe", "1f1b"))
    assert [stage.in_flight for stage in gpipe.stages] == [8, 8]
    assert [stage.in_flight for stage in one_f.stages] == [2, 1]
    assert gpipe.stages[0].memory_bytes > one_f.stages[0].memory_bytes


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [(12, 1, [12]), (12, 4, [3, 3, 3, 3]), (8, 5, [2, 2, 2, 1, 1]), (7, 3, [3, 2, 2]), (5, 5, [1, 1, 1, 1, 1])],
)
def test_an_even_split_has_its_larger_stages_first(num_layers: int, num_stages: int, expected: list[int]) -> None:
    split = even_split(num_layers, num_stages)
    assert [stop - start for start, stop in split] == expected
    assert split[0][0] == 0
    assert split[-1][1] == num_layers


def test_a_slow_node_gets_fewer_layers() -> None:
    made = plan(fleet(node("a"), node("b", 3.0), node("c")), stages=3)
    a, b, c = sizes(made)
    assert b < min(a, c)
    assert made.step_s < 0.8 * made.even_step_s
    assert made.binds.startswith("stage ")


def test_nodes_that_differ_by_less_than_noise_are_cut_evenly() -> None:
    made = plan(fleet(node("a"), node("b", 1.03), node("c", 0.98)), stages=3)
    assert sizes(made) == [4, 4, 4]
    assert made.step_s == made.even_step_s


def test_as_many_stages_as_train_fastest() -> None:
    nodes = [node(name) for name in "abcd"]
    near = plan(fleet(*nodes))
    assert len(near.stages) == 4
    # Links so thin that one node alone is faster.
    thin = tuple(link(a, b, 0.05) for a in "abcd" for b in "abcd" if a < b)
    assert len(plan(fleet(*nodes, links=thin)).stages) == 1


def test_stages_go_to_the_fastest_nodes_in_the_fleets_order() -> None:
    made = plan(fleet(node("a", 2.0), node("b"), node("c", 3.0), node("d", 0.9)), stages=2)
    assert [stage.node for stage in made.stages] == ["b", "d"]


def test_too_little_memory_names_stage_node_gigabytes_and_a_change_that_fits() -> None:
    enough = need(node("a"), 0, 12, in_flight=1)
    with pytest.raises(PlanError) as caught:
        plan(fleet(node("a", memory_bytes=enough - 1_000_000)))
    assert "stage 0 (layers 0-11) needs" in caught.value.message
    assert f"{enough / 1e9:.2f} GB, a (TestGPU) has {(enough - 1_000_000) / 1e9:.2f} GB free" in caught.value.message
    assert caught.value.remedy == "it would fit with batch.microbatch_size=1 batch.num_microbatches=16"
    assert len(plan(fleet(node("a", memory_bytes=enough))).stages) == 1


def test_memory_moves_layers_where_the_even_split_does_not_fit() -> None:
    little = need(node("a"), 0, 3, in_flight=2)
    made = plan(fleet(node("a", memory_bytes=little), node("b")), stages=2)
    assert sorted(sizes(made)) == [3, 9]
    assert all(stage.memory_bytes <= stage.memory_limit_bytes for stage in made.stages)


def test_a_given_split_is_taken_as_it_is_or_refused() -> None:
    two = fleet(node("a"), node("b"))
    made = plan(two, split=(2, 10))
    assert sizes(made) == [2, 10]
    assert made.even_step_s < made.step_s
    with pytest.raises(ConfigError, match=r"plan.split has 11 layers, the model 12"):
        plan(two, split=(2, 9))
    with pytest.raises(PlanError, match=r"3 stages on 1 node\(s\) each need as many; the fleet has 2"):
        plan(two, split=(4, 4, 4))
    small = node("a", memory_bytes=need(node("a"), 0, 1, in_flight=2))
    with pytest.raises(PlanError, match=r"with plan.split=2,10 stage 0 \(layers 0-1\) needs"):
        plan(fleet(small, node("b")), split=(2, 10))


def test_a_given_split_goes_to_the_nodes_that_are_pinned_to_its_stages() -> None:
    three = fleet(node("a"), node("b"), node("c"))
    made = plan(three, split=(2, 4, 6), pins={"c": "first", "a": "last"})
    assert [(stage.node, stage.layer_stop) for stage in made.stages] == [("c", 2), ("b", 6), ("a", 12)]
    assert [stage.node for stage in plan(three, split=(4, 8), pins={"c": "0"}).stages] == ["c", "a"]
    # The fastest of the others.
    mixed = fleet(node("a", 2.0), node("b"), node("c", 3.0))
    assert [stage.node for stage in plan(mixed, split=(4, 8), pins={"c": "1"}).stages] == ["b", "c"]


def test_more_stages_than_layers_or_nodes_are_refused() -> None:
    with pytest.raises(PlanError, match="13 stages for 12 layers"):
        plan(fleet(*(node(str(number)) for number in range(14))), stages=13)
    with pytest.raises(PlanError, match="3 stages on 1 node"):
        plan(fleet(node("a")), stages=3)


@pytest.mark.parametrize("config", [{"stages": 0}, {"split": ()}, {"split": (3, 0)}, {"stages": 2, "split": (4, 4, 4)}])
def test_settings_that_contradict_one_another_are_refused(config: dict) -> None:
    with pytest.raises(ConfigError, match="plan"):
        PlanConfig(**config)


def test_a_thin_link_binds_and_its_codec_sets_the_bytes() -> None:
    nodes = (node("a"), node("b"))
    elements = BATCH.microbatch_tokens * MODEL.hidden_size
    made = plan(
        fleet(*nodes, links=(link("a", "b", 0.2, 0.05),)),
        wire=WireConfig(forward="none", backward="bf16"),
        stages=2,
        schedule="gpipe",
    )
    (only,) = made.links
    assert (only.frame_bytes_forward, only.frame_bytes_backward) == (4 * elements, 2 * elements)
    assert (only.forward_codec, only.backward_codec) == ("none", "bf16")
    assert made.binds.startswith("link 0 -> 1 ")
    frame_s = 4 * elements * 8 / 0.2e6
    stages_s = sum(stage.compute_s for stage in made.stages)
    # Down and back once, then the other frames down and up, and the commit's round trip; headers are a little more.
    assert made.step_s == pytest.approx(stages_s + 1.5 * frame_s + 0.1 + 7 * 1.5 * frame_s + 0.1, rel=0.01)


def test_a_link_that_was_not_measured_is_taken_for_the_worst_that_was() -> None:
    nodes = [node(name) for name in "abc"]
    first, second = plan(fleet(*nodes, links=(link("a", "b", 9.0, 0.02), link("a", "c", 5.0, 0.08))), stages=3).links
    assert (first.rate_mbps, first.delay_s) == (9.0, 0.02)
    assert (second.rate_mbps, second.delay_s) == (5.0, 0.08)
    near, _ = plan(fleet(*nodes), stages=3).links
    assert near.rate_mbps > 1000


def test_bf16_boundaries_halve_an_uncompressed_frame() -> None:
    nodes = (node("a", boundary_bytes=2), node("b", boundary_bytes=2))
    (only,) = plan(fleet(*nodes), wire=WireConfig(forward="none"), stages=2).links
    assert only.frame_bytes_forward == 2 * BATCH.microbatch_tokens * MODEL.hidden_size


def test_each_link_has_the_bytes_of_its_own_codecs() -> None:
    wire = WireConfig(forward="q8", backward="q8", links={"1-2": "hq4/none"})
    first, second = plan(fleet(node("a"), node("b"), node("c")), wire=wire, stages=3).links
    elements = BATCH.microbatch_tokens * MODEL.hidden_size
    assert first.frame_elements == second.frame_elements == elements
    assert first.raw_frame_bytes == second.frame_bytes_backward == 4 * elements
    assert first.frame_bytes_forward == first.frame_bytes_backward == CODECS["q8"].size_bytes(elements, torch.float32)
    assert second.frame_bytes_forward == CODECS["hq4"].size_bytes(elements, torch.float32)


def test_money_and_tokens_follow_from_the_step() -> None:
    made = plan(fleet(node("a", price=1.5), node("b", price=2.5), node("unused", 9.0, price=100.0)), stages=2)
    assert made.dollars_per_hour == 4.0
    assert made.tokens_per_s == pytest.approx(BATCH.step_tokens / made.step_s)
    assert made.dollars_per_mtoken == pytest.approx(4.0 / 3600 / made.tokens_per_s * 1e6)


@pytest.mark.parametrize("rate_mbps", [0.001, 1.0, 8.0, 50.0, 200.0, 1e5])
def test_chunks_and_windows_keep_to_their_bounds(rate_mbps: float) -> None:
    wire = WireConfig()
    (only,) = plan(fleet(node("a"), node("b"), links=(link("a", "b", rate_mbps),)), wire=wire, stages=2).links
    assert wire.min_chunk_bytes <= only.chunk_bytes <= wire.max_chunk_bytes
    assert only.chunk_bytes <= only.window_bytes <= wire.max_window_bytes
    if rate_mbps == 50.0:
        # A tenth of a second of the link at most, and a second of it.
        assert chunk_and_window_bytes(rate_mbps, wire) == (625_000, 6_250_000)
        assert only.window_bytes == 6_250_000


@pytest.mark.parametrize(("forward", "backward"), [("none", "none"), ("q8", "none"), ("hq4", "hq4"), ("q8", "q8")])
@pytest.mark.parametrize("rate_mbps", [8.0, 1e5])
def test_a_frame_of_two_least_chunks_or_more_goes_in_two_or_more(rate_mbps: float, forward: str, backward: str) -> None:
    wire = WireConfig(forward=forward, backward=backward)
    large = replace(WORK, batch=BatchSpec(seq_len=1024, microbatch_size=2, num_microbatches=8))
    these = fleet(node("a"), node("b"), links=(link("a", "b", rate_mbps), link("b", "a", rate_mbps)))
    (only,) = make_plan(these, large, wire, PlanConfig(stages=2)).links
    assert only.chunk_bytes >= wire.min_chunk_bytes
    for frame_bytes in (only.frame_bytes_forward, only.frame_bytes_backward):
        assert (frame_bytes > only.chunk_bytes) == (frame_bytes > wire.min_chunk_bytes)


def test_the_same_inputs_give_the_same_plan() -> None:
    inputs = fleet(node("a", 1.7), node("b"), node("c", 1.1), links=(link("a", "b", 10.0),))
    assert plan(inputs) == plan(inputs)


def test_a_run_that_goes_on_keeps_its_cut_unless_another_is_better_by_more_than_noise() -> None:
    # The slow node sets the pace, so how the others share the rest hardly matters.
    slower = fleet(node("a", 2.5), node("b"), node("c"))
    before, anew = plan(slower, split=(2, 6, 4)), plan(slower, stages=3)
    assert sizes(anew) != [2, 6, 4]
    kept = make_plan(slower, WORK, WireConfig(), PlanConfig(stages=3), before)
    assert [(s.node, s.layer_start, s.layer_stop) for s in kept.stages] == [
        (s.node, s.layer_start, s.layer_stop) for s in before.stages
    ]
    assert kept.step_s <= anew.step_s / 0.95
    # One that says much else.
    even = fleet(node("a"), node("b"), node("c"))
    assert sizes(make_plan(even, WORK, WireConfig(), PlanConfig(stages=3), before)) == [4, 4, 4]
    # What a user sets goes before what was.
    assert len(make_plan(slower, WORK, WireConfig(), PlanConfig(stages=2), before).stages) == 2
    assert sizes(make_plan(slower, WORK, WireConfig(), PlanConfig(split=(4, 4, 4)), before)) == [4, 4, 4]


def test_a_lost_nodes_layers_go_to_a_spare_and_the_cut_stays() -> None:
    before = plan(fleet(node("a"), node("b"), node("c")), stages=3)
    assert sizes(before) == [4, 4, 4]
    with_spare = make_plan(fleet(node("a"), node("c"), node("d")), WORK, WireConfig(), PlanConfig(), before)
    assert {s.node: (s.layer_start, s.layer_stop) for s in with_spare.stages} == {
        "a": (0, 4),
        "d": (4, 8),
        "c": (8, 12),
    }
    without = make_plan(fleet(node("a"), node("c")), WORK, WireConfig(), PlanConfig(), before)
    assert sorted(sizes(without)) == [6, 6]


def test_halves_of_backwards_fill_waits_but_not_those_of_nodes_that_share_cores() -> None:
    cards = [node(name) for name in "abcd"]
    apart = Fleet(nodes=tuple(replace(card, host=card.node) for card in cards), links=())
    assert plan(apart, stages=4).schedule in SPLIT
    # Near nodes need no more in flight than 1F1B has.
    assert plan(apart, stages=4, noise=0.0).step_s <= plan(apart, stages=4, noise=0.0, schedule="zb-h1").step_s
    assert plan(apart, stages=4, schedule="zb-h1").step_s < plan(apart, stages=4, schedule="1f1b").step_s
    assert plan(fleet(*cards), stages=4).schedule == "bdp"
    assert plan(fleet(*cards), stages=4, schedule="bdp-split").schedule == "bdp-split"


def test_large_fleets_are_not_searched_for_zb_h1_unless_it_is_asked_for() -> None:
    many = Fleet(nodes=tuple(replace(node(f"n{i}"), host=f"n{i}") for i in range(17)), links=())
    few = Fleet(nodes=many.nodes[:16], links=())
    assert plan(few, stages=4, evaluations=500).schedule == "zb-h1"
    assert plan(many, stages=4, evaluations=500).schedule == "bdp-split"
    assert plan(many, stages=4, evaluations=500, schedule="zb-h1").schedule == "zb-h1"


def test_halves_put_off_are_counted_with_what_their_blocks_computed_again() -> None:
    again = replace(WORK, activation_checkpointing=True)
    apart = tuple(replace(node(name), host=name) for name in "abcd")
    assert plan(Fleet(nodes=apart, links=()), again, stages=4, schedule="zb-h1").schedule == "zb-h1"
    # Just enough for whole backwards, which keep a block's input alone.
    whole = plan(Fleet(nodes=apart, links=()), again, stages=4, schedule="1f1b")
    most = math.ceil(max(stage.memory_bytes for stage in whole.stages))
    tight = Fleet(nodes=tuple(replace(card, memory_bytes=most) for card in apart), links=())
    assert plan(tight, again, stages=4, schedule="1f1b").schedule == "1f1b"
    with pytest.raises(PlanError, match="short"):
        plan(tight, again, stages=4, schedule="zb-h1")
    assert plan(tight, again, stages=4).schedule not in SPLIT


def test_a_split_that_a_limit_forbids_is_not_called_short_of_memory() -> None:
    two = fleet(node("a", price=2.0), node("b"))
    with pytest.raises(PlanError, match=r"no plan with plan.split=4,8 keeps to plan.max_dollars_per_hour=1:"):
        plan(two, split=(4, 8), max_dollars_per_hour=1.0)
    with pytest.raises(PlanError, match=r"keeps to plan.pins and plan.after:"):
        plan(two, split=(4, 8), after={"a": "b"})


def test_a_large_fleets_roomy_nodes_come_into_question_though_they_are_slow() -> None:
    ends = need(node("a"), 11, 12, in_flight=1)
    small = tuple(node(f"s{i}", memory_bytes=ends - 1) for i in range(210))
    roomy = tuple(node(f"b{i}", 3.0) for i in range(2))
    made = plan(Fleet(nodes=(*small, *roomy), links=()), evaluations=3000)
    assert made.stages[-1].node.startswith("b")


def test_the_cut_is_kept_under_another_schedule_and_a_damaged_plan_is_not() -> None:
    slower = fleet(node("a", 2.5), node("b"), node("c"))
    before = plan(slower, split=(2, 6, 4))
    kept = make_plan(slower, WORK, WireConfig(), PlanConfig(stages=3, schedule="bdp"), before)
    assert (sizes(kept), kept.schedule) == ([2, 6, 4], "bdp")
    anew = plan(slower, stages=3)
    stages = before.stages
    for damaged in (
        (replace(stages[0], layer_stop=9), *stages[1:]),
        (stages[0], replace(stages[1], layer_stop=2), stages[2]),
        (stages[0], replace(stages[1], node="a"), stages[2]),
    ):
        wrong = replace(before, stages=damaged)
        assert sizes(make_plan(slower, WORK, WireConfig(), PlanConfig(stages=3), wrong)) == sizes(anew)


def test_nodes_of_a_region_stand_side_by_side_where_the_order_makes_no_difference_worth_moving_for() -> None:
    cards = [replace(node(name), host=name, region=region) for name, region in zip("abcd", "xyxy", strict=True)]
    # Frames hide under compute on every link, so that only the fill tells orders apart.
    links = tuple(
        link(a.node, b.node, 1000.0 if a.region == b.region else 50.0, 0.001 if a.region == b.region else 0.003)
        for a in cards
        for b in cards
        if a is not b
    )
    made = plan(fleet(*cards, links=links), stages=4)
    regions = [next(card.region for card in cards if card.node == stage.node) for stage in made.stages]
    assert regions in (["x", "x", "y", "y"], ["y", "y", "x", "x"])
    # As are the regions that are named, in the order in which they are.
    named = plan(fleet(*cards, links=links), stages=4, regions=("y", "x"))
    assert [stage.node for stage in named.stages] == ["b", "d", "a", "c"]
