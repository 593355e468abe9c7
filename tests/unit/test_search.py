"""The search: what it keeps to, and what it is never worse than."""

import math
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planner.objective import Limits, is_allowed, score
from orchestrator.planner.problem import Placement
from orchestrator.planner.search import even_placement, search
from tests.planner_problems import random_problem, uniform_problem


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"])
def test_the_same_inputs_and_seed_give_the_same_plan_within_the_budget(schedule) -> None:
    problem = random_problem(3, num_nodes=9, num_layers=12, num_microbatches=16, schedule=schedule)
    limits = Limits(max_replicas=2)
    found = search(problem, limits, seed=4, evaluations=4000)
    assert found == search(problem, limits, seed=4, evaluations=4000)
    assert found.evaluations <= 4000
    assert found.placement is not None
    assert found.score == pytest.approx(score(problem, limits, found.placement), rel=1e-9)
    assert found.score < score(problem, limits, even_placement(problem, limits))


@pytest.mark.parametrize("evaluations", [1, 2, 7, 50])
def test_it_is_never_worse_than_its_start_whatever_the_budget(evaluations: int) -> None:
    problem = random_problem(5, num_nodes=6, num_layers=8, num_microbatches=8)
    start = search(problem, Limits(), seed=0, evaluations=3000).placement
    again = search(problem, Limits(), seed=1, evaluations=evaluations, start=start)
    assert again.score <= score(problem, Limits(), start)
    assert again.evaluations <= evaluations


def test_equal_stages_on_equal_nodes() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=8, num_microbatches=64)
    found = search(problem, Limits(), seed=0, evaluations=2000)
    assert found.placement is not None
    assert found.placement.bounds == (0, 2, 4, 6, 8)


def test_pins_orders_copies_and_domains_are_kept_to() -> None:
    problem = random_problem(8, num_nodes=10, num_layers=12, num_microbatches=16)
    problem = replace(problem, domain_N=np.arange(10, dtype=np.int32) % 3)
    limits = Limits(
        num_stages=3, max_replicas=3, min_copies=2, min_domains=2, pins=((0, 0), (4, -1)), after=((1, 2), (3, 5))
    )
    found = search(problem, limits, seed=0, evaluations=20_000)
    assert found.placement is not None
    assert is_allowed(problem, limits, found.placement)


def test_money_is_an_aim_and_a_limit() -> None:
    problem = random_problem(9, num_nodes=8, num_layers=12, num_microbatches=32)
    fastest = search(problem, Limits(), seed=0, evaluations=10_000)
    assert fastest.placement is not None
    spent = sum(problem.price_N[list(fastest.placement.used)])
    poor = Limits(max_dollars_per_hour=spent / 2)
    found = search(problem, poor, seed=0, evaluations=10_000)
    assert found.placement is not None
    assert sum(problem.price_N[list(found.placement.used)]) <= spent / 2
    assert found.score >= fastest.score
    patient = Limits(objective="cheapest", max_step_s=fastest.score * 2)
    cheap = search(problem, patient, seed=0, evaluations=10_000)
    assert cheap.placement is not None
    assert cheap.score < spent
    dollars = search(problem, Limits(objective="dollars"), seed=0, evaluations=10_000)
    assert dollars.score <= spent / 3600 * fastest.score


def test_where_nothing_fits_or_is_allowed_nothing_is_found() -> None:
    problem = uniform_problem(num_nodes=3, num_layers=6, num_microbatches=4)
    tiny = replace(problem, memory_bytes_N=np.full(3, 3.0))
    for these, limits in (
        (tiny, Limits()),
        (problem, Limits(num_stages=4)),
        (problem, Limits(min_copies=2)),
        (problem, Limits(max_dollars_per_hour=0.5)),
        (problem, Limits(num_stages=2, pins=((0, 0), (1, 2)))),
    ):
        found = search(these, limits, seed=0, evaluations=2000)
        assert found.placement is None
        assert found.score == math.inf


def test_a_start_that_is_wider_than_allowed_is_no_trouble() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=4, num_microbatches=8)
    wide = Placement(bounds=(0, 2, 4), nodes=((0, 1), (2, 3)))
    found = search(problem, Limits(max_replicas=1), seed=0, evaluations=2000, start=wide)
    assert found.placement is not None
    assert all(len(nodes) == 1 for nodes in found.placement.nodes)
