"""The compiled cost model is the cost model."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.fast import evaluate_into, score_state
from orchestrator.planner.objective import Limits, score
from orchestrator.planner.problem import Placement
from orchestrator.planner.tables import (
    OBJECTIVES,
    SCHEDULES,
    make_rules,
    make_scratch,
    make_state,
    make_tables,
    read_state,
    write_state,
)
from tests.planner_problems import random_problem

# Machines that run tests are slow at times.
relaxed = settings(max_examples=300, deadline=None)


def random_placement(rng: np.random.Generator, num_nodes: int, num_layers: int, max_replicas: int) -> Placement:
    num_stages = int(rng.integers(1, min(num_nodes, num_layers) + 1))
    cuts = np.sort(rng.choice(np.arange(1, num_layers), num_stages - 1, replace=False))
    nodes = rng.permutation(num_nodes).tolist()
    stages = [[nodes.pop()] for _ in range(num_stages)]
    while nodes and rng.random() < 0.8:
        stage = stages[int(rng.integers(num_stages))]
        if len(stage) < max_replicas:
            stage.append(nodes.pop())
    return Placement(bounds=(0, *cuts.tolist(), num_layers), nodes=tuple(map(tuple, stages)))


@relaxed
@given(st.integers(0, 2**32), st.sampled_from(SCHEDULES), st.booleans(), st.booleans())
def test_the_compiled_cost_is_the_cost(seed: int, schedule, places: bool, shared: bool) -> None:
    rng = np.random.default_rng(seed)
    num_nodes, num_layers, most = (int(rng.integers(1, high)) for high in (9, 10, 5))
    problem = random_problem(
        seed,
        num_nodes=num_nodes,
        num_layers=num_layers,
        num_microbatches=int(rng.integers(1, 40)),
        schedule=schedule,
        num_places=int(rng.integers(1, 5)) if places else None,
        shared=shared,
    )
    placement = random_placement(rng, num_nodes, num_layers, most)
    tables, state, scratch = make_tables(problem), make_state(problem, most), make_scratch(problem, most)
    write_state(state, placement)
    assert read_state(state) == placement
    evaluate_into(tables, state, scratch)
    found = evaluate(problem, placement)
    wanted = (found.step_s, found.rate, found.fill_s, found.pace_s, found.sync_s, found.commit_s, found.short_bytes)
    np.testing.assert_allclose(np.maximum(scratch.result[:7], 0.0), wanted, rtol=1e-9, atol=0.0)
    for stage, shares in enumerate(found.shares_S):
        assert tuple(scratch.window_SR[stage, : len(shares)]) == found.in_flight_SR[stage]
        assert tuple(scratch.shares_SR[stage, : len(shares)]) == shares
    for limits in (
        Limits(max_replicas=99),
        Limits(max_replicas=99, objective="dollars"),
        Limits(
            objective=OBJECTIVES[seed % 3],
            max_replicas=int(rng.integers(1, 5)),
            min_copies=int(rng.integers(1, 3)),
            min_domains=int(rng.integers(1, 3)),
            num_stages=None if rng.random() < 0.5 else placement.num_stages + int(rng.integers(0, 2)),
            pins=((int(rng.integers(num_nodes)), int(rng.integers(-1, 3))),) * int(rng.integers(0, 2)),
            after=((int(rng.integers(num_nodes)), int(rng.integers(num_nodes))),) * int(rng.integers(0, 2)),
            max_dollars_per_hour=float(rng.choice([5.0, math.inf])),
            max_step_s=float(found.step_s * rng.choice([0.9, 1.1])),
        ),
    ):
        fast = float(score_state(tables, make_rules(limits), state, scratch))
        np.testing.assert_allclose(fast, score(problem, limits, placement), rtol=1e-9)
