"""The bound is never below what a placement reaches, and more of anything never lowers it."""

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.planner.bound import StandingBound, throughput_bound
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.objective import is_allowed
from tests.uneven_problems import any_placement, uneven_limits, uneven_problem, with_another

seeds = st.integers(0, 2**32 - 1)
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The solver's tolerance, as a part of the bound.
TOLERANCE = 1e-6


@relaxed
@given(seeds)
def test_no_placement_that_fits_is_faster_than_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = uneven_problem(rng)
    limits = uneven_limits(rng, problem)
    bound = throughput_bound(problem, limits)
    for _ in range(40):
        placement = any_placement(rng, problem, limits)
        if is_allowed(problem, limits, placement):
            found = evaluate(problem, placement)
            assert found.short_bytes > 0 or found.rate <= bound.rate


@relaxed
@given(seeds)
def test_more_nodes_memory_or_rate_never_lower_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = uneven_problem(rng)
    limits = uneven_limits(rng, problem)
    factor = float(rng.uniform(1.0, 3.0))
    node = int(rng.integers(problem.num_nodes))
    of_node = np.where(np.arange(problem.num_nodes) == node, factor, 1.0)
    p, q = rng.integers(problem.num_places, size=2)
    of_pair = np.ones((problem.num_places, problem.num_places))
    of_pair[p, q] = factor
    richer = [
        with_another(problem, node),
        replace(problem, memory_bytes_N=problem.memory_bytes_N * of_node),
        replace(problem, byte_s_PP=problem.byte_s_PP / of_pair),
        replace(problem, shared_bytes_per_s_PP=problem.shared_bytes_per_s_PP * of_pair),
        replace(problem, uplink_byte_s_N=problem.uplink_byte_s_N / of_node),
        replace(problem, downlink_byte_s_N=problem.downlink_byte_s_N / of_node),
        replace(
            problem,
            layer_forward_s_N=problem.layer_forward_s_N / of_node,
            layer_backward_s_N=problem.layer_backward_s_N / of_node,
            first_forward_s_N=problem.first_forward_s_N / of_node,
            first_backward_s_N=problem.first_backward_s_N / of_node,
            last_forward_s_N=problem.last_forward_s_N / of_node,
            last_backward_s_N=problem.last_backward_s_N / of_node,
        ),
    ]
    before = throughput_bound(problem, limits).rate
    for more in richer:
        assert throughput_bound(more, limits).rate >= before * (1 - TOLERANCE)


@relaxed
@given(seeds)
def test_a_bound_kept_through_changes_is_that_of_a_fresh_start(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = uneven_problem(rng)
    limits = uneven_limits(rng, problem)
    standing = StandingBound(limits)
    for _ in range(3):
        kept, fresh = standing.of(problem), throughput_bound(problem, limits)
        assert abs(kept.rate - fresh.rate) <= TOLERANCE * fresh.rate
        problem = with_another(problem, int(rng.integers(problem.num_nodes)))
