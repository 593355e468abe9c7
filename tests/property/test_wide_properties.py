"""The cost model for wide stages has the figures of the cost model."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.objective import Limits
from orchestrator.planner.wide import evaluate_wide
from tests.uneven_problems import any_placement, uneven_problem


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1))
def test_wide_stages_cost_what_the_specification_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = uneven_problem(rng, most_nodes=20)
    placement = any_placement(rng, problem, Limits(max_replicas=problem.num_nodes))
    expected, found = evaluate(problem, placement), evaluate_wide(problem, placement)
    assert found.shares_S == expected.shares_S
    assert found.in_flight_SR == expected.in_flight_SR
    for name in ("step_s", "rate", "fill_s", "pace_s", "sync_s", "commit_s"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    assert found.short_bytes == pytest.approx(expected.short_bytes, abs=1e-9)
    for ours, theirs in zip(found.memory_S, expected.memory_S, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
