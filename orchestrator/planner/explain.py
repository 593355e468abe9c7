"""What a person wants to know of a plan before money is spent: how good it can be, what else there is, what would help.

PURE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from actors.errors import PlanError
from actors.fleet_spec import Fleet, NodeCard
from actors.settings import WireConfig
from actors.spec import Alternative, Plan
from orchestrator.planner.assemble import Option, plan_of
from orchestrator.planner.binding import what_binds
from orchestrator.planner.bound import throughput_bound
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.choices import CHOSEN_SCHEDULES, PlanConfig, limits_of
from orchestrator.planner.interleave import with_chunks
from orchestrator.planner.objective import Limits, score
from orchestrator.planner.plan import best_option, codec_sets, even_option, find
from orchestrator.planner.problem import Floats, Problem

_MOST_ADVICE = 3
# Looked at: regions by themselves, those with the most to compute with first, and kinds of nodes that might be added.
_MOST_REGIONS, _MOST_KINDS = 4, 6
# What helps less than this is not worth a line.
_WORTH_A_LINE = 0.01
# The budgets of each what-if, which starts from the plan itself, and of a region by itself.
_EVALUATIONS, _REGION_EVALUATIONS = 20_000, 60_000


def explained_plan(fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig) -> Plan:
    """Return `make_plan`'s plan with its certified bound, plans to compare it with, and what would help most."""
    searched = config.searched
    option = best_option(fleet, work, wire, searched)
    even = even_option(option)
    plan = plan_of(option, even_step_s=None if even is None else even.step_s)
    alternatives = () if even is None else (_alternative("even split, same nodes", even),)
    plan = replace(
        plan,
        bound_tokens_per_s=_bound_tokens_per_s(option, searched),
        alternatives=alternatives + tuple(_single_regions(option, fleet, work, wire, searched)),
        advice=tuple(_advice(option, searched)),
    )
    interleaved = with_chunks(plan, option, config)
    # What would help was found for the chain.
    return interleaved if interleaved is plan else replace(interleaved, advice=())


def _bound_tokens_per_s(option: Option, config: PlanConfig) -> float:
    """Return what no plan for this fleet exceeds in the long run, whatever is chosen of all that may be chosen."""
    limits = limits_of(option.fleet, config, option.work.batch.step_tokens)
    rates: list[float] = []
    # The schedules that are not GPipe have one bound; its two phases have a lower one.
    schedule = config.schedule or CHOSEN_SCHEDULES[0]
    for batch in config.batches(option.work.batch):
        work = replace(option.work, batch=batch, schedule=schedule)
        # The last set has the smallest frames that may be used.
        problem = make_problem(option.fleet, work, option.wire, codecs=codec_sets(config)[-1])
        rates.append(throughput_bound(problem, limits).rate * batch.microbatch_tokens)
    return max(rates)


def _alternative(name: str, option: Option) -> Alternative:
    plan = plan_of(option, even_step_s=None)
    return Alternative(
        name=name, step_s=plan.step_s, tokens_per_s=plan.tokens_per_s, dollars_per_mtoken=plan.dollars_per_mtoken
    )


def _single_regions(
    option: Option, fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig
) -> Iterator[Alternative]:
    """Yield the best plan that stays within one region, where the plan itself does not."""
    if len({option.fleet.nodes[node].region for node in option.placement.used}) == 1:
        return
    speeds: dict[str, float] = {}
    for node, layer_s in zip(option.fleet.nodes, option.problem.layer_s_N.tolist(), strict=True):
        speeds[node.region] = speeds.get(node.region, 0.0) + 1 / layer_s
    regions = sorted(speeds, key=lambda region: -speeds[region])
    small = replace(config, evaluations=min(_REGION_EVALUATIONS, config.evaluations or _REGION_EVALUATIONS))
    inside: list[tuple[float, str, Option]] = []
    for region in regions[:_MOST_REGIONS]:
        try:
            best = best_option(fleet, work, wire, replace(small, regions=(region,)))
        except PlanError:
            # It does not fit there: no alternative.
            continue
        inside.append((best.step_s, region, best))
    if inside:
        _, region, best = min(inside, key=lambda item: item[:2])
        yield _alternative(f"best within one region ({region})", best)
    else:
        yield Alternative(
            name="within one region: no plan",
            step_s=float("nan"),
            tokens_per_s=0.0,
            dollars_per_mtoken=float("nan"),
        )


@dataclass(frozen=True)
class _WhatIf:
    """A change to the fleet, in words, with its price an hour and the plan's own score under it."""

    words: str
    dollars_per_hour: float
    problem: Problem
    limits: Limits


