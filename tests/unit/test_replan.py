"""Replanning: healing, staying and moving, and what it says about it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planner.heal import renumbered
from orchestrator.planner.migration import StateSizes, expected_life_s, migration
from orchestrator.planner.objective import Limits, score
from orchestrator.planner.problem import Placement
from orchestrator.planner.replan import replan
from orchestrator.planner.search import search
from tests.planner_problems import random_problem, uniform_problem

SIZES = StateSizes(layer_bytes=1e9, first_bytes=1e8, last_bytes=1e8, store_byte_s=1e-7)
LONG_S = 1e9


def test_lost_nodes_leave_gaps_in_the_new_indices() -> None:
    old = Placement(bounds=(0, 2, 4, 6), nodes=((3, 1), (2,), (0,)))
    assert renumbered(old, {0: 0, 1: 1, 3: 2}).nodes == ((2, 1), (), (0,))


def test_a_spare_takes_the_place_of_a_node_that_is_lost() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=8, num_microbatches=64)
    damaged = Placement(bounds=(0, 2, 4, 6, 8), nodes=((0,), (), (1,), (2,)))
    found = replan(problem, damaged, Limits(), state_sizes=SIZES, horizon_s=LONG_S, seed=0)
    assert found.stay == Placement(bounds=(0, 2, 4, 6, 8), nodes=((0,), (3,), (1,), (2,)))
    assert found.placement == found.stay
    # Nobody holds its two layers any more.
    (fetch,) = found.migration.fetches
    assert (fetch.node, fetch.source, fetch.start, fetch.stop) == (3, None, 2, 4)
    assert found.migration.transfer_s == pytest.approx(2e9 * 1e-7)


def test_without_a_spare_the_neighbours_take_the_layers() -> None:
    problem = uniform_problem(num_nodes=2, num_layers=6, num_microbatches=8)
    damaged = Placement(bounds=(0, 2, 4, 6), nodes=((0,), (), (1,)))
    found = replan(problem, damaged, Limits(), state_sizes=SIZES, horizon_s=LONG_S, seed=0)
    assert found.stay == Placement(bounds=(0, 3, 6), nodes=((0,), (1,)))
    for nodes, healed in ((((), (0,), (1,)), ((0,), (1,))), (((0,), (1,), ()), ((0,), (1,)))):
        found = replan(
            problem,
            Placement(bounds=(0, 2, 4, 6), nodes=nodes),
            Limits(),
            state_sizes=SIZES,
            horizon_s=1.0,
            seed=0,
        )
        assert found.stay is not None
        assert found.stay.nodes == healed
        assert sorted(np.diff(found.stay.bounds).tolist()) == [2, 4]


def test_what_is_gained_must_pay_for_what_is_moved() -> None:
    problem = random_problem(2, num_nodes=8, num_layers=12, num_microbatches=32)
    problem = replace(problem, uplink_byte_s_N=np.zeros(8), downlink_byte_s_N=np.zeros(8))
    fast = replace(problem, layer_forward_s_N=problem.layer_forward_s_N * np.where(np.arange(8) == 7, 0.3, 1.0))
    incumbent = search(
        replace(fast, price_N=np.where(np.arange(8) == 7, 1e9, 1.0)), Limits(max_dollars_per_hour=100), seed=0
    ).placement
    assert incumbent is not None
    assert 7 not in incumbent.used
    ask = {"state_sizes": SIZES, "seed": 0}
    patient = replan(fast, incumbent, Limits(), horizon_s=LONG_S, **ask)
    assert patient.moves
    assert patient.reason.startswith("move: ")
    assert patient.step_s < patient.stay_step_s
    assert patient.migration.size_bytes > 0
    hurried = replan(fast, incumbent, Limits(), horizon_s=patient.migration.transfer_s / 10, **ask)
    assert not hurried.moves
    assert hurried.placement == incumbent
    assert hurried.reason.startswith("stay: ")
    assert hurried.migration.size_bytes == 0


def test_an_incumbent_that_no_longer_fits_is_left() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=8, num_microbatches=8)
    problem = replace(problem, memory_bytes_N=np.array([100.0, 100.0, 100.0, 5.0]))
    incumbent = Placement(bounds=(0, 2, 4, 6, 8), nodes=((0,), (1,), (2,), (3,)))
    found = replan(problem, incumbent, Limits(), state_sizes=SIZES, horizon_s=1.0, seed=0)
    assert found.stay is None
    assert found.placement is not None
    assert math.isfinite(score(problem, Limits(), found.placement))
    assert "cannot go on" in found.reason


def test_where_nothing_fits_it_says_so_and_without_an_incumbent_it_plans() -> None:
    problem = uniform_problem(num_nodes=3, num_layers=6, num_microbatches=4)
    tiny = replace(problem, memory_bytes_N=np.full(3, 3.0))
    incumbent = Placement(bounds=(0, 2, 4, 6), nodes=((0,), (1,), (2,)))
    nothing = replan(tiny, incumbent, Limits(), state_sizes=SIZES, horizon_s=LONG_S, seed=0, evaluations=500)
    assert nothing.placement is None
    assert nothing.reason.startswith("nothing to run")
    first = replan(problem, None, Limits(), state_sizes=SIZES, horizon_s=LONG_S, seed=0, evaluations=500)
    assert first.placement is not None
    assert first.moves


def test_layers_come_from_the_nearest_that_holds_them() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=4, num_microbatches=4, byte_s=1e-9)
    byte_s_PP = problem.byte_s_PP.copy()
    byte_s_PP[1, 3] = 1e-10
    problem = replace(problem, byte_s_PP=byte_s_PP)
    old = Placement(bounds=(0, 2, 4), nodes=((0, 1), (2,)))
    new = Placement(bounds=(0, 2, 4), nodes=((0, 1), (3,)))
    moved = migration(problem, old, new, SIZES)
    assert [(f.node, f.source, f.start, f.stop) for f in moved.fetches] == [(3, 2, 2, 4)]
    assert moved.size_bytes == 2 * 1e9 + 1e8
    new = Placement(bounds=(0, 2, 4), nodes=((0, 3), (2,)))
    moved = migration(problem, old, new, SIZES)
    assert [(f.node, f.source) for f in moved.fetches] == [(3, 1)]
    assert moved.transfer_s == pytest.approx(2.1e9 * 1e-10)


def test_a_fleet_lasts_until_the_first_of_its_nodes_is_lost() -> None:
    assert expected_life_s([0.01] * 10) == pytest.approx(36_000)
    assert expected_life_s([]) == math.inf


@pytest.mark.parametrize("join", [True, False])
def test_ten_thousand_nodes_are_repaired_where_it_matters(join: bool) -> None:
    problem = random_problem(1, num_nodes=2000, num_layers=32, num_microbatches=4000, num_places=8)
    problem = replace(
        problem,
        uplink_byte_s_N=np.zeros(2000),
        downlink_byte_s_N=np.zeros(2000),
        memory_bytes_N=np.full(2000, 1e12),
        byte_s_PP=problem.byte_s_PP / 1000,
    )
    nodes = np.arange(2000).reshape(16, 125)
    incumbent = Placement(bounds=tuple(range(0, 33, 2)), nodes=tuple(map(tuple, nodes.tolist())))
    lost = incumbent.nodes[3][:1] if join else incumbent.nodes[5][:1]
    smaller = Placement(
        bounds=incumbent.bounds, nodes=tuple(tuple(n for n in s if n not in lost) for s in incumbent.nodes)
    )
    limits = Limits(max_replicas=200)
    found = replan(problem, smaller, limits, state_sizes=SIZES, horizon_s=LONG_S, seed=0)
    assert found.placement is not None
    assert found.score <= found.stay_score
    assert sorted(found.placement.used) == list(range(2000))
