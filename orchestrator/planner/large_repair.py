"""A large plan after a node came or went: the same stages, with few nodes moved.

PURE. Who is new joins where it helps the slowest stage most, who is missing is made up for, by the search that levels
stages (orchestrator.planner.level): one node a change, so that little state moves.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from orchestrator.planner.large import Judged, judge
from orchestrator.planner.layout import Cut, Runs, Workers, levelled, workers
from orchestrator.planner.objective import Found, Limits
from orchestrator.planner.problem import Placement, Problem


def repair_large(problem: Problem, placement: Placement, limits: Limits, evaluations: int) -> Found:
    """Return a placement near the given one: its stages, with nodes added that it lacks and a few moved or swapped.

    Nodes of the problem that the placement does not have are free to join, as after a join; a stage may be short of
    some or have none, as after a leave. At most `evaluations` changes are made. The given placement is kept where they
    make it no better, and Found has None where neither is allowed and fits.
    """
    before = judge(problem, limits, placement) if all(placement.nodes) else None
    best, spent = before, 1
    team = _team(problem, limits, placement)
    if team is not None:
        runs, cut = _as_it_is(problem, placement)
        # A stage without nodes takes some from the places beside it.
        num_empty = sum(not nodes for nodes in placement.nodes)
        reach = num_empty + 1 if num_empty else 0
        changed, changes = levelled(problem, limits, team, runs, cut, reach=reach, changes=evaluations)
        spent += changes + 1
        if changes and all(changed.nodes):
            after = judge(problem, limits, changed)
            best = after if _improves(after, before, limits) else before
    return _found(best, spent)


def _improves(after: Judged, before: Judged | None, limits: Limits) -> bool:
    """Return whether to move: never to a lower rate, where throughput is wanted."""
    if before is None or not math.isfinite(before.score) or limits.objective != "throughput":
        return after.better_than(before, limits, steady=True)
    return after.evaluation.rate >= before.evaluation.rate and after.better_than(before, limits, steady=True)


def _found(best: Judged | None, spent: int) -> Found:
    if best is None or not math.isfinite(best.score):
        return Found(placement=None, score=math.inf, evaluations=spent)
    return Found(placement=best.placement, score=best.score, evaluations=spent)


def _team(problem: Problem, limits: Limits, placement: Placement) -> Workers | None:
    """Return those who take part: who does now, and others as far as money goes."""
    used = np.zeros(problem.num_nodes, np.bool_)
    used[list(placement.used)] = True
    fixed = np.zeros(problem.num_nodes, np.bool_)
    fixed[[pin[0] for pin in limits.pins] + [node for pair in limits.after for node in pair]] = True
    others = np.flatnonzero(~used & ~fixed)
    left = limits.max_dollars_per_hour - float(problem.price_N[used].sum())
    others = others[np.cumsum(problem.price_N[others]) <= left] if left < math.inf else others
    ours = np.flatnonzero(used & ~fixed)
    team = workers(problem, limits, np.append(ours, others), longest=problem.num_layers, caution=0.0)
    # Whom a new plan would do without stays: this is no new plan.
    return None if team is None else replace(team, nodes=np.union1d(team.nodes, ours))


def _as_it_is(problem: Problem, placement: Placement) -> tuple[Runs, Cut]:
    """Return the stages as if they had just been cut, and the places in the order in which stages name them."""
    stage_N = np.full(problem.num_nodes, -1, np.int64)
    for stage, nodes in enumerate(placement.nodes):
        stage_N[list(nodes)] = stage
    used = np.array(placement.used, np.int64)
    places, first = np.unique(problem.place_N[used], return_index=True)
    rank_P = np.full(problem.num_places, problem.num_places)
    rank_P[places[np.argsort(first)]] = np.arange(len(places))
    runs = Runs(queue=used, run_N=problem.place_N.astype(np.int64), rank_P=rank_P)
    return runs, Cut(bounds=placement.bounds, stage_N=stage_N)
