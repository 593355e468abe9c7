"""What to do when a fleet has changed: stay with the placement, or move to a better one near it.

PURE. After a join, a leave or a change of links, the incumbent is healed where it lost nodes, searches start from it,
and what they find is weighed against what must be moved: training stands still until the last node has its state, and
what is gained is gained only until the fleet changes again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.planner.draws import new_stream
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.heal import healed, touch_up
from orchestrator.planner.large_repair import repair_large
from orchestrator.planner.migration import Migration, StateSizes, migration
from orchestrator.planner.objective import Found, Limits
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.search import Searcher, search

# Fleets beyond this are repaired in a few places rather than searched.
_LARGE = 400
# Of the evaluations, the part that improves the incumbent by single changes; the rest anneals.
_DESCENT_PART = 0.5
_FIRST_LOOK = 250
# What the choices themselves take, at most.
_CHOICES = 16
_WARM, _STRICTNESS = 0.003, 30.0


@dataclass(frozen=True, kw_only=True)
class Replan:
    """What to do now; scores as of `orchestrator.planner.objective.score`, infinite where there is nothing."""

    # What to run from now on: the healed incumbent or another; None where nothing fits.
    placement: Placement | None
    step_s: float
    score: float
    moves: bool
    # What must be fetched to run it.
    migration: Migration
    # The healed incumbent, if it can go on.
    stay: Placement | None
    stay_step_s: float
    stay_score: float
    reason: str
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A placement that could be run from now on."""

    placement: Placement
    score: float
    step_s: float
    migration: Migration

    def cost(self, horizon_s: float) -> float:
        """Return its score, dearer by the part of the horizon in which training stands still for it."""
        left_s = horizon_s - self.migration.transfer_s
        return self.score * (1.0 if math.isinf(horizon_s) else horizon_s / left_s) if left_s > 0 else math.inf


def default_replan_evaluations(problem: Problem) -> int:
    """Return a budget that takes 100 ms at most once compiled."""
    return 10 if problem.num_nodes > _LARGE else 20_000


def replan(
    problem: Problem,
    incumbent: Placement | None,
    limits: Limits,
    *,
    state_sizes: StateSizes,
    horizon_s: float,
    seed: int,
    evaluations: int | None = None,
) -> Replan:
    """Return whether to stay or to move, and where to.

    `incumbent` is in this problem's indices, lost nodes left out (`heal.renumbered`), so that a stage may have none.
    `horizon_s` is how long the fleet is expected to stay as it is (`migration.expected_life_s`). Never worse than the
    healed incumbent, if that is allowed and fits.
    """
    budget = default_replan_evaluations(problem) if evaluations is None else evaluations
    if incumbent is None or not incumbent.used:
        return _anew(problem, limits, state_sizes, seed, evaluations, None)
    wide = max(len(nodes) for nodes in incumbent.nodes)
    # A repair's change brings two nodes to a stage at most.
    more = 2 * budget if problem.num_nodes > _LARGE else 8
    searcher = Searcher.of(problem, limits, max(wide + 1, min(limits.max_replicas, wide + more)))
    mended = healed(problem, limits, searcher, incumbent)
    assert mended is not None
    stay = _choice(problem, searcher, incumbent, mended, state_sizes)
    choices = [stay]
    for placement in _neighbours(problem, limits, searcher, mended, seed, budget):
        if placement != mended:
            choices.append(_choice(problem, searcher, incumbent, placement, state_sizes))
    if all(math.isinf(choice.score) for choice in choices):
        return _anew(problem, limits, state_sizes, seed, evaluations, incumbent)
    best = min(choices, key=lambda choice: choice.cost(horizon_s))
    # Where no time is left for any move, what can be run at all is still better than nothing.
    if math.isinf(best.cost(horizon_s)):
        best = min(choices, key=lambda choice: choice.score)
    can_stay = math.isfinite(stay.score)
    return Replan(
        placement=best.placement,
        step_s=best.step_s,
        score=best.score,
        moves=best is not stay,
        migration=best.migration,
        stay=stay.placement if can_stay else None,
        stay_step_s=stay.step_s if can_stay else math.inf,
        stay_score=stay.score,
        reason=_reason(stay, best, choices, horizon_s),
        evaluations=searcher.used,
    )


