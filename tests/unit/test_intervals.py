"""Placements of overlapping intervals: known ones, every one of small problems, and what is refused."""

from itertools import product

import numpy as np
import pytest

from orchestrator.planner.interval_bound import cover_bound
from orchestrator.planner.interval_problem import IntervalProblem
from orchestrator.planner.intervals import interval_problem, placement_rate, search_intervals, work_bound

AMPLE = 1e6


def wired(num_layers: int, rates: list[list[float]], capacity: float = AMPLE) -> IntervalProblem:
    """Every node has links with every other, with the source and with the sink."""
    longest = max(len(row) for row in rates)
    rates_NK = np.array([[0.0, *row, *[0.0] * (longest - len(row))] for row in rates])
    return interval_problem(num_layers, rates_NK, np.full((len(rates) + 2, len(rates) + 2), capacity))


def drawn(seed: int) -> IntervalProblem:
    """Three nodes and four layers; rates that fall with the layers held, mostly; some links thin, some missing."""
    random = np.random.default_rng(seed)
    rates_NK = np.zeros((3, 5))
    for node in range(3):
        longest = random.integers(1, 5)
        rates_NK[node, 1 : 1 + longest] = random.uniform(5.0, 20.0) / np.arange(1, 1 + longest)
        rates_NK[node, 1 : 1 + longest] *= random.uniform(0.8, 1.2, longest)
    links_PP = random.choice([0.0, 2.0, 5.0, AMPLE], p=[0.15, 0.15, 0.15, 0.55], size=(5, 5))
    return interval_problem(4, rates_NK, links_PP)


def best_of_all(problem: IntervalProblem) -> float:
    """The rate of the best of all placements."""
    choices = [
        [
            (start, start + length)
            for length in range(1, longest + 1)
            for start in range(problem.num_layers - length + 1)
        ]
        for longest in problem.longest_N.tolist()
    ]
    return max(
        placement_rate(problem, tuple(s for s, _ in chosen), tuple(e for _, e in chosen))
        for chosen in product(*choices)
    )


def test_a_chain_is_as_fast_as_its_slowest_node() -> None:
    assert placement_rate(wired(4, [[9.0, 7.0], [9.0, 5.0]]), (0, 2), (2, 4)) == 5.0


def test_nodes_of_one_interval_share_the_frames() -> None:
    assert placement_rate(wired(2, [[9.0, 3.0], [9.0, 4.0]]), (0, 0), (2, 2)) == 7.0


def test_intervals_overlap_where_each_end_has_a_start() -> None:
    # The first goes on in the second and third, which hold together what the fourth holds alone.
    problem = wired(3, [[6.0, 6.0, 6.0], [2.0, 2.0], [2.0, 2.0], [3.0, 3.0]])
    assert placement_rate(problem, (0, 1, 2, 1), (1, 2, 3, 3)) == 5.0


def test_nothing_passes_where_no_node_goes_on() -> None:
    assert placement_rate(wired(4, [[9.0, 9.0], [9.0]]), (0, 3), (2, 4)) == 0.0


def test_links_bind() -> None:
    assert placement_rate(wired(2, [[9.0], [9.0]], capacity=1.5), (0, 1), (1, 2)) == 1.5


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_best_of_all_placements(seed: int) -> None:
    problem = drawn(seed)
    best = best_of_all(problem)
    found = search_intervals(problem, seed=seed, max_evaluations=20_000)
    assert found.rate == pytest.approx(best)
    assert placement_rate(problem, found.starts, found.stops) == found.rate


@pytest.mark.parametrize("seed", range(20))
def test_no_placement_exceeds_the_bounds(seed: int) -> None:
    problem = drawn(seed)
    best = best_of_all(problem)
    assert best <= cover_bound(problem) * (1.0 + 1e-9)
    assert cover_bound(problem) <= work_bound(problem)


def test_prices_prove_the_best_where_work_does_not() -> None:
    # Two of three equal nodes hold one layer each, or a node both: work alone would let them pass half as much again.
    problem = wired(2, [[2.0], [2.0], [2.0]])
    assert work_bound(problem) == pytest.approx(3.0)
    assert cover_bound(problem) == pytest.approx(2.0, rel=1e-3)
    assert search_intervals(problem, seed=0, max_evaluations=1_000).rate == 2.0


def test_the_same_seed_finds_the_same_placement() -> None:
    problem = wired(8, [[8.0 / k for k in range(1, 5)] for _ in range(6)], capacity=3.0)
    assert search_intervals(problem, seed=3, max_evaluations=5_000) == search_intervals(
        problem, seed=3, max_evaluations=5_000
    )


def test_the_search_ends_at_its_bound_or_its_evaluations() -> None:
    alone = search_intervals(wired(2, [[2.0, 1.0]]), seed=0, max_evaluations=1_000)
    assert (alone.rate, alone.num_evaluations < 1_000) == (1.0, True)
    short = search_intervals(wired(3, [[2.0, 1.0], [1.0]], capacity=0.0), seed=0, max_evaluations=1_000)
    assert (short.rate, short.num_evaluations) == (0.0, 1_000)
    with pytest.raises(ValueError, match="at least one evaluation"):
        search_intervals(wired(2, [[2.0, 1.0]]), seed=0, max_evaluations=0)


def test_too_few_layers_pass_nothing() -> None:
    problem = wired(3, [[2.0, 1.0]])
    assert (work_bound(problem), cover_bound(problem)) == (0.0, 0.0)
    found = search_intervals(problem, seed=0, max_evaluations=1_000)
    assert (found.rate, found.num_evaluations) == (0.0, 0)
    assert placement_rate(problem, found.starts, found.stops) == 0.0


@pytest.mark.parametrize(
    ("rates", "capacity", "words"),
    [
        ([[1.0], [0.0]], 1.0, "node 1 passes nothing"),
        ([[np.nan]], 1.0, "not negative"),
        ([[-1.0]], 1.0, "not negative"),
        ([[1.0]], -1.0, "not negative"),
    ],
)
def test_a_problem_that_cannot_be_is_refused(rates: list[list[float]], capacity: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wired(2, rates, capacity)


def test_links_are_of_these_nodes() -> None:
    with pytest.raises(ValueError, match="links by node"):
        interval_problem(2, np.ones((2, 3)), np.ones((3, 3)))


@pytest.mark.parametrize(
    ("starts", "stops", "words"),
    [
        ((0,), (1, 2), "one interval"),
        ((0, 2), (1, 2), "ends after it starts"),
        ((-1, 1), (1, 2), "ends after it starts"),
        ((0, 1), (1, 4), "within the layers"),
        ((0, 0), (2, 2), "no more layers"),
    ],
)
def test_an_interval_that_cannot_be_held_is_refused(
    starts: tuple[int, ...], stops: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        placement_rate(wired(3, [[1.0, 1.0], [1.0]]), starts, stops)
