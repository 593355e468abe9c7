"""A plan made again in its cut for links that changed: as a plan for those links would be, and why, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.fleet_spec import Fleet, RegionLink
from actors.settings import BatchSpec, WireConfig
from actors.spec import LinkReading, Plan
from orchestrator.canary import StepDown
from orchestrator.link_watch import RetuneConfig
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.retuned import Way, WayState, assumed, retuned, with_links
from orchestrator.retune import Retuned, Tuning, judge_links, watch_of
from tests.small_fleets import MODEL, WORK, fleet, link, node, plan

SPLIT = (4, 4, 4)
NAMES = ("a", "b", "c")
BIG = replace(
    WORK,
    batch=BatchSpec(seq_len=64, microbatch_size=2, num_microbatches=32),
    model=replace(MODEL, hidden_size=256, num_heads=4),
)
FAT, THIN = 100.0, 4.0


def at(first_mbps: float, second_mbps: float = FAT, delay_s: float = 0.05) -> Fleet:
    """Three nodes in a row, links of the same rate both ways."""
    pairs = (("a", "b", first_mbps), ("b", "c", second_mbps), ("a", "c", FAT))
    links = [link(*ends, rate, delay_s) for a, b, rate in pairs for ends in ((a, b), (b, a))]
    return fleet(*(node(name, 0.3) for name in NAMES), links=tuple(links))


def planned(these: Fleet, wire: WireConfig | None = None, **config: object) -> Plan:
    return plan(these, BIG, wire, split=SPLIT, schedule="bdp", pins={"a": "0", "b": "1", "c": "2"}, **config)


def again(before: Plan, these: Fleet, wire: WireConfig, **changed: float) -> Plan:
    ways: dict[Way, WayState] = {(0, 1): WayState(rate_mbps=changed["first"], delay_s=0.05)}
    ways[1, 0] = ways[0, 1]
    config = PlanConfig(split=SPLIT, schedule="bdp", quality_budget=changed.get("budget"))
    return retuned(before, these, BIG, wire, config, ways)[0]


@pytest.mark.parametrize(("rate", "then"), [(FAT, THIN), (THIN, FAT), (20.0, 1.0)])
def test_it_is_the_plan_that_would_be_made(rate: float, then: float) -> None:
    wire = WireConfig()
    after = again(planned(at(rate), wire), at(rate), wire, first=then)
    fresh = planned(at(then), wire)
    assert after.in_flight == fresh.in_flight
    assert after.links == fresh.links
    assert after.step_s == pytest.approx(fresh.step_s)
    assert [stage.node for stage in after.stages] == list(NAMES)


def test_a_thin_link_takes_more_in_flight_and_longer() -> None:
    before = planned(at(FAT))
    after = again(before, at(FAT), WireConfig(), first=THIN)
    assert after.step_s > 1.4 * before.step_s
    assert after.in_flight != before.in_flight
    assert after.links[0].window_bytes < before.links[0].window_bytes
    assert after.links[1] == before.links[1]
    assert after.link_codecs == before.link_codecs, "quality is not the planner's to spend"


def test_a_thin_link_takes_large_frames_in_smaller_pieces() -> None:
    large = replace(BIG, batch=replace(BIG.batch, seq_len=1024), model=replace(BIG.model, max_positions=1024))
    wire = WireConfig(forward="none", backward="none")
    these, config = at(FAT), PlanConfig(split=SPLIT, schedule="bdp")
    before = plan(these, large, wire, split=SPLIT, schedule="bdp", pins={"a": "0", "b": "1", "c": "2"})
    ways = {(0, 1): WayState(rate_mbps=THIN, delay_s=0.05), (1, 0): WayState(rate_mbps=THIN, delay_s=0.05)}
    after, _ = retuned(before, these, large, wire, config, ways)
    assert after.links[0].chunk_bytes < before.links[0].chunk_bytes


def test_memory_bounds_what_is_in_flight() -> None:
    these = at(FAT)
    before = planned(these)
    both = zip(these.nodes, before.stages, strict=True)
    tight = replace(these, nodes=tuple(replace(card, memory_bytes=stage.memory_bytes) for card, stage in both))
    after = again(before, tight, WireConfig(), first=20.0)
    assert all(stage.memory_bytes <= stage.memory_limit_bytes for stage in after.stages)
    assert all(now <= then for now, then in zip(after.in_flight, before.in_flight, strict=True))


def test_wire_thin_is_for_the_link_that_turned_thin_and_only_there() -> None:
    wire = WireConfig(thin=("q8/hq4-stochastic", "hq4/hq4-stochastic"))
    before = planned(at(FAT), wire)
    assert {(link.forward_codec, link.backward_codec) for link in before.links} == {("q8", "q8")}
    after = again(before, at(FAT), wire, first=THIN)
    first, second = after.links
    assert (first.forward_codec, first.backward_codec) == ("hq4", "hq4-stochastic")
    assert (second.forward_codec, second.backward_codec) == ("q8", "q8")
    assert after.step_s < again(planned(at(FAT)), at(FAT), WireConfig(), first=THIN).step_s
    # And back again.
    assert again(after, at(THIN), wire, first=FAT).link_codecs == before.link_codecs
    # A run that starts there has them from the start.
    assert planned(at(THIN), wire).link_codecs == after.link_codecs


def test_a_quality_budget_is_kept_to() -> None:
    wire = WireConfig()
    before = planned(at(FAT), wire, quality_budget=0.002)
    after = again(before, at(FAT), wire, first=1.0, budget=0.002)
    assert 0 == before.loss_share < after.loss_share <= 0.002
    # The way back hides behind the way there: for a smaller codec there it would save less than noise.
    assert (after.links[0].forward_codec, after.links[0].backward_codec) == ("q8", "q8")
    assert again(before, at(FAT), wire, first=1.0, budget=0.04).links[0].forward_codec == "hq4"


def test_only_what_changed_changes_in_the_fleet() -> None:
    these = at(FAT)
    before = planned(these)
    after = with_links(before, these, {(0, 1): WayState(rate_mbps=3.0, delay_s=0.07)})
    changed = [new for old, new in zip(these.links, after.links, strict=True) if old != new]
    assert changed == [link("a", "b", 3.0, 0.07)]
    # Where only one direction was measured, it stands for the other no more.
    one_way = replace(these, links=tuple(card for card in these.links if card.source < card.target))
    after = with_links(before, one_way, {(0, 1): WayState(rate_mbps=3.0, delay_s=0.07)})
    states = assumed(before, after)
    assert states[0, 1] == WayState(rate_mbps=3.0, delay_s=0.07)
    assert states[1, 0] == WayState(rate_mbps=FAT, delay_s=0.05)


def test_links_known_by_region_become_links_of_nodes() -> None:
    regions = tuple(RegionLink(source=a, target=b, delay_s=0.03, rate_mbps=50.0) for a in "xy" for b in "xy" if a != b)
    nodes = tuple(replace(card, region="xxy"[n]) for n, card in enumerate(at(FAT).nodes))
    these = Fleet(nodes=nodes, links=(), regions=regions)
    before = planned(these)
    states = assumed(before, these)
    after = assumed(before, with_links(before, these, {(1, 2): WayState(rate_mbps=5.0, delay_s=0.03)}))
    assert after == {**states, (1, 2): WayState(rate_mbps=5.0, delay_s=0.03)}


def test_what_a_node_may_send_is_part_of_what_is_assumed() -> None:
    these = at(FAT)
    first, *others = these.nodes
    these = replace(these, nodes=(replace(first, uplink_mbps=10.0, downlink_mbps=30.0), *others))
    states = assumed(planned(these), these)
    assert (states[0, 1].rate_mbps, states[1, 0].rate_mbps) == (10.0, 30.0)


def reading(rate_mbps: float, way: Way = (0, 1)) -> LinkReading:
    return LinkReading(
        source_stage=way[0], target_stage=way[1], rate_mbps=rate_mbps, is_measured=True, delay_s=0.05, num_bytes=10**6
    )


def judged(before: Plan, these: Fleet, rate_mbps: float, **more: object) -> Retuned | None:
    """What becomes of a plan whose first link is read as this for two steps."""
    wire = more.pop("wire", WireConfig())
    assert isinstance(wire, WireConfig)
    config = PlanConfig(split=SPLIT, schedule=before.schedule)
    tuning = Tuning(work=BIG, wire=wire, plan=config, retune=RetuneConfig(), step_downs=(), **more)  # pyright: ignore
    watch, nothing = judge_links(watch_of(before, these), 7, [reading(rate_mbps)], before, these, tuning)
    assert nothing is None
    watch, made = judge_links(watch, 8, [reading(rate_mbps)], before, these, tuning)
    if made is not None:
        assert watch.planned == assumed(made.plan, made.fleet), "what was found is what is assumed from now on"
        again, nothing = judge_links(watch, 99, [reading(rate_mbps)], made.plan, made.fleet, tuning)
        assert judge_links(again, 100, [reading(rate_mbps)], made.plan, made.fleet, tuning)[1] is nothing is None
    return made


def test_the_reason_says_which_link_and_what_is_done() -> None:
    these = at(FAT)
    before = planned(these)
    made = judged(before, these, THIN)
    assert made is not None
    assert "link 0 -> 1 has 4 Mbit/s in 2 steps, 100 were planned" in made.reason
    assert "link 1 -> 0 is taken for 4 Mbit/s too" in made.reason
    assert f"stage 0 keeps {made.plan.in_flight[0]} microbatches in flight, not {before.in_flight[0]}" in made.reason
    assert f"a step is foreseen to take {made.plan.step_s:.3g} s, not {before.step_s:.3g} s" in made.reason


def test_codecs_that_did_harm_stay_away() -> None:
    these = at(FAT)
    wire = WireConfig(thin=("hq4/hq4-stochastic",))
    made = judged(planned(these, wire), these, THIN, wire=wire)
    assert made is not None
    assert made.plan.links[0].forward_codec == "hq4"
    assert "link 0 - 1 carries hq4/hq4-stochastic, not q8/q8" in made.reason
    down = StepDown(source_stage=0, target_stage=1, codec="q8")
    config = PlanConfig(split=SPLIT, schedule="bdp")
    tuning = Tuning(work=BIG, wire=wire, plan=config, retune=RetuneConfig(steps=1), step_downs=(down,))
    before = planned(these, wire)
    _, made = judge_links(watch_of(before, these), 0, [reading(THIN)], before, these, tuning)
    assert made is not None
    assert made.plan.links[0].forward_codec == "q8"


def test_a_change_that_would_move_nothing_is_let_be() -> None:
    these = at(4000.0)
    assert judged(planned(these), these, 1500.0) is None
