"""A rate that no placement of intervals exceeds, certified by prices.

PURE. In a placement of rate T the nodes that hold a layer pass T together, whichever layer it is. Let a node that
holds k layers have a price for each of them, such that nodes that pass T together cost 1 or more, however chosen. Then
all layers cost their number at least, and a node earns max_k k * price(k) at most: where the nodes' sum is less than
the number of layers, no placement has rate T or more. The prices are those of a linear program, whose rows are found
one by one as the cheapest nodes that pass T (Gilmore and Gomory 1961). Links are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numba import njit

from orchestrator.planner.flow import Floats, Ints
from orchestrator.planner.highs import QuietHighs
from orchestrator.planner.interval_problem import IntervalProblem
from orchestrator.planner.intervals import work_bound

# Rates are rounded up to parts of T: what covers at the true rates covers at the rounded ones.
_NUM_UNITS = 4096
# Rows of one program; where they do not do, the rate counts as not refused.
_MOST_ROWS = 1_000
_MARGIN = 1e-9


@dataclass(frozen=True, kw_only=True)
class _Items:
    """Nodes of one kind that hold so many layers, one item each; nodes with the same rates are of one kind."""

    kind_I: Ints
    num_layers_I: Ints
    rates_I: Floats
    num_nodes_C: Ints


def cover_bound(problem: IntervalProblem, *, tolerance: float = 1e-4) -> float:
    """Return the least rate found that prices refuse, within `tolerance` of the least there is; in the problem's unit.

    Never above `work_bound`, which holds where prices are in proportion to min(rate, T).
    """
    kinds_CK, num_nodes_C = np.unique(problem.rates_NK, axis=0, return_counts=True)
    kind_I, num_layers_I = np.nonzero(kinds_CK)
    items = _Items(
        kind_I=kind_I.astype(np.int32),
        num_layers_I=num_layers_I.astype(np.int32),
        rates_I=kinds_CK[kind_I, num_layers_I],
        num_nodes_C=num_nodes_C.astype(np.int32),
    )
    held, refused = 0.0, work_bound(problem)
    covers_RI: list[Ints] = []
    while refused - held > tolerance * refused:
        middle = (held + refused) / 2.0
        if _refuses(items, problem.num_layers, middle, covers_RI):
            refused = middle
        else:
            held = middle
    return refused


def _refuses(items: _Items, num_layers: int, rate: float, covers_RI: list[Ints]) -> bool:
    """Return whether prices show that no placement passes `rate`; covers found on the way are added."""
    # Rounding up keeps every true cover one.
    units_I = np.ceil(np.minimum(items.rates_I, rate) / rate * _NUM_UNITS).astype(np.int32)
    num_items, num_kinds = len(units_I), len(items.num_nodes_C)
    program = QuietHighs()
    # Columns: each item's price, then what a node of each kind earns.
    for _ in range(num_items):
        program.addCol(0.0, 0.0, 1.0, 0, np.empty(0, np.int32), np.empty(0))
    for count in items.num_nodes_C:
        program.addCol(float(count), 0.0, highspy.kHighsInf, 0, np.empty(0, np.int32), np.empty(0))
    for item in range(num_items):
        columns = np.array([item, num_items + items.kind_I[item]], np.int32)
        program.addRow(0.0, highspy.kHighsInf, 2, columns, np.array([-float(items.num_layers_I[item]), 1.0]))
    for cover_I in covers_RI:
        if int(cover_I @ units_I) >= _NUM_UNITS:
            _add_cover(program, cover_I)
    for _ in range(_MOST_ROWS):
        program.run()
        if program.getInfo().objective_function_value >= num_layers * (1.0 - _MARGIN):
            return False
        prices_I = np.clip(np.array(program.getSolution().col_value[:num_items]), 0.0, None)
        cost, cover_I = _cheapest_cover(units_I, prices_I, _NUM_UNITS)
        if cost > 0.0:
            earned_C = np.zeros(num_kinds)
            np.maximum.at(earned_C, items.kind_I, prices_I * items.num_layers_I / cost)
            if float(earned_C @ items.num_nodes_C) < num_layers * (1.0 - _MARGIN):
                return True
        if cost >= 1.0 - _MARGIN:
            return False
        covers_RI.append(cover_I)
        _add_cover(program, cover_I)
    return False


def _add_cover(program: QuietHighs, cover_I: Ints) -> None:
    columns = np.flatnonzero(cover_I).astype(np.int32)
    program.addRow(1.0, highspy.kHighsInf, len(columns), columns, cover_I[columns].astype(np.float64))


@njit(cache=True)
def _cheapest_cover(units_I: Ints, prices_I: Floats, num_units: int) -> tuple[float, Ints]:
    """Return the least price of items, each as often as wished, whose units are `num_units` or more; and how often."""
    price_U = np.empty(num_units + 1, np.float64)
    item_U = np.empty(num_units + 1, np.int32)
    price_U[0] = 0.0
    for units in range(1, num_units + 1):
        price_U[units] = np.inf
        for item in range(len(units_I)):
            price = prices_I[item] + price_U[max(0, units - units_I[item])]
            if price < price_U[units]:
                price_U[units], item_U[units] = price, item
    cover_I = np.empty(len(units_I), np.int32)
    for item in range(len(units_I)):
        cover_I[item] = 0
    units = num_units
    while units > 0:
        cover_I[item_U[units]] += 1
        units -= units_I[item_U[units]]
    return price_U[num_units], cover_I
