"""Plans for hundreds of nodes: near the bound, allowed, repeatable, and repaired when a node comes or goes."""

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planner.bound import throughput_bound
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.large import judge, plan_large
from orchestrator.planner.large_repair import repair_large
from orchestrator.planner.objective import Limits, is_allowed, score
from orchestrator.planner.problem import Placement, Problem
from tests.uneven_problems import with_another

MANY = Limits(max_replicas=1000)
NUM_NODES, NUM_LAYERS, NUM_PLACES = 240, 12, 4


def wide_problem(seed: int = 0) -> Problem:
    """Return 240 nodes in four places of uneven speeds, of which each holds up to three layers; links are fat."""
    rng = np.random.default_rng(seed)
    speed = np.exp(rng.uniform(np.log(0.5), np.log(4.0), NUM_NODES))
    zeros = np.zeros(NUM_NODES)
    apart = 1 - np.eye(NUM_PLACES)
    return Problem(
        num_layers=NUM_LAYERS,
        num_microbatches=200,
        schedule="bdp",
        layer_forward_s_N=1 / speed,
        layer_backward_s_N=2 / speed,
        first_forward_s_N=zeros,
        first_backward_s_N=zeros,
        last_forward_s_N=0.5 / speed,
        last_backward_s_N=0.5 / speed,
        layer_weight_s_N=1 / speed,
        memory_bytes_N=np.where(rng.random(NUM_NODES) < 0.3, 160.0, 480.0),
        layer_state_bytes=100.0,
        first_state_bytes=20.0,
        last_state_bytes=20.0,
        layer_saved_bytes_N=zeros + 0.5,
        layer_halved_bytes_N=zeros + 0.25,
        raw_frame_bytes_N=zeros,
        flight_bytes_N=zeros + 0.5,
        fixed_bytes_N=zeros + 1.0,
        last_bytes=1.0,
        last_saved_bytes=0.1,
        place_N=rng.integers(0, NUM_PLACES, NUM_NODES).astype(np.int32),
        delay_s_PP=0.05 * apart,
        byte_s_PP=1e-4 + 1e-3 * apart,
        shared_bytes_per_s_PP=np.where(apart > 0, 2000.0, np.inf),
        uplink_byte_s_N=zeros + 1e-4,
        downlink_byte_s_N=zeros + 1e-4,
        forward_bytes_L=np.full(NUM_LAYERS, 10.0),
        backward_bytes_L=np.full(NUM_LAYERS, 10.0),
        layer_sync_bytes=10.0,
        first_sync_bytes=1.0,
        last_sync_bytes=1.0,
        price_N=0.5 + speed**1.2,
        domain_N=np.arange(NUM_NODES, dtype=np.int32),
    )


def test_a_large_plan_is_within_two_percent_of_the_bound_and_has_the_score_of_the_specification() -> None:
    problem = wide_problem()
    found = plan_large(problem, MANY, seed=0, evaluations=4000, steady=True)
    assert found.placement is not None
    cost = evaluate(problem, found.placement)
    assert cost.short_bytes == 0
    assert found.score == pytest.approx(score(problem, MANY, found.placement, cost))
    bound = throughput_bound(problem, MANY).rate
    assert 0.98 * bound <= cost.rate <= bound
    assert plan_large(problem, MANY, seed=0, evaluations=4000, steady=True) == found


def test_a_link_too_thin_for_the_flow_is_not_crossed() -> None:
    # Place 3 is behind links that carry next to nothing: its nodes are left out.
    problem = wide_problem()
    shared = problem.shared_bytes_per_s_PP.copy()
    shared[3, :3] = shared[:3, 3] = 0.1
    shared[3, 3] = np.inf
    found = plan_large(replace(problem, shared_bytes_per_s_PP=shared), MANY, seed=0, evaluations=4000, steady=True)
    assert found.placement is not None
    assert not (problem.place_N[list(found.placement.used)] == 3).any()
    whole = plan_large(problem, MANY, seed=0, evaluations=4000, steady=True)
    assert whole.placement is not None
    rest = 1 - (problem.place_N == 3) @ (1 / problem.layer_s_N) / (1 / problem.layer_s_N).sum()
    rate = evaluate(replace(problem, shared_bytes_per_s_PP=shared), found.placement).rate
    assert rate >= 0.95 * rest * evaluate(problem, whole.placement).rate


