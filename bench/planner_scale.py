"""How near to the certified bound plans for 8 to 10,000 nodes come, and how long they take to find and to repair.

    python -m bench.planner_scale [--quick] [--check]

Fleets are synthetic and seeded (bench.planner_fleets): six kinds of GPU, links between regions from 30 Mbit/s to 30
Gbit/s, frames in q8; a model of about 8 billion parameters on 8 and 24 nodes, of about 70 billion on more. The rate is
the cost model's, in microbatches a second once the pipeline is full, and the gap is what it lacks of the bound. What a
step takes besides (fill, commit, exchange among replicas) stands beside it; large fleets are planned for the rate here,
and once more for the shortest step, which is what `isthmus plan` does. Times are of this process on one thread;
compilation is not in them, nor is making the fleet and its arrays. A join or a leave: the bound solved again, and
`replan`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace

import numpy as np

from actors.model.spec import ModelSpec
from bench.planner_fleets import MODEL_8B, MODEL_70B, synthetic_fleet, synthetic_problem
from bench.record import parse_arguments, save
from orchestrator.planner.bound import StandingBound
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.large import default_large_evaluations, judge, plan_large
from orchestrator.planner.migration import StateSizes
from orchestrator.planner.objective import Limits
from orchestrator.planner.plan import MIN_CLASSED_NODES, find
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.replan import replan

ANY_REPLICAS = Limits(max_replicas=1_000_000)
# A layer's weights and moments in bfloat16 and float32, and a day for which a fleet stays as it is.
STATE, HORIZON_S = StateSizes(layer_bytes=9e9, first_bytes=3e9, last_bytes=3e9, store_byte_s=1e-9), 86_400.0
# Up to so many nodes stages have so many replicas at most.
SMALL, SMALL_LIMITS = 64, Limits(max_replicas=8)
# Nodes, regions, model, microbatches a step.
SIZES = (
    (8, 4, MODEL_8B, 64),
    (24, 5, MODEL_8B, 64),
    (64, 5, MODEL_70B, 64),
    (200, 5, MODEL_70B, 64),
    (1_000, 10, MODEL_70B, 125),
    (10_000, 20, MODEL_70B, 1250),
)
# What must hold: gap from so many nodes up, and seconds by nodes; replan after one join or leave.
MOST_GAP, GAP_FROM = 0.02, 1_000
MOST_WALL_S = {64: 2.0, 1_000: 5.0, 10_000: 10.0}
MOST_REPLAN_MS = 100.0


@dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """One fleet: rates in microbatches a second, times in seconds but where milliseconds are said."""

    nodes: int
    regions: int
    seed: int
    microbatches: int
    stages: int
    nodes_used: int
    rate: float
    bound: float
    gap: float
    binds: str
    step_s: float
    fill_s: float
    sync_s: float
    commit_s: float
    bound_wall_s: float
    plan_wall_s: float
    plan_cpu_s: float
    # What a step takes of the plan made for the shortest step, its rate's gap, and how long that took to find.
    short_step_s: float
    short_gap: float
    short_wall_s: float


@dataclass(frozen=True, kw_only=True)
class ReplanRow:
    """One node more or less at the largest fleet, median over several, of wall and of processor time."""

    change: str
    nodes: int
    bound_wall_ms: float
    replan_wall_ms: float
    bound_cpu_ms: float
    replan_cpu_ms: float
    worst_gap: float


def run(quick: bool) -> tuple[list[ScaleRow], list[ReplanRow]]:
    """Return the figures of all sizes, over one seed or three, and of changes to the largest fleet."""
    _compile()
    rows: list[ScaleRow] = []
    largest: tuple[Problem, Placement] | None = None
    for nodes, regions, model, microbatches in SIZES:
        for seed in range(1 if quick else 3):
            problem = _problem(nodes, regions, model, microbatches, seed)
            row, placement = _measure(problem, nodes, regions, seed)
            rows.append(row)
            print(_line(row), flush=True)
            if placement is not None:
                largest = problem, placement
    assert largest is not None, "no plan for the largest fleet"
    return rows, _replans(*largest, times=4 if quick else 12)


def _problem(nodes: int, regions: int, model: ModelSpec, microbatches: int, seed: int) -> Problem:
    return synthetic_problem(synthetic_fleet(nodes, regions, model, seed=seed), model, microbatches)


def _compile() -> None:
    """Compile what is compiled at first use, or load it from the cache."""
    problem = _problem(200, 5, MODEL_70B, 64, 0)
    found = find(problem, PlanConfig(evaluations=300), ANY_REPLICAS)
    assert found.placement is not None
    changed = _joined(_problem(1000, 5, MODEL_70B, 64, 0), found.placement, 0)
    replan(*changed, ANY_REPLICAS, state_sizes=STATE, horizon_s=HORIZON_S, seed=0)


def _measure(problem: Problem, nodes: int, regions: int, seed: int) -> tuple[ScaleRow, Placement | None]:
    limits = SMALL_LIMITS if nodes <= SMALL else ANY_REPLICAS
    started = time.perf_counter()
    bound = StandingBound(limits).of(problem)
    bounded, cpu = time.perf_counter(), time.process_time()
    found = short = find(problem, PlanConfig(seed=seed), limits)
    shortened, cpu = time.perf_counter(), time.process_time() - cpu
    short_s = plan_s = shortened - bounded
    if nodes >= MIN_CLASSED_NODES:
        evaluations, cpu = default_large_evaluations(problem), time.process_time()
        found = plan_large(problem, limits, seed=seed, evaluations=evaluations, steady=True)
        plan_s, cpu = time.perf_counter() - shortened, time.process_time() - cpu
    short_cost = None if short.placement is None else judge(problem, limits, short.placement).evaluation
    cost = None if found.placement is None else judge(problem, limits, found.placement).evaluation
    binds: dict[str, float] = {}
    for bind in bound.binds:
        binds[bind.kind] = binds.get(bind.kind, 0.0) + bind.share
    row = ScaleRow(
        nodes=nodes,
        regions=regions,
        seed=seed,
        microbatches=problem.num_microbatches,
        stages=0 if found.placement is None else found.placement.num_stages,
        nodes_used=0 if found.placement is None else len(found.placement.used),
        rate=cost.rate if cost else 0.0,
        bound=bound.rate,
        gap=1 - (cost.rate if cost else 0.0) / bound.rate if bound.rate else 0.0,
        binds=", ".join(f"{kind} {share:.0%}" for kind, share in binds.items()),
        step_s=cost.step_s if cost else np.inf,
        fill_s=cost.fill_s if cost else np.inf,
        sync_s=cost.sync_s if cost else np.inf,
        commit_s=cost.commit_s if cost else np.inf,
        bound_wall_s=bounded - started,
        plan_wall_s=plan_s,
        plan_cpu_s=cpu,
        short_step_s=short_cost.step_s if short_cost else np.inf,
        short_gap=1 - (short_cost.rate if short_cost else 0.0) / bound.rate if bound.rate else 0.0,
        short_wall_s=short_s,
    )
    return row, found.placement


def _replans(problem: Problem, placement: Placement, *, times: int) -> list[ReplanRow]:
    """Return what one node more, and one less, cost; each from the same plan."""
    standing = StandingBound(ANY_REPLICAS)
    standing.of(problem)
    rng = np.random.default_rng(0)
    rows: list[ReplanRow] = []
    for change in ("join", "leave"):
        taken: list[list[float]] = []
        gaps: list[float] = []
        for node in rng.choice(np.array(placement.used), times, replace=False).tolist():
            changed, left = (_joined if change == "join" else _left)(problem, placement, int(node))
            walls, cpus = [time.perf_counter()], [time.process_time()]
            bound = standing.of(changed)
            walls.append(time.perf_counter())
            cpus.append(time.process_time())
            found = replan(changed, left, ANY_REPLICAS, state_sizes=STATE, horizon_s=HORIZON_S, seed=0)
            walls.append(time.perf_counter())
            cpus.append(time.process_time())
            assert found.placement is not None
            gaps.append(1 - judge(changed, ANY_REPLICAS, found.placement).evaluation.rate / bound.rate)
            taken.append([*np.diff(walls).tolist(), *np.diff(cpus).tolist()])
        middle = (1e3 * np.median(np.array(taken), axis=0)).tolist()
        row = ReplanRow(
            change=change,
            nodes=problem.num_nodes,
            bound_wall_ms=middle[0],
            replan_wall_ms=middle[1],
            bound_cpu_ms=middle[2],
            replan_cpu_ms=middle[3],
            worst_gap=max(gaps),
        )
        rows.append(row)
        print(
            f"{change}: bound {row.bound_wall_ms:.0f} ms (processor {row.bound_cpu_ms:.0f}), "
            f"replan {row.replan_wall_ms:.0f} ms ({row.replan_cpu_ms:.0f}), worst gap {row.worst_gap:.2%}",
            flush=True,
        )
    return rows


def _joined(problem: Problem, placement: Placement, node: int) -> tuple[Problem, Placement]:
    """Return the fleet with one more node, like this one."""
    more = {name: np.append(value, value[node]) for name, value in vars(problem).items() if name.endswith("_N")}
    return replace(problem, **more), placement


def _left(problem: Problem, placement: Placement, node: int) -> tuple[Problem, Placement]:
    """Return the fleet without this node: it has no memory, so that all others keep their numbers."""
    memory_N = problem.memory_bytes_N.copy()
    memory_N[node] = 0.0
    stages = tuple(tuple(n for n in nodes if n != node) for nodes in placement.nodes)
    return replace(problem, memory_bytes_N=memory_N), Placement(bounds=placement.bounds, nodes=stages)


def _line(row: ScaleRow) -> str:
    return (
        f"{row.nodes:>6} nodes, {row.regions:>2} regions, seed {row.seed}: {row.stages:>2} stages, {row.rate:8.3f} of "
        f"{row.bound:8.3f} microbatches/s, gap {row.gap:6.2%} ({row.binds}); step {row.step_s:7.1f} s: fill "
        f"{row.fill_s:5.1f}, exchange {row.sync_s:6.1f}, commit {row.commit_s:4.2f}; plan {row.plan_wall_s:5.2f} s "
        f"wall, {row.plan_cpu_s:5.2f} s processor, bound {1e3 * row.bound_wall_s:4.0f} ms; "
        f"shortest step {row.short_step_s:.1f} s, gap {row.short_gap:.2%}, {row.short_wall_s:.2f} s"
    )


def _missed(rows: list[ScaleRow], replans: list[ReplanRow]) -> list[str]:
    missed = [
        f"{row.nodes} nodes, seed {row.seed}: gap {row.gap:.2%}, {MOST_GAP:.0%} at most"
        for row in rows
        if row.nodes >= GAP_FROM and row.gap > MOST_GAP
    ]
    for row in rows:
        most_s = MOST_WALL_S.get(row.nodes, np.inf)
        taken = max(row.plan_wall_s, row.short_wall_s) + row.bound_wall_s
        if taken > most_s:
            missed.append(f"{row.nodes} nodes, seed {row.seed}: {taken:.1f} s, {most_s:.0f} at most")
    for row in replans:
        taken = row.bound_wall_ms + row.replan_wall_ms
        if taken > MOST_REPLAN_MS:
            missed.append(f"after a {row.change}: {taken:.0f} ms, {MOST_REPLAN_MS:.0f} at most")
    return missed


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    rows, replans = run(arguments.quick)
    missed = _missed(rows, replans)
    document = {"fleets": [asdict(row) for row in rows], "replans": [asdict(row) for row in replans], "missed": missed}
    print(save("planner_scale", arguments, document))
    for line in missed:
        print("missed:", line)
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
