"""From a placement to the arrays that one step is played on: who takes which microbatch, what each frame passes.

PURE.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from actors.schedule import FIXED, SPLIT, Action, Op, stage_actions
from actors.settings import WireConfig
from orchestrator.planner.evaluate import backward_s, evaluate, forward_s
from orchestrator.planner.problem import Placement, Problem
from orchestrator.simulator.kernel import BACKWARD, FORWARD, WEIGHT, Floats, Ints, Layout
from orchestrator.simulator.links import loss_limited_bytes_per_s, window_limited_bytes_per_s
from orchestrator.simulator.overheads import CodecTimes, Overheads

_NO_CODEC = CodecTimes(encode_byte_s=0.0, decode_byte_s=0.0)
_OPS = {Op.FORWARD: FORWARD, Op.BACKWARD: BACKWARD, Op.INPUT_BACKWARD: BACKWARD, Op.WEIGHT_BACKWARD: WEIGHT}

# Of each stage, what it does, in order.
Orders = Sequence[Sequence[Action]]


def shares_of(seconds_R: Sequence[float], num_microbatches: int) -> tuple[int, ...]:
    """Return how many microbatches each replica takes so that the last to finish is earliest; ties to the first.

    As `orchestrator.planner.evaluate.split_microbatches` does, without trying every replica for every microbatch.
    """
    rate = sum(1 / s for s in seconds_R)
    # Of those that finish by the ideal time none is too many, and at most one a replica is missing.
    ideal_s = num_microbatches / rate * (1 - 1e-12)
    shares = [int(ideal_s / s) for s in seconds_R]
    line = [((share + 1) * s, r) for r, (share, s) in enumerate(zip(shares, seconds_R, strict=True))]
    heapq.heapify(line)
    for _ in range(num_microbatches - sum(shares)):
        _, r = heapq.heappop(line)
        shares[r] += 1
        heapq.heappush(line, ((shares[r] + 1) * seconds_R[r], r))
    return tuple(shares)


def deal(shares_R: Sequence[int]) -> Ints:
    """Return which replica takes each microbatch: each spreads its share evenly over the step (weighted by turns)."""
    replica_M = np.repeat(np.arange(len(shares_R), dtype=np.int32), shares_R)
    turn_M = np.concatenate([(np.arange(share) + 0.5) / share for share in shares_R if share])
    return replica_M[np.argsort(turn_M, kind="stable")]


class Lineup:
    """The nodes of a placement, stage by stage, each with its microbatches."""

    def __init__(self, problem: Problem, placement: Placement) -> None:
        self.problem, self.placement = problem, placement
        self.nodes_U: NDArray[np.int64] = np.array(placement.used, dtype=np.int64)
        sizes = [len(nodes) for nodes in placement.nodes]
        self.stage_U: Ints = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self.first_S = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        spans = list(pairwise(placement.bounds))
        self.spans_U = [spans[stage] for stage in self.stage_U]
        ends = list(zip(self.nodes_U.tolist(), self.spans_U, strict=True))
        self.forward_s_U: Floats = np.array([forward_s(problem, node, *span) for node, span in ends])
        self.backward_s_U: Floats = np.array([backward_s(problem, node, *span) for node, span in ends])
        seconds_U = self.forward_s_U + self.backward_s_U
        self.shares_S = [
            shares_of(seconds_U[a:b].tolist(), problem.num_microbatches) for a, b in pairwise(self.first_S)
        ]
        rows = [deal(shares) + first for shares, first in zip(self.shares_S, self.first_S[:-1], strict=True)]
        self.node_SM: Ints = np.stack(rows).astype(np.int32)

    @property
    def num_stages(self) -> int:
        return self.placement.num_stages

    def own(self) -> tuple[Ints, Ints]:
        """Return where each node's microbatches begin in the list of all, and that list."""
        counts = np.bincount(self.node_SM.ravel(), minlength=len(self.nodes_U))
        starts = np.concatenate([[0], np.cumsum(counts)])
        # Nodes are numbered stage by stage, so a stable sort keeps each one's microbatches in order.
        flat = np.argsort(self.node_SM.ravel(), kind="stable")
        return starts.astype(np.int32), (flat % self.problem.num_microbatches).astype(np.int32)

    def durations(self, action_s: float, share: float, sigma: float, seed: int) -> Floats:
        """Return how long each operation of each microbatch takes: a share of what was probed, and `action_s`.

        Times a lognormal of `sigma`.
        """
        problem = self.problem
        weight_s_U = np.zeros(len(self.nodes_U))
        if self.is_split:
            layers_U = np.array([stop - start for start, stop in self.spans_U])
            weight_s_U = layers_U * problem.layer_weight_s_N[self.nodes_U]
        seconds_AU = share * np.stack([self.forward_s_U, self.backward_s_U - weight_s_U, weight_s_U])
        seconds_AU[:2] += action_s
        seconds_ASM = seconds_AU[:, self.node_SM]
        if sigma > 0:
            noise_ASM = np.random.default_rng(seed).normal(0.0, sigma, seconds_ASM.shape)
            # Of mean 1: noise by itself makes nobody slower.
            seconds_ASM = seconds_ASM * np.exp(noise_ASM - sigma**2 / 2)
        return np.ascontiguousarray(seconds_ASM)

    @property
    def is_split(self) -> bool:
        return self.problem.schedule in SPLIT

    def orders(self, orders: Orders | None) -> tuple[Ints, Ints, Ints]:
        """Return each node's order, line by line: the given one, else of fixed schedules their own.

        Replicas under 1F1B and ZB-H1, and schedules that keep as much in flight as a link needs, have none: what
        they do next depends on what is there. Strict 1F1B could wait for itself among replicas.
        """
        schedule, num_nodes = self.problem.schedule, len(self.nodes_U)
        lines: list[list[tuple[int, int]]] = [[] for _ in range(num_nodes)]
        starts, own = self.own()
        for u in range(num_nodes):
            stage = int(self.stage_U[u])
            mine = own[starts[u] : starts[u + 1]]
            if orders is not None:
                is_mine = set(mine.tolist())
                actions = [action for action in orders[stage] if action.microbatch in is_mine]
                lines[u] = [(_OPS[action.op], action.microbatch) for action in actions]
            elif schedule == "gpipe" or (schedule in FIXED and num_nodes == self.num_stages):
                actions = stage_actions(schedule, stage, self.num_stages, len(mine))
                lines[u] = [(_OPS[action.op], int(mine[action.microbatch])) for action in actions]
        counts = np.cumsum([0, *(len(line) for line in lines)]).astype(np.int32)
        flat = [entry for line in lines for entry in line]
        ops = np.array([op for op, _ in flat], dtype=np.int32)
        return counts, ops, np.array([m for _, m in flat], dtype=np.int32)

    def caps(self, in_flight_S: Sequence[int] | None) -> Ints:
        """Return how many microbatches each node keeps in flight at most."""
        if in_flight_S is None:
            if self.problem.schedule == "1f1b":
                in_flight_S = [self.num_stages - stage for stage in range(self.num_stages)]
            elif self.problem.schedule == "gpipe":
                in_flight_S = [self.problem.num_microbatches] * self.num_stages
            elif self.problem.schedule == "zb-h1":
                in_flight_S = [self.num_stages] * self.num_stages
            else:
                windows_SR = evaluate(self.problem, self.placement).in_flight_SR
                return np.array(list(chain.from_iterable(windows_SR)), dtype=np.int32)
        return np.array(in_flight_S, dtype=np.int32)[self.stage_U]


