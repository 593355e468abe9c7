"""Who sits where: the seat search for S stages of R replicas whose communication costs least.

PURE. A portfolio of annealing runs in a fixed order, ended by a budget of evaluations: of seats, which finds structure
and plateaus' ends, and of groups, which sees what only new chains and a new order of stages would gain. Runs start
afresh or from the best so far, the first ones short. The same inputs and seed give the same seats, and a larger budget
goes on where a smaller one ended, so it is never worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.errors import PlanError
from orchestrator.planner.draws import new_stream, shuffle
from orchestrator.planner.grid_cost import GridObjective, seated_cost_s
from orchestrator.planner.grid_groups import MOST_ORDERED, anneal_groups, seat_groups
from orchestrator.planner.grid_moves import Cooling, Links, anneal_grid

DEFAULT_EVALUATIONS = 16_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class GridPlacement:
    """Seats found, and what they cost by the objective's definition."""

    # [s, r]: the node of stage s in chain r, as the objective counts nodes.
    seats_SR: NDArray[np.int64]
    cost_s: float
    # Placements costed, of seats or of groups.
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One annealing run; temperatures are in shares of what a stage costs where nodes sit at random."""

    of_groups: bool = False
    afresh: bool = False
    hot: float
    cold: float
    first_blur: float
    last_blur: float
    moves_per_seat: int


_FRESH = _Run(afresh=True, hot=0.08, cold=0.004, first_blur=0.8, last_blur=0.5, moves_per_seat=4000)
_WARM = _Run(hot=0.02, cold=0.004, first_blur=0.5, last_blur=0.3, moves_per_seat=4000)
_COOL = _Run(hot=0.02, cold=0.002, first_blur=0.3, last_blur=0.05, moves_per_seat=4000)
_GROUPS = _Run(of_groups=True, afresh=True, hot=0.03, cold=0.001, first_blur=0.5, last_blur=0.1, moves_per_seat=150)
_ROUND = (_FRESH, _WARM, _COOL, _GROUPS, _WARM, _COOL)
# The first rounds are shorter by these factors, so that a small budget sees all kinds of run.
_SHORTER = (8, 4, 2)


def search_grid(
    objective: GridObjective,
    num_stages: int,
    num_replicas: int,
    seed: int,
    evaluations: int = DEFAULT_EVALUATIONS,
) -> GridPlacement:
    """Return the best seats found for `num_stages` x `num_replicas` of the objective's nodes; the others stay spare.

    Smoothed annealing of seats, and of groups after DT-FM (arXiv 2206.01288). Raises PlanError for too few nodes.
    """
    num_seats = num_stages * num_replicas
    if min(num_stages, num_replicas) < 1:
        raise PlanError(f"{num_stages} stages of {num_replicas} replicas", "ask for 1 or more of each")
    if num_seats > objective.num_nodes:
        raise PlanError(
            f"{num_stages} stages of {num_replicas} replicas need {num_seats} nodes, the fleet has "
            f"{objective.num_nodes}",
            "add nodes, or ask for fewer stages or replicas",
        )
    if evaluations < 1:
        raise PlanError(f"{evaluations} evaluations", "ask for 1 or more")
    links = _links(objective, num_replicas)
    stage_s = _random_stage_s(links, num_stages, num_replicas)
    best_N, best_s = np.arange(objective.num_nodes), float("inf")
    left, index = evaluations, 0
    while left > 0:
        run = _run(index, num_stages)
        stream = new_stream(seed, index)
        length = _length(run, index, num_seats)
        limit = min(length, left)
        start_N = best_N
        if run.afresh:
            start_N = np.arange(objective.num_nodes)
            shuffle(stream, start_N)
        cooling = Cooling(run.hot * stage_s, run.cold * stage_s, run.first_blur, run.last_blur)
        anneal = anneal_groups if run.of_groups else anneal_grid
        node_N = anneal(links, start_N, num_stages, num_replicas, cooling, length, limit, stream)
        # Not where the budget ends a run: its best a little later, better as it is, might seat worse, and a larger
        # budget be worse.
        if limit == length:
            node_N = seat_groups(links, node_N, num_stages, num_replicas)
        cost_s = seated_cost_s(objective, node_N[:num_seats].reshape(num_stages, num_replicas))
        if cost_s < best_s:
            best_N, best_s = node_N, cost_s
        left -= limit
        index += 1
    return GridPlacement(
        seats_SR=best_N[:num_seats].reshape(num_stages, num_replicas).copy(), cost_s=best_s, evaluations=evaluations
    )


def _run(index: int, num_stages: int) -> _Run:
    run = _ROUND[index % len(_ROUND)]
    return _FRESH if run.of_groups and num_stages > MOST_ORDERED else run


def _length(run: _Run, index: int, num_seats: int) -> int:
    rounds = index // len(_ROUND)
    shorter = _SHORTER[rounds] if rounds < len(_SHORTER) else 1
    return max(1, run.moves_per_seat * num_seats // shorter)


def _links(objective: GridObjective, num_replicas: int) -> Links:
    """Return what pairs of nodes cost each other, there and back."""
    apart_NN = ~np.eye(objective.num_nodes, dtype=bool)
    delay_s_NN = np.where(apart_NN, objective.delay_s_NN, 0.0)
    s_per_byte_NN = 8e-6 / np.where(apart_NN, objective.rate_mbps_NN, np.inf)
    one_way_s_2NN = np.stack(
        [
            delay_s_NN + size_bytes * s_per_byte_NN
            for size_bytes in (objective.sync_bytes / num_replicas, objective.hop_bytes)
        ]
    )
    pair_s_2NN = one_way_s_2NN + one_way_s_2NN.transpose(0, 2, 1)
    # Stable, so that ties are broken the same everywhere; a node itself comes last and is cut off.
    hop_s_NN = np.where(apart_NN, pair_s_2NN[1], np.inf)
    near_NN = np.argsort(hop_s_NN, axis=1, kind="stable")[:, :-1]
    return Links(pair_s_2NN, np.ascontiguousarray(near_NN))


def _random_stage_s(links: Links, num_stages: int, num_replicas: int) -> float:
    """Return about what a stage costs, its hop included, where nodes sit at random: the unit of temperature."""
    num_nodes = len(links.near_NN)
    num_pairs = max(1, num_nodes * (num_nodes - 1))
    sync_s, hop_s = (float(total_s) / num_pairs for total_s in links.pair_s_2NN.sum(axis=(1, 2)))
    # Where everything is free any temperature does.
    return ((num_replicas - 1) * sync_s + (num_stages - 1) * hop_s) / num_stages or 1.0
