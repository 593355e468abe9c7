"""One step of a pipeline as discrete events, compiled: who computes what when, and what the links carry meanwhile.

PURE. Servers are first come, first served, a frame at a time. A frame is cut-through: its first bytes go on to the next
server while its last ones are still behind, so that it takes as long as its slowest server, not as all together; a
frame at the head of a line holds up those behind it, as a connection does. What two regions or a node's own link can
carry is thus shared frame by frame, which in the long run is by bytes offered.

Axes: A operations (forward, backward, weight), S stages, M microbatches, U nodes used, Q pairs of neighbouring nodes
with traffic, D directions (0: activations down, 1: gradients up), X pairs of places whose capacity is shared.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from orchestrator.simulator.event_queue import event_queue, pop, push

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]

FORWARD, BACKWARD, WEIGHT = 0, 1, 2
_DOWN, _UP = 0, 1
# Events: a node may begin; its action ends; a frame is encoded; its first byte is there; its last; it is decoded;
# its sender knows that it arrived.
_BEGIN, _DONE, _SEND, _HEAD, _TAIL, _USABLE, _ACKED = range(7)


class Layout(NamedTuple):
    """A step as arrays; seconds and bytes."""

    # Which node does stage s of microbatch m, and how long each operation takes there.
    node_SM: Ints
    duration_s_ASM: Floats
    stage_U: Ints
    # Node u has the microbatches own_O[own_U[u] : own_U[u + 1]], in order.
    own_U: Ints
    own_O: Ints
    # A node does what its order says, line by line; where it has none, whatever is ready: forward while fewer than
    # cap_U microbatches are in flight and backward, the one or the other first, then what makes weight gradients.
    order_U: Ints
    order_op_O: Ints
    order_microbatch_O: Ints
    cap_U: Ints
    forward_first: bool
    is_split: bool
    # When a node may begin: its order is there, the step before is committed.
    begin_s_U: Floats
    # The pair that microbatch m takes from stage s to the next.
    pair_SM: Ints
    source_Q: Ints
    target_Q: Ints
    frame_bytes_DQ: Floats
    byte_s_DQ: Floats
    delay_s_DQ: Floats
    # A connection's window after it was idle for long; 0: links are at their rate at once. What counts as idle.
    initial_window_bytes: float
    timeout_s_DQ: Floats
    # What the step before left: each connection's window, and when its last byte left (before 0).
    window_DQ: Floats
    last_sent_s_DQ: Floats
    encode_s_DQ: Floats
    decode_s_DQ: Floats
    shared_DQ: Ints
    shared_byte_s_X: Floats
    uplink_byte_s_U: Floats
    downlink_byte_s_U: Floats
    # Whether encoding and decoding take the processor from compute, as they do on a CPU, or run beside it.
    codec_computes_U: NDArray[np.bool_]
    # What a microbatch in flight keeps, what it does between the halves of its backward, and a boundary tensor that
    # waits to be sent or used.
    flight_bytes_U: Floats
    halved_bytes_U: Floats
    raw_bytes_U: Floats


class Played(NamedTuple):
    """What happened: when each operation began and ended, when each frame could be used, and the peak of memory."""

    begin_s_ASM: Floats
    end_s_ASM: Floats
    usable_s_DSM: Floats
    # Of what changes within a step: activations in flight and frames; and of activations alone.
    peak_bytes_U: Floats
    flight_peak_bytes_U: Floats
    in_flight_peak_U: Ints
    # What the next step finds.
    window_DQ: Floats
    last_sent_s_DQ: Floats
    # Operations that never ran: more than 0 where the orders wait for one another.
    num_left: int
    num_events: int


@njit(cache=True)
def play(layout: Layout) -> Played:
    """Return what one step does, from the first node's begin to the last operation's end."""
    num_stages, num_microbatches = layout.node_SM.shape
    num_nodes, num_pairs = len(layout.stage_U), len(layout.source_Q)
    begin_s_ASM = np.full((3, num_stages, num_microbatches), -1.0)
    end_s_ASM = np.full((3, num_stages, num_microbatches), -1.0)
    usable_s_DSM = np.full((2, num_stages, num_microbatches), -1.0)
    # The first stage makes its own input, the last its own gradient, once it has done the forward.
    for m in range(num_microbatches):
        usable_s_DSM[_DOWN, 0, m] = 0.0
        usable_s_DSM[_UP, num_stages - 1, m] = 0.0
    next_AU = np.zeros((3, num_nodes), np.int64)
    next_line_U = np.zeros(num_nodes, np.int64)
    in_flight_U, in_flight_peak_U = np.zeros(num_nodes, np.int32), np.zeros(num_nodes, np.int32)
    has_begun_U, is_busy_U = np.zeros(num_nodes, np.bool_), np.zeros(num_nodes, np.bool_)
    running_op_U, running_microbatch_U = np.zeros(num_nodes, np.int64), np.zeros(num_nodes, np.int64)
    # Where codecs compute: until when, and by how much they hold up the action that runs.
    codec_until_s_U, held_up_s_U = np.zeros(num_nodes), np.zeros(num_nodes)
    encoder_free_s_DQ, decoder_free_s_DQ = np.zeros((2, num_pairs)), np.zeros((2, num_pairs))
    uplink_free_s_U, downlink_free_s_U = np.zeros(num_nodes), np.zeros(num_nodes)
    link_free_s_DQ, window_DQ = layout.last_sent_s_DQ.copy(), layout.window_DQ.copy()
    shared_free_s_X = np.zeros(len(layout.shared_byte_s_X))
    left_s_DSM = np.zeros((2, num_stages, num_microbatches))
    memory_U, peak_bytes_U = np.zeros(num_nodes), np.zeros(num_nodes)
    in_flight_bytes_U, flight_peak_bytes_U = np.zeros(num_nodes), np.zeros(num_nodes)
    num_left = num_stages * num_microbatches * (3 if layout.is_split else 2)
    num_cells = num_stages * num_microbatches
    # Of each node one event at most waits, of each frame two: the next on its way, and its acknowledgement.
    queue = event_queue(num_nodes + 4 * num_cells)
    for u in range(num_nodes):
        push(queue, layout.begin_s_U[u], _BEGIN, u)
    while queue.size_1[0]:
        now_s, kind, whom = pop(queue)
        awake = -1
        if kind == _BEGIN:
            has_begun_U[whom] = True
            awake = whom
        elif kind == _DONE:
            u = whom
            if held_up_s_U[u] > 0:
                push(queue, now_s + held_up_s_U[u], _DONE, u)
                held_up_s_U[u] = 0.0
                continue
            op, m, stage = running_op_U[u], running_microbatch_U[u], layout.stage_U[u]
            end_s_ASM[op, stage, m] = now_s
            is_busy_U[u] = False
            num_left -= 1
            awake = u
            let_go = 0.0
            if op == WEIGHT or (op == BACKWARD and not layout.is_split):
                in_flight_U[u] -= 1
                let_go = layout.halved_bytes_U[u] if layout.is_split else layout.flight_bytes_U[u]
            elif op == BACKWARD:
                let_go = layout.flight_bytes_U[u] - layout.halved_bytes_U[u]
            memory_U[u] -= let_go
            in_flight_bytes_U[u] -= let_go
            if op == BACKWARD and stage + 1 < num_stages:
                memory_U[u] -= layout.raw_bytes_U[u]
            direction, pair = -1, 0
            if op == FORWARD and stage + 1 < num_stages:
                direction, pair = _DOWN, int(layout.pair_SM[stage, m])
            elif op == BACKWARD and stage > 0:
                direction, pair = _UP, int(layout.pair_SM[stage - 1, m])
            if direction >= 0:
                memory_U[u] += layout.raw_bytes_U[u]
                encode_s = layout.encode_s_DQ[direction, pair]
                if layout.codec_computes_U[u]:
                    codec_until_s_U[u] = max(codec_until_s_U[u], now_s) + encode_s
                    encoded_s = codec_until_s_U[u]
                else:
                    encoded_s = max(encoder_free_s_DQ[direction, pair], now_s) + encode_s
                    encoder_free_s_DQ[direction, pair] = encoded_s
                cell = direction * num_cells + stage * num_microbatches + m
                push(queue, encoded_s, _SEND, cell)
        else:
            # `stage` is the sender's.
            direction = whom // num_cells
            stage, m = whom % num_cells // num_microbatches, whom % num_microbatches
            pair = layout.pair_SM[stage - direction, m]
            sender, receiver = layout.source_Q[pair], layout.target_Q[pair]
            if direction == _UP:
                sender, receiver = receiver, sender
            size = float(layout.frame_bytes_DQ[direction, pair])
            then_s, then = now_s, -1
            if kind == _SEND:
                memory_U[sender] += size - layout.raw_bytes_U[sender]
                # First byte and last byte, as they leave one server after another.
                head_s = max(now_s, uplink_free_s_U[sender])
                uplink_free_s_U[sender] = head_s + size * layout.uplink_byte_s_U[sender]
                tail_s = uplink_free_s_U[sender]
                head_s = max(head_s, link_free_s_DQ[direction, pair])
                idle_s = float(head_s - link_free_s_DQ[direction, pair])
                link_free_s_DQ[direction, pair] = head_s + _sending_s(
                    layout, window_DQ, direction, int(pair), size, idle_s
                )
                tail_s = max(tail_s, link_free_s_DQ[direction, pair])
                shared = layout.shared_DQ[direction, pair]
                if shared >= 0:
                    head_s = max(head_s, shared_free_s_X[shared])
                    shared_free_s_X[shared] = head_s + size * layout.shared_byte_s_X[shared]
                    tail_s = max(tail_s, shared_free_s_X[shared])
                left_s_DSM[direction, stage, m] = tail_s
                then_s, then = head_s + layout.delay_s_DQ[direction, pair], _HEAD
            elif kind == _HEAD:
                memory_U[receiver] += size
                head_s = max(now_s, downlink_free_s_U[receiver])
                downlink_free_s_U[receiver] = head_s + size * layout.downlink_byte_s_U[receiver]
                arrived_s = left_s_DSM[direction, stage, m] + layout.delay_s_DQ[direction, pair]
                then_s, then = max(downlink_free_s_U[receiver], arrived_s), _TAIL
            elif kind == _TAIL:
                acked_s = now_s + float(layout.delay_s_DQ[1 - direction, pair])
                push(queue, acked_s, _ACKED, whom)
                decode_s = layout.decode_s_DQ[direction, pair]
                memory_U[receiver] += layout.raw_bytes_U[receiver]
                if layout.codec_computes_U[receiver]:
                    codec_until_s_U[receiver] = max(codec_until_s_U[receiver], now_s) + decode_s
                    if is_busy_U[receiver]:
                        held_up_s_U[receiver] += decode_s
                    then_s = codec_until_s_U[receiver]
                else:
                    then_s = max(decoder_free_s_DQ[direction, pair], now_s) + decode_s
                    decoder_free_s_DQ[direction, pair] = then_s
                then = _USABLE
            elif kind == _USABLE:
                memory_U[receiver] -= size
                usable_s_DSM[direction, layout.stage_U[receiver], m] = now_s
                awake = int(receiver)
            else:
                memory_U[sender] -= size
            peak_bytes_U[sender] = max(peak_bytes_U[sender], memory_U[sender])
            peak_bytes_U[receiver] = max(peak_bytes_U[receiver], memory_U[receiver])
            if then >= 0:
                push(queue, float(then_s), then, whom)
        if awake < 0:
            continue
        peak_bytes_U[awake] = max(peak_bytes_U[awake], memory_U[awake])
        if is_busy_U[awake] or not has_begun_U[awake]:
            continue
        op, m = _choose(layout, awake, next_AU, next_line_U, in_flight_U, usable_s_DSM, end_s_ASM)
        if op < 0:
            continue
        u, stage = awake, layout.stage_U[awake]
        next_AU[op, u] += 1
        next_line_U[u] += 1
        if op == FORWARD:
            in_flight_U[u] += 1
            in_flight_peak_U[u] = max(in_flight_peak_U[u], in_flight_U[u])
            in_flight_bytes_U[u] += layout.flight_bytes_U[u]
            flight_peak_bytes_U[u] = max(flight_peak_bytes_U[u], in_flight_bytes_U[u])
            # What came in stays as the microbatch's own input.
            memory_U[u] += layout.flight_bytes_U[u] - (layout.raw_bytes_U[u] if stage > 0 else 0.0)
        peak_bytes_U[u] = max(peak_bytes_U[u], memory_U[u])
        is_busy_U[u], running_op_U[u], running_microbatch_U[u] = True, op, m
        begin_s_ASM[op, stage, m] = now_s
        held_up_s_U[u] = max(0.0, codec_until_s_U[u] - now_s)
        push(queue, now_s + float(layout.duration_s_ASM[op, stage, m]), _DONE, u)
    return Played(
        begin_s_ASM,
        end_s_ASM,
        usable_s_DSM,
        peak_bytes_U,
        flight_peak_bytes_U,
        in_flight_peak_U,
        window_DQ,
        link_free_s_DQ,
        num_left,
        int(queue.made_1[0]),
    )


@njit(cache=True)
def _sending_s(layout: Layout, window_DQ: Floats, direction: int, pair: int, size: float, idle_s: float) -> float:
    """Return how long a frame takes to leave, and keep how far the connection's window has grown.

    TCP sends one window a round trip and doubles it each time, until windows fill the link (slow start, RFC 5681).
    Linux halves the window for each timeout that the connection was idle (RFC 2861), down to its first one.
    """
    byte_s = layout.byte_s_DQ[direction, pair]
    if layout.initial_window_bytes <= 0:
        return size * byte_s
    round_trip_s = layout.delay_s_DQ[0, pair] + layout.delay_s_DQ[1, pair]
    window = window_DQ[direction, pair]
    window = max(layout.initial_window_bytes, window * 0.5 ** np.floor(idle_s / layout.timeout_s_DQ[direction, pair]))
    sending_s, left = 0.0, size
    while window < left and window * byte_s < round_trip_s:
        sending_s += round_trip_s
        left -= window
        window *= 2
    # What is acknowledged of the rest opens the window by as much.
    window_DQ[direction, pair] = window + min(left, window)
    return sending_s + left * byte_s


@njit(cache=True)
def _choose(
    layout: Layout,
    u: int,
    next_AU: NDArray[np.int64],
    next_line_U: NDArray[np.int64],
    in_flight_U: Ints,
    usable_s_DSM: Floats,
    end_s_ASM: Floats,
) -> tuple[int, int]:
    """Return the operation and microbatch that a free node does next; (-1, -1) where it must wait."""
    stage = layout.stage_U[u]
    first_line, last_line = layout.order_U[u], layout.order_U[u + 1]
    if last_line > first_line:
        line = first_line + next_line_U[u]
        if line >= last_line:
            return -1, -1
        op, m = int(layout.order_op_O[line]), int(layout.order_microbatch_O[line])
        return (op, m) if _is_ready(op, stage, m, usable_s_DSM, end_s_ASM) else (-1, -1)
    first_own, num_own = layout.own_U[u], layout.own_U[u + 1] - layout.own_U[u]
    for op in (FORWARD, BACKWARD, WEIGHT) if layout.forward_first else (BACKWARD, FORWARD, WEIGHT):
        if op == FORWARD and in_flight_U[u] >= layout.cap_U[u]:
            continue
        if next_AU[op, u] >= num_own or (op == WEIGHT and not layout.is_split):
            continue
        m = int(layout.own_O[first_own + next_AU[op, u]])
        if _is_ready(op, stage, m, usable_s_DSM, end_s_ASM):
            return op, m
    return -1, -1


@njit(cache=True)
def _is_ready(op: int, stage: int, m: int, usable_s_DSM: Floats, end_s_ASM: Floats) -> bool:
    if op == FORWARD:
        return usable_s_DSM[_DOWN, stage, m] >= 0
    if op == BACKWARD:
        return usable_s_DSM[_UP, stage, m] >= 0 and end_s_ASM[FORWARD, stage, m] >= 0
    return end_s_ASM[BACKWARD, stage, m] >= 0
