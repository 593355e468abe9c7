"""How fast any placement can be at most, proved, and what keeps it there.

PURE. Two relaxations, and the lower of the two: the linear programme of flows (orchestrator.planner.flow_lp), for
placements of any kind; and for chains of single nodes a count of whole layers (orchestrator.planner.chains). Solved by
HiGHS (Huangfu and Hall 2018) with the dual simplex method, which after a small change starts from where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from orchestrator.planner.chains import chain_rate
from orchestrator.planner.classes import Phase, phases
from orchestrator.planner.flow_lp import FlowProgram, flow_program
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Floats, Problem

# What binds less than this is not told.
_LEAST_SHARE = 1e-4
# A proof is in floating point: what its sums may be off by, as a part of the bound.
_PROOF_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Binding:
    """Something of which one percent more would raise the bound by `share` percent."""

    # compute, memory, uplink, downlink, peers (links of single nodes), link (between places), budget, nodes (how many
    # may be used), coverage (a place cannot hold all layers) or layers (whole ones, in a chain).
    kind: str
    # The place of the nodes, or the link's two; empty where it is of the whole fleet.
    places: tuple[int, ...]
    num_nodes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Bound:
    """No placement has a rate above `rate`, in microbatches a second; `binds` from most to least."""

    rate: float
    binds: tuple[Binding, ...]


def throughput_bound(problem: Problem, limits: Limits) -> Bound:
    """Return a certified bound on `evaluate(problem, placement).rate` over all placements that `limits` allow.

    It takes memory, links, shares, budget and replicas into account, and no pins, copies or step time.
    """
    return StandingBound(limits).of(problem)


class StandingBound:
    """A bound kept for a fleet that changes: after a join or a leave it goes on from the last solution."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._solvers: dict[Phase, _Solver] = {}

    def of(self, problem: Problem) -> Bound:
        """Return what `throughput_bound` returns."""
        rates: list[float] = []
        found: list[Binding] = []
        for phase in phases(problem):
            program = flow_program(problem, self._limits, phase)
            if program is None:
                return Bound(rate=0.0, binds=())
            rate, binds = self._solvers.setdefault(phase, _Solver()).solve(program)
            rates.append(rate)
            found += binds
        rate = 1 / sum(1 / rate for rate in rates) if min(rates) > 0 else 0.0
        if self._limits.max_replicas == 1:
            whole = chain_rate(problem, self._limits)
            if whole < rate:
                rate, found = whole, [Binding(kind="layers", places=(), num_nodes=problem.num_nodes, share=1.0)]
        parts = len(rates)
        merged: dict[tuple[str, tuple[int, ...]], tuple[int, float]] = {}
        for bind in found:
            nodes, share = merged.get((bind.kind, bind.places), (0, 0.0))
            merged[bind.kind, bind.places] = nodes + bind.num_nodes, share + bind.share / parts
        binds = [Binding(kind=k, places=p, num_nodes=n, share=s) for (k, p), (n, s) in merged.items()]
        binds.sort(key=lambda bind: (-bind.share, bind.kind, bind.places))
        return Bound(rate=rate, binds=tuple(bind for bind in binds if bind.share > _LEAST_SHARE))


class _QuietHighs(highspy.Highs):
    """HiGHS prints its name when callbacks are switched on, which nothing here needs."""

    def enableCallbacks(self) -> None:
        pass


