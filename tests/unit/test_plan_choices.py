"""What a user may set of the planner, what contradicts, and what is said of it."""

import math
from dataclasses import replace

import pytest

from actors.errors import ConfigError, PlanError
from actors.fleet_spec import Fleet, NodeCard
from actors.settings import BatchSpec
from orchestrator.planner.choices import PlanConfig, allowed_fleet, limits_of
from orchestrator.planner.codecs import LADDER, choose_codecs, loss_share
from tests.part_times import part_times

BATCH = BatchSpec(seq_len=32, microbatch_size=2, num_microbatches=8)


def card(name: str, *, region: str = "here", price: float = 1.0) -> NodeCard:
    times = part_times(2, layer_forward_s=0.01, layer_backward_s=0.02, embedding_s=0.0, head_s=0.0)
    return NodeCard(
        node=name,
        host=name,
        region=region,
        device="TestGPU",
        boundary_bytes=4,
        memory_bytes=10**9,
        times=(times,),
        price_per_hour=price,
    )


NOISE = 0.05
FLEET = Fleet(nodes=(card("a"), card("b", price=3.0), card("c", region="there")), links=())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": 0}, "plan.stages is 0"),
        ({"split": (2, 0)}, "1 layer or more"),
        ({"split": (2, 2), "stages": 3}, "set only one"),
        ({"microbatch_sizes": (0,)}, "1 sequence or more"),
        ({"max_dollars_per_hour": -1.0}, "0 or more"),
        ({"quality_budget": math.nan}, "0 or more"),
        ({"objective": "cheapest"}, "needs plan.min_tokens_per_s"),
        ({"min_tokens_per_s": 5.0}, "contradict"),
        ({"copies": 2}, "plan.domains <= plan.copies"),
        ({"noise": 1.0}, "below 1"),
        ({"evaluations": 0}, "1 or more"),
        ({"after": {"a": "b", "b": "c", "c": "a"}}, "in a circle: a after b after c after a"),
        ({"after": {"a": "a"}}, "in a circle: a after a"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlanConfig(**settings)  # pyright: ignore[reportArgumentType]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pins": {"d": "first"}}, "which the fleet does not have"),
        ({"pins": {"a": "middle"}}, "is no place"),
        ({"pins": {"a": "3"}, "stages": 2}, "there are 2 stages"),
        ({"pins": {"a": "first", "b": "0"}}, "two nodes in one stage"),
        ({"pins": {"a": "first", "b": "1"}, "after": {"a": "b"}}, "plan.pins not"),
        ({"max_dollars_per_hour": 0.5}, "buys no node: the cheapest, a, is $1"),
    ],
)
def test_settings_that_this_fleet_cannot_meet_are_refused_in_one_line(settings: dict[str, object], words: str) -> None:
    config = PlanConfig(**settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError) as caught:
        limits_of(FLEET, config, BATCH.step_tokens)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_objective_in_dollars_needs_prices() -> None:
    free = Fleet(nodes=tuple(replace(node, price_per_hour=0.0) for node in FLEET.nodes), links=())
    with pytest.raises(PlanError, match="no node has a price"):
        limits_of(free, PlanConfig(objective="dollars"), BATCH.step_tokens)


def test_limits_are_in_indices_and_seconds() -> None:
    config = PlanConfig(
        objective="cheapest", min_tokens_per_s=1024.0, pins={"c": "last", "a": "0"}, after={"c": "b"}, max_replicas=2
    )
    limits = limits_of(FLEET, config, BATCH.step_tokens)
    assert limits.max_step_s == pytest.approx(0.5)
    assert limits.pins == ((2, -1), (0, 0))
    assert limits.after == ((2, 1),)


def test_regions_leave_out_the_others_and_name_what_there_is() -> None:
    assert [node.node for node in allowed_fleet(FLEET, PlanConfig(regions=("there",))).nodes] == ["c"]
    with pytest.raises(PlanError, match="the fleet has here, there"):
        allowed_fleet(FLEET, PlanConfig(regions=("nowhere",)))


def test_microbatch_sizes_keep_the_sequences_of_a_step() -> None:
    batches = PlanConfig(microbatch_sizes=(1, 4, 4)).batches(BATCH)
    assert [(batch.microbatch_size, batch.num_microbatches) for batch in batches] == [(1, 16), (4, 4)]
    assert PlanConfig().batches(BATCH) == (BATCH,)
    with pytest.raises(ConfigError, match="does not divide a step's 16 sequences"):
        PlanConfig(microbatch_sizes=(3,)).batches(BATCH)


def test_the_link_that_holds_the_step_up_gets_the_smaller_codec_within_the_budget() -> None:
    mild, strong = LADDER[0].pair, LADDER[-1].pair
    thin = {pair.pair: 8.0 - 2 * rung for rung, pair in enumerate(LADDER)}

    def step_s(pairs) -> float:
        # The second link is ten times thinner than the first.
        return max(1.0, thin[pairs[0]] / 10, thin[pairs[1]])

    assert choose_codecs(2, 1.0, NOISE, step_s) == (mild, strong)
    assert choose_codecs(2, 0.0, NOISE, step_s) == (mild, mild)
    some = choose_codecs(2, LADDER[0].loss_share + LADDER[1].loss_share, NOISE, step_s)
    assert some == (mild, LADDER[1].pair)


def test_two_links_that_bind_alike_are_both_given_a_smaller_codec() -> None:
    thin = {pair.pair: 8.0 - 2 * rung for rung, pair in enumerate(LADDER)}
    chosen = choose_codecs(3, 1.0, NOISE, lambda pairs: max(thin[pair] for pair in pairs))
    assert chosen == (LADDER[-1].pair,) * 3


def test_what_a_codec_saves_less_than_noise_of_is_not_spent() -> None:
    # The smallest codec on every link saves 4%, of which noise is 5%.
    assert choose_codecs(2, 1.0, NOISE, lambda pairs: 10.0 - 0.2 * sum(p == LADDER[-1].pair for p in pairs)) == (
        (LADDER[0].pair,) * 2
    )


def test_links_give_back_what_only_the_other_needs() -> None:
    # One link's codec alone saves nothing, both save half; the first does it with its mildest.
    def step_s(pairs) -> float:
        return 5.0 if pairs[0] != LADDER[0].pair and pairs[1] == LADDER[-1].pair else 10.0

    assert choose_codecs(2, 1.0, NOISE, step_s) == (LADDER[1].pair, LADDER[-1].pair)


def test_what_codecs_cost_adds_up_and_is_unknown_where_it_was_not_measured() -> None:
    assert loss_share([("q8", "q8"), ("hq4", "q8")]) == pytest.approx((0.0004 + 0.0304) / 3)
    assert loss_share([("none", "none")]) == 0.0
    assert loss_share([("bf16", "q8")]) is None
