"""Whatever the pipeline: everything runs once, nothing before what it needs, nobody does two things at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.settings import WireConfig
from orchestrator.planner.evaluate import split_microbatches
from orchestrator.planner.problem import Placement, Problem
from orchestrator.simulator.kernel import BACKWARD, FORWARD, WEIGHT
from orchestrator.simulator.layout import deal, shares_of
from orchestrator.simulator.step import StepSimulation, simulate_step
from tests.planner_problems import uniform_problem


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Problem, Placement]:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    num_nodes, num_layers = sum(sizes), len(sizes) + draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    problem = uniform_problem(
        num_nodes=num_nodes, num_layers=num_layers, num_microbatches=draw(st.integers(1, 12)), sync_bytes=1.0
    )
    problem = replace(
        problem,
        schedule=draw(st.sampled_from(["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"])),
        layer_forward_s_N=rng.uniform(0.5, 2, num_nodes),
        layer_backward_s_N=rng.uniform(1.5, 4, num_nodes),
        delay_s_PP=rng.uniform(0, 5, (num_nodes, num_nodes)),
        byte_s_PP=rng.uniform(0, 3, (num_nodes, num_nodes)),
        forward_bytes_L=rng.uniform(0.1, 2, num_layers),
        backward_bytes_L=rng.uniform(0.1, 2, num_layers),
        uplink_byte_s_N=rng.choice([0.0, 0.5], num_nodes),
        downlink_byte_s_N=rng.choice([0.0, 0.5], num_nodes),
        shared_bytes_per_s_PP=rng.choice([np.inf, 0.7], (num_nodes, num_nodes)),
    )
    ends = sorted(draw(st.permutations(range(1, num_layers)))[: len(sizes) - 1])
    firsts = np.cumsum([0, *sizes]).tolist()
    nodes = tuple(tuple(range(a, b)) for a, b in pairwise(firsts))
    return problem, Placement(bounds=(0, *ends, num_layers), nodes=nodes)


def simulated(pipeline: tuple[Problem, Placement]) -> StepSimulation:
    return simulate_step(*pipeline, WireConfig())


@given(pipelines())
@settings(max_examples=60, deadline=None)
def test_everything_runs_once_in_order_and_nobody_does_two_things(pipeline: tuple[Problem, Placement]) -> None:
    problem, placement = pipeline
    simulation = simulated(pipeline)
    layout, played = simulation.layout, simulation.played
    ops = (FORWARD, BACKWARD, WEIGHT) if layout.is_split else (FORWARD, BACKWARD)
    begin, end = played.begin_s_ASM, played.end_s_ASM
    assert (begin[list(ops)] >= 0).all()
    for stage in range(placement.num_stages):
        for m in range(problem.num_microbatches):
            assert begin[BACKWARD, stage, m] >= end[FORWARD, stage, m]
            if stage:
                source, target = layout.node_SM[stage - 1, m], layout.node_SM[stage, m]
                least_s = problem.delay_s_PP[source, target]
                least_s += problem.forward_bytes_L[stage - 1] * problem.byte_s_PP[source, target]
                assert begin[FORWARD, stage, m] >= end[FORWARD, stage - 1, m] + least_s - 1e-9
    for u in range(len(layout.stage_U)):
        own = layout.own_O[layout.own_U[u] : layout.own_U[u + 1]]
        spans = sorted((begin[op, layout.stage_U[u], m], end[op, layout.stage_U[u], m]) for op in ops for m in own)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))
        # In microbatch order, so that gradients add up in the order of a plain loop.
        for op in ops:
            assert (np.diff(begin[op, layout.stage_U[u], own]) > 0).all()


@given(pipelines())
@settings(max_examples=40, deadline=None)
def test_no_step_is_shorter_than_what_its_busiest_part_does(pipeline: tuple[Problem, Placement]) -> None:
    simulation = simulated(pipeline)
    assert simulation.step_s >= simulation.compute_s_U.max() - 1e-9
    assert simulation.link_busy_DQ.max(initial=0.0) <= 1 + 1e-9
    assert ((simulation.idle_share_U >= 0) & (simulation.idle_share_U <= 1)).all()
    assert simulation.played.peak_bytes_U.min() >= 0


@given(pipelines(), st.floats(1.1, 3))
@settings(max_examples=40, deadline=None)
def test_a_chain_is_no_slower_with_faster_links(pipeline: tuple[Problem, Placement], factor: float) -> None:
    problem, placement = pipeline
    chain = Placement(bounds=placement.bounds, nodes=tuple(nodes[:1] for nodes in placement.nodes))
    # What is shared is first come, first served: there, who comes earlier may hold up who matters more.
    none_N, unshared_PP = np.zeros(problem.num_nodes), np.full_like(problem.delay_s_PP, np.inf)
    problem = replace(
        problem,
        schedule="1f1b",
        uplink_byte_s_N=none_N,
        downlink_byte_s_N=none_N,
        shared_bytes_per_s_PP=unshared_PP,
    )
    faster = replace(problem, delay_s_PP=problem.delay_s_PP / factor, byte_s_PP=problem.byte_s_PP / factor)
    assert simulated((faster, chain)).step_s <= simulated((problem, chain)).step_s + 1e-9


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 60))
def test_shares_are_those_of_the_cost_model_and_are_spread_evenly(seconds: list[float], num_microbatches: int) -> None:
    shares = shares_of(seconds, num_microbatches)
    expected = split_microbatches(seconds, num_microbatches)
    assert sum(shares) == num_microbatches
    # Rounding may break a tie otherwise; what counts is when the last one is done.
    assert max(n * s for n, s in zip(shares, seconds, strict=True)) == pytest.approx(
        max(n * s for n, s in zip(expected, seconds, strict=True))
    )
    dealt = deal(shares)
    for replica, share in enumerate(shares):
        turns = np.flatnonzero(dealt == replica)
        assert len(turns) == share
        ideal = (np.arange(share) + 0.5) / max(1, share) * num_microbatches
        assert np.abs(turns + 0.5 - ideal).max(initial=0) <= len(seconds)
