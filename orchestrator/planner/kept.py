"""The plan that a run went by so far, on the fleet as it is now: kept unless another is better by more than noise.

PURE. With the same cut a run that goes on does so bit for bit, whatever its links' codecs, and what nodes hold stays
where it is; a new plan for every start would lose that to the noise of a probe.
"""

from __future__ import annotations

from itertools import pairwise

from actors.fleet_spec import Fleet
from actors.spec import Plan
from orchestrator.planner.heal import healed
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.search import Searcher


def kept_placement(problem: Problem, limits: Limits, fleet: Fleet, plan: Plan) -> Placement | None:
    """Return the plan's stages on those of its nodes that the fleet has, those of others healed; None where none is."""
    index = {card.node: number for number, card in enumerate(fleet.nodes)}
    bounds = (0, *(stage.layer_stop for stage in plan.stages))
    named = [node for stage in plan.stages for node in stage.nodes]
    is_cut = all(start < stop for start, stop in pairwise(bounds))
    # A file that somebody has edited, or another model's.
    if not is_cut or bounds[-1] != problem.num_layers or len(set(named)) < len(named):
        return None
    nodes = tuple(tuple(index[node] for node in stage.nodes if node in index) for stage in plan.stages)
    placement = Placement(bounds=bounds, nodes=nodes)
    if all(nodes):
        return placement
    # None of a stage's nodes is there any more: it gets one.
    most = max(1, *(len(stage) for stage in nodes))
    return healed(problem, limits, Searcher.of(problem, limits, most), placement)
