"""What holds of every placement problem: bounds are bounds, and more to work with is never worse."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planner.flow import Floats
from orchestrator.planner.interval_bound import cover_bound
from orchestrator.planner.interval_problem import IntervalProblem
from orchestrator.planner.intervals import interval_problem, placement_rate, search_intervals, work_bound

# Machines that run tests are slow at times.
relaxed = settings(max_examples=60, deadline=None)
# Each bound solves a hundred linear programs.
few = settings(max_examples=15, deadline=None)
TOLERANCE = 0.02
# Of rates, for sums in another order.
ROUNDING = 1e-9


@st.composite
def problems(draw: st.DrawFn) -> IntervalProblem:
    num_layers, num_nodes = draw(st.integers(1, 10)), draw(st.integers(1, 6))
    rates_NK = np.zeros((num_nodes, num_layers + 1))
    rate = st.one_of(st.integers(1, 4).map(float), st.floats(1e-2, 1e4))
    for node in range(num_nodes):
        rates = draw(st.lists(rate, min_size=1, max_size=num_layers))
        rates_NK[node, 1 : 1 + len(rates)] = rates
    capacity = st.one_of(st.just(0.0), st.just(np.inf), st.floats(1e-2, 1e4))
    capacities = draw(st.lists(capacity, min_size=(num_nodes + 2) ** 2, max_size=(num_nodes + 2) ** 2))
    return interval_problem(num_layers, rates_NK, np.array(capacities).reshape(num_nodes + 2, num_nodes + 2))


@few
@given(problems(), st.integers(0, 2**64))
def test_a_found_placement_can_be_held_has_its_rate_and_keeps_to_the_bounds(
    problem: IntervalProblem, seed: int
) -> None:
    found = search_intervals(problem, seed=seed, max_evaluations=500)
    assert placement_rate(problem, found.starts, found.stops) == found.rate
    bound = cover_bound(problem, tolerance=TOLERANCE)
    assert found.rate <= bound * (1.0 + ROUNDING)
    assert bound <= work_bound(problem)
    assert found.num_evaluations <= 500


def more(problem: IntervalProblem, rates_NK: Floats, links_PP: Floats) -> IntervalProblem:
    return interval_problem(problem.num_layers, rates_NK, links_PP)


@few
@given(problems(), st.integers(0, 5), st.integers(1, 10), st.floats(0.0, 1e4))
def test_a_faster_node_never_slows_a_placement_or_lowers_a_bound(
    problem: IntervalProblem, node: int, length: int, gain: float
) -> None:
    node %= len(problem.longest_N)
    rates_NK = problem.rates_NK.copy()
    rates_NK[node, min(length, problem.num_layers)] += gain
    faster = more(problem, rates_NK, problem.links_PP)
    found = search_intervals(problem, seed=0, max_evaluations=200)
    assert placement_rate(faster, found.starts, found.stops) >= found.rate * (1.0 - ROUNDING)
    assert work_bound(faster) >= work_bound(problem) * (1.0 - ROUNDING)
    before, after = (cover_bound(each, tolerance=TOLERANCE) for each in (problem, faster))
    assert after >= before * (1.0 - 2.0 * TOLERANCE)


@relaxed
@given(problems(), st.integers(0, 7), st.integers(0, 7), st.floats(0.0, 1e4))
def test_a_wider_link_never_slows_a_placement(problem: IntervalProblem, tail: int, head: int, gain: float) -> None:
    links_PP = problem.links_PP.copy()
    links_PP[tail % len(links_PP), head % len(links_PP)] += gain
    found = search_intervals(problem, seed=0, max_evaluations=200)
    wider = more(problem, problem.rates_NK, links_PP)
    assert placement_rate(wider, found.starts, found.stops) >= found.rate * (1.0 - ROUNDING)
