"""Problems for tests of the planner: one that is all alike, to do sums on by hand, and random uneven ones."""

import numpy as np

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
        flight_bytes_N=all_of(1.0),
        fixed_bytes_N=all_of(0.0),
        last_bytes=0.0,
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