def make_layout(
    lineup: Lineup,
    wire: WireConfig,
    overheads: Overheads,
    *,
    begin_s_U: Floats,
    codecs: Sequence[tuple[str, str]] | None,
    orders: Orders | None,
    in_flight_S: Sequence[int] | None,
    sigma: float,
    seed: int,
) -> Layout:
    """Return the arrays of one step; `codecs` as for `make_problem`, only to know how long they take."""
    problem, node_SM = lineup.problem, lineup.node_SM
    starts, own = lineup.own()
    order_U, order_op_O, order_microbatch_O = lineup.orders(orders)
    pair_SM, source_Q, target_Q, cut_Q = _pairs(node_SM, len(lineup.nodes_U))
    place_U = problem.place_N[lineup.nodes_U]
    ends_DQ = np.stack([place_U[source_Q], place_U[target_Q]])
    from_DQ, to_DQ = ends_DQ, ends_DQ[::-1]
    delay_s_DQ = problem.delay_s_PP[from_DQ, to_DQ]
    byte_s_DQ = _effective_byte_s(problem, from_DQ, to_DQ, wire, overheads)
    frame_bytes_DQ = np.stack([problem.forward_bytes_L[cut_Q], problem.backward_bytes_L[cut_Q]])
    shared_bytes_per_s_DQ = problem.shared_bytes_per_s_PP[from_DQ, to_DQ]
    shared_DQ = np.where(np.isfinite(shared_bytes_per_s_DQ), from_DQ * problem.num_places + to_DQ, -1)
    raw_bytes_U = problem.raw_frame_bytes_N[lineup.nodes_U]
    sender_DQ, receiver_DQ = np.stack([source_Q, target_Q]), np.stack([target_Q, source_Q])
    encode_byte_s_DQ, decode_byte_s_DQ = _codec_byte_s(cut_Q, codecs, overheads)
    layers_U = np.array([stop - start for start, stop in lineup.spans_U])
    flight_bytes_U = layers_U * problem.layer_saved_bytes_N[lineup.nodes_U] + problem.flight_bytes_N[lineup.nodes_U]
    halved_bytes_U = layers_U * problem.layer_halved_bytes_N[lineup.nodes_U]
    flight_bytes_U += (lineup.stage_U == lineup.num_stages - 1) * problem.last_saved_bytes
    return Layout(
        node_SM=node_SM,
        duration_s_ASM=lineup.durations(overheads.action_s, overheads.probe_share, sigma, seed),
        stage_U=lineup.stage_U,
        own_U=starts,
        own_O=own,
        order_U=order_U,
        order_op_O=order_op_O,
        order_microbatch_O=order_microbatch_O,
        cap_U=lineup.caps(in_flight_S),
        # As actors.dispatch has it; replicas under 1F1B are nearer to it the other way.
        forward_first=problem.schedule in ("bdp", "bdp-split"),
        is_split=lineup.is_split,
        begin_s_U=begin_s_U,
        pair_SM=pair_SM,
        source_Q=source_Q,
        target_Q=target_Q,
        frame_bytes_DQ=frame_bytes_DQ,
        byte_s_DQ=byte_s_DQ,
        delay_s_DQ=np.ascontiguousarray(delay_s_DQ),
        initial_window_bytes=overheads.initial_window_bytes,
        timeout_s_DQ=delay_s_DQ + delay_s_DQ[::-1] + overheads.idle_s,
        window_DQ=np.full_like(frame_bytes_DQ, overheads.initial_window_bytes),
        last_sent_s_DQ=np.zeros_like(frame_bytes_DQ),
        encode_s_DQ=overheads.send_frame_s
        + overheads.send_byte_s * frame_bytes_DQ
        + encode_byte_s_DQ * raw_bytes_U[sender_DQ],
        decode_s_DQ=overheads.receive_frame_s
        + overheads.receive_byte_s * frame_bytes_DQ
        + decode_byte_s_DQ * raw_bytes_U[receiver_DQ],
        shared_DQ=shared_DQ.astype(np.int32),
        shared_byte_s_X=(1 / problem.shared_bytes_per_s_PP).ravel(),
        uplink_byte_s_U=problem.uplink_byte_s_N[lineup.nodes_U],
        downlink_byte_s_U=problem.downlink_byte_s_N[lineup.nodes_U],
        codec_computes_U=np.full(len(lineup.nodes_U), overheads.codec_computes),
        flight_bytes_U=flight_bytes_U,
        halved_bytes_U=halved_bytes_U,
        raw_bytes_U=raw_bytes_U,
    )


