"""The planner's search beside the best placement there is, on fleets small enough to try them all.

    python -m bench.planner_small [--quick] [--check]

Half of the instances are up to 6 nodes and 8 layers with replicas, every placement tried; half are chains of up to 12
nodes, by dynamic programming over subsets. Nodes, links and memory are uneven; where nothing fits both must say so.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass, replace

import numpy as np

from bench.planner_best_chain import best_chain
from bench.planner_optimum import best_of_all
from bench.record import parse_arguments, save
from orchestrator.planner.objective import Found, Limits, score
from orchestrator.planner.problem import Problem
from orchestrator.planner.search import search
from orchestrator.planner.tables import SCHEDULES

NUM_INSTANCES, NUM_QUICK = 300, 40
MOST_MEAN_GAP, MOST_GAP = 0.005, 0.05
# All nodes' memory over what one whole model takes: where it does not bind, where it does, and where little fits.
MEMORY_OVER_MODEL = {"ample": (4.0, 12.0), "tight": (2.0, 4.0), "scarce": (1.2, 2.4)}
# How much above the search's score the subset programme may start from; it must find something below it by itself.
_ROOM = 1 + 1e-6


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One fleet: what it was, what is best, what was found; scores are infinite where nothing fits."""

    kind: str
    memory: str
    schedule: str
    num_nodes: int
    num_layers: int
    num_microbatches: int
    limits: str
    best_score: float
    found_score: float
    gap: float
    search_s: float
    optimum_s: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All instances together; gaps are parts of the optimum, over those where something fits."""

    num_chains: int
    num_replicated: int
    num_infeasible: int
    # Instances where one of the two found something and the other nothing.
    num_mistaken: int
    num_optimal: int
    mean_gap: float
    worst_gap: float
    search_cpu_s: float
    optimum_cpu_s: float


def run(quick: bool, seed: int) -> tuple[Summary, tuple[Instance, ...]]:
    """Return how far the search is from the optimum, over all instances and each."""
    count = NUM_QUICK if quick else NUM_INSTANCES
    instances = tuple(measure(seed, index) for index in range(count))
    fitting = [one for one in instances if math.isfinite(one.best_score) and math.isfinite(one.found_score)]
    return (
        Summary(
            num_chains=sum(one.kind == "chain" for one in instances),
            num_replicated=sum(one.kind == "replicas" for one in instances),
            num_infeasible=sum(not math.isfinite(one.best_score) for one in instances),
            num_mistaken=sum(math.isfinite(one.best_score) != math.isfinite(one.found_score) for one in instances),
            num_optimal=sum(one.gap <= 1e-9 for one in fitting),
            mean_gap=float(np.mean([one.gap for one in fitting])),
            worst_gap=max(one.gap for one in fitting),
            search_cpu_s=sum(one.search_s for one in instances),
            optimum_cpu_s=sum(one.optimum_s for one in instances),
        ),
        instances,
    )


def measure(seed: int, index: int) -> Instance:
    """Return one instance, drawn from the seed and its number."""
    rng = np.random.default_rng((seed, index))
    is_chain = index % 2 == 1
    memory = tuple(MEMORY_OVER_MODEL)[index // 2 % 3]
    problem = draw_problem(rng, is_chain=is_chain, memory=memory)
    limits = Limits() if is_chain else draw_limits(rng, problem)
    started_s = time.process_time()
    found = search(problem, limits, seed=index)
    searched_s = time.process_time()
    best = _best_chain(problem, found) if is_chain else best_of_all(problem, limits)
    done_s = time.process_time()
    for one in (found, best):
        if one.placement is not None:
            assert math.isclose(score(problem, limits, one.placement), one.score, rel_tol=1e-9)
    is_found = math.isfinite(best.score) and math.isfinite(found.score)
    gap = found.score / best.score - 1 if is_found else math.nan
    # Nothing beats the optimum by more than rounding.
    assert not gap < -1e-9, (index, found, best)
    return Instance(
        kind="chain" if is_chain else "replicas",
        memory=memory,
        schedule=problem.schedule,
        num_nodes=problem.num_nodes,
        num_layers=problem.num_layers,
        num_microbatches=problem.num_microbatches,
        limits=_changed(limits),
        best_score=best.score,
        found_score=found.score,
        gap=max(gap, 0.0) if is_found else math.nan,
        search_s=searched_s - started_s,
        optimum_s=done_s - searched_s,
    )


def _best_chain(problem: Problem, found: Found) -> Found:
    """Return the best chain; what the search found only bounds what is looked at, and is itself found again."""
    return best_chain(problem, below=found.score * _ROOM)


def draw_problem(rng: np.random.Generator, *, is_chain: bool, memory: str) -> Problem:
    """Return a random fleet: speeds to 8 times apart, delays 1 to 200 ms, rates 20 to 5,000 Mbit/s.

    A quarter of the fleets with replicas stand in two to four places, half of these with a limit on what all flows
    between two places carry together.
    """
    nodes = int(rng.integers(7, 13) if is_chain else rng.integers(2, 7))
    layers = int(rng.integers(6, 13) if is_chain else rng.integers(3, 9))
    has_places = not is_chain and rng.random() < 0.25
    places = int(rng.integers(2, 5)) if has_places else nodes

    def between(low: float, high: float, *shape: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), shape))

    def own_way() -> np.ndarray:
        return np.where(rng.random(nodes) < 0.5, 0.0, 8 / (between(50, 1000, nodes) * 1e6))

    layer_s_N = 0.01 * between(1, 8, nodes)
    layer_bytes, end_bytes, microbatches = 2e9, 1e9, int(rng.choice([4, 8, 16, 32, 64]))
    memory_N = between(1, 6, nodes)
    memory_N *= rng.uniform(*MEMORY_OVER_MODEL[memory]) * (layers * layer_bytes + 2 * end_bytes) / memory_N.sum()
    frame_bytes = float(between(1e5, 4e6)), float(between(1e5, 4e6))
    problem = Problem(
        num_layers=layers,
        num_microbatches=microbatches,
        schedule=SCHEDULES[int(rng.integers(4))],
        layer_forward_s_N=layer_s_N,
        layer_backward_s_N=2 * layer_s_N * between(0.9, 1.1, nodes),
        first_forward_s_N=layer_s_N * 0.3,
        first_backward_s_N=layer_s_N * 0.2,
        last_forward_s_N=layer_s_N * 0.8,
        last_backward_s_N=layer_s_N * 1.5,
        layer_weight_s_N=layer_s_N * 0.9,
        memory_bytes_N=memory_N,
        layer_state_bytes=layer_bytes,
        first_state_bytes=end_bytes,
        last_state_bytes=end_bytes,
        layer_saved_bytes_N=np.full(nodes, between(1e7, 1e8)),
        layer_halved_bytes_N=np.full(nodes, 1e7),
        raw_frame_bytes_N=np.full(nodes, 1e7),
        flight_bytes_N=np.full(nodes, 1e7),
        fixed_bytes_N=np.full(nodes, 5e7),
        last_bytes=2e8,
        last_saved_bytes=5e7,
        place_N=np.arange(nodes, dtype=np.int32) % places,
        delay_s_PP=between(0.001, 0.2, places, places),
        byte_s_PP=8 / (between(20, 5000, places, places) * 1e6),
        shared_bytes_per_s_PP=np.full((places, places), np.inf),
        uplink_byte_s_N=own_way(),
        downlink_byte_s_N=own_way(),
        forward_bytes_L=np.full(layers, frame_bytes[0]),
        backward_bytes_L=np.full(layers, frame_bytes[1]),
        layer_sync_bytes=float(between(1e7, 5e8)),
        first_sync_bytes=1e8,
        last_sync_bytes=1e8,
        price_N=between(0.1, 5, nodes),
        domain_N=rng.integers(0, max(2, nodes // 2), nodes).astype(np.int32),
    )
    if has_places and rng.random() < 0.5:
        return replace(problem, shared_bytes_per_s_PP=between(1e6, 1e9, places, places))
    return problem


def draw_limits(rng: np.random.Generator, problem: Problem) -> Limits:
    """Return limits with replicas; every other time something else is asked for, too."""
    most = int(rng.integers(2, 4))
    other = int(rng.integers(10))
    budget = float(problem.price_N.sum() * rng.uniform(0.3, 0.7))
    return {
        0: Limits(max_replicas=most, objective="dollars"),
        1: Limits(max_replicas=most, max_dollars_per_hour=budget),
        2: Limits(max_replicas=most, min_copies=2),
        3: Limits(max_replicas=most, pins=((0, 0),), after=((1, 0),)),
        4: Limits(max_replicas=most, num_stages=2, min_domains=2),
    }.get(other, Limits(max_replicas=most))


def _changed(limits: Limits) -> str:
    """Return what is not as it is where nothing is said, in words."""
    usual = asdict(Limits())
    return ", ".join(f"{name} {value}" for name, value in asdict(limits).items() if value != usual[name])


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    summary, instances = run(arguments.quick, 0)
    print(
        f"{summary.num_chains} chains, {summary.num_replicated} with replicas; {summary.num_infeasible} where nothing "
        f"fits, {summary.num_mistaken} mistaken\n{summary.num_optimal} optimal, mean gap {summary.mean_gap:.4%}, worst "
        f"{summary.worst_gap:.3%}\nCPU: search {summary.search_cpu_s:.0f} s, optimum {summary.optimum_cpu_s:.0f} s"
    )
    # JSON knows neither infinity nor NaN.
    rows = [
        {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in asdict(one).items()}
        for one in instances
    ]
    print(save("planner_small", arguments, {"summary": asdict(summary), "instances": rows}))
    good = summary.mean_gap <= MOST_MEAN_GAP and summary.worst_gap <= MOST_GAP and not summary.num_mistaken
    if arguments.check and not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
