"""The best plan for a fleet: each way to cut the batch and each schedule is searched, and the best placement wins.

PURE: the same fleet, configuration and seed give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product

from actors.errors import ConfigError, PlanError
from actors.fleet_spec import Fleet
from actors.schedule import SPLIT
from actors.settings import WireConfig
from actors.spec import Plan, ScheduleName
from orchestrator.planner.assemble import Option, plan_of
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.choices import (
    CHOSEN_SCHEDULES,
    PlanConfig,
    allowed_fleet,
    cores_are_shared,
    limits_of,
    noise_of,
)
from orchestrator.planner.codecs import LADDER, CodecPair
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.interleave import with_chunks
from orchestrator.planner.kept import kept_placement
from orchestrator.planner.large import default_large_evaluations, plan_large
from orchestrator.planner.link_codecs import with_codecs
from orchestrator.planner.objective import Found, Limits, score
from orchestrator.planner.played import polished
from orchestrator.planner.problem import Placement, Problem, even_sizes
from orchestrator.planner.search import in_order, search
from orchestrator.planner.shortage import may_fit, no_fit, split_fits
from orchestrator.planner.shortlist import found_in_part, limits_of_part, part_of, shortlist
from orchestrator.planner.validate import require_sound
from orchestrator.planner.wide import evaluated

# Fleets of up to this many nodes are searched node by node, and so are as many of a larger one for one node a stage.
# Where stages may have replicas, fleets from the fewer up are planned for by classes of nodes.
MAX_SEARCHED_NODES, MIN_CLASSED_NODES = 200, 65
# Of a large fleet's plans: replicas a stage to be tried besides as many as are allowed; how many placements a change is
# worth, and the fewest changes.
_REPLICA_CAPS = (2, 8, 32)
_LOOKS_A_CHANGE, _MIN_CHANGES = 20, 500
# ZB-H1 is asked about for so many nodes at most: among more, delays want as much in flight as links need, and each
# schedule that is searched takes its time.
_MOST_NODES_ZB_H1 = 16


def make_plan(fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig, before: Plan | None = None) -> Plan:
    """Return the best plan that fits and keeps to the limits; the one of `before`, unless others are better by noise.

    Raises PlanError: where the model fits nowhere, with the stage, the shortage and the smallest change that would fit;
    where the limits leave nothing, with the limit.
    """
    option = best_option(fleet, work, wire, config.searched, before)
    return with_chunks(_plan_of(option), option, config, before)


def make_chain(fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig) -> Plan:
    """Return the best plan of those whose nodes hold one stage each; PlanError as `make_plan`."""
    return _plan_of(best_option(fleet, work, wire, config.searched))


def _plan_of(option: Option) -> Plan:
    even = even_option(option)
    return plan_of(option, even_step_s=None if even is None else even.step_s)


def best_option(
    fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig, before: Plan | None = None
) -> Option:
    """Return the placement that `make_plan` makes its plan of."""
    require_sound(fleet)
    fleet = allowed_fleet(fleet, config)
    require_counts(fleet, work, config)
    limits = limits_of(fleet, config, work.batch.step_tokens)
    options = _options(fleet, work, wire, config, limits, before)
    scored = [(_score(option, limits), option) for option in options]
    if min((own for own, _ in scored), default=math.inf) == math.inf:
        raise _refusal(fleet, work, wire, config, limits)
    if config.split is None:
        scored += [(_score(option, limits), option) for option in _polished(scored, limits)]
    best = min(own for own, _ in scored)
    noise = noise_of(fleet, config)
    # What was run before comes first, then the plainest.
    return next(option for own, option in scored if own * (1 - noise) <= best)


def _polished(scored: Sequence[tuple[float, Option]], limits: Limits) -> Iterator[Option]:
    """Yield the best option of each schedule, polished by how it plays."""
    schedules = dict.fromkeys(option.problem.schedule for _, option in scored)
    for schedule in schedules:
        own, option = min((one for one in scored if one[1].problem.schedule == schedule), key=lambda one: one[0])
        if own < math.inf:
            yield replace(option, placement=polished(option.problem, limits, option.placement))


def _score(option: Option, limits: Limits) -> float:
    """Return an option's score with its step as it plays, instead of the closed form that it was searched by."""
    own = score(option.problem, limits, option.placement, option.found)
    if own == math.inf or option.step_s > limits.max_step_s:
        return math.inf
    return own if limits.objective == "cheapest" else own * option.step_s / option.found.step_s


def even_option(option: Option) -> Option | None:
    """Return the even split over the plan's own nodes, in the fleet's order; None where it does not fit.

    What someone without a planner would run on them: to compare with.
    """
    stops = [stop for _, stop in even_split(option.problem.num_layers, option.placement.num_stages)]
    placement = Placement(bounds=(0, *stops), nodes=tuple(sorted(option.placement.nodes)))
    even = replace(option, placement=placement)
    return None if even.found.short_bytes > 0 else even


