"""Random small problems whose nodes, links, memory and frames all differ, and random placements on them."""

from dataclasses import replace

import numpy as np

from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Placement, Problem


def uneven_problem(rng: np.random.Generator, *, most_nodes: int = 6, most_layers: int = 8) -> Problem:
    """Return one with any schedule; links may be thin or shared, memory short, ends dear and nodes' own ways narrow."""
    num_nodes, num_layers = int(rng.integers(1, most_nodes + 1)), int(rng.integers(1, most_layers + 1))
    num_places = num_nodes if rng.random() < 0.5 else int(rng.integers(1, num_nodes + 1))
    own_places = num_places == num_nodes

    def spread(low: float, high: float, *shape: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), shape))

    def sometimes(values: np.ndarray, otherwise: float) -> np.ndarray:
        return values if rng.random() < 0.5 else np.full(values.shape, otherwise)

    def end() -> np.ndarray:
        return sometimes(spread(0.1, 2.0, num_nodes), 0.0)

    byte_s = spread(1e-3, 1e-1 if rng.random() < 0.6 else 2e-3, num_places, num_places)
    if rng.random() < 0.5:
        np.fill_diagonal(byte_s, 1e-4 * (rng.random() < 0.5))
    memory = (4.0, 14.0 * num_layers) if rng.random() < 0.5 else (3.0 * num_layers, 40.0 * num_layers)
    return Problem(
        num_layers=num_layers,
        num_microbatches=int(rng.integers(1, 20)),
        schedule=("gpipe", "1f1b", "bdp", "bdp-split", "zb-h1")[int(rng.integers(5))],
        layer_forward_s_N=spread(0.2, 2.0, num_nodes),
        layer_backward_s_N=spread(0.2, 4.0, num_nodes),
        first_forward_s_N=end(),
        first_backward_s_N=end(),
        last_forward_s_N=end(),
        last_backward_s_N=end(),
        layer_weight_s_N=np.full(num_nodes, 0.1),
        memory_bytes_N=spread(*memory, num_nodes),
        layer_state_bytes=2.0,
        first_state_bytes=float(rng.integers(4)),
        last_state_bytes=float(rng.integers(4)),
        layer_saved_bytes_N=spread(0.2, 1.0, num_nodes),
        layer_halved_bytes_N=np.full(num_nodes, 0.2),
        raw_frame_bytes_N=np.zeros(num_nodes),
        flight_bytes_N=spread(0.1, 1.0, num_nodes),
        fixed_bytes_N=spread(0.1, 1.0, num_nodes),
        last_bytes=float(rng.integers(3)),
        last_saved_bytes=float(rng.integers(2)),
        place_N=np.arange(num_nodes, dtype=np.int32)
        if own_places
        else rng.integers(0, num_places, num_nodes).astype(np.int32),
        delay_s_PP=rng.uniform(0, 1, (num_places, num_places)),
        byte_s_PP=byte_s,
        shared_bytes_per_s_PP=sometimes(spread(10.0, 500.0, num_places, num_places), np.inf),
        uplink_byte_s_N=sometimes(spread(1e-3, 2e-2, num_nodes), 0.0),
        downlink_byte_s_N=sometimes(spread(1e-3, 2e-2, num_nodes), 0.0),
        forward_bytes_L=sometimes(spread(5.0, 40.0, num_layers), 20.0),
        backward_bytes_L=sometimes(spread(5.0, 40.0, num_layers), 20.0),
        layer_sync_bytes=1.0,
        first_sync_bytes=1.0,
        last_sync_bytes=1.0,
        price_N=spread(0.5, 3.0, num_nodes),
        domain_N=np.arange(num_nodes, dtype=np.int32),
    )


def uneven_limits(rng: np.random.Generator, problem: Problem) -> Limits:
    """Return some on replicas, and now and then on stages and dollars."""
    most_stages = min(problem.num_nodes, problem.num_layers)
    return Limits(
        max_replicas=(1, 1, 2, 8)[int(rng.integers(4))],
        num_stages=None if rng.random() < 0.7 else int(rng.integers(1, most_stages + 1)),
        max_dollars_per_hour=np.inf if rng.random() < 0.6 else float(rng.uniform(1.0, 6.0)),
    )


def any_placement(rng: np.random.Generator, problem: Problem, limits: Limits) -> Placement:
    """Return one with as many stages as the limits say; it need not fit."""
    num_nodes, num_layers = problem.num_nodes, problem.num_layers
    num_stages = limits.num_stages or int(rng.integers(1, min(num_nodes, num_layers) + 1))
    cuts = np.sort(rng.choice(np.arange(1, num_layers), num_stages - 1, replace=False)) if num_stages > 1 else []
    order = rng.permutation(num_nodes).tolist()
    stages = [[order.pop()] for _ in range(num_stages)]
    if limits.max_replicas > 1:
        for node in order[: int(rng.integers(len(order) + 1))]:
            stages[int(rng.integers(num_stages))].append(node)
    return Placement(bounds=(0, *map(int, cuts), num_layers), nodes=tuple(map(tuple, stages)))


def with_another(problem: Problem, node: int) -> Problem:
    """Return the problem with one more node, like another and in the same place."""
    more = {name: np.append(value, value[node]) for name, value in vars(problem).items() if name.endswith("_N")}
    return replace(problem, **more)
