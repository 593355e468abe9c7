"""What the runs of a case come to: the limit, the shares and multiples that are bound, and which bounds are missed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from actors.fleet_spec import Fleet
from bench.wan_cases import Case, Route
from bench.wan_field import Run
from bench.wan_limit import LinkTimes, link_times, step_limit
from orchestrator.recipe import plan_ahead

# Figures that their bound is the most of; of all others it is the least.
AT_MOST = {"driver_share"}
# Nothing of these may happen in a run that is timed.
TROUBLE = {"retried", "node_lost", "skipped", "failed"}


def run_figures(run: Run, timed: slice) -> dict[str, Any]:
    """Return what is kept of a run of Isthmus, and of its timed steps."""
    plan, steps = run.plan, run.history.steps[timed]
    stages = range(len(plan.stages))

    def mean_s(stage: int, *names: str) -> float:
        """Of a stage's actions of these names, a microbatch."""
        actions = [a for step in steps for a in step.stages[stage].actions if a.name in names]
        return sum(a.end_s - a.start_s for a in actions) / (len(steps) * plan.num_microbatches)

    return {
        "step_s": [step.step_s for step in steps],
        "stage_s": [mean_s(stage, "F", "B", "W") for stage in stages],
        "forward_s": [mean_s(stage, "F") for stage in stages],
        "wait_s": [statistics.mean(step.stages[stage].wait_s for step in steps) for stage in stages],
        "commit_s": [mean_s(stage, "C") * plan.num_microbatches for stage in stages],
        "idle_share": [statistics.mean(step.stages[stage].idle_share for step in steps) for stage in stages],
        "schedule": plan.schedule,
        "split": [stage.layer_stop - stage.layer_start for stage in plan.stages],
        "in_flight": [stage.in_flight for stage in plan.stages],
        "nodes": [stage.node for stage in plan.stages],
        "regions": [_region(run.fleet, stage.node) for stage in plan.stages],
        "codecs": [f"{link.forward_codec}/{link.backward_codec}" for link in plan.links],
        "frame_bytes": [(link.frame_bytes_forward, link.frame_bytes_backward) for link in plan.links],
        "probed_mbps": [link.rate_mbps for link in plan.links],
        "probed_delay_s": [link.delay_s for link in plan.links],
        "planned_step_s": plan.step_s,
        "planned_idle_share": [1 - plan.num_microbatches * stage.compute_s / plan.step_s for stage in plan.stages],
        "planned_fill_s": plan.fill_s,
        "loss_share": plan.loss_share,
        "driver_share": run.driver_share,
        "actors_share": run.actors_share,
        "daemons_share": run.daemons_share,
        "stolen_share": run.stolen_share,
        "trouble": [f"{e.name}: {e.text}" for e in run.history.events if e.name in TROUBLE],
        "retuned": [f"step {e.step}: {e.text}" for e in run.history.events if e.name == "retuned"],
    }


def certified_step_s(run: Run) -> float:
    """Return the step time below which no plan for this fleet gets: its tokens at the most rate that is certified.

    A step has a fill besides. How much of it no plan can hide is not proved, so none is counted, and the step that is
    held against this has its own in it.
    """
    plan = plan_ahead(run.config, run.fleet).plan
    return run.config.batch.step_tokens / plan.bound_tokens_per_s


