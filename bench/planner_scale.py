"""How near to the certified bound plans for 8 to 10,000 nodes come, and how long they take to find and to repair.

    python -m bench.planner_scale [--quick] [--check]

Fleets are synthetic and seeded (bench.planner_fleets): six kinds of GPU, links between regions from 30 Mbit/s to 30
Gbit/s, frames in q8; a model of about 8 billion parameters on 8 and 24 nodes, of about 70 billion on more. The rate is
the cost model's, in microbatches a second once the pipeline is full, and the gap is what it lacks of the bound. What a
step takes besides (fill, commit, exchange among replicas) stands beside it. Times are of this process on one thread;
compilation is not in them, nor is making the fleet and its arrays. A join or a leave: the bound solved again, the plan
repaired.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from actors.model.spec import ModelSpec
from bench.planner_fleets import MODEL_8B, MODEL_70B, synthetic_fleet, synthetic_problem
from bench.record import parse_arguments, save
from orchestrator.planner.bound import StandingBound
from orchestrator.planner.large import judge, plan_large
from orchestrator.planner.large_repair import repair_large
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Placement, Problem

ANY_REPLICAS = Limits(max_replicas=1_000_000)
EVALUATIONS, REPAIR_CHANGES = 5000, 10
# Up to so many nodes the search for small fleets plans, with so many replicas a stage at most.
SMALL, SMALL_LIMITS = 64, Limits(max_replicas=8)
_SEARCH = "orchestrator.planner.search"
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


@dataclass(frozen=True, kw_only=True)
class ReplanRow:
    """One node more or less at the largest fleet, median over several, of wall and of processor time."""

    change: str
    nodes: int
    bound_wall_ms: float
    repair_wall_ms: float
    bound_cpu_ms: float
    repair_cpu_ms: float
    worst_gap: float


def run(quick: bool) -> tuple[list[ScaleRow], list[ReplanRow]]:
    """Return the figures of all sizes, over one seed or three, and of changes to the largest fleet."""
    _compile()
    rows: list[ScaleRow] = []
    largest: tuple[Problem, Placement] | None = None
    for nodes, regions, model, microbatches in SIZES:
        if nodes <= SMALL and find_spec(_SEARCH) is None:
            continue
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
    found = plan_large(problem, ANY_REPLICAS, seed=0, evaluations=300)
    assert found.placement is not None
    repair_large(problem, found.placement, ANY_REPLICAS, 1)


def _measure(problem: Problem, nodes: int, regions: int, seed: int) -> tuple[ScaleRow, Placement | None]:
    limits = SMALL_LIMITS if nodes <= SMALL else ANY_REPLICAS
    started = time.perf_counter()
    bound = StandingBound(limits).of(problem)
    bounded, cpu = time.perf_counter(), time.process_time()
    if nodes <= SMALL:
        found = import_module(_SEARCH).search(problem, limits, seed=seed)
    else:
        found = plan_large(problem, limits, seed=seed, evaluations=EVALUATIONS)
    planned, cpu = time.perf_counter(), time.process_time() - cpu
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
        plan_wall_s=planned - bounded,
        plan_cpu_s=cpu,
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
            found = repair_large(changed, left, ANY_REPLICAS, REPAIR_CHANGES)
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
            repair_wall_ms=middle[1],
            bound_cpu_ms=middle[2],
            repair_cpu_ms=middle[3],
            worst_gap=max(gaps),
        )
        rows.append(row)
        print(
            f"{change}: bound {row.bound_wall_ms:.0f} ms (processor {row.bound_cpu_ms:.0f}), "
            f"repair {row.repair_wall_ms:.0f} ms ({row.repair_cpu_ms:.0f}), worst gap {row.worst_gap:.2%}",
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
        f"wall, {row.plan_cpu_s:5.2f} s processor, bound {1e3 * row.bound_wall_s:4.0f} ms"
    )


def _missed(rows: list[ScaleRow], replans: list[ReplanRow]) -> list[str]:
    missed = [
        f"{nodes} nodes: not planned, {_SEARCH} is not there"
        for nodes, *_ in SIZES
        if not any(row.nodes == nodes for row in rows)
    ]
    missed += [
        f"{row.nodes} nodes, seed {row.seed}: gap {row.gap:.2%}, {MOST_GAP:.0%} at most"
        for row in rows
        if row.nodes >= GAP_FROM and row.gap > MOST_GAP
    ]
    for row in rows:
        most_s = MOST_WALL_S.get(row.nodes, np.inf)
        taken = row.plan_wall_s + row.bound_wall_s
        if taken > most_s:
            missed.append(f"{row.nodes} nodes, seed {row.seed}: {taken:.1f} s, {most_s:.0f} at most")
    for row in replans:
        taken = row.bound_wall_ms + row.repair_wall_ms
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
