"""A run's plan after a link changed: what is done about it from the next step on, and why, in words.

PURE. The watch says which links are something else than the plan takes them for, the planner what it would do then; a
change that would move nothing is let be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.fleet_spec import Fleet
from actors.settings import WireConfig
from actors.spec import LinkReading, Plan, StepReport
from orchestrator.canary import StepDown, with_step_downs
from orchestrator.link_watch import LinkChange, LinkWatch, RetuneConfig, on_readings
from orchestrator.planner.build import Workload
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.retuned import assumed, retuned


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a plan is made by, and what must stay out of it."""

    work: Workload
    wire: WireConfig
    plan: PlanConfig
    retune: RetuneConfig
    # Codecs that did a link harm.
    step_downs: tuple[StepDown, ...]


@dataclass(frozen=True, kw_only=True)
class Retuned:
    """The plan from the next step on, the fleet that it was made for, and why."""

    plan: Plan
    fleet: Fleet
    reason: str


def link_readings(reports: Sequence[StepReport]) -> tuple[LinkReading, ...]:
    """Return what every stage's links were seen to do in a step, in stage order."""
    return tuple(reading for report in reports for reading in report.readings)


def watch_of(plan: Plan, fleet: Fleet) -> LinkWatch:
    """Return the watch that a plan begins with: nothing was seen yet."""
    return LinkWatch(planned=assumed(plan, fleet))


def judge_links(
    watch: LinkWatch, step: int, readings: Sequence[LinkReading], plan: Plan, fleet: Fleet, tuning: Tuning
) -> tuple[LinkWatch, Retuned | None]:
    """Return the watch after a step's readings, and another plan where links changed so that it pays.

    It pays where a codec, a depth, or the step as it is foreseen, by more than plan.noise, is another one.
    """
    if plan.num_nodes < len(plan.stages):
        # Interleaved: links of other stages share the way, and no reading can tell whose turn it was.
        return watch, None
    watch, changes = on_readings(watch, step, readings, tuning.retune)
    if not changes:
        return watch, None
    changed = {change.way: change.now for change in changes}
    after, fleet = retuned(plan, fleet, tuning.work, tuning.wire, tuning.plan, changed)
    after = with_step_downs(after, tuning.step_downs)
    differences = _differences(plan, after)
    if not differences and abs(after.step_s - plan.step_s) <= tuning.plan.noise * plan.step_s:
        return watch, None
    words = [*map(_change_words, changes), *(differences or ["codecs and depths stay"])]
    watch = replace(watch, planned=assumed(after, fleet))
    words.append(f"a step is foreseen to take {after.step_s:.3g} s, not {plan.step_s:.3g} s")
    return watch, Retuned(plan=after, fleet=fleet, reason="; ".join(words))


def _change_words(change: LinkChange) -> str:
    source, target = change.way
    if not change.num_readings:
        return f"link {source} -> {target} is taken for {change.now.rate_mbps:.3g} Mbit/s too"
    least = "" if change.is_measured else "at least "
    return (
        f"link {source} -> {target} has {least}{change.now.rate_mbps:.3g} Mbit/s in {change.num_readings} steps, "
        f"{change.before.rate_mbps:.3g} were planned"
    )


def _differences(before: Plan, after: Plan) -> list[str]:
    """Return what stages and links do otherwise, in words."""
    words = [
        f"link {link.source_stage} - {link.target_stage} carries {link.forward_codec}/{link.backward_codec}, "
        f"not {old.forward_codec}/{old.backward_codec}"
        for old, link in zip(before.links, after.links, strict=True)
        if (old.forward_codec, old.backward_codec) != (link.forward_codec, link.backward_codec)
    ]
    words += [
        f"stage {stage.stage} keeps {stage.in_flight} microbatches in flight, not {old.in_flight}"
        for old, stage in zip(before.stages, after.stages, strict=True)
        if old.in_flight != stage.in_flight
    ]
    return words
