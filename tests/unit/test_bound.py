"""The bound, held to sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planner.bound import Binding, throughput_bound
from orchestrator.planner.objective import Limits
from tests.planner_problems import uniform_problem

MANY = Limits(max_replicas=100)


def test_without_other_limits_it_is_what_the_nodes_compute() -> None:
    # 6 nodes that take 3 s a layer, 4 layers.
    bound = throughput_bound(uniform_problem(num_nodes=6, num_layers=4, num_microbatches=8, num_places=2), MANY)
    assert bound.rate == pytest.approx(6 / 12)
    assert {bind.kind for bind in bound.binds} == {"compute"}
    assert sum(bind.share for bind in bound.binds) == pytest.approx(1.0)


def test_a_chain_holds_whole_layers() -> None:
    # 3 nodes, 4 layers: one node has 2.
    bound = throughput_bound(uniform_problem(num_nodes=3, num_layers=4, num_microbatches=8), Limits())
    assert bound.rate == pytest.approx(1 / 6)
    assert bound.binds == (Binding(kind="layers", places=(), num_nodes=3, share=1.0),)


def test_a_chain_needs_links_of_its_pace() -> None:
    # Between the two halves of the fleet a frame takes 10 s: four layers of 3 s on two nodes are faster.
    problem = uniform_problem(num_nodes=4, num_layers=4, num_microbatches=8, frame_bytes=10.0, num_places=2)
    thin = replace(problem, byte_s_PP=np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert throughput_bound(problem, Limits()).rate == pytest.approx(1 / 3)
    assert throughput_bound(thin, Limits()).rate == pytest.approx(1 / 6)


def test_memory_that_splits_a_model_over_places_makes_their_link_bind() -> None:
    # Two layers and a place for each; what is done in one must cross.
    problem = uniform_problem(num_nodes=2, num_layers=2, num_microbatches=8, frame_bytes=10.0, num_places=2)
    small = replace(problem, memory_bytes_N=np.full(2, 3.0))
    shared = replace(small, shared_bytes_per_s_PP=np.full((2, 2), 1.0))
    assert throughput_bound(small, MANY).rate == pytest.approx(1 / 3)
    bound = throughput_bound(shared, MANY)
    # A microbatch crosses at least once, forward one way and back the other: 10 bytes each, 1 byte a second.
    assert bound.rate == pytest.approx(1 / 10)
    assert "link" in {bind.kind for bind in bound.binds}


def test_a_budget_buys_part_of_the_fleet() -> None:
    problem = uniform_problem(num_nodes=6, num_layers=4, num_microbatches=8, num_places=1)
    bound = throughput_bound(problem, replace(MANY, max_dollars_per_hour=3.0))
    assert bound.rate == pytest.approx(3 / 12)
    assert bound.binds[0].kind == "budget"


def test_no_rate_where_no_node_holds_a_layer() -> None:
    problem = uniform_problem(num_nodes=2, num_layers=2, num_microbatches=8)
    for limits in (Limits(), MANY):
        bound = throughput_bound(replace(problem, memory_bytes_N=np.full(2, 1.0)), limits)
        assert (bound.rate, bound.binds) == (0.0, ())
