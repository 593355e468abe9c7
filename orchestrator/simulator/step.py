"""What one step of a placement would do: time, idle shares, memory, bytes, dollars, and who did what when.

PURE. A step begins when the driver sends its orders, each with the
commit of the step before, and ends when the last report is back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from actors.errors import PlanError
from actors.fleet_spec import Fleet
from actors.settings import WireConfig
from actors.spec import Plan
from orchestrator.planner.build import FRAME_COPIES, Workload, make_problem
from orchestrator.planner.problem import Placement, Problem
from orchestrator.simulator.kernel import WEIGHT, Floats, Ints, Layout, Played, play
from orchestrator.simulator.layout import Lineup, Orders, make_layout
from orchestrator.simulator.links import sync_s
from orchestrator.simulator.overheads import NO_OVERHEADS, Overheads


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSimulation:
    """One simulated step; axes: U nodes used, stage by stage, S stages, Q pairs of nodes with traffic."""

    placement: Placement
    # From the driver's order to the last report, the driver's own work included.
    step_s: float
    # Until the last node has done its last operation; what the exchange of gradients adds at the end.
    pipeline_s: float
    sync_s_S: tuple[float, ...]
    # Indices into the Problem, and each one's stage.
    nodes_U: Ints
    stage_U: Ints
    shares_U: Ints
    compute_s_U: Floats
    # The share of the step in which a node does not compute: as real runs count it, the commit is compute.
    idle_share_U: Floats
    memory_bytes_U: Floats
    # The same without frames.
    tensor_bytes_U: Floats
    memory_limit_bytes_U: Floats
    in_flight_peak_U: Ints
    # The share of the step in which the link between two nodes sends, down and up.
    link_busy_DQ: Floats
    # What crosses below each stage but the last, down and up, in a step; what replicas exchange.
    link_bytes_DS: Floats
    sync_bytes_S: tuple[float, ...]
    dollars: float
    # Seconds from each node's own order: as real nodes, which begin when their order comes.
    order_s_U: Floats
    commit_s_U: Floats
    layout: Layout
    played: Played

    @property
    def short_bytes(self) -> float:
        """By how much the worst node is short of memory; 0 where all fit."""
        return max(0.0, float((self.memory_bytes_U - self.memory_limit_bytes_U).max()))


def simulate_step(
    problem: Problem,
    placement: Placement,
    wire: WireConfig,
    *,
    overheads: Overheads = NO_OVERHEADS,
    codecs: Sequence[tuple[str, str]] | None = None,
    orders: Orders | None = None,
    in_flight_S: Sequence[int] | None = None,
    driver: int | None = None,
    sigma: float = 0.0,
    seed: int = 0,
) -> StepSimulation:
    """Return what one step of `placement` does.

    `codecs` gives each link's, to know how long they take; `orders` each stage's actions, instead of its schedule's
    own; `in_flight_S` how many microbatches a replica keeps in flight where the schedule may choose; `driver` the node
    beside which the driver runs, by default the first stage's first; `sigma` the spread of compute times (lognormal).
    Raises PlanError where the orders wait for one another.
    """
    lineup = Lineup(problem, placement)
    nodes_U = lineup.nodes_U
    place_U = problem.place_N[nodes_U]
    state_U = _state_bytes(lineup)
    driver_place = problem.place_N[nodes_U[0] if driver is None else driver]
    order_s_U = problem.delay_s_PP[driver_place, place_U]
    commit_s_U = state_U * overheads.commit_byte_s
    layout = make_layout(
        lineup,
        wire,
        overheads,
        begin_s_U=order_s_U + commit_s_U,
        codecs=codecs,
        orders=orders,
        in_flight_S=in_flight_S,
        sigma=sigma,
        seed=seed,
    )
    back_s_U = problem.delay_s_PP[place_U, driver_place]
    sync_s_S = tuple(sync_s(problem, placement, stage) for stage in range(placement.num_stages))

    def played_step() -> tuple[Played, Floats, float]:
        played = play(layout)
        _require_played(problem, placement, played)
        finish_s_U = _finish_s(lineup, played)
        done_s_U = _with_sync(lineup, finish_s_U, sync_s_S)
        return played, finish_s_U, float((done_s_U + overheads.report_s + back_s_U).max()) + overheads.step_s

    played, finish_s_U, step_s = played_step()
    if overheads.initial_window_bytes:
        # A step finds its connections as the one before left them: the second is as all that follow.
        layout = layout._replace(window_DQ=played.window_DQ, last_sent_s_DQ=played.last_sent_s_DQ - step_s)
        played, finish_s_U, step_s = played_step()
    once_U = state_U + _standing_bytes(lineup)
    compute_s_U = commit_s_U + _compute_s(lineup, layout)
    return StepSimulation(
        placement=placement,
        step_s=step_s,
        pipeline_s=float(finish_s_U.max()),
        sync_s_S=sync_s_S,
        nodes_U=nodes_U.astype(np.int32),
        stage_U=lineup.stage_U,
        shares_U=np.diff(layout.own_U).astype(np.int32),
        compute_s_U=compute_s_U,
        idle_share_U=np.maximum(0.0, 1 - compute_s_U / step_s),
        memory_bytes_U=once_U + played.peak_bytes_U,
        tensor_bytes_U=once_U + played.flight_peak_bytes_U,
        memory_limit_bytes_U=problem.memory_bytes_N[nodes_U],
        in_flight_peak_U=played.in_flight_peak_U,
        link_busy_DQ=_link_busy_s(layout) / step_s,
        link_bytes_DS=problem.num_microbatches
        * np.stack([problem.forward_bytes_L, problem.backward_bytes_L])[:, : placement.num_stages - 1],
        sync_bytes_S=_sync_bytes(problem, placement),
        dollars=float(problem.price_N[nodes_U].sum()) * step_s / 3600,
        order_s_U=order_s_U,
        commit_s_U=commit_s_U,
        layout=layout,
        played=played,
    )


def _require_played(problem: Problem, placement: Placement, played: Played) -> None:
    if played.num_left:
        raise PlanError(
            f"the {problem.schedule} schedule of {placement.num_stages} stages stops with {played.num_left} operations "
            "left: they wait for one another",
            "give each stage its forwards in microbatch order, and more in flight than the stage after it",
        )


def _with_sync(lineup: Lineup, finish_s_U: Floats, sync_s_S: Sequence[float]) -> Floats:
    """Return when each node has also exchanged gradients, which begins once the last replica of its stage is done."""
    last_s_S = np.array([finish_s_U[a:b].max() for a, b in pairwise(lineup.first_S)])
    has_sync_S = np.array(sync_s_S) > 0
    return np.where(has_sync_S[lineup.stage_U], (last_s_S + np.array(sync_s_S))[lineup.stage_U], finish_s_U)


def simulate_plan(
    plan: Plan,
    fleet: Fleet,
    work: Workload,
    wire: WireConfig,
    *,
    overheads: Overheads = NO_OVERHEADS,
    sigma: float = 0.0,
    seed: int = 0,
) -> tuple[Problem, StepSimulation]:
    """Return the arrays of a saved plan on the fleet that it was made for, and what one step of it does.

    Raises PlanError where the plan names a node that the fleet does not have, or is interleaved.
    """
    if plan.num_nodes < len(plan.stages):
        raise PlanError(
            "this plan is interleaved; a simulated node holds one stage",
            "isthmus plan shows what an interleaved step takes; to simulate, set another plan.schedule",
        )
    codecs = [(link.forward_codec, link.backward_codec) for link in plan.links]
    problem = make_problem(fleet, replace(work, schedule=plan.schedule), wire, codecs=codecs or None)
    placement = placement_of(plan, fleet)
    simulation = simulate_step(problem, placement, wire, overheads=overheads, codecs=codecs, sigma=sigma, seed=seed)
    return problem, simulation


def placement_of(plan: Plan, fleet: Fleet) -> Placement:
    """Return a plan's stages as indices into its fleet; stages of the same layers are replicas of one."""
    numbers = {card.node: number for number, card in enumerate(fleet.nodes)}
    missing = [stage.node for stage in plan.stages if stage.node not in numbers]
    if missing:
        raise PlanError(
            f"the plan puts a stage on {missing[0]}, which the fleet does not have",
            "give the plan with the fleet.json that lies beside it",
        )
    spans: dict[tuple[int, int], list[int]] = {}
    for stage in plan.stages:
        spans.setdefault((stage.layer_start, stage.layer_stop), []).append(numbers[stage.node])
    ordered = sorted(spans)
    bounds = (*(start for start, _ in ordered), ordered[-1][1])
    if bounds[0] != 0 or any(a[1] != b[0] for a, b in pairwise(ordered)):
        raise PlanError("the plan's stages do not follow one another", "plan anew with `isthmus plan`")
    return Placement(bounds=bounds, nodes=tuple(tuple(spans[span]) for span in ordered))


