"""What tensors take on a node, from the shapes alone: of a block, of a microbatch in flight, of the head.

PURE. On a CPU, float32 throughout, this is what torch's allocator gives out, tensor by tensor (tests hold it to the
profiler's count). In mixed precision on a GPU nothing was counted yet: activations are meant to be on the high side;
the cast of the weights, two bytes a parameter, is not in it.
"""

from __future__ import annotations

from actors.model.spec import ModelSpec
from actors.settings import BatchSpec

FLOAT32_BYTES = 4
# float32 weight, gradient and AdamW's two moments; the fused step takes nothing besides.
STATE_BYTES_PER_PARAM = 16
# Kept for backward per token in units of the hidden, key-value and ffn size of one block. Float32: what norms take and
# give, queries, attention's output; keys and values; the gated product, its factors, and what silu takes. Mixed
# precision, on the high side: projections before and after rotation, and casts, too.
_FLOAT32_WIDTHS, _MIXED_WIDTHS = (8, 2, 4), (10, 4, 5)
# Kept of a block from the first half of its backward to the second: what each linear layer takes, and the gradient of
# what it gives. Mixed precision: layers that take the same have each a cast of it.
_FLOAT32_HALVED_WIDTHS, _MIXED_HALVED_WIDTHS = (6, 2, 3), (9, 2, 3)
# Losses, counts and flags of a step: next to nothing.
_ODDS_BYTES = 65_536
# In mixed precision: logits, their float32 copy and the gradient.
_MIXED_LOGITS = 3


def block_bytes(model: ModelSpec, batch: BatchSpec, element_bytes: int, document_mask: bool) -> float:
    """Return what one block keeps of one microbatch for its backward."""
    is_float32 = element_bytes == FLOAT32_BYTES
    hidden, kv, ffn = _FLOAT32_WIDTHS if is_float32 else _MIXED_WIDTHS
    kv_size = model.num_kv_heads * model.head_size
    if is_float32 and document_mask:
        # Attention with a mask gets keys and values for every head.
        kv_size = model.hidden_size
    widths = hidden * model.hidden_size + kv * kv_size + ffn * model.ffn_size
    if is_float32:
        # The norms' scales, and attention's sum for each head.
        widths += 2 + model.num_heads
    else:
        # Attention weights, where a fused kernel does not take a mask.
        widths += batch.seq_len * (1 / element_bytes + model.num_heads)
    return float(element_bytes * batch.microbatch_tokens * widths)


def halved_block_bytes(model: ModelSpec, batch: BatchSpec, element_bytes: int) -> float:
    """Return what one block keeps of one microbatch whose backward has done its first half."""
    hidden, kv, ffn = _FLOAT32_HALVED_WIDTHS if element_bytes == FLOAT32_BYTES else _MIXED_HALVED_WIDTHS
    widths = hidden * model.hidden_size + kv * model.num_kv_heads * model.head_size + ffn * model.ffn_size
    return float(element_bytes * batch.microbatch_tokens * widths)


def flight_bytes(model: ModelSpec, batch: BatchSpec, element_bytes: int, document_mask: bool) -> float:
    """Return what a stage keeps of one microbatch besides its blocks: its input, the rotation, the mask."""
    rotation = 2 * batch.seq_len * model.head_size
    mask = batch.microbatch_tokens * batch.seq_len if document_mask else 0
    return float(raw_frame_bytes(model, batch, element_bytes) + element_bytes * (rotation + mask))


def raw_frame_bytes(model: ModelSpec, batch: BatchSpec, element_bytes: int) -> float:
    """Return what one microbatch's boundary tensor takes before any codec."""
    return float(element_bytes * batch.microbatch_tokens * model.hidden_size)


def passing_bytes(model: ModelSpec, batch: BatchSpec, *, in_halves: bool) -> float:
    """Return what a block's backward takes at its worst for a moment, over what it kept.

    At its down projection: the gradients of the hidden state and of the gated product, and either that of a factor or
    of the weights; where backwards come in halves, of the weights once more.
    """
    hidden, ffn = (batch.microbatch_tokens * size for size in (model.hidden_size, model.ffn_size))
    weights = model.hidden_size * model.ffn_size
    return float(FLOAT32_BYTES * (hidden + ffn + max(ffn, weights) + in_halves * weights) + _ODDS_BYTES)


def head_saved_bytes(model: ModelSpec, batch: BatchSpec) -> float:
    """Return what norm, head and loss keep of one microbatch: its log-softmax, and what norm and head take."""
    return float(FLOAT32_BYTES * batch.microbatch_tokens * (model.vocab_size + 2 * model.hidden_size + 2))


def head_passing_bytes(model: ModelSpec, batch: BatchSpec, *, is_float32: bool) -> float:
    """Return what head and loss take at their worst for a moment: the logits' gradient, and what is made of it."""
    logits = batch.microbatch_tokens * model.vocab_size
    made = max(logits, model.vocab_size * model.hidden_size)
    return float(FLOAT32_BYTES * (logits + made if is_float32 else max(_MIXED_LOGITS * logits, logits + made)))