class _Solver:
    """One programme in HiGHS, changed in place as long as only its numbers differ."""

    def __init__(self) -> None:
        # Typed as Any: what the wheel says of its types is not enough.
        self._highs: Any = _QuietHighs()
        self._highs.silent()
        self._highs.setOptionValue("threads", 1)
        self._highs.setOptionValue("solver", "simplex")
        self._last: FlowProgram | None = None

    def solve(self, program: FlowProgram) -> tuple[float, list[Binding]]:
        last = self._last
        if last is None or last.key != program.key or not np.array_equal(last.columns_E, program.columns_E):
            self._pass(program)
        else:
            self._change(last, program)
        self._last = program
        self._highs.run()
        solution = self._highs.getSolution()
        multiplier_R = np.array(solution.row_dual, np.float64)
        if len(multiplier_R) != len(program.kind_R):
            # No solution: multipliers of nothing still prove the columns' own bound.
            multiplier_R = np.zeros(len(program.kind_R))
        return _proof(program, multiplier_R, np.array(solution.col_value, np.float64))

    def _pass(self, program: FlowProgram) -> None:
        lp = highspy.HighsLp()
        num_columns, num_rows = len(program.most_J), len(program.kind_R)
        lp.num_col_, lp.num_row_ = num_columns, num_rows
        cost = np.zeros(num_columns)
        cost[0] = -1.0
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(num_columns), program.most_J
        lp.row_lower_, lp.row_upper_ = program.lower_R, program.upper_R
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.num_col_, lp.a_matrix_.num_row_ = num_columns, num_rows
        lp.a_matrix_.start_ = program.start_R.astype(np.int32)
        lp.a_matrix_.index_ = program.columns_E.astype(np.int32)
        lp.a_matrix_.value_ = program.values_E
        status = self._highs.passModel(lp)
        assert status == highspy.HighsStatus.kOk, "a programme that the solver refuses"

    def _change(self, last: FlowProgram, program: FlowProgram) -> None:
        rows = np.flatnonzero((last.lower_R != program.lower_R) | (last.upper_R != program.upper_R))
        for row in rows.tolist():
            self._highs.changeRowBounds(row, float(program.lower_R[row]), float(program.upper_R[row]))
        for column in np.flatnonzero(last.most_J != program.most_J).tolist():
            self._highs.changeColBounds(column, 0.0, float(program.most_J[column]))
        entries = np.flatnonzero(last.values_E != program.values_E)
        of_row = np.searchsorted(program.start_R, entries, side="right") - 1
        for entry, row in zip(entries.tolist(), of_row.tolist(), strict=True):
            self._highs.changeCoeff(row, int(program.columns_E[entry]), float(program.values_E[entry]))


def _proof(program: FlowProgram, multiplier_R: Floats, value_J: Floats) -> tuple[float, list[Binding]]:
    """Return the rate that these multipliers prove, and what holds it."""
    # A multiplier of a side that has no limit proves nothing.
    multiplier_R = np.where(np.isfinite(multiplier_R), multiplier_R, 0.0)
    multiplier_R = np.where((multiplier_R > 0) & ~np.isfinite(program.lower_R), 0.0, multiplier_R)
    multiplier_R = np.where((multiplier_R < 0) & ~np.isfinite(program.upper_R), 0.0, multiplier_R)
    weight_E = np.repeat(multiplier_R, np.diff(program.start_R)) * program.values_E
    num_columns = len(program.most_J)
    left_J = -np.bincount(program.columns_E, weights=weight_E, minlength=num_columns)
    left_J[0] -= 1.0
    rows = np.where(multiplier_R > 0, program.lower_R, program.upper_R)
    value_R = np.where(multiplier_R != 0, multiplier_R * np.where(multiplier_R != 0, rows, 0.0), 0.0)
    value_of_J = np.where(left_J < 0, left_J * program.most_J, 0.0)
    rate = -float(value_R.sum() + value_of_J.sum())
    if rate <= 0:
        return 0.0, []
    binds: list[Binding] = []
    # Rows without a right-hand side bind by their coefficients: by what they hold back.
    activity_E = weight_E * value_J[program.columns_E] * (program.values_E > 0) if len(value_J) == num_columns else None
    held_R = (
        np.zeros(len(multiplier_R))
        if activity_E is None
        else np.bincount(
            np.repeat(np.arange(len(multiplier_R)), np.diff(program.start_R)), activity_E, len(multiplier_R)
        )
    )
    for row in np.flatnonzero(multiplier_R).tolist():
        kind = program.kind_R[row]
        if kind in ("cover", "visit", "place"):
            continue
        share = -float(held_R[row] if kind in ("memory", "coverage") else value_R[row]) / rate
        if share > _LEAST_SHARE:
            binds.append(Binding(kind=kind, places=program.places_R[row], num_nodes=program.nodes_R[row], share=share))
    for number, places in enumerate(program.links):
        share = -float(value_of_J[program.first_link + number]) / rate
        if share > _LEAST_SHARE:
            binds.append(Binding(kind="peers", places=places, num_nodes=0, share=share))
    return rate * program.rate_scale * (1 + _PROOF_ROUNDING), binds