def judge(case: Case, measured: dict[str, Any], num_microbatches: int) -> dict[str, Any]:
    """Return the figures of a case by name, the bounds that it has, and those that it misses."""
    shaped, unshaped = measured["isthmus"]["shaped"], measured["isthmus"].get("unshaped")
    step_s = median_s(shaped)
    figures: dict[str, float] = {"step_s": step_s}
    # Compute as it is where no link holds it up.
    alone = [_node_stage_s(run) for run in unshaped or shaped]
    stage_s = [statistics.mean(run[i] for run in alone) for i in range(case.num_stages)]
    figures["tau_s"] = max(stage_s)
    limit = step_limit(stage_s, _links(case, shaped[0]), num_microbatches)
    figures |= {"limit_s": limit.step_s, "period_s": limit.period_s, "of_limit": limit.step_s / step_s}
    if unshaped:
        figures["of_unshaped"] = median_s(unshaped) / step_s
        figures["limit_of_unshaped"] = median_s(unshaped) / limit.step_s
    torch_s = best_torch_s(measured, "shaped")
    if torch_s is not None:
        figures |= {"torch_s": torch_s, "of_torch": torch_s / step_s}
    torch_unshaped_s = best_torch_s(measured, "unshaped")
    if torch_unshaped_s is not None and torch_s is not None:
        figures["torch_of_unshaped"] = torch_unshaped_s / torch_s
    for name, key in (("isthmus-none", "of_none"), ("isthmus-even", "of_even"), ("lossless", "of_lossless")):
        if name in measured:
            other_s = median_s(measured[name]["shaped"])
            figures[key] = other_s / step_s
    crossings = sum(a != b for a, b in pairwise(shaped[0]["regions"]))
    figures["few_crossings"] = (len(set(case.regions)) - 1) / crossings if crossings else 1.0
    # Of a core, while steps ran: the controller with all that is in its process; Ray's daemons on all hosts.
    for name in ("driver_share", "daemons_share"):
        figures[name] = max(run[name] for run in shaped)
    # 1 less the largest difference between a stage's idle share and the plan's.
    told = [run for run in shaped if "planned_idle_share" in run]
    pairs = [pair for run in told for pair in zip(run["idle_share"], run["planned_idle_share"], strict=True)]
    if pairs:
        figures["idle_as_planned"] = 1 - max(abs(idle - foreseen) for idle, foreseen in pairs)
    if "certified_s" in measured:
        figures["of_certified"] = measured["certified_s"] / step_s
    if any(run["trouble"] for run in shaped):
        figures |= {name: math.inf if name in AT_MOST else 0.0 for name in case.bounds}
    return {"figures": figures, "limit_binds": limit.binds, "bounds": case.bounds, "missed": missed(case, figures)}


def judge_fall(case: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """Return how a run whose links became thin does beside one that was planned for thin links."""
    run, planned = measured["isthmus"]["shaped"][0], measured["planned"]["shaped"]
    planned_s, step_s = median_s(planned), statistics.median(run["step_s"])
    figures = {"step_s": step_s, "planned_s": planned_s, "of_planned": 0.0 if run["trouble"] else planned_s / step_s}
    within = [index for index, s in enumerate(run["fallen_step_s"]) if s <= 1.2 * planned_s]
    figures["first_step_within"] = float(within[0]) if within else -1.0
    return {"figures": figures, "bounds": case.bounds, "missed": missed(case, figures)}


def missed(case: Case, figures: dict[str, float]) -> list[str]:
    """Return the figures that are on the wrong side of their bound, or not there."""
    return [name for name, bound in case.bounds.items() if not _is_met(name, bound, figures)]


def _is_met(name: str, bound: float, figures: dict[str, float]) -> bool:
    if name in AT_MOST:
        return figures.get(name, math.inf) <= bound
    return figures.get(name, 0.0) >= bound


def median_s(runs: Sequence[dict[str, Any]]) -> float:
    """Return the median step of some runs."""
    return statistics.median(step_s for run in runs for step_s in run["step_s"])


def best_torch_s(measured: dict[str, Any], how: str) -> float | None:
    """Return the step of torch's better schedule; None where it was not run."""
    found = [median_s(measured[name][how]) for name in ("torch-gpipe", "torch-1f1b") if measured.get(name, {}).get(how)]
    return min(found, default=None)


def _links(case: Case, run: dict[str, Any]) -> list[LinkTimes]:
    """Return the links between the stages of a run, by the regions that their nodes are in."""
    regions = run["regions"]
    links: list[LinkTimes] = []
    for index, frame_bytes in enumerate(run["frame_bytes"]):
        route: Route = case.near if regions[index] == regions[index + 1] else case.route
        links.append(link_times(tuple(frame_bytes), route.rate_mbps, route.delay_ms / 1e3))
    return links


def _node_stage_s(run: dict[str, Any]) -> list[float]:
    """Return what each node's stages take of it for a microbatch: of interleaved, a node has several."""
    seconds: dict[str, float] = {}
    for number, stage_s in enumerate(run["stage_s"]):
        node = run["nodes"][number] if "nodes" in run else str(number)
        seconds[node] = seconds.get(node, 0.0) + stage_s
    return list(seconds.values())


def _region(fleet: Fleet, node: str) -> str:
    return next(card.region for card in fleet.nodes if card.node == node)
