"""What a stage costs in time and memory, in closed form.

PURE. Times come from each node's own probe; memory is counted from the shapes, on the high side: a plan that fits here
must fit on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.model.spec import ModelSpec
from actors.schedule import num_in_flight
from actors.settings import BatchSpec
from actors.spec import NodeCard, ScheduleName

# float32 weight, gradient and AdamW's two moments.
_STATE_BYTES_PER_PARAM = 16
# Kept for backward per token, in units of the hidden size, the key-value size and the ffn size of one block: norms'
# inputs and outputs, projections before and after rotation, attention's output, the gated product's factors.
_SAVED_HIDDEN, _SAVED_KV, _SAVED_FFN = 10, 4, 5
# Logits, their float32 copy, its log-softmax and the gradient.
_HEAD_COPIES = 4
# A frame exists encoded, as chunks in the window, and decoded, at each end.
_FRAME_COPIES = 6


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be run: everything that a stage's cost depends on besides its node and its layers."""

    model: ModelSpec
    batch: BatchSpec
    schedule: ScheduleName
    activation_checkpointing: bool


def compute_s(node: NodeCard, work: Workload, layer_start: int, layer_stop: int) -> float:
    """Return the seconds of one microbatch forward and backward in layers [layer_start, layer_stop)."""
    times = node.times_at(work.batch.microbatch_size)
    assert times is not None
    backward_s = times.layer_backward_s
    if work.activation_checkpointing:
        backward_s += times.layer_forward_s
    total_s = (layer_stop - layer_start) * (times.layer_forward_s + backward_s)
    if layer_start == 0:
        total_s += times.embedding_forward_s + times.embedding_backward_s
    if layer_stop == work.model.num_layers:
        total_s += times.head_forward_s + times.head_backward_s
    return total_s


def memory_bytes(node: NodeCard, work: Workload, stage: int, num_stages: int, layer_start: int, layer_stop: int) -> int:
    """Return what a stage takes: state, activations of the microbatches in flight, the head's logits, frames."""
    model, batch = work.model, work.batch
    kv_size = model.num_kv_heads * model.head_size
    element_bytes = node.boundary_bytes
    tokens = batch.microbatch_tokens
    boundary_bytes = tokens * model.hidden_size * element_bytes
    block_bytes = (
        tokens * element_bytes * (_SAVED_HIDDEN * model.hidden_size + _SAVED_KV * kv_size + _SAVED_FFN * model.ffn_size)
    )
    # A document mask, and attention weights where a fused kernel does not take one.
    block_bytes += tokens * batch.seq_len * (1 + model.num_heads * element_bytes)
    in_flight = num_in_flight(work.schedule, stage, num_stages, batch.num_microbatches)
    num_layers = layer_stop - layer_start
    if work.activation_checkpointing:
        saved_bytes = in_flight * num_layers * boundary_bytes + block_bytes
    else:
        saved_bytes = in_flight * num_layers * block_bytes
    head_bytes = 0
    if layer_stop == model.num_layers:
        head_bytes = _HEAD_COPIES * tokens * model.vocab_size * 4
    state_bytes = _STATE_BYTES_PER_PARAM * model.stage_params(layer_start, layer_stop)
    return state_bytes + saved_bytes + head_bytes + (in_flight + _FRAME_COPIES) * boundary_bytes


def step_s(stage_s: list[float], frame_s: list[float], delay_s: list[float], num_microbatches: int) -> float:
    """Return the seconds of one step of a synchronous pipeline whose transfers overlap with compute.

    The first microbatch goes down and back; the others follow at the pace of the slowest stage or link.
    `frame_s` and `delay_s` give, per link, one frame's transfer and the one-way delay, each way.
    """
    fill_s = sum(stage_s) + 2 * sum(frame_s) + 2 * sum(delay_s)
    return fill_s + (num_microbatches - 1) * max([*stage_s, *frame_s])