def _choice(
    problem: Problem, searcher: Searcher, incumbent: Placement, placement: Placement, sizes: StateSizes
) -> _Choice:
    """Return what a placement scores, and what it takes to get there."""
    searcher.offer(placement)
    score, step_s = searcher.marks_2.tolist()
    return _Choice(
        placement=placement,
        score=score,
        step_s=step_s,
        migration=migration(problem, incumbent, placement, sizes),
    )


def _neighbours(
    problem: Problem, limits: Limits, searcher: Searcher, mended: Placement, seed: int, budget: int
) -> Iterator[Placement]:
    """Yield better and better placements, each further from the incumbent."""
    if problem.num_nodes > _LARGE:
        repaired = repair_large(problem, mended, limits, budget).placement or mended
        yield repaired
        # Who is left over joins where it helps by the whole cost, windows and exchange included.
        yield touch_up(problem, limits, searcher, repaired, budget)
        return
    # The descent is looked in on after a while, after twice as long, and so on: its first steps move least.
    each, left, reached = _FIRST_LOOK, int(budget * _DESCENT_PART), mended
    while left > 0:
        searcher.descend(reached, min(each, left))
        left, each = left - each, 2 * each
        found = searcher.placement or reached
        if found == reached:
            break
        reached = found
        yield reached
    searcher.anneal(reached, new_stream(seed, 0), budget - searcher.used - _CHOICES, _WARM, _STRICTNESS)
    if searcher.placement is not None:
        yield searcher.placement


def _anew(
    problem: Problem,
    limits: Limits,
    sizes: StateSizes,
    seed: int,
    evaluations: int | None,
    incumbent: Placement | None,
) -> Replan:
    """Return the best placement there is where there is none to stay near to."""
    if problem.num_nodes > _LARGE:
        found = Found(placement=None, score=math.inf, evaluations=0)
    else:
        found = search(problem, limits, seed=seed, evaluations=evaluations)
    if found.placement is None:
        reason = "nothing to run: no placement near the last one is allowed and fits; plan the whole fleet anew"
        return Replan(
            placement=None,
            step_s=math.inf,
            score=math.inf,
            moves=False,
            migration=Migration(),
            stay=None,
            stay_step_s=math.inf,
            stay_score=math.inf,
            reason=reason,
            evaluations=found.evaluations,
        )
    moved = migration(problem, incumbent, found.placement, sizes)
    step_s = evaluate(problem, found.placement).step_s
    return Replan(
        placement=found.placement,
        step_s=step_s,
        score=found.score,
        moves=True,
        migration=moved,
        stay=None,
        stay_step_s=math.inf,
        stay_score=math.inf,
        reason=f"move: the last placement cannot go on; {_moving(moved)}, then a step takes {step_s:.3g} s",
        evaluations=found.evaluations,
    )


def _must(moved: Migration, step_s: float) -> str:
    return f"move: the last placement cannot go on; {_moving(moved)}, then a step takes {step_s:.3g} s"


def _moving(moved: Migration) -> str:
    return f"moving {moved.size_bytes / 1e9:.3g} GB takes {moved.transfer_s:.3g} s"


def _reason(stay: _Choice, best: _Choice, choices: Sequence[_Choice], horizon_s: float) -> str:
    """Return why, in one line."""
    if math.isinf(stay.score):
        return _must(best.migration, best.step_s)
    other = best if best is not stay else min(choices, key=lambda choice: choice.score)
    if other is stay or other.score >= stay.score:
        return f"stay: nothing better was found than the {stay.step_s:.3g} s that a step takes"
    gain = 1 - other.score / stay.score
    saved = f"saves {gain:.1%}"
    if math.isfinite(horizon_s):
        saved += f", {gain * horizon_s:.3g} s of the {horizon_s:.3g} s that the fleet is expected to last"
    change = f"a step of {other.step_s:.3g} s instead of {stay.step_s:.3g} s {saved}; {_moving(other.migration)}"
    return f"{'move' if best is other else 'stay'}: {change}"
