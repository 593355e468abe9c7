"""The optima that the search is measured against: two ways to find them agree, and no placement beats them."""

from dataclasses import replace

import numpy as np
import pytest

from bench.planner_best_chain import best_chain
from bench.planner_optimum import best_of_all
from bench.planner_small import MEMORY_OVER_MODEL, draw_problem
from orchestrator.planner.objective import Limits, score
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.tables import SCHEDULES
from tests.planner_problems import uniform_problem


def small_problem(seed: int) -> Problem:
    """Return five or six nodes of those that the bench draws."""
    for attempt in range(100):
        problem = draw_problem(
            np.random.default_rng((seed, attempt)), is_chain=False, memory=tuple(MEMORY_OVER_MODEL)[seed % 3]
        )
        if problem.num_nodes >= 5 and problem.num_places == problem.num_nodes and problem.num_layers <= 7:
            return replace(problem, schedule=SCHEDULES[seed % 4])
    raise AssertionError("no small problem was drawn")


@pytest.mark.parametrize("seed", range(24))
def test_subsets_and_full_enumeration_find_the_same_best_chain(seed: int) -> None:
    problem = small_problem(seed)
    subsets, all_of_them = best_chain(problem), best_of_all(problem, Limits())
    assert subsets.score == pytest.approx(all_of_them.score, rel=1e-12)
    for found in (subsets, all_of_them):
        if found.placement is not None:
            assert score(problem, Limits(), found.placement) == pytest.approx(found.score, rel=1e-12)


def test_the_best_of_all_is_the_least_of_those_listed_by_hand() -> None:
    problem = uniform_problem(num_nodes=2, num_layers=2, num_microbatches=4, delay_s=0.5, sync_bytes=1.0, byte_s=0.1)
    problem = replace(problem, layer_forward_s_N=np.array([1.0, 2.0]))
    groups = [((0,),), ((1,),), ((0, 1),), ((1, 0),), ((0,), (1,)), ((1,), (0,))]
    listed = [Placement(bounds=(0, 2) if len(nodes) == 1 else (0, 1, 2), nodes=nodes) for nodes in groups]
    limits = Limits(max_replicas=2)
    found = best_of_all(problem, limits)
    assert found.score == min(score(problem, limits, one) for one in listed)
    assert found.evaluations == len(listed)


def test_a_bound_does_not_change_the_best_chain() -> None:
    problem = small_problem(1)
    best = best_chain(problem)
    assert best_chain(problem, below=best.score * (1 + 1e-9)).placement == best.placement
    assert best_chain(problem, below=best.score * (1 - 1e-9)).placement is None
