"""Plans for hundreds to tens of thousands of nodes, whose stages have replicas.

PURE. Places in a row, layers by what nodes compute, whole stages by rounding, then local search on the slowest stage
(orchestrator.planner.layout): tried in a few ways, of which the best by the cost model is kept. The steady rate counts
first, then the step's time, where throughput is wanted; otherwise the score. `throughput_bound` says how far from the
best possible it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.planner.evaluate import Evaluation
from orchestrator.planner.layout import Runs, Workers, cut_stages, levelled, node_order, team_walks, workers
from orchestrator.planner.objective import Found, Limits, score
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.walk import Walk
from orchestrator.planner.wide import evaluate_wide

Counts = NDArray[np.int64]

# Rates within this part of each other are alike: the shorter step is then better.
_ALIKE = 0.002
# Who is so near to what the nodes were worth as a fluid is not bettered by another way.
_NEAR = 0.993
# Of the nodes that give most for their price, these parts are tried where price counts.
_PARTS = (1.0, 0.8, 0.6, 0.45, 0.33, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
# The longest stage in layers, how much memory in flight is reckoned with, and whether all nodes must have it from the
# first stage on: otherwise those with less come last.
_WAYS = (
    (1, 1.0, False),
    (2, 1.0, False),
    (1, 1.5, True),
    (3, 1.0, False),
    (99, 1.0, False),
    (2, 2.0, True),
    (4, 2.0, False),
    (1, 0.0, False),
)
# So many walks, each both ways, are tried with each of these.
_WALKS = 6
# Places are left out one by one while the thinnest link of the row holds up the others.
_MOST_LEFT_OUT = 8


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A placement, and what it is worth; smaller is better."""

    placement: Placement
    evaluation: Evaluation
    score: float

    def better_than(self, other: Judged | None, limits: Limits, steady: bool) -> bool:
        if other is None or not math.isfinite(other.score):
            return other is None or math.isfinite(self.score)
        if not math.isfinite(self.score):
            return False
        ours, theirs = self.evaluation.rate, other.evaluation.rate
        if steady and limits.objective == "throughput" and abs(ours - theirs) > _ALIKE * theirs:
            return ours > theirs
        return self.score < other.score


def judge(problem: Problem, limits: Limits, placement: Placement) -> Judged:
    """Return what a placement of any size is worth."""
    evaluation = evaluate_wide(problem, placement)
    return Judged(placement=placement, evaluation=evaluation, score=score(problem, limits, placement, evaluation))


def default_large_evaluations(problem: Problem) -> int:
    """Return a budget that takes 2 s for 1,000 nodes, 5 s for 10,000."""
    return int(20_000 * min(1.0, (1000 / problem.num_nodes) ** 0.3))


def plan_large(problem: Problem, limits: Limits, *, seed: int, evaluations: int, steady: bool) -> Found:
    """Return the best placement found; each one judged, and each change of one, counts as an evaluation.

    `steady`: the highest rate of a full pipeline, whatever filling it and exchanging gradients take of a step. Nodes
    that pins or an order name are left out, which both allow. The same inputs and seed give the same plan.
    """
    rng = np.random.default_rng(seed)
    best: Judged | None = None
    spent = 0
    for nodes in _teams(problem, limits):
        everyone = workers(problem, limits, nodes, longest=problem.num_layers, caution=0.0)
        most = everyone.rate if everyone is not None else math.inf
        for team, runs in _rows(problem, limits, nodes, rng):
            if spent >= evaluations:
                break
            cut = cut_stages(problem, limits, team, runs)
            if cut is None:
                spent += 1
                continue
            placement, changes = levelled(problem, limits, team, runs, cut, reach=0, changes=evaluations - spent)
            found = judge(problem, limits, placement)
            spent += changes + 1
            if found.better_than(best, limits, steady):
                best = found
            if steady and limits.objective == "throughput" and best is found and found.evaluation.rate >= most * _NEAR:
                break
    if best is None or not math.isfinite(best.score):
        return Found(placement=None, score=math.inf, evaluations=spent)
    return Found(placement=best.placement, score=best.score, evaluations=spent)


def _teams(problem: Problem, limits: Limits) -> Iterator[Counts]:
    """Yield which nodes to plan with: all, or, where price counts, those that give most for it."""
    named = [node for pin in limits.pins for node in pin[:1]] + [node for pair in limits.after for node in pair]
    nodes = np.setdiff1d(np.arange(problem.num_nodes), np.array(named, np.int64))
    if limits.objective == "throughput" and limits.max_dollars_per_hour == math.inf:
        yield nodes
        return
    holds = workers(problem, limits, nodes, longest=problem.num_layers, caution=0.0)
    if holds is None:
        return
    nodes = holds.nodes
    ranked = nodes[np.argsort(problem.price_N[nodes] * problem.layer_s_N[nodes], kind="stable")]
    spent = np.cumsum(problem.price_N[ranked])
    affordable = int(np.searchsorted(spent, limits.max_dollars_per_hour, side="right"))
    for part in _PARTS if limits.objective != "throughput" else _PARTS[:1]:
        count = math.ceil(part * affordable)
        if count:
            yield np.sort(ranked[:count])


def _rows(problem: Problem, limits: Limits, nodes: Counts, rng: np.random.Generator) -> Iterator[tuple[Workers, Runs]]:
    """Yield ways to lay nodes out in a row: first each way on its best walk."""
    kept: list[tuple[Workers, list[Walk]]] = []
    for way in _WAYS:
        found = _without_thin(problem, limits, nodes, way, rng)
        if found is not None:
            kept.append(found)
    for number in range(_WALKS):
        for team, found in kept:
            if number < 2 * len(found):
                # Each walk both ways.
                yield team, node_order(problem, team, found[number // 2].places[:: 1 - 2 * (number % 2)])


def _without_thin(
    problem: Problem, limits: Limits, nodes: Counts, way: tuple[int, float, bool], rng: np.random.Generator
) -> tuple[Workers, list[Walk]] | None:
    """Return a team without the places whose links would hold up the others more than they add, and its walks."""
    longest, caution, early = way

    def team_of(nodes: Counts) -> Workers | None:
        return workers(problem, limits, nodes, longest=longest, caution=caution, early=early)

    team = team_of(nodes)
    if team is None:
        return None
    found = team_walks(problem, team, rng)
    for _ in range(min(_MOST_LEFT_OUT, len(found[0].places) - 1)):
        if found[0].rate >= team.rate * (1 - _ALIKE):
            break
        tried: list[tuple[Workers, list[Walk]]] = []
        for place in np.sort(found[0].places).tolist():
            rest = team_of(team.nodes[problem.place_N[team.nodes] != place])
            if rest is not None:
                tried.append((rest, team_walks(problem, rest, rng)))
        if not tried or max(walks[0].rate for _, walks in tried) <= found[0].rate:
            break
        team, found = max(tried, key=lambda option: option[1][0].rate)
    return team, found
