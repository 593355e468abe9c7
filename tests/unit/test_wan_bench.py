"""The arithmetic of bench.wan: limits, figures and bounds; what was measured comes in by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from actors.play import PipelineTimes, play
from actors.schedule import stage_actions
from bench.wan import known_cases, settings_of
from bench.wan_cases import CASES, Case, Route, quick
from bench.wan_field import Run
from bench.wan_judge import best_torch_s, certified_step_s, judge, judge_fall
from bench.wan_limit import LinkTimes, link_times, step_limit
from orchestrator.config import RunConfig
from orchestrator.events import History
from orchestrator.planner.problem import even_sizes
from tests.small_fleets import BATCH, MODEL, WORK, fleet, node, plan


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def isthmus_run(*step_s: float, **changes: object) -> dict[str, object]:
    """What is kept of a run on three thin links whose stages take a second a microbatch."""
    run: dict[str, object] = {
        "step_s": list(step_s),
        "stage_s": [1.0, 1.0, 1.0, 1.0],
        "regions": ["region-0", "region-1", "region-2", "region-3"],
        "frame_bytes": [(125_000, 125_000)] * 3,
        "driver_share": 0.01,
        "daemons_share": 0.1,
        "trouble": [],
        "idle_share": [0.3, 0.3, 0.3, 0.1],
        "planned_idle_share": [0.35, 0.3, 0.18, 0.1],
    }
    return run | changes


def test_a_frame_takes_its_bytes_over_the_rate() -> None:
    assert link_times((500_000, 250_000), 4.0, 0.025) == LinkTimes(forward_s=1.0, backward_s=0.5, round_trip_s=0.05)
    assert link_times((500_000, 250_000), 0.0, 0.0) == LinkTimes(forward_s=0.0, backward_s=0.0, round_trip_s=0.0)


@pytest.mark.parametrize("num_microbatches", [1, 5, 32])
def test_the_limit_of_near_stages_is_what_their_steps_take(num_microbatches: int) -> None:
    forward_s, backward_s = (0.3, 0.5, 0.4), (0.6, 1.0, 0.8)
    times = PipelineTimes(
        forward_s_S=forward_s,
        input_backward_s_S=backward_s,
        weight_backward_s_S=(0.0, 0.0, 0.0),
        send_down_s_L=(0.0, 0.0),
        send_up_s_L=(0.0, 0.0),
        delay_down_s_L=(0.0, 0.0),
        delay_up_s_L=(0.0, 0.0),
    )
    orders = tuple(stage_actions("gpipe", stage, 3, num_microbatches) for stage in range(3))
    no_link = LinkTimes(forward_s=0.0, backward_s=0.0, round_trip_s=0.0)
    limit = step_limit([f + b for f, b in zip(forward_s, backward_s, strict=True)], [no_link] * 2, num_microbatches)
    # GPipe's step is not shorter, and the slowest stage's period is counted once a microbatch.
    assert limit.step_s <= play(orders, times).step_s + 1e-9
    assert limit.step_s == pytest.approx(3.6 + (num_microbatches - 1) * 1.5)
    assert limit.binds == "compute"


def test_a_link_that_is_slower_than_every_stage_sets_the_period() -> None:
    links = [link_times((125_000, 125_000), 4.0, 0.0), link_times((125_000, 500_000), 2.0, 0.0)]
    limit = step_limit([1.0, 1.0, 1.0], links, 11)
    assert limit.binds == "link 1 -> 2"
    assert limit.step_s == pytest.approx(3.0 + 0.5 + 2.5 + 10 * 2.0)


@pytest.mark.parametrize("num_microbatches", [2, 64])
@pytest.mark.parametrize("slowness", [(1.0, 1.0), (1.0, 0.4), (0.4, 1.0)])
def test_no_plan_is_faster_than_the_certified_step(num_microbatches: int, slowness: tuple[float, float]) -> None:
    hosts = fleet(node("a", slowness[0]), node("b", slowness[1]))
    config = RunConfig(model=MODEL, batch=replace(BATCH, num_microbatches=num_microbatches))
    work = replace(WORK, batch=config.batch)
    run = Run(history=History(), plan=plan(hosts, work), fleet=hosts, config=config)
    certified_s = certified_step_s(run)
    assert certified_s <= run.plan.step_s
    if num_microbatches == 64:
        # What is left is the fill, and that layers are whole.
        assert certified_s > 0.85 * run.plan.step_s


def test_a_bound_that_is_missed_is_named() -> None:
    case = replace(case_named("4-25"), bounds={"of_limit": 0.95, "of_unshaped": 0.88, "of_torch": 4.0})
    measured = {
        "isthmus": {"shaped": [isthmus_run(40.0, 41.0, 90.0)], "unshaped": [isthmus_run(36.0)]},
        "torch-gpipe": {"shaped": [{"step_s": [150.0]}], "unshaped": [{"step_s": [35.0]}]},
        "torch-1f1b": {"shaped": [{"step_s": [170.0]}], "unshaped": [{"step_s": [34.0]}]},
    }
    verdict = judge(case, measured, 32)
    # 31 + 4 + 3 * (0.25 + 0.25 + 0.05) seconds.
    assert verdict["figures"]["limit_s"] == pytest.approx(36.65)
    assert verdict["figures"]["of_limit"] == pytest.approx(36.65 / 41)
    assert verdict["figures"]["of_torch"] == pytest.approx(150 / 41)
    assert verdict["figures"]["torch_of_unshaped"] == pytest.approx(34 / 150)
    # The unshaped rate is missed by a hair: 36 / 41 is 0.878.
    assert verdict["missed"] == ["of_limit", "of_unshaped", "of_torch"]


def test_idle_shares_are_held_against_the_plans() -> None:
    case = replace(case_named("uneven"), bounds={"idle_as_planned": 0.9})
    verdict = judge(case, {"isthmus": {"shaped": [isthmus_run(40.0)]}}, 32)
    assert verdict["figures"]["idle_as_planned"] == pytest.approx(0.88)
    assert verdict["missed"] == ["idle_as_planned"]


def test_what_the_controller_takes_of_a_core_is_bound_from_above() -> None:
    case = replace(case_named("unshaped"), bounds={"driver_share": 0.02})
    assert judge(case, {"isthmus": {"shaped": [isthmus_run(36.0)]}}, 32)["missed"] == []
    greedy = isthmus_run(36.0, driver_share=0.021)
    assert judge(case, {"isthmus": {"shaped": [greedy]}}, 32)["missed"] == ["driver_share"]
    troubled = isthmus_run(36.0, trouble=["retried: a peer was slow"])
    assert judge(case, {"isthmus": {"shaped": [troubled]}}, 32)["missed"] == ["driver_share"]


def test_what_is_asked_of_a_case_is_no_part_of_its_settings() -> None:
    case = case_named("4-25")
    assert settings_of(case, 32) == settings_of(replace(case, bounds={}), 32)
    assert settings_of(case, 32) != settings_of(case, 8)
    assert settings_of(case, 32) != settings_of(replace(case, idle_restart=True), 32)


def test_a_run_with_trouble_meets_no_bound() -> None:
    case = case_named("2-25")
    measured = {"isthmus": {"shaped": [isthmus_run(36.0, trouble=["retried: a peer was slow"])]}}
    assert judge(case, measured, 32)["missed"] == list(case.bounds)


def test_links_within_a_region_cost_nothing_and_crossings_are_counted() -> None:
    case = case_named("two-regions")
    near = ["region-0", "region-0", "region-1", "region-1"]
    across = ["region-0", "region-1", "region-0", "region-1"]
    figures = judge(case, {"isthmus": {"shaped": [isthmus_run(40.0, regions=near)]}}, 32)["figures"]
    assert figures["limit_s"] == pytest.approx(35.55)
    assert figures["few_crossings"] == 1.0
    figures = judge(case, {"isthmus": {"shaped": [isthmus_run(40.0, regions=across)]}}, 32)["figures"]
    assert figures["few_crossings"] == pytest.approx(1 / 3)


def test_a_fall_is_judged_by_the_steps_after_it_and_by_none_that_was_lost() -> None:
    case = case_named("falls")
    fallen = isthmus_run(44.0, 46.0, fallen_step_s=[90.0, 80.0, 47.0, 44.0])
    measured = {"isthmus": {"shaped": [fallen]}, "planned": {"shaped": [isthmus_run(40.0)]}}
    verdict = judge_fall(case, measured)
    assert verdict["missed"] == []
    assert verdict["figures"]["first_step_within"] == 2
    measured["isthmus"]["shaped"] = [fallen | {"trouble": ["retried: too slow"]}]
    assert judge_fall(case, measured)["missed"] == ["of_planned"]


def test_torchs_better_schedule_is_the_one_compared_with() -> None:
    measured = {"torch-gpipe": {"shaped": [{"step_s": [9.0]}]}, "torch-1f1b": {"shaped": [{"step_s": [8.0]}]}}
    assert best_torch_s(measured, "shaped") == 8.0
    assert best_torch_s(measured, "unshaped") is None


def test_a_case_is_run_again_where_anything_about_it_is_other(tmp_path: Path) -> None:
    case = case_named("4-25")
    others = [case, replace(case, cpus=(0.3, 0.3, 0.3, 0.4)), replace(case, near=Route(rate_mbps=1)), quick(case)]
    hashes = [settings_of(other, 32) for other in others] + [settings_of(case, 8)]
    assert len(set(hashes)) == len(hashes)
    assert settings_of(case, 32) == hashes[0]
    file = tmp_path / "wan.json"
    assert known_cases(file) == {}
    file.write_text(json.dumps({"cases": {"4-25": {"settings": hashes[0]}}}))
    assert known_cases(file)["4-25"]["settings"] == hashes[0]


def test_an_even_split_covers_all_layers() -> None:
    for num_layers in range(4, 18):
        split = even_sizes(num_layers, 4)
        assert sum(split) == num_layers
        assert all(0 <= a - b <= 1 for a, b in pairwise(split))