def _pairs(node_SM: Ints, num_nodes: int) -> tuple[Ints, Ints, Ints, NDArray[np.int64]]:
    """Return, for the links below each stage but the last, each microbatch's pair of nodes, and what the pairs are."""
    num_stages, num_microbatches = node_SM.shape
    if num_stages == 1:
        none = np.zeros(0, dtype=np.int32)
        return np.zeros((0, num_microbatches), dtype=np.int32), none, none, none.astype(np.int64)
    keys_SM = node_SM[:-1].astype(np.int64) * num_nodes + node_SM[1:]
    # Nodes of a stage are its own, so a pair is of one cut.
    keys_Q, pair = np.unique(keys_SM, return_inverse=True)
    source_Q, target_Q = (keys_Q // num_nodes).astype(np.int32), (keys_Q % num_nodes).astype(np.int32)
    cut_Q = np.zeros(len(keys_Q), dtype=np.int64)
    pair_SM = pair.reshape(keys_SM.shape).astype(np.int32)
    cut_Q[pair_SM] = np.arange(num_stages - 1)[:, None]
    return pair_SM, source_Q, target_Q, cut_Q


def _effective_byte_s(problem: Problem, from_DQ: Ints, to_DQ: Ints, wire: WireConfig, overheads: Overheads) -> Floats:
    """Return the seconds of one byte of each pair, down and up, once windows and losses have had their say."""
    keys, inverse = np.unique(from_DQ.astype(np.int64) * problem.num_places + to_DQ, return_inverse=True)
    found: list[float] = []
    for key in keys.tolist():
        p, q = divmod(key, problem.num_places)
        round_trip_s = float(problem.delay_s_PP[p, q] + problem.delay_s_PP[q, p])
        byte_s = float(problem.byte_s_PP[p, q])
        rate = window_limited_bytes_per_s(1 / byte_s if byte_s > 0 else math.inf, round_trip_s, wire)
        limit = loss_limited_bytes_per_s(
            round_trip_s,
            overheads.loss_share,
            num_streams=overheads.num_streams,
            segment_bytes=overheads.segment_bytes,
        )
        found.append(1 / min(rate, limit))
    return np.array(found, dtype=np.float64)[inverse].reshape(from_DQ.shape)


def _codec_byte_s(
    cut_Q: NDArray[np.int64], codecs: Sequence[tuple[str, str]] | None, overheads: Overheads
) -> tuple[Floats, Floats]:
    """Return each pair's seconds of encoding and of decoding a raw byte, down and up."""
    encode_DQ, decode_DQ = np.zeros((2, len(cut_Q))), np.zeros((2, len(cut_Q)))
    if codecs:
        for cut in np.unique(cut_Q):
            for direction, name in enumerate(codecs[min(int(cut), len(codecs) - 1)]):
                times = overheads.codecs.get(name, _NO_CODEC)
                encode_DQ[direction, cut_Q == cut] = times.encode_byte_s
                decode_DQ[direction, cut_Q == cut] = times.decode_byte_s
    return encode_DQ, decode_DQ
