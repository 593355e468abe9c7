"""Problems for tests of the planner: one that is all alike, to do sums on by hand, and random uneven ones."""

from dataclasses import replace

import numpy as np

from actors.spec import ScheduleName
from orchestrator.planner.problem import Problem


def uniform_problem(
    *,
    num_nodes: int,
    num_layers: int,
    num_microbatches: int,
    frame_bytes: float = 0.0,
    byte_s: float = 0.0,
    delay_s: float = 0.0,
    sync_bytes: float = 0.0,
    num_places: int | None = None,
) -> Problem:
    """Return equal nodes whose layer takes 1 s forward and 2 s backward, a byte of state and one of activations.

    A node costs a dollar an hour and has 1,000 bytes; with fewer places than nodes they stand in them by turns.
    """
    places = num_places or num_nodes

    def all_of(value: float) -> np.ndarray:
        return np.full(num_nodes, value, dtype=np.float64)

    apart = 1 - np.eye(places)
    return Problem(
        num_layers=num_layers,
        num_microbatches=num_microbatches,
        schedule="1f1b",
        layer_forward_s_N=all_of(1.0),
        layer_backward_s_N=all_of(2.0),
        first_forward_s_N=all_of(0.0),
        first_backward_s_N=all_of(0.0),
        last_forward_s_N=all_of(0.0),
        last_backward_s_N=all_of(0.0),
        layer_weight_s_N=all_of(1.0),
        memory_bytes_N=all_of(1000.0),
        layer_state_bytes=2.0,
        first_state_bytes=0.0,
        last_state_bytes=0.0,
        layer_saved_bytes_N=all_of(1.0),
        layer_halved_bytes_N=all_of(0.75),
        raw_frame_bytes_N=all_of(1.0),
        flight_bytes_N=all_of(1.0),
        fixed_bytes_N=all_of(0.0),
        last_bytes=0.0,
        last_saved_bytes=0.0,
        place_N=np.arange(num_nodes, dtype=np.int32) % places,
        delay_s_PP=delay_s * apart,
        byte_s_PP=byte_s * apart,
        shared_bytes_per_s_PP=np.full((places, places), np.inf),
        uplink_byte_s_N=all_of(0.0),
        downlink_byte_s_N=all_of(0.0),
        forward_bytes_L=np.full(num_layers, frame_bytes),
        backward_bytes_L=np.full(num_layers, frame_bytes),
        layer_sync_bytes=sync_bytes,
        first_sync_bytes=0.0,
        last_sync_bytes=0.0,
        price_N=all_of(1.0),
        domain_N=np.arange(num_nodes, dtype=np.int32),
    )


def random_problem(
    seed: int,
    *,
    num_nodes: int,
    num_layers: int,
    num_microbatches: int,
    schedule: ScheduleName = "1f1b",
    num_places: int | None = None,
    shared: bool = False,
) -> Problem:
    """Return uneven nodes and links: speeds to 8 times apart, memory 10, delays 1 to 200 ms, rates 20 to 5,000 Mbit/s.

    Half of the nodes have a limit on their own way out, and half on that in; a layer takes 2 GB of state, 0.3 a
    microbatch. Where `shared`, what all flows between two places may carry is limited too.
    """
    rng = np.random.default_rng(seed)
    base = uniform_problem(
        num_nodes=num_nodes, num_layers=num_layers, num_microbatches=num_microbatches, num_places=num_places
    )
    places = base.num_places

    def between(low: float, high: float, *shape: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), shape))

    def own_way() -> np.ndarray:
        return np.where(rng.random(num_nodes) < 0.5, 0.0, 8 / (between(50, 1000, num_nodes) * 1e6))

    layer_s_N = 0.01 * between(1, 8, num_nodes)
    return replace(
        base,
        schedule=schedule,
        layer_forward_s_N=layer_s_N,
        layer_backward_s_N=2 * layer_s_N * between(0.9, 1.1, num_nodes),
        first_forward_s_N=layer_s_N * 0.3,
        first_backward_s_N=layer_s_N * 0.2,
        last_forward_s_N=layer_s_N * 0.8,
        last_backward_s_N=layer_s_N * 1.5,
        layer_weight_s_N=layer_s_N * 0.9,
        memory_bytes_N=1e9 * between(8, 80, num_nodes),
        layer_state_bytes=2e9,
        first_state_bytes=1e9,
        last_state_bytes=1e9,
        layer_saved_bytes_N=np.full(num_nodes, 3e8),
        layer_halved_bytes_N=np.full(num_nodes, 2e8),
        raw_frame_bytes_N=np.full(num_nodes, 3e7),
        flight_bytes_N=np.full(num_nodes, 3e7),
        fixed_bytes_N=np.full(num_nodes, 1e8),
        last_bytes=5e8,
        last_saved_bytes=2e8,
        delay_s_PP=between(0.001, 0.2, places, places),
        byte_s_PP=8 / (between(20, 5000, places, places) * 1e6),
        shared_bytes_per_s_PP=between(1e6, 1e9, places, places) if shared else base.shared_bytes_per_s_PP,
        uplink_byte_s_N=own_way(),
        downlink_byte_s_N=own_way(),
        forward_bytes_L=between(1e5, 4e6, num_layers),
        backward_bytes_L=between(1e5, 4e6, num_layers),
        layer_sync_bytes=5e8,
        first_sync_bytes=2e8,
        last_sync_bytes=1e8,
        price_N=between(0.1, 5, num_nodes),
        domain_N=rng.integers(0, max(2, num_nodes // 2), num_nodes).astype(np.int32),
    )
