"""The search for a placement on fleets of up to some hundreds of nodes: many starts, annealing, then descent.

PURE. A budget of evaluations ends it, never a clock: the same inputs and seed give the same placement. It is never
worse than the placement it is given to start from, nor than equal stages on the nodes in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, zip_longest

import numpy as np

from orchestrator.planner.anneal import CURSOR_SIZE, explore
from orchestrator.planner.cuts import CUT_EVALUATIONS, cuts
from orchestrator.planner.draws import new_stream
from orchestrator.planner.moves import Stream
from orchestrator.planner.objective import Found, Limits
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.starts import pinned, starting_groups
from orchestrator.planner.tables import (
    Counts,
    Floats,
    Ints,
    Rules,
    Scratch,
    State,
    Tables,
    make_rules,
    make_scratch,
    make_state,
    make_tables,
    most_stages,
    read_state,
    write_state,
)

# Parts of the evaluations: to compare starts, to anneal from many, and from the best again; descent gets the rest.
_STARTS_PART, _MANY_PART, _BEST_PART = 0.1, 0.55, 0.3
# How long one annealing is, over the square of the number of nodes, and how many there are at least and at most.
_EACH_OVER_SQUARE, _FEWEST, _MOST = 20, 2, 100
# Temperatures, as parts of the cost, of the first and of the later annealing.
_HOT, _WARM, _COLD = 0.02, 0.004, 1e-3
# How dear it is to break a limit: a search gets through what is not allowed, and out again.
_LENIENT, _STRICT = 3.0, 30.0


def default_evaluations(problem: Problem, limits: Limits) -> int:
    """Return a budget that takes some seconds at most: 0.4 s for 12 nodes, 2 s for 64, 3 s for 200.

    An evaluation takes longer where stages may have replicas.
    """
    nodes = problem.num_nodes
    if nodes > 64:
        return int(600_000 * (64 / nodes) ** 0.5)
    most = 600_000 if limits.max_replicas == 1 else 400_000
    return int(250_000 + (most - 250_000) * nodes / 64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Searcher:
    """What a search works on: the arrays, and the best placement so far with its score and step."""

    tables: Tables
    rules: Rules
    scratch: Scratch
    current: State
    trial: State
    best: State
    best_marks_2: Floats
    # Score and step of what was evaluated last.
    marks_2: Floats
    spares_N: Ints
    cursor: Counts
    # How many evaluations were used.
    used_1: Counts

    @classmethod
    def of(cls, problem: Problem, limits: Limits, most_replicas: int) -> Searcher:
        """Return one with room for so many replicas a stage."""
        return cls(
            tables=make_tables(problem),
            rules=make_rules(limits),
            scratch=make_scratch(problem, most_replicas),
            current=make_state(problem, most_replicas),
            trial=make_state(problem, most_replicas),
            best=make_state(problem, most_replicas),
            best_marks_2=np.full(2, np.inf),
            marks_2=np.full(2, np.inf),
            spares_N=np.zeros(problem.num_nodes, np.int32),
            cursor=np.zeros(CURSOR_SIZE, np.int64),
            used_1=np.zeros(1, np.int64),
        )

    @property
    def used(self) -> int:
        return int(self.used_1[0])

    @property
    def placement(self) -> Placement | None:
        """The best so far."""
        return read_state(self.best) if np.isfinite(self.best_marks_2[0]) else None

    @property
    def best_score(self) -> float:
        return float(self.best_marks_2[0])

    def offer(self, placement: Placement) -> float:
        """Evaluate a placement and return its energy; `marks_2` are its score and step then."""
        write_state(self.current, placement)
        return self._explore(new_stream(0, 0), 1, 0.0, _LENIENT)

    def cut(self, groups: tuple[tuple[int, ...], ...]) -> tuple[float, Placement]:
        """Return the best cuts found for these nodes in this order, with their energy."""
        num_layers, num_stages = self.tables.num_layers, len(groups)
        bounds = tuple(num_layers * stage // num_stages for stage in range(num_stages + 1))
        write_state(self.current, Placement(bounds=bounds, nodes=groups))
        rows = {tuple(row) for row in cuts(self.tables, self.current).tolist()}
        found = list[tuple[float, Placement]]()
        for row in sorted(rows):
            placement = Placement(bounds=(0, *accumulate(row)), nodes=groups)
            found.append((self.offer(placement), placement))
        return min(found, key=lambda pair: pair[0])

    def anneal(
        self,
        placement: Placement,
        stream: Stream,
        evaluations: int,
        hot: float,
        strictness: float,
        *,
        is_chain: bool = False,
    ) -> None:
        """Anneal a placement, from this temperature on; a chain stays one."""
        if evaluations > 0:
            write_state(self.current, placement)
            rules = self.rules._replace(max_replicas=1) if is_chain else self.rules
            self._explore(stream, evaluations, hot, strictness, rules)

    def descend(self, placement: Placement, evaluations: int) -> None:
        """Improve a placement by small changes until none helps."""
        if evaluations > 0:
            write_state(self.current, placement)
            self._explore(new_stream(0, 0), evaluations, 0.0, _STRICT)

    def _explore(
        self, stream: Stream, evaluations: int, hot: float, strictness: float, rules: Rules | None = None
    ) -> float:
        used, energy = explore(
            self.tables,
            rules or self.rules,
            self.current,
            self.trial,
            self.best,
            self.best_marks_2,
            self.marks_2,
            self.scratch,
            self.spares_N,
            self.cursor,
            stream,
            evaluations,
            hot,
            _COLD,
            strictness,
        )
        # Changes that come to nothing are counted as well.
        self.used_1[0] += evaluations if hot > 0.0 else used
        return float(energy)


def search(
    problem: Problem, limits: Limits, *, seed: int, evaluations: int | None = None, start: Placement | None = None
) -> Found:
    """Return the best placement found within so many evaluations; by default as many as take some seconds at most.

    Deterministic. Its score is `score`'s of its placement.
    """
    budget = default_evaluations(problem, limits) if evaluations is None else evaluations
    wide = max((len(nodes) for nodes in start.nodes), default=1) if start is not None else 1
    searcher = Searcher.of(problem, limits, max(limits.max_replicas, wide))
    starts = list[tuple[float, Placement]]()
    for placement in (start, even_placement(problem, limits)):
        if placement is not None and searcher.used < budget:
            starts.append((searcher.offer(placement), placement))
    for groups in starting_groups(problem, limits, seed):
        if searcher.used >= budget * _STARTS_PART or searcher.used + CUT_EVALUATIONS > budget:
            break
        starts.append(searcher.cut(groups))
    starts.sort(key=lambda pair: pair[0])
    left = budget - searcher.used
    rng = np.random.default_rng(seed)
    num_runs = int(left * _MANY_PART / (_EACH_OVER_SQUARE * problem.num_nodes**2))
    num_runs = min(max(num_runs, _FEWEST), _MOST)
    each = int(left * _MANY_PART / num_runs)
    if each < CUT_EVALUATIONS:
        num_runs = 0
    for index, placement in enumerate(_varied(problem, limits, searcher, starts, num_runs, rng)):
        # A chain stays one every other time: where replicas do not help, they only stand in the way.
        is_chain = index % 4 < 2 and limits.min_copies == 1 and all(len(nodes) == 1 for nodes in placement.nodes)
        searcher.anneal(placement, new_stream(seed, index), each, _HOT, _LENIENT, is_chain=is_chain)
        if searcher.used + CUT_EVALUATIONS + each > budget:
            break
    for index in range(2):
        found = searcher.placement or (starts[0][1] if starts else None)
        if found is not None:
            each = min(int(left * _BEST_PART / 2), budget - searcher.used)
            searcher.anneal(found, new_stream(seed, num_runs + index), each, _WARM, _STRICT)
    found = searcher.placement
    if found is not None and searcher.used < budget:
        searcher.descend(found, budget - searcher.used)
    return Found(placement=searcher.placement, score=searcher.best_score, evaluations=searcher.used)


def in_order(problem: Problem, limits: Limits, placement: Placement) -> Placement:
    """Return the best cuts found for the nodes of a placement in the fleet's own order."""
    groups = tuple(sorted(tuple(sorted(nodes)) for nodes in placement.nodes))
    _, ordered = Searcher.of(problem, limits, max(map(len, groups))).cut(groups)
    return ordered