@pytest.mark.parametrize(
    "limits",
    [
        replace(MANY, max_dollars_per_hour=100.0),
        Limits(max_replicas=5),
        replace(MANY, num_stages=6),
        replace(MANY, min_copies=3),
        replace(MANY, pins=((0, 0),), after=((1, 2),)),
        replace(MANY, objective="dollars"),
        replace(MANY, objective="cheapest", max_step_s=120.0),
    ],
    ids=["budget", "replicas", "stages", "copies", "pins", "dollars", "cheapest"],
)
def test_limits_are_kept(limits: Limits) -> None:
    problem = wide_problem()
    found = plan_large(problem, limits, seed=0, evaluations=3000, steady=True)
    assert found.placement is not None
    assert is_allowed(problem, limits, found.placement)
    cost = evaluate(problem, found.placement)
    assert cost.short_bytes == 0
    assert cost.step_s <= limits.max_step_s
    assert cost.rate <= throughput_bound(problem, limits).rate
    if limits.objective != "throughput":
        # Cheaper than what is fastest.
        fastest = plan_large(problem, replace(limits, objective="throughput"), seed=0, evaluations=3000, steady=True)
        assert fastest.placement is not None
        assert found.score < score(problem, limits, fastest.placement)


def test_where_nothing_fits_nothing_is_found() -> None:
    problem = replace(wide_problem(), memory_bytes_N=np.full(NUM_NODES, 50.0))
    assert plan_large(problem, MANY, seed=0, evaluations=100, steady=True).placement is None


def test_who_joins_is_used_and_who_leaves_is_made_up_for() -> None:
    problem = wide_problem()
    plan = plan_large(problem, MANY, seed=0, evaluations=4000, steady=True).placement
    assert plan is not None
    before = evaluate(problem, plan).rate
    node = plan.nodes[3][0]
    joined = repair_large(with_another(problem, node), plan, MANY, 40)
    assert joined.placement is not None
    assert joined.placement.bounds == plan.bounds
    assert evaluate(with_another(problem, node), joined.placement).rate >= before
    gone = Placement(bounds=plan.bounds, nodes=tuple(tuple(n for n in stage if n != node) for stage in plan.nodes))
    without = replace(problem, memory_bytes_N=np.where(np.arange(NUM_NODES) == node, 0.0, problem.memory_bytes_N))
    left = repair_large(without, gone, MANY, 40)
    assert left.placement is not None
    assert node not in left.placement.used
    assert evaluate(without, left.placement).rate >= evaluate(without, gone).rate
    assert evaluate(without, left.placement).rate >= 0.97 * before
    moved = sum(set(a) != set(b) for a, b in zip(left.placement.nodes, gone.nodes, strict=True))
    assert moved <= 2 * 40


def test_a_stage_that_lost_all_its_nodes_gets_others() -> None:
    problem = wide_problem()
    plan = plan_large(problem, MANY, seed=0, evaluations=4000, steady=True).placement
    assert plan is not None
    empty = Placement(bounds=plan.bounds, nodes=tuple(() if s == 2 else nodes for s, nodes in enumerate(plan.nodes)))
    lost = np.isin(np.arange(NUM_NODES), plan.nodes[2])
    without = replace(problem, memory_bytes_N=np.where(lost, 0.0, problem.memory_bytes_N))
    found = repair_large(without, empty, MANY, 200)
    assert found.placement is not None
    assert judge(without, MANY, found.placement).evaluation.rate > 0.8 * throughput_bound(without, MANY).rate