def _state_bytes(lineup: Lineup) -> Floats:
    """Return what each node holds whatever runs: weights, gradients, moments."""
    problem = lineup.problem
    return np.array(
        [
            (stop - start) * problem.layer_state_bytes
            + problem.first_state_bytes * (start == 0)
            + problem.last_state_bytes * (stop == problem.num_layers)
            for start, stop in lineup.spans_U
        ]
    )


def _standing_bytes(lineup: Lineup) -> Floats:
    """Return what each node holds besides while it works: what passes, and a block that is computed again.

    Not the frames that a Problem counts once and for all: they are in the ledger one by one.
    """
    problem = lineup.problem
    again_N = np.maximum(0.0, problem.fixed_bytes_N - FRAME_COPIES * problem.raw_frame_bytes_N)
    is_last_U = lineup.stage_U == lineup.num_stages - 1
    return again_N[lineup.nodes_U] + is_last_U * problem.last_bytes


def _finish_s(lineup: Lineup, played: Played) -> Floats:
    """Return when each node has done its last operation; where it has no microbatch, never begun: 0."""
    last_s_SM = played.end_s_ASM.max(axis=0)
    finish_s_U = np.zeros(len(lineup.nodes_U))
    np.maximum.at(finish_s_U, lineup.node_SM.ravel(), last_s_SM.ravel())
    return finish_s_U


def _compute_s(lineup: Lineup, layout: Layout) -> Floats:
    seconds_ASM = layout.duration_s_ASM if layout.is_split else layout.duration_s_ASM[:WEIGHT]
    return np.bincount(
        lineup.node_SM.ravel(), weights=seconds_ASM.sum(axis=0).ravel(), minlength=len(lineup.nodes_U)
    ).astype(np.float64)


def _link_busy_s(layout: Layout) -> Floats:
    num_pairs = len(layout.source_Q)
    frames_Q = np.bincount(layout.pair_SM.ravel(), minlength=num_pairs)
    return frames_Q * layout.frame_bytes_DQ * layout.byte_s_DQ


def _sync_bytes(problem: Problem, placement: Placement) -> tuple[float, ...]:
    """Return what each stage's replicas send one another in a step, all together."""
    found: list[float] = []
    for (start, stop), nodes in zip(pairwise(placement.bounds), placement.nodes, strict=True):
        size = (stop - start) * problem.layer_sync_bytes
        size += problem.first_sync_bytes * (start == 0) + problem.last_sync_bytes * (stop == problem.num_layers)
        found.append(2 * size * (len(nodes) - 1))
    return tuple(found)