def even_placement(problem: Problem, limits: Limits) -> Placement | None:
    """Return equal stages on the nodes in their order, one on each; None where there are too few of them."""
    num_stages = limits.num_stages or most_stages(problem)
    if num_stages > most_stages(problem):
        return None
    size, num_larger = divmod(problem.num_layers, num_stages)
    bounds = tuple(stage * size + min(stage, num_larger) for stage in range(num_stages + 1))
    return Placement(bounds=bounds, nodes=tuple((node,) for node in range(num_stages)))


def _varied(
    problem: Problem,
    limits: Limits,
    searcher: Searcher,
    starts: list[tuple[float, Placement]],
    most: int,
    rng: np.random.Generator,
) -> Iterator[Placement]:
    """Yield the best chains and the best starts of all, no two on the same nodes in the same stages.

    In fleets small enough for many searches, every other one starts from nodes at random.
    """
    different = list({placement.nodes: placement for _, placement in reversed(starts)}.values())[::-1]
    chains = [one for one in different if all(len(nodes) == 1 for nodes in one.nodes)]
    ranked = [one for pair in zip_longest(chains, different) for one in pair if one is not None]
    has_random = most > _FEWEST
    for index in range(most if ranked else 0):
        place = index // 2 if has_random else index
        if place < len(ranked) and not (has_random and index % 2 == 1):
            yield ranked[place]
            continue
        sizes = [len(nodes) for nodes in ranked[int(rng.integers(len(ranked)))].nodes]
        nodes = iter(rng.permutation(problem.num_nodes).tolist())
        groups = pinned(tuple(tuple(next(nodes) for _ in range(size)) for size in sizes), limits)
        yield searcher.cut(groups)[1]