def require_counts(fleet: Fleet, work: Workload, config: PlanConfig) -> None:
    """Raise PlanError where stages, layers and nodes do not go together by their numbers alone."""
    num_layers = work.model.num_layers
    if config.split is not None and sum(config.split) != num_layers:
        raise ConfigError(
            f"plan.split has {sum(config.split)} layers, the model {num_layers}",
            f"make plan.split sum to {num_layers}",
        )
    wanted = len(config.split) if config.split is not None else config.stages or 1
    if wanted > num_layers:
        raise PlanError(f"{wanted} stages for {num_layers} layers", f"set plan.stages to {num_layers} or fewer")
    if wanted * config.copies > len(fleet.nodes):
        raise PlanError(
            f"{wanted} stages on {config.copies} node(s) each need as many; the fleet has {len(fleet.nodes)} nodes",
            f"set plan.stages={max(1, len(fleet.nodes) // config.copies)} or add nodes",
        )


def even_split(num_layers: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Return the split whose stages differ by one layer at most, the larger ones first."""
    return tuple(pairwise((0, *accumulate(even_sizes(num_layers, num_stages)))))


def _options(
    fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig, limits: Limits, before: Plan | None
) -> Iterator[Option]:
    """Yield placements to choose from: what was run before, then the plainest first."""
    ways = list(_ways(fleet, work, wire, config))
    if before is not None and config.split is None:
        # Its bits depend on the cut, not on the schedule: another one may have been asked for.
        alike = [way for way in ways if way.work.batch.microbatch_size == before.microbatch_size]
        for way in sorted(alike, key=lambda way: way.work.schedule != before.schedule):
            kept = kept_placement(way.problem, limits, fleet, before)
            if kept is not None:
                yield way.option(kept, config)
    for way in ways:
        for placement in _placements(way.problem, config, limits):
            yield way.option(placement, config)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A way to run: microbatches, schedule, and a set of codecs, or None for what is set."""

    fleet: Fleet
    work: Workload
    wire: WireConfig
    problem: Problem
    codecs: tuple[CodecPair, ...] | None

    def option(self, placement: Placement, config: PlanConfig) -> Option:
        pairs = tuple(self.wire.codecs_of(stage) for stage in range(placement.num_stages - 1))
        option = Option(
            fleet=self.fleet, work=self.work, wire=self.wire, problem=self.problem, placement=placement, pairs=pairs
        )
        return with_codecs(option, config)


def _ways(fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig) -> Iterator[_Way]:
    schedules: Sequence[ScheduleName] = CHOSEN_SCHEDULES if config.schedule is None else (config.schedule,)
    if config.schedule is None and cores_are_shared(fleet):
        # What waits leave of shared cores is the other nodes'.
        schedules = [schedule for schedule in schedules if schedule not in SPLIT]
    if config.schedule is None and len(fleet.nodes) > _MOST_NODES_ZB_H1:
        schedules = [schedule for schedule in schedules if schedule != "zb-h1"]
    for batch, schedule, codecs in product(config.batches(work.batch), schedules, codec_sets(config)):
        this = replace(work, batch=batch, schedule=schedule)
        problem = make_problem(fleet, this, wire, codecs=codecs)
        yield _Way(fleet=fleet, work=this, wire=wire, problem=problem, codecs=codecs)


def codec_sets(config: PlanConfig) -> tuple[tuple[CodecPair, ...] | None, ...]:
    """Return what links are taken to carry while placements are searched: what is set, or the ends of what may be."""
    if config.quality_budget is None:
        return (None,)
    affordable = [cost.pair for cost in LADDER if cost.loss_share <= config.quality_budget] or [LADDER[0].pair]
    # The mildest codec rather than none, where it may be: nobody would search with frames that large.
    return tuple((pair,) for pair in dict.fromkeys((affordable[:2][-1], affordable[-1])))


def _placements(problem: Problem, config: PlanConfig, limits: Limits) -> Iterator[Placement]:
    """Yield the even split of the plainest placement, the best found with its nodes in their order, then as it is."""
    if config.split is not None:
        stops = [sum(config.split[: stage + 1]) for stage in range(len(config.split))]
        # The roomiest, for a model that does not fit the fastest.
        for ranked in (_fastest(problem), _roomiest(problem)):
            dealt = _dealt(ranked, limits, len(stops))
            yield Placement(bounds=(0, *stops), nodes=tuple((node,) for node in dealt))
        return
    best = find(problem, config, limits).placement
    if best is None:
        return
    yield _even_placement(problem, best.num_stages)
    yield in_order(problem, limits, best)
    yield best


def find(problem: Problem, config: PlanConfig, limits: Limits, start: Placement | None = None) -> Found:
    """Return what the search for this fleet's size finds; never worse for more replicas allowed, or for `start`."""
    if not may_fit(problem):
        return Found(placement=None, score=math.inf, evaluations=0)
    by_classes = problem.num_nodes >= MIN_CLASSED_NODES and limits.max_replicas > 1
    if not by_classes and problem.num_nodes <= MAX_SEARCHED_NODES:
        return search(problem, limits, seed=config.seed, evaluations=config.evaluations, start=start)
    found: list[Found] = []
    if start is not None:
        own = score(problem, limits, start, evaluated(problem, start))
        found.append(Found(placement=start, score=own, evaluations=1))
    # One node a stage, of the few that come into question.
    nodes = shortlist(problem, limits, MAX_SEARCHED_NODES)
    part, chains = part_of(problem, nodes), replace(limits_of_part(limits, nodes), max_replicas=1)
    if limits.min_copies == 1:
        own = search(part, chains, seed=config.seed, evaluations=config.evaluations)
        found.append(found_in_part(own, nodes))
    if by_classes:
        found += _by_classes(problem, config, limits)
        if problem.num_nodes <= MAX_SEARCHED_NODES:
            best = min(found, key=lambda one: one.score)
            own = search(problem, limits, seed=config.seed, evaluations=config.evaluations, start=best.placement)
            found.append(own)
    return min(found, key=lambda one: one.score)


def _by_classes(problem: Problem, config: PlanConfig, limits: Limits) -> Iterator[Found]:
    """Yield what is found by classes of nodes, with more and more replicas a stage."""
    changes = default_large_evaluations(problem)
    if config.evaluations is not None:
        # A change looks at many placements.
        changes = max(_MIN_CHANGES, min(changes, config.evaluations // _LOOKS_A_CHANGE))
    caps = [cap for cap in _REPLICA_CAPS if limits.min_copies <= cap < limits.max_replicas]
    for cap in (*caps, limits.max_replicas):
        capped = replace(limits, max_replicas=cap)
        yield plan_large(
            problem, capped, seed=config.seed, evaluations=max(1, changes // (len(caps) + 1)), steady=False
        )


def _even_placement(problem: Problem, num_stages: int) -> Placement:
    split = even_split(problem.num_layers, num_stages)
    nodes = sorted(_fastest(problem)[:num_stages])
    return Placement(bounds=(0, *(stop for _, stop in split)), nodes=tuple((node,) for node in nodes))


def _fastest(problem: Problem) -> list[int]:
    return sorted(range(problem.num_nodes), key=lambda node: float(problem.layer_s_N[node]))


def _roomiest(problem: Problem) -> list[int]:
    """Return the nodes, those with the most memory first."""
    return sorted(range(problem.num_nodes), key=lambda node: -float(problem.memory_bytes_N[node]))


def _dealt(ranked: Sequence[int], limits: Limits, num_stages: int) -> list[int]:
    """Return a node for each stage: what is pinned to it, else the first of `ranked`, in the fleet's order."""
    pinned = {stage % num_stages: node for node, stage in limits.pins}
    others = [node for node in ranked if node not in pinned.values()]
    rest = iter(sorted(others[: num_stages - len(pinned)]))
    return [pinned[stage] if stage in pinned else next(rest) for stage in range(num_stages)]


def _refusal(fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig, limits: Limits) -> PlanError:
    """Return why there is no plan: a limit, where one without it would fit, else memory."""
    # The way to run that takes the least memory of those that may be chosen.
    least = min(config.batches(work.batch), key=lambda batch: batch.microbatch_size)
    work = replace(work, batch=least, schedule=config.schedule or "bdp")
    problem = make_problem(fleet, work, wire)
    if config.split is not None:
        # But for the last, which is all of them at once.
        asked = [words for _, words in _relaxed(replace(limits, num_stages=None))][:-1]
        if asked and split_fits(problem, config.split):
            split = ",".join(map(str, config.split))
            return PlanError(f"no plan with plan.split={split} keeps to {', '.join(asked)}", "leave out one of them")
    else:
        for change, words in _relaxed(limits):
            found = find(problem, config, change).placement
            if found is not None:
                price = sum(float(problem.price_N[node]) for node in found.used)
                seconds = evaluate(problem, found).step_s
                return PlanError(
                    f"no plan keeps to {words}",
                    f"without it the best plan takes {seconds:.2f} s a step "
                    f"({work.batch.step_tokens / seconds:,.0f} tokens/s) for ${price:.2f} an hour",
                )
    return no_fit(fleet, work, wire, limits.num_stages, config.split)


def _relaxed(limits: Limits) -> Iterator[tuple[Limits, str]]:
    """Yield the limits with one of them, then all of them, given up, and that one in words."""
    if limits.max_step_s < math.inf:
        yield replace(limits, max_step_s=math.inf), "plan.min_tokens_per_s"
    if limits.max_dollars_per_hour < math.inf:
        words = f"plan.max_dollars_per_hour={limits.max_dollars_per_hour:g}"
        yield replace(limits, max_dollars_per_hour=math.inf), words
    if limits.pins or limits.after:
        yield replace(limits, pins=(), after=()), "plan.pins and plan.after"
    if limits.min_copies > 1 or limits.min_domains > 1:
        words = f"plan.copies={limits.min_copies} and plan.domains={limits.min_domains}"
        yield replace(limits, min_copies=1, min_domains=1), words
    if limits.num_stages is not None:
        yield replace(limits, num_stages=None), f"plan.stages={limits.num_stages}"
    bare = Limits(max_replicas=limits.max_replicas)
    yield bare, "all of the limits under plan at once"
