"""The plan that a run goes by, for links as they are now: same cut, same nodes, other codecs, depths, chunks, windows.

PURE. Weights and layers stay where they are, so it takes effect with the next step's order; the depths are those that
a new plan would have, by the same closed form, within the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from actors.fleet_spec import Fleet, LinkCard
from actors.settings import WireConfig
from actors.spec import Plan
from orchestrator.planner.assemble import Option, plan_of
from orchestrator.planner.build import Workload, link_table, make_problem
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.link_codecs import with_codecs
from orchestrator.planner.problem import Placement

# The stages that a direction of a link leads from and to.
Way = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class WayState:
    """Rate and one-way delay of one direction of a link."""

    rate_mbps: float
    delay_s: float


def assumed(plan: Plan, fleet: Fleet) -> dict[Way, WayState]:
    """Return what a plan takes each direction between neighbouring stages for, limits of their nodes included."""
    table = link_table(fleet)
    index = {card.node: number for number, card in enumerate(fleet.nodes)}
    states: dict[Way, WayState] = {}
    for way in _ways(plan):
        source, target = (index[plan.stages[stage].node] for stage in way)
        place = table.place_of[source], table.place_of[target]
        limits = [float(table.rate_mbps_PP[place]), float(table.shared_mbps_PP[place])]
        limits += [mbps for mbps in (fleet.nodes[source].uplink_mbps, fleet.nodes[target].downlink_mbps) if mbps]
        states[way] = WayState(rate_mbps=min(limits), delay_s=float(table.delay_s_PP[place]))
    return states


def with_links(plan: Plan, fleet: Fleet, changed: Mapping[Way, WayState]) -> Fleet:
    """Return the fleet with what is now known of the plan's links; what was assumed of the others stays."""
    table = link_table(fleet)
    place_of = {card.node: place for card, place in zip(fleet.nodes, table.place_of, strict=True)}
    known = {(link.source, link.target): link for link in fleet.links}
    # Commits go between the first stage and all others.
    commits = [way for stage in range(2, len(plan.stages)) for way in ((0, stage), (stage, 0))]
    for way in (*_ways(plan), *commits):
        source, target = (plan.stages[stage].node for stage in way)
        p, q = place_of[source], place_of[target]
        # What was not measured had another link stand for it, which must not do so for what changed.
        state = WayState(rate_mbps=float(table.rate_mbps_PP[p, q]), delay_s=float(table.delay_s_PP[p, q]))
        if way in changed or (source, target) not in known:
            state = changed.get(way, state)
            known[source, target] = LinkCard(
                source=source, target=target, delay_s=state.delay_s, rate_mbps=state.rate_mbps
            )
    return replace(fleet, links=tuple(known.values()))


def retuned(
    plan: Plan, fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig, changed: Mapping[Way, WayState]
) -> tuple[Plan, Fleet]:
    """Return the plan's cut on the plan's nodes as it would be planned for links that changed, and the fleet so."""
    fleet = with_links(plan, fleet, changed)
    index = {card.node: number for number, card in enumerate(fleet.nodes)}
    placement = Placement(
        bounds=(0, *(stage.layer_stop for stage in plan.stages)),
        nodes=tuple(tuple(index[node] for node in stage.nodes) for stage in plan.stages),
    )
    work = replace(work, schedule=plan.schedule)
    option = Option(
        fleet=fleet,
        work=work,
        wire=wire,
        problem=make_problem(fleet, work, wire),
        placement=placement,
        pairs=tuple(wire.codecs_of(stage) for stage in range(placement.num_stages - 1)),
    )
    after = plan_of(with_codecs(option, config), even_step_s=plan.even_step_s)
    return replace(after, bound_tokens_per_s=plan.bound_tokens_per_s), fleet


def _ways(plan: Plan) -> list[Way]:
    pairs = list(pairwise(range(len(plan.stages))))
    return [*pairs, *((target, source) for source, target in pairs)]
