"""Interleaved 1F1B: every node holds several chunks of layers, so that a microbatch passes it several times.

PURE. Of N nodes with V chunks each, chunk c of node n is virtual stage c * N + n (Narayanan et al., arXiv 2104.04473).
A chunk takes 1/V of the time of all of a node's layers, so the pipeline fills in 1/V of it; what crosses links is V
times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import ScheduleError
from actors.play import PipelineTimes, Timings
from actors.schedule import Op


@dataclass(frozen=True)
class ChunkAction:
    """Run `op` of one microbatch on one of a node's chunks."""

    op: Op
    chunk: int
    microbatch: int


def node_actions(node: int, num_nodes: int, num_chunks: int, num_microbatches: int) -> tuple[ChunkAction, ...]:
    """Return what `node` does in one step.

    Microbatches go in groups of N through one chunk after another: forwards from the first chunk on, backwards from
    the last. Within a chunk both are in microbatch order, so weight gradients are summed as a plain loop would. Where
    the last group is not full, its missing microbatches are left out of the full order: no action waits for another
    microbatch's, so what could run still can.
    """
    num_slots = _num_slots(num_nodes, num_chunks, num_microbatches)
    warmup = _warmup(node, num_nodes, num_chunks, num_slots)
    forwards, backwards = list[ChunkAction](), list[ChunkAction]()
    for slot in range(num_slots):
        group, place = divmod(slot, num_nodes * num_chunks)
        chunk, member = divmod(place, num_nodes)
        microbatch = group * num_nodes + member
        forwards.append(ChunkAction(Op.FORWARD, chunk, microbatch))
        backwards.append(ChunkAction(Op.BACKWARD, num_chunks - 1 - chunk, microbatch))
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    full = (*forwards[:warmup], *steady, *backwards[num_slots - warmup :])
    return tuple(action for action in full if action.microbatch < num_microbatches)


def most_in_flight(node: int, num_nodes: int, num_chunks: int, num_microbatches: int) -> int:
    """Return how many microbatches a node holds the activations of at most, counted for each chunk.

    2 (N - n - 1) + (V - 1) N + 1, or all V * M of them; each is 1/V of what 1F1B holds of one. Reached where M is a
    multiple of N, else never exceeded.
    """
    num_slots = _num_slots(num_nodes, num_chunks, num_microbatches)
    return min(_warmup(node, num_nodes, num_chunks, num_slots) + 1, num_chunks * num_microbatches)


def play_chunks(orders: Sequence[Sequence[ChunkAction]], times: PipelineTimes) -> Timings:
    """Return when each node's actions run, if each node does its own in order, each as soon as it can.

    `times` are of virtual stages, N * V of them, and of the cuts between them. As `actors.play.play`, but for what the
    chunks of a node share: its compute, and its way to the next node and to the one before. Raises
    ScheduleError where an order lets nodes wait for ever. Seconds in and out; linear in the number of actions.
    """
    num_nodes, last = len(orders), times.num_stages - 1
    # When what an action waits for is there, by operation, virtual stage and microbatch.
    ready_s: dict[tuple[Op, int, int], float] = {}
    # By the nodes at its ends: of two nodes, activations and gradients go the same way.
    link_free_s: dict[tuple[int, int], float] = {}
    starts = [list[float]() for _ in orders]
    ends = [list[float]() for _ in orders]
    runnable = dict.fromkeys(range(num_nodes))
    while runnable:
        node, _ = runnable.popitem()
        for action in orders[node][len(starts[node]) :]:
            op, microbatch = action.op, action.microbatch
            stage = action.chunk * num_nodes + node
            there_s = 0.0 if op is Op.FORWARD and stage == 0 else ready_s.get((op, stage, microbatch))
            if there_s is None:
                break
            start_s = max(ends[node][-1] if ends[node] else 0.0, there_s)
            end_s = start_s + times.action_s(stage, op)
            starts[node].append(start_s)
            ends[node].append(end_s)
            target = stage + 1 if op is Op.FORWARD else stage - 1
            if op is Op.FORWARD and stage == last:
                ready_s[Op.BACKWARD, stage, microbatch] = end_s
            elif target >= 0:
                cut = min(stage, target)
                is_down = op is Op.FORWARD
                send_s = (times.send_down_s_L if is_down else times.send_up_s_L)[cut]
                delay_s = (times.delay_down_s_L if is_down else times.delay_up_s_L)[cut]
                way = node, target % num_nodes
                sent_s = max(end_s, link_free_s.get(way, 0.0)) + send_s
                link_free_s[way] = sent_s
                ready_s[op, target, microbatch] = sent_s + delay_s
                runnable[target % num_nodes] = None
    for node, order in enumerate(orders):
        if len(starts[node]) < len(order):
            action = order[len(starts[node])]
            raise ScheduleError(
                f"node {node} waits for ever before {action.op.value}{action.microbatch} of its chunk {action.chunk}",
                "mend the order of this node or of its neighbours",
            )
    return Timings(start_s_SA=tuple(map(tuple, starts)), end_s_SA=tuple(map(tuple, ends)))


def _num_slots(num_nodes: int, num_chunks: int, num_microbatches: int) -> int:
    """Return how many forwards a node has were the last group full."""
    return -(-num_microbatches // num_nodes) * num_nodes * num_chunks


def _warmup(node: int, num_nodes: int, num_chunks: int, num_slots: int) -> int:
    return min(2 * (num_nodes - node - 1) + (num_chunks - 1) * num_nodes, num_slots)