def _advice(option: Option, config: PlanConfig) -> list[str]:
    """Return what would help most: by gain for a dollar an hour where it has a price, the free changes before."""
    limits = limits_of(option.fleet, config, option.work.batch.step_tokens)
    if len(option.placement.used) == option.placement.num_stages:
        # Replicas that the plan does without are no change to the fleet.
        limits = replace(limits, max_replicas=1)
    now = score(option.problem, limits, option.placement, option.found)
    gains: list[tuple[float, str]] = []
    small = replace(config, evaluations=min(_EVALUATIONS, config.evaluations or _EVALUATIONS))
    for change in _changes(option, limits):
        found = find(change.problem, small, change.limits, start=option.placement)
        # A plan that costs nothing cannot cost less.
        gain = now / found.score - 1 if found.score > 0 else 0.0
        if gain < _WORTH_A_LINE:
            continue
        what = {"throughput": "faster", "dollars": "more tokens for a dollar", "cheapest": "cheaper"}[limits.objective]
        words = f"{change.words}: {gain:.0%} {what}"
        if change.dollars_per_hour:
            words += f" for ${change.dollars_per_hour:.2f} more an hour"
        gains.append((gain / max(change.dollars_per_hour, 1e-9), words))
    return [words for _, words in sorted(gains, reverse=True)[:_MOST_ADVICE]]


def _changes(option: Option, limits: Limits) -> Iterator[_WhatIf]:
    """Yield one more node of each kind that the fleet has, and more of what binds where that is no stage."""
    problem = option.problem
    kinds: dict[tuple[str, str], NodeCard] = {}
    # Those that the plan uses first.
    used = [option.fleet.nodes[node] for node in option.placement.used]
    for card in (*used, *option.fleet.nodes):
        kinds.setdefault((card.device, card.region), card)
    if option.placement.num_stages < problem.num_layers:
        for (device, region), card in islice(kinds.items(), _MOST_KINDS):
            words = f"one more {device} in {region}"
            yield _WhatIf(words, card.price_per_hour, _with_node(option, card), limits)
    binding = what_binds(problem, option.placement, option.found)
    if binding.kind == "stage":
        return
    cards = [option.fleet.nodes[node] for node in binding.nodes]
    places = problem.place_N[list(binding.nodes)]
    both_ways = (places, places[::-1])
    if binding.kind == "link":
        words = f"twice the rate between {cards[0].node} and {cards[1].node}"
        changed = replace(problem, byte_s_PP=_scaled(problem.byte_s_PP, both_ways, 0.5))
    elif binding.kind == "shared way":
        words = f"twice what {cards[0].region} and {cards[1].region} share"
        shared = _scaled(problem.shared_bytes_per_s_PP, both_ways, 2.0)
        changed = replace(problem, shared_bytes_per_s_PP=shared)
    elif binding.kind == "uplink":
        words = f"twice the uplink of {cards[0].node}"
        changed = replace(problem, uplink_byte_s_N=_scaled(problem.uplink_byte_s_N, binding.nodes, 0.5))
    elif binding.kind == "downlink":
        words = f"twice the downlink of {cards[0].node}"
        changed = replace(problem, downlink_byte_s_N=_scaled(problem.downlink_byte_s_N, binding.nodes, 0.5))
    elif problem.schedule == "1f1b":
        words, changed = "plan.schedule=bdp", replace(problem, schedule="bdp")
    else:
        words, changed = "twice the memory", replace(problem, memory_bytes_N=2 * problem.memory_bytes_N)
    yield _WhatIf(words, 0.0, changed, limits)


def _scaled(values: Floats, where: Any, factor: float) -> Floats:
    """Return a copy in which some values are multiplied."""
    values = values.copy()
    values[where] *= factor
    return values


def _with_node(option: Option, card: NodeCard) -> Problem:
    """Return the problem with one more node like `card`, in the same place as it, last."""
    problem = option.problem
    index = option.fleet.nodes.index(card)
    grown = {name: np.append(value, value[index]) for name, value in vars(problem).items() if name.endswith("_N")}
    if problem.num_places == problem.num_nodes:
        # Each node is a place of its own: the newcomer's links are like its twin's, and the two are near each other.
        order = [*range(problem.num_nodes), index]
        tables = {name: value[np.ix_(order, order)] for name, value in vars(problem).items() if name.endswith("_PP")}
        grown |= tables | {"place_N": np.arange(problem.num_nodes + 1, dtype=np.int32)}
    return replace(problem, **grown)
