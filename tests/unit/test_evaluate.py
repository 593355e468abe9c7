"""The cost model, held to sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planner.evaluate import evaluate, split_microbatches
from orchestrator.planner.objective import Limits, score
from orchestrator.planner.problem import Placement
from tests.planner_problems import uniform_problem

CHAIN = Placement(bounds=(0, 2, 4), nodes=((0,), (1,)))


def test_a_chain_fills_and_then_keeps_the_pace_of_its_slowest_stage() -> None:
    # Layers take 1 + 2 s, ends nothing, links nothing: stages of 6 s each.
    found = evaluate(uniform_problem(num_nodes=2, num_layers=4, num_microbatches=8), CHAIN)
    assert found.fill_s == pytest.approx(12.0)
    assert found.step_s == pytest.approx(12.0 + 7 * 6.0)
    assert found.rate == pytest.approx(1 / 6)


def test_a_thin_link_binds_and_a_delay_starves_1f1b_but_not_gpipe() -> None:
    thin = uniform_problem(num_nodes=2, num_layers=4, num_microbatches=8, frame_bytes=100.0, byte_s=0.1)
    assert evaluate(thin, CHAIN).pace_s == pytest.approx(10.0)
    # Two microbatches in flight at the first stage, each away for 12 s of compute and 20 s of delay.
    far = uniform_problem(num_nodes=2, num_layers=4, num_microbatches=8, delay_s=10.0)
    assert evaluate(far, CHAIN).rate == pytest.approx(2 / 32)
    assert evaluate(far, CHAIN).step_s == pytest.approx(32 + 3 * 32 + 6 + 20)
    assert evaluate(replace(far, schedule="gpipe"), CHAIN).step_s == pytest.approx(32 + 7 * 6 + 20)
    # As many in flight as the delay asks for, where memory allows it.
    free = evaluate(replace(far, schedule="bdp"), CHAIN)
    assert free.in_flight_SR == ((8,), (2,))
    assert free.rate == pytest.approx(1 / 6)
    short = replace(far, schedule="bdp", memory_bytes_N=np.array([4 + 3 * 3.0, 100.0]))
    assert evaluate(short, CHAIN).in_flight_SR == ((3,), (2,))


def test_replicas_share_microbatches_by_speed_and_pay_for_their_gradients() -> None:
    assert split_microbatches([1.0, 3.0], 8) == (6, 2)
    problem = uniform_problem(num_nodes=3, num_layers=4, num_microbatches=8, sync_bytes=100.0, byte_s=0.01)
    pair = evaluate(problem, Placement(bounds=(0, 4), nodes=((0, 1),)))
    assert pair.shares_S == ((4, 4),)
    # 4 layers of 100 bytes, half of it sent and fetched again.
    assert pair.sync_s == pytest.approx(2 * 200 * 0.01)
    assert pair.step_s == pytest.approx(12 + 3 * 12 + pair.sync_s)
    # Two nodes of the first stage feed one of the second, whose frames they each send over their own link.
    joined = evaluate(problem, Placement(bounds=(0, 3, 4), nodes=((0, 1), (2,))))
    assert joined.rate == pytest.approx(1 / 4.5)


def test_flows_that_share_a_pair_of_places_divide_what_it_carries() -> None:
    problem = uniform_problem(num_nodes=4, num_layers=4, num_microbatches=8, frame_bytes=10.0, num_places=2)
    shared = replace(problem, shared_bytes_per_s_PP=np.array([[np.inf, 1.0], [1.0, np.inf]]))
    # Stages in places 0, 1, 0, 1: three links cross, forward frames of two of them and a backward frame one way.
    placement = Placement(bounds=(0, 1, 2, 3, 4), nodes=((0,), (1,), (2,), (3,)))
    assert evaluate(problem, placement).pace_s == pytest.approx(3.0)
    assert evaluate(shared, placement).pace_s == pytest.approx(30.0)


def test_a_nodes_own_way_out_carries_both_neighbours_frames() -> None:
    problem = uniform_problem(num_nodes=3, num_layers=3, num_microbatches=8, frame_bytes=10.0)
    narrow = replace(problem, uplink_byte_s_N=np.array([0.0, 1.0, 0.0]))
    assert evaluate(narrow, Placement(bounds=(0, 1, 2, 3), nodes=((0,), (1,), (2,)))).pace_s == pytest.approx(20.0)


def test_score_is_infinite_for_what_does_not_fit_or_is_not_allowed() -> None:
    problem = uniform_problem(num_nodes=3, num_layers=4, num_microbatches=8)
    assert score(problem, Limits(), CHAIN) == pytest.approx(54.0)
    assert score(replace(problem, memory_bytes_N=np.full(3, 5.0)), Limits(), CHAIN) == np.inf
    assert score(problem, Limits(max_dollars_per_hour=1.5), CHAIN) == np.inf
    assert score(problem, Limits(objective="dollars"), CHAIN) == pytest.approx(54.0 * 2 / 3600)
    assert score(problem, Limits(objective="cheapest", max_step_s=60.0), CHAIN) == 2.0
    assert score(problem, Limits(objective="cheapest", max_step_s=50.0), CHAIN) == np.inf
    assert score(problem, Limits(pins=((0, -1),)), CHAIN) == np.inf
    assert score(problem, Limits(pins=((2, -1), (1, 1))), CHAIN) < np.inf
    assert score(problem, Limits(after=((0, 1),)), CHAIN) == np.inf
    assert score(problem, Limits(min_copies=2, max_replicas=2), CHAIN) == np.inf
    assert score(problem, Limits(num_stages=3), CHAIN) == np.inf
