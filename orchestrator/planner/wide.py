"""`evaluate`, as fast for stages of hundreds of replicas as for few: the same figures, from arrays.

PURE. Flow among replicas is what takes time. It need not be computed where every link and every shared way carries its
part when each node is dealt a share in proportion to its speed: no flow is larger then. Otherwise the very flow that
`evaluate` asks for is computed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from actors.schedule import SPLIT
from orchestrator.planner.evaluate import IN_FLIGHT_MARGIN, Evaluation, evaluate
from orchestrator.planner.flow import max_flow
from orchestrator.planner.problem import Floats, Ints, Placement, Problem
from orchestrator.planner.stretches import slowest_stretch

_ROUNDING = 1e-9
# Arrays over stages and pairs of places have so many cells at most.
_MOST_CELLS = 1 << 20
# So many nodes are evaluated as the specification does it.
_MOST_PLAIN = 64


def evaluated(problem: Problem, placement: Placement) -> Evaluation:
    """Return what a placement costs, in the form that is quick for its size."""
    return (evaluate if len(placement.used) <= _MOST_PLAIN else evaluate_wide)(problem, placement)


def evaluate_wide(problem: Problem, placement: Placement) -> Evaluation:
    """Return what `evaluate` returns, but for the last digits."""
    view = _Wide(problem, placement)
    total_K = view.forward_K + view.backward_K
    shares_K = _split(total_K, view.start_S, problem.num_microbatches)
    trip_S, beyond_S = view.trips(total_K)
    if problem.schedule == "gpipe":
        down, up = view.pace(view.forward_K, shares_K, True, False), view.pace(view.backward_K, shares_K, False, True)
        more_s, pace_s = down[0] + up[0], down[1] + up[1]
    else:
        more_s, pace_s = view.pace(total_K, shares_K, True, True)
    window_K = view.windows(total_K, trip_S, pace_s)
    held_S = view.sums(np.minimum(window_K, shares_K))
    num_more_S = problem.num_microbatches - view.sums((shares_K > 0).astype(np.int64))
    rate = 1 / pace_s
    for trip_s, held, num_more in zip(trip_S.tolist(), held_S.tolist(), num_more_S.tolist(), strict=True):
        if held <= num_more:
            rounds, rest = divmod(num_more, held)
            more_s = max(more_s, rounds * max(trip_s, held * pace_s) + rest * pace_s)
            rate = min(rate, held / trip_s)
    if problem.schedule in ("1f1b", "zb-h1") and len(view.node_K) == view.num_stages:
        held_up_s, slowest = slowest_stretch(trip_S, beyond_S, problem.num_microbatches, pace_s)
        if slowest is not None:
            more_s, rate = max(more_s, held_up_s), min(rate, slowest.count / slowest.seconds)
    sync_s = view.sync_s()
    delays = problem.delay_s_PP[problem.place_N[view.node_K[0]], problem.place_N[view.node_K]]
    commit_s = 2 * float(delays.max()) if len(view.node_K) > 1 else 0.0
    memory_K = view.memory(np.minimum(window_K, shares_K))
    short = float((memory_K - problem.memory_bytes_N[view.node_K]).max())
    return Evaluation(
        step_s=float(trip_S[0]) + more_s + sync_s + commit_s,
        rate=rate,
        fill_s=float(trip_S[0]),
        pace_s=pace_s,
        sync_s=sync_s,
        commit_s=commit_s,
        in_flight_SR=view.by_stage(window_K),
        shares_S=view.by_stage(shares_K),
        memory_S=view.by_stage(memory_K),
        short_bytes=max(0.0, short),
    )


class _Wide:
    """A placement as arrays over its K replicas, stage by stage; stage s has those from start_S[s] on."""

    def __init__(self, problem: Problem, placement: Placement) -> None:
        self.problem = problem
        sizes = np.array([len(nodes) for nodes in placement.nodes])
        self.num_stages = len(sizes)
        self.node_K = np.array(placement.used, np.int64)
        self.stage_K = np.repeat(np.arange(self.num_stages), sizes)
        self.start_S = np.concatenate([[0], np.cumsum(sizes)])
        self.layers_S = np.diff(np.array(placement.bounds))
        self.layers_K = self.layers_S[self.stage_K]
        self.first_K = self.stage_K == 0
        self.last_K = self.stage_K == self.num_stages - 1
        self.place_K = problem.place_N[self.node_K]
        self.forward_K = self._seconds(problem.layer_forward_s_N, problem.first_forward_s_N, problem.last_forward_s_N)
        self.backward_K = self._seconds(
            problem.layer_backward_s_N, problem.first_backward_s_N, problem.last_backward_s_N
        )
        self.parts = [slice(a, b) for a, b in pairwise(self.start_S.tolist())]
        self.count_SP = np.bincount(
            self.stage_K * problem.num_places + self.place_K, minlength=self.num_stages * problem.num_places
        ).reshape(self.num_stages, problem.num_places)
        self.present_SP = self.count_SP > 0

    def _seconds(self, layer_N: Floats, first_N: Floats, last_N: Floats) -> Floats:
        node = self.node_K
        return self.layers_K * layer_N[node] + self.first_K * first_N[node] + self.last_K * last_N[node]

    def sums(self, values_K: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values_K, self.start_S[:-1])

    def most(self, values_K: Floats) -> Floats:
        return np.maximum.reduceat(values_K, self.start_S[:-1])

    def by_stage(self, values_K: np.ndarray) -> tuple[tuple[Any, ...], ...]:
        values: list[Any] = values_K.tolist()
        return tuple(tuple(values[part]) for part in self.parts)

    def memory(self, in_flight_K: np.ndarray) -> Floats:
        problem, node = self.problem, self.node_K
        total_K = self.layers_K * problem.layer_state_bytes + problem.fixed_bytes_N[node]
        each_K = self.layers_K * problem.layer_saved_bytes_N[node] + problem.flight_bytes_N[node]
        total_K = total_K + in_flight_K * each_K + self.first_K * problem.first_state_bytes
        last_K = problem.last_state_bytes + problem.last_bytes + in_flight_K * problem.last_saved_bytes
        return total_K + self.last_K * last_K

    def trips(self, total_K: Floats) -> tuple[Floats, Floats]:
        problem = self.problem
        if problem.schedule in SPLIT:
            total_K = total_K - self.layers_K * problem.layer_weight_s_N[self.node_K]
        own_S = self.most(total_K)
        seconds_S = own_S.copy()
        delay_s = problem.delay_s_PP + problem.delay_s_PP.T
        byte_s = problem.frame_byte_s_PP
        out_SP, into_SP = self._slowest(problem.uplink_byte_s_N), self._slowest(problem.downlink_byte_s_N)
        for stages in self._batches():
            after = stages + 1
            ways_s = np.maximum(out_SP[stages][:, :, None], into_SP[after][:, None, :])
            out_s = problem.forward_bytes_L[stages, None, None] * np.maximum(byte_s, ways_s)
            ways_s = np.maximum(into_SP[stages][:, :, None], out_SP[after][:, None, :])
            back_s = problem.backward_bytes_L[stages, None, None] * np.maximum(byte_s.T, ways_s)
            linked = self.present_SP[stages][:, :, None] & self.present_SP[after][:, None, :]
            seconds_S[stages] += np.where(linked, delay_s + out_s + back_s, 0.0).max(axis=(1, 2))
        trip_S = np.cumsum(seconds_S[::-1])[::-1]
        return trip_S, trip_S - own_S

    def _slowest(self, byte_s_N: Floats) -> Floats:
        """Return the slowest of each stage's nodes at each place, [S, P]."""
        slowest_SP = np.zeros(self.count_SP.shape)
        np.maximum.at(slowest_SP, (self.stage_K, self.place_K), byte_s_N[self.node_K])
        return slowest_SP

    def windows(self, total_K: Floats, trip_S: Floats, pace_s: float) -> np.ndarray:
        problem, count = self.problem, self.problem.num_microbatches
        if problem.schedule == "gpipe":
            return np.full(len(self.node_K), count)
        if problem.schedule == "1f1b":
            return np.minimum(self.num_stages - self.stage_K, count)
        if problem.schedule == "zb-h1":
            return np.full(len(self.node_K), min(self.num_stages, count))
        needed_S = IN_FLIGHT_MARGIN * trip_S / pace_s * (1 - _ROUNDING)
        wanted_K = np.ceil(needed_S[self.stage_K] / (total_K * self.sums(1 / total_K)[self.stage_K]))
        empty_K = self.memory(np.zeros(len(self.node_K)))
        each_K = self.memory(np.ones(len(self.node_K))) - empty_K
        room_K = np.trunc((problem.memory_bytes_N[self.node_K] - empty_K) // each_K)
        return np.maximum(1, np.minimum(np.minimum(count, wanted_K), room_K)).astype(np.int64)

    def sync_s(self) -> float:
        problem = self.problem
        size_S = self.layers_S * problem.layer_sync_bytes
        size_S[0] += problem.first_sync_bytes
        size_S[-1] += problem.last_sync_bytes
        node = self.node_K
        own_S = self.most(np.maximum(problem.uplink_byte_s_N[node], problem.downlink_byte_s_N[node]))
        slowest = 0.0
        for stage, (replicas, size) in enumerate(zip(np.diff(self.start_S).tolist(), size_S.tolist(), strict=True)):
            if replicas == 1:
                continue
            sent = size * (replicas - 1) / replicas
            places = np.flatnonzero(self.present_SP[stage])
            near = np.ix_(places, places)
            link_s = problem.delay_s_PP[near] + sent * problem.byte_s_PP[near]
            # A place is linked with itself only where two of its nodes are replicas.
            alone = np.flatnonzero(self.count_SP[stage, places] == 1)
            link_s[alone, alone] = 0.0
            slowest = max(slowest, 2 * max(float(link_s.max()), 0.0, sent * float(own_S[stage])))
        return slowest

    def pace(self, seconds_K: Floats, shares_K: np.ndarray, down: bool, up: bool) -> tuple[float, float]:
        """Return the seconds beyond the first microbatch, and the seconds a microbatch, as `evaluate` has them."""
        problem = self.problem
        down_L, up_L = problem.forward_bytes_L * down, problem.backward_bytes_L * up
        busy_K = np.maximum(seconds_K, self._own_s(down_L, up_L))
        pace_s = self._dealt_s(busy_K, down_L, up_L)
        if pace_s > (1 + _ROUNDING) / float(self.sums(1 / busy_K).min()):
            pace_s = min(pace_s, self._flow_s(busy_K, down_L, up_L))
        more_s = float(((shares_K - 1) * seconds_K).max())
        if pace_s > 1 / float(self.sums(1 / seconds_K).min()) * (1 + _ROUNDING):
            more_s = max(more_s, (problem.num_microbatches - 1) * pace_s)
        return more_s, pace_s

    def _own_s(self, down_L: Floats, up_L: Floats) -> Floats:
        stage, node = self.stage_K, self.node_K
        has_next, has_previous = ~self.last_K, ~self.first_K
        before = np.maximum(stage - 1, 0)
        sent = has_next * down_L[stage] + has_previous * up_L[before]
        taken = has_next * up_L[stage] + has_previous * down_L[before]
        return np.maximum(sent * self.problem.uplink_byte_s_N[node], taken * self.problem.downlink_byte_s_N[node])

    def _edge_s(self, stage: int, ours: Ints, theirs: Ints, down_L: Floats, up_L: Floats) -> Floats:
        """Return how long links between two sets of places are busy for one microbatch."""
        byte_s = self.problem.byte_s_PP
        return np.maximum(down_L[stage] * byte_s[np.ix_(ours, theirs)], up_L[stage] * byte_s[np.ix_(theirs, ours)].T)

    def _dealt_s(self, busy_K: Floats, down_L: Floats, up_L: Floats) -> float:
        """Return the seconds a microbatch where each node is dealt a part by its speed, whoever sends."""
        speed_K = 1 / busy_K
        speed_S = self.sums(speed_K)
        # Of each stage and place: all nodes together, and the fastest, as parts of the stage.
        shape = (self.num_stages, self.problem.num_places)
        cell_K = self.stage_K * shape[1] + self.place_K
        part_K = speed_K / speed_S[self.stage_K]
        part_SP = np.bincount(cell_K, weights=part_K, minlength=shape[0] * shape[1]).reshape(shape)
        fastest_SP = np.zeros(shape[0] * shape[1])
        np.maximum.at(fastest_SP, cell_K, part_K)
        fastest_SP = fastest_SP.reshape(shape)
        pace_s, byte_s = 1 / float(speed_S.min()), self.problem.byte_s_PP
        load_PP = np.zeros_like(self.problem.delay_s_PP)
        # Many stages at once, of as many pairs of places as fit into memory.
        for stages in self._batches():
            after = stages + 1
            edge_s = np.maximum(down_L[stages, None, None] * byte_s, up_L[stages, None, None] * byte_s.T)
            edge_s *= fastest_SP[stages][:, :, None] * fastest_SP[after][:, None, :]
            pace_s = max(pace_s, float(edge_s.max()))
            part = part_SP[stages][:, :, None] * part_SP[after][:, None, :]
            load_PP += np.tensordot(down_L[stages], part, 1) + np.tensordot(up_L[stages], part, 1).T
        return max(pace_s, float((load_PP / self.problem.shared_bytes_per_s_PP).max()))

    def _batches(self) -> list[NDArray[np.int64]]:
        """Return the stages that have a next one, in parts for arrays over stages and pairs of places."""
        size = max(1, _MOST_CELLS // self.problem.num_places**2)
        stages = np.arange(self.num_stages - 1)
        return [stages[at : at + size] for at in range(0, len(stages), size)]

    def _flow_s(self, busy_K: Floats, down_L: Floats, up_L: Floats) -> float:
        """Return the pace of a largest flow among replicas: the graph that `evaluate` makes, in the same order."""
        first, last = self.parts[0], self.parts[-1]
        ids_K = 2 + 2 * np.arange(len(busy_K))
        tails = [np.zeros(first.stop, np.int64), ids_K[last] + 1, ids_K]
        heads = [ids_K[first], np.ones(last.stop - last.start, np.int64), ids_K + 1]
        capacities = [np.full(first.stop, np.inf), np.full(last.stop - last.start, np.inf), 1 / busy_K]
        for stage, (ours, theirs) in enumerate(pairwise(self.parts)):
            seconds = self._edge_s(stage, self.place_K[ours], self.place_K[theirs], down_L, up_L).reshape(-1)
            tails.append(np.repeat(ids_K[ours] + 1, theirs.stop - theirs.start))
            heads.append(np.tile(ids_K[theirs], ours.stop - ours.start))
            with np.errstate(divide="ignore"):
                capacities.append(1 / seconds)
        tail, head = np.concatenate(tails).astype(np.int32), np.concatenate(heads).astype(np.int32)
        rate, flows = max_flow(2 + 2 * len(ids_K), tail, head, np.concatenate(capacities), 0, 1)
        load_PP = np.zeros_like(self.problem.delay_s_PP)
        at = first.stop + (last.stop - last.start) + len(ids_K)
        for stage, (ours, theirs) in enumerate(pairwise(self.parts)):
            count = (ours.stop - ours.start) * (theirs.stop - theirs.start)
            fraction = flows[at : at + count] / rate
            places = self.problem.num_places
            ends = np.repeat(self.place_K[ours] * places, theirs.stop - theirs.start)
            ends += np.tile(self.place_K[theirs], ours.stop - ours.start)
            part_PP = np.bincount(ends, weights=fraction, minlength=places**2).reshape(places, places)
            load_PP += part_PP * down_L[stage] + part_PP.T * up_L[stage]
            at += count
        return max(1 / rate, float((load_PP / self.problem.shared_bytes_per_s_PP).max()))


@njit(cache=True)
def _split(seconds_K: Floats, start_S: np.ndarray, num_microbatches: int) -> np.ndarray:
    """Return `split_microbatches` of each stage: a heap of who would be done first with one more, ties to the first.

    That takes the smallest of all multiples of the replicas' seconds. Those up to a time in which all together do no
    more than there are can be taken at once.
    """
    shares_K = np.zeros(len(seconds_K), np.int64)
    for stage in range(len(start_S) - 1):
        start, size = start_S[stage], start_S[stage + 1] - start_S[stage]
        heap = np.empty(size, np.int64)
        done = np.empty(size, np.float64)
        speed = 0.0
        for replica in range(size):
            speed += 1 / seconds_K[start + replica]
        surely_s = max(0, num_microbatches - size) / speed * (1 - _ROUNDING)
        left = num_microbatches
        for replica in range(size):
            shares_K[start + replica] = int(surely_s / seconds_K[start + replica])
            left -= shares_K[start + replica]
            done[replica] = (shares_K[start + replica] + 1) * seconds_K[start + replica]
            heap[replica] = replica
            at = replica
            while at > 0:
                above = (at - 1) // 2
                a, b = heap[at], heap[above]
                if done[a] < done[b] or (done[a] == done[b] and a < b):
                    heap[at], heap[above] = b, a
                    at = above
                else:
                    break
        for _ in range(left):
            replica = heap[0]
            shares_K[start + replica] += 1
            done[replica] = (shares_K[start + replica] + 1) * seconds_K[start + replica]
            at = 0
            while True:
                below = 2 * at + 1
                if below >= size:
                    break
                if below + 1 < size:
                    a, b = heap[below + 1], heap[below]
                    if done[a] < done[b] or (done[a] == done[b] and a < b):
                        below += 1
                a, b = heap[below], heap[at]
                if done[a] < done[b] or (done[a] == done[b] and a < b):
                    heap[at], heap[below] = a, b
                    at = below
                else:
                    break
    return shares_K
