"""A step as its actions play, beside the closed form that searches use."""

from dataclasses import replace

import numpy as np
import pytest

from actors.settings import WireConfig
from orchestrator.planner.binding import Binding, what_binds
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.objective import Limits
from orchestrator.planner.played import played_step_s, polished
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.search import search
from orchestrator.simulator.step import simulate_step
from tests.planner_problems import random_problem, uniform_problem

FOUR = Placement(bounds=(0, 1, 2, 3, 4), nodes=((0,), (1,), (2,), (3,)))


def random_chain(rng: np.random.Generator, problem: Problem) -> Placement:
    """All of the nodes in any order, cut anywhere."""
    cuts = sorted(rng.choice(np.arange(1, problem.num_layers), problem.num_nodes - 1, replace=False).tolist())
    nodes = tuple((int(node),) for node in rng.permutation(problem.num_nodes))
    return Placement(bounds=(0, *cuts, problem.num_layers), nodes=nodes)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"])
def test_near_nodes_play_as_the_closed_form_says(schedule) -> None:
    problem = replace(uniform_problem(num_nodes=4, num_layers=4, num_microbatches=16), schedule=schedule)
    found = evaluate(problem, FOUR)
    # Halves of a backward that fill waits only make it shorter.
    assert played_step_s(problem, FOUR, found) == pytest.approx(found.step_s, rel=0.1)


def test_a_long_link_in_the_middle_holds_1f1b_up_and_the_closed_form_knows() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=4, num_microbatches=64)
    delay_s = np.zeros((4, 4))
    delay_s[[1, 2], [2, 1]] = 10.0
    far = replace(problem, delay_s_PP=delay_s)
    found = evaluate(far, FOUR)
    # Two microbatches a round trip between stages 1 and 2: 3 s each, and 20 s of delay.
    pace_s = (3 + 3 + 20) / 2
    assert found.rate == pytest.approx(1 / pace_s)
    assert what_binds(far, FOUR, found) == Binding(
        kind="round trip", stage=1, last=2, count=2, seconds=26.0, nodes=(1,)
    )
    assert found.step_s == pytest.approx(64 * pace_s, rel=0.05)
    assert played_step_s(far, FOUR, found) == pytest.approx(64 * pace_s, rel=0.05)
    # A window that the delay is reckoned into has no such stretch.
    free = replace(far, schedule="bdp")
    own = evaluate(free, FOUR)
    assert played_step_s(free, FOUR, own) == pytest.approx(own.step_s, rel=0.05)


def test_replicas_and_shared_ways_keep_the_closed_form() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=4, num_microbatches=16, frame_bytes=10.0)
    pair = Placement(bounds=(0, 2, 4), nodes=((0, 1), (2, 3)))
    assert played_step_s(problem, pair, evaluate(problem, pair)) == evaluate(problem, pair).step_s
    narrow = replace(problem, uplink_byte_s_N=np.full(4, 1.0))
    found = evaluate(narrow, FOUR)
    # Frames of both ways share a middle stage's uplink: 20 s a microbatch, which single links do not show.
    assert found.pace_s == pytest.approx(20.0)
    assert played_step_s(narrow, FOUR, found) >= found.step_s


def test_the_closed_form_of_uneven_chains_under_1f1b_is_near_what_plays() -> None:
    over = []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        num_nodes = int(rng.integers(3, 9))
        problem = random_problem(
            seed, num_nodes=num_nodes, num_layers=12, num_microbatches=int(rng.integers(num_nodes, 64))
        )
        free = np.zeros(num_nodes)
        problem = replace(
            problem,
            uplink_byte_s_N=free,
            downlink_byte_s_N=free,
            delay_s_PP=problem.delay_s_PP * rng.choice([0.1, 1, 3]),
        )
        chain = random_chain(rng, problem)
        found = evaluate(problem, chain)
        over.append(played_step_s(problem, chain, found) / found.step_s)
    assert np.median(over) == pytest.approx(1.0, abs=0.02)
    # What is too much comes of the warm-up, whose forwards are counted twice.
    assert min(over) > 0.8
    assert max(over) < 1.1


def test_polishing_takes_the_last_percents_that_the_closed_form_does_not_see() -> None:
    gains = []
    for seed in range(12):
        problem = random_problem(seed, num_nodes=5, num_layers=10, num_microbatches=6)
        free = np.zeros(5)
        problem = replace(problem, memory_bytes_N=np.full(5, 1e12), uplink_byte_s_N=free, downlink_byte_s_N=free)
        limits = Limits(num_stages=5)
        found = search(problem, limits, seed=0, evaluations=5000).placement
        assert found is not None
        better = polished(problem, limits, found)
        assert sorted(better.used) == sorted(found.used)
        before, after = (played_step_s(problem, one, evaluate(problem, one)) for one in (found, better))
        assert after <= before * (1 + 1e-9)
        assert polished(problem, limits, better) == better
        gains.append(before / after - 1)
    assert max(gains) > 0.01


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"])
@pytest.mark.parametrize("shared", [False, True])
def test_narrow_ways_out_and_shared_ones_take_what_the_simulator_says(schedule, shared: bool) -> None:
    wire = WireConfig(max_window_bytes=1 << 40, window_s=1e6)
    over = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        num_nodes = int(rng.integers(2, 8))
        problem = random_problem(
            seed,
            num_nodes=num_nodes,
            num_layers=12,
            num_microbatches=int(rng.choice([8, 16, 48])),
            schedule=schedule,
            shared=shared,
        )
        problem = replace(problem, memory_bytes_N=problem.memory_bytes_N * 100)
        chain = random_chain(rng, problem)
        found = evaluate(problem, chain)
        simulated_s = simulate_step(problem, chain, wire).step_s
        over.append(simulated_s / (played_step_s(problem, chain, found) - found.commit_s))
    assert np.median(over) == pytest.approx(1.0, abs=0.02)
    assert min(over) > 0.8
    assert max(over) < 1.25
