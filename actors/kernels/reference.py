"""The specification, in plain torch, of every byte that a codec puts on a link.

Little-endian throughout. A compiled backend is right when its bytes equal these. What makes that possible on every
device: only sums, differences, products and one division a block, each rounded by itself (no fused multiply-add, no
flush to zero); butterflies in a fixed order; reductions by maximum or in integers; ties to the lowest index.

Shapes: N elements, C blocks or chunks of them, B = 128 and E = 4096 elements in each, K kept ones, W 32-bit words.
"""

from __future__ import annotations

import torch

from actors.kernels.layout import BLOCK, CHUNK, BlockForm, ChunkForm, Fault

name = "torch"

_U32 = 0xFFFFFFFF
_ABS = 0x7FFFFFFF
# A value of 2**126 or more, an infinity or NaN has a key (its bits without the sign) from here on: not encodable.
_KEY_LIMIT = 0x7E800000
# Where the largest value is below this, the step or level is 0.
_TINY = 1e-30
# The random signs of the rotation: bit i of word i / 32 negates element i. From SHA-256 of "isthmus hadamard signs".
_SIGN_WORDS = (0x28AC2D84, 0xD2B777FC, 0x8B200BDE, 0xCD2980FE)
# A step covers this multiple of itself. To nearest: more than the largest code, less than half a step more, so that
# nothing need be clamped, and chosen so that encoding what was decoded finds the same step. Stochastic: just the code.
_REACH = {(8, False): 127.4921875, (4, False): 7.0068359375, (8, True): 127.0, (4, True): 7.0}
# No encoder makes a step from here on; what is decoded stays below 2**127.
_STEP_LIMIT = {8: (127 + 120) << 7, 4: (127 + 124) << 7}
_LEVEL_LIMIT = _KEY_LIMIT >> 16
# Levels are means of values in units of the chunk's largest over this.
_FIXED_POINT = 1048576.0


# Bits


def float_bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of float32 values as int64 in [0, 2**32)."""
    return values.view(torch.int32).long() & _U32


def bfloat16_value(bits: torch.Tensor) -> torch.Tensor:
    """Return the float32 that a bfloat16's 16 bits, as int64, stand for."""
    shifted = bits << 16
    return torch.where(shifted >= 1 << 31, shifted - (1 << 32), shifted).to(torch.int32).view(torch.float32)


def mix32(x: torch.Tensor) -> torch.Tensor:
    """Return 32 well-mixed bits of 32, both as int64: a bijection of xor-shifts and odd multipliers."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _U32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _U32
    return x ^ (x >> 16)


def _words(payload_N: torch.Tensor) -> torch.Tensor:
    """Return bytes as 32-bit words in int64: the last axis shrinks by four."""
    return payload_N.contiguous().view(torch.int32).long() & _U32


def _bytes_of_int16(values: torch.Tensor) -> torch.Tensor:
    """Return int64 in [0, 2**16) as two bytes each."""
    return torch.stack([values & 0xFF, values >> 8], dim=-1).to(torch.uint8).flatten(-2)


def checksum(words_CW: torch.Tensor, steps_C: torch.Tensor) -> torch.Tensor:
    """Return the checksum, modulo 2**64, of blocks' or records' words and steps (0 where records hold their levels).

    A sum, so that the order in which blocks are added does not matter. Words are taken in pairs, the last odd one with
    0; the product of keyed words is that of NH (Black et al., UMAC, 1999). Each pair's words are added too, swapped,
    so that no single flipped bit goes unseen. It finds accidents, not forgery.
    """
    num_blocks, num_words = words_CW.shape
    if num_words % 2:
        words_CW = torch.nn.functional.pad(words_CW, (0, 1))
    keys_W = mix32(0x49535448 + torch.arange(words_CW.shape[1]))
    keyed_CW = (words_CW + keys_W) & _U32
    even, odd = words_CW[:, 0::2], words_CW[:, 1::2]
    pairs = keyed_CW[:, 0::2] * keyed_CW[:, 1::2] + odd + (even << 32)
    # int64 wraps around: the same bits as modulo 2**64.
    blocks_C = pairs.sum(dim=1) + steps_C * -0x61C8864680B583EB
    weights_C = 2 * mix32(torch.arange(num_blocks) & _U32) + 1
    return (blocks_C * weights_C).sum()


def _write_trailer(payload_N: torch.Tensor, offset: int, total: torch.Tensor, num_bad: torch.Tensor) -> None:
    payload_N[offset:] = torch.stack([total, num_bad.long()]).view(torch.uint8)


def _trailer_fault(payload_N: torch.Tensor, offset: int, total: torch.Tensor) -> Fault:
    # A copy, because a slice need not lie on 8 bytes.
    said, num_bad = payload_N[offset:].clone().view(torch.int64).tolist()
    if said != int(total):
        return Fault.CHECKSUM
    return Fault.NOT_FINITE if num_bad else Fault.NONE


def _padded(values_N: torch.Tensor, size: int) -> torch.Tensor:
    """Return the elements in float32, in rows of `size`, the last one filled with zeros."""
    values_N = values_N.float()
    return torch.nn.functional.pad(values_N, (0, -len(values_N) % size)).view(-1, size)


# Blocks: one step, a code an element


def hadamard_signs() -> torch.Tensor:
    """Return the rotation's random signs, 1 or -1: shape (128,)."""
    bits = [(_SIGN_WORDS[i // 32] >> (i % 32)) & 1 for i in range(BLOCK)]
    return 1.0 - 2.0 * torch.tensor(bits, dtype=torch.float32)


def walsh_hadamard(blocks_CB: torch.Tensor) -> torch.Tensor:
    """Return the unnormalised transform of each block: butterflies at distance 1, 2, 4, ... 64, in this order."""
    distance = 1
    while distance < BLOCK:
        pairs = blocks_CB.view(-1, BLOCK // (2 * distance), 2, distance)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        blocks_CB = torch.stack([low + high, low - high], dim=2).view(-1, BLOCK)
        distance *= 2
    return blocks_CB


def block_steps(largest_C: torch.Tensor, form: BlockForm) -> torch.Tensor:
    """Return the bits, as int64, of each block's step: the smallest bfloat16 whose reach covers the largest value."""
    reach = torch.tensor(_REACH[form.bits, form.stochastic], dtype=torch.float32)
    step = float_bits(largest_C * (1.0 / reach)) >> 16
    step = step + (bfloat16_value(step) * reach < largest_C).long()
    return torch.where(largest_C < _TINY, 0, step)


def uniform16(num_elements: int, seed: int) -> torch.Tensor:
    """Return 16 random bits for each element, as int64: halves of a hash of the seed and the element's pair."""
    index = torch.arange(num_elements)
    pair = mix32((((index >> 1) * 0x9E3779B9) & _U32) ^ seed)
    return torch.where(index % 2 == 1, pair >> 16, pair & 0xFFFF)


def encode_blocks(source_N: torch.Tensor, form: BlockForm, seed: int) -> torch.Tensor:
    """Return the payload of float32 or bfloat16 elements: uint8 of shape (form.payload_bytes(N),).

    A block that holds what cannot be encoded is all zeros, and counted in the trailer.
    """
    blocks_CB = _padded(source_N, BLOCK)
    if form.hadamard:
        blocks_CB = walsh_hadamard(blocks_CB * hadamard_signs())
    largest_C = (float_bits(blocks_CB) & _ABS).amax(dim=1)
    is_bad_C = largest_C >= _KEY_LIMIT
    steps_C = block_steps(largest_C.to(torch.int32).view(torch.float32), form)
    inverse_C = torch.where(steps_C > 0, 1.0 / bfloat16_value(steps_C), 0.0)
    scaled_CB = blocks_CB * inverse_C[:, None]
    if form.stochastic:
        # The inverse is rounded, so a product may pass the lowest code by a rounding: from there it only goes up.
        floor_CB = scaled_CB.floor().clamp(min=-_REACH[form.bits, True])
        threshold_CB = ((scaled_CB - floor_CB) * 65536.0).nan_to_num(0.0).long()
        quantised_CB = floor_CB + (threshold_CB > uniform16(blocks_CB.numel(), seed).view(-1, BLOCK))
    else:
        quantised_CB = scaled_CB.round()
    quantised_CB = quantised_CB.masked_fill(is_bad_C[:, None], 0.0).long()
    if form.bits == 8:
        codes = quantised_CB & 0xFF
    else:
        codes = (quantised_CB[:, : BLOCK // 2] + 8) | (quantised_CB[:, BLOCK // 2 :] + 8) << 4
    codes = codes.masked_fill(is_bad_C[:, None], 0).to(torch.uint8)
    steps_C = steps_C.masked_fill(is_bad_C, 0)

    num_elements = len(source_N)
    payload_N = torch.zeros(form.payload_bytes(num_elements), dtype=torch.uint8)
    offset = form.steps_offset(num_elements)
    payload_N[:offset] = codes.flatten()
    payload_N[offset : offset + 2 * len(steps_C)] = _bytes_of_int16(steps_C)
    total = checksum(_words(codes), steps_C)
    _write_trailer(payload_N, form.trailer_offset(num_elements), total, is_bad_C.sum())
    return payload_N


def _sections_of_blocks(
    payload_N: torch.Tensor, num_elements: int, form: BlockForm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, steps (int64) and the padding after them."""
    start, trailer = form.steps_offset(num_elements), form.trailer_offset(num_elements)
    stop = start + 2 * form.num_blocks(num_elements)
    steps = payload_N[start:stop].long().view(-1, 2)
    return payload_N[:start].view(-1, form.codes_bytes), steps[:, 0] | steps[:, 1] << 8, payload_N[stop:trailer]


def verify_blocks(payload_N: torch.Tensor, num_elements: int, form: BlockForm) -> Fault:
    """Return what is wrong with a payload of form.payload_bytes(num_elements) bytes."""
    codes, steps_C, padding = _sections_of_blocks(payload_N, num_elements, form)
    total = checksum(_words(codes), steps_C)
    if fault := _trailer_fault(payload_N, form.trailer_offset(num_elements), total):
        return fault
    is_made = bool((steps_C < _STEP_LIMIT[form.bits]).all()) and not padding.any()
    # Codes are symmetric: their lowest value is never made.
    never = (codes == 0x80) if form.bits == 8 else ((codes & 0xF) == 0) | ((codes >> 4) == 0)
    return Fault.NONE if is_made and not never.any() else Fault.GRAMMAR


def decode_blocks(payload_N: torch.Tensor, into_N: torch.Tensor, form: BlockForm, *, accumulate: bool) -> None:
    """Write, or add, the elements of a verified payload; `into_N` is float32, or to write to also bfloat16."""
    codes, steps_C, _ = _sections_of_blocks(payload_N, len(into_N), form)
    if form.bits == 8:
        quantised_CB = codes.view(torch.int8).float()
    else:
        quantised_CB = torch.cat([codes & 0xF, codes >> 4], dim=1).float() - 8.0
    steps_C = bfloat16_value(steps_C)
    if form.hadamard:
        # Sums of small integers: exact. Then one product with step / 128, which is exact too.
        values_CB = walsh_hadamard(quantised_CB) * (steps_C * (1.0 / BLOCK))[:, None] * hadamard_signs()
    else:
        values_CB = quantised_CB * steps_C[:, None]
    values_N = values_CB.view(-1)[: len(into_N)]
    if accumulate:
        into_N += values_N
    else:
        into_N.copy_(values_N)


# Chunks: the k largest elements, by index, sign and level


def group_level(
    fixed_CK: torch.Tensor, keys_CK: torch.Tensor, is_in_CK: torch.Tensor, largest_C: torch.Tensor
) -> torch.Tensor:
    """Return the bits of one level a chunk: the mean of a group of values, made such that value - level is exact.

    The difference of x and a level d of the same sign is a float32 when d < 2 * 2**exponent(x), so the level stays
    below that for the group's smallest value other than 0; and when d is not 2**16 times smaller than x, else it is 0.
    """
    count_C = is_in_CK.sum(dim=1)
    mean_C = (fixed_CK * is_in_CK).sum(dim=1) // count_C.clamp(min=1)
    level_C = (mean_C.float() * (1.0 / _FIXED_POINT) * largest_C).bfloat16().view(torch.int16).long() & 0xFFFF
    is_nonzero_CK = is_in_CK & (keys_CK > 0)
    smallest_C = keys_CK.masked_fill(~is_nonzero_CK, _ABS).amin(dim=1)
    greatest_C = (keys_CK * is_in_CK).amax(dim=1)
    exponent_C = (smallest_C >> 23).clamp(min=1)
    level_C = torch.minimum(level_C, (exponent_C << 7) | 0x7F)
    is_too_small_C = (greatest_C >> 23).clamp(min=1) - (level_C >> 7).clamp(min=1) > 16
    return level_C.masked_fill(is_too_small_C | ~is_nonzero_CK.any(dim=1), 0)


def encode_chunks(delta_N: torch.Tensor, residual_N: torch.Tensor, beta: float, form: ChunkForm) -> torch.Tensor:
    """Return the payload of beta * residual + delta, float32 both, and leave in `residual_N` what it does not carry.

    sent + residual = beta * residual + delta, bit for bit (but for the sign of a zero). A chunk that holds what cannot
    be encoded is all zeros, is counted in the trailer, and keeps its residual. Error feedback: Seide et al., 2014;
    top-k of each chunk with decay: SparseLoCo, arXiv 2508.15706.
    """
    num_elements = len(delta_N)
    sum_CE = _padded(residual_N * torch.tensor(beta, dtype=torch.float32) + delta_N, CHUNK)
    bits_CE = float_bits(sum_CE)
    keys_CE = bits_CE & _ABS
    largest_C = keys_CE.amax(dim=1)
    is_bad_C = largest_C >= _KEY_LIMIT
    kept_CK = keys_CE.sort(dim=1, descending=True, stable=True).indices[:, : form.k].sort(dim=1).values
    keys_CK = keys_CE.gather(1, kept_CK)
    largest_C = largest_C.to(torch.int32).view(torch.float32)
    inverse_C = torch.where(largest_C < _TINY, 0.0, 1.0 / largest_C)
    magnitudes_CK = keys_CK.to(torch.int32).view(torch.float32)
    fixed_CK = (magnitudes_CK * inverse_C[:, None] * _FIXED_POINT).nan_to_num(0.0, 0.0).long()
    if form.bits == 2:
        is_high_CK = fixed_CK >= (fixed_CK.sum(dim=1) // form.k)[:, None]
    else:
        is_high_CK = torch.zeros_like(fixed_CK, dtype=torch.bool)
    low_C = group_level(fixed_CK, keys_CK, ~is_high_CK, largest_C)
    high_C = group_level(fixed_CK, keys_CK, is_high_CK, largest_C)
    is_negative_CK = bits_CE.gather(1, kept_CK) >> 31

    records = _records(kept_CK, is_negative_CK, is_high_CK, low_C, high_C, form)
    records = records.masked_fill(is_bad_C[:, None], 0)
    payload_N = torch.zeros(form.payload_bytes(num_elements), dtype=torch.uint8)
    payload_N[: records.numel()] = records.flatten()
    total = checksum(_words(records), torch.zeros(len(records), dtype=torch.int64))
    _write_trailer(payload_N, form.trailer_offset(num_elements), total, is_bad_C.sum())

    level_CK = bfloat16_value(torch.where(is_high_CK, high_C[:, None], low_C[:, None]))
    sent_CE = sum_CE.gather(1, kept_CK) + torch.where(is_negative_CK == 1, level_CK, -level_CK)
    left_CE = sum_CE.scatter(1, kept_CK, sent_CE)
    left_N = left_CE.view(-1)[:num_elements]
    is_bad_N = is_bad_C.repeat_interleave(CHUNK)[:num_elements]
    residual_N.copy_(torch.where(is_bad_N, residual_N, left_N))
    return payload_N


def _records(
    kept_CK: torch.Tensor,
    is_negative_CK: torch.Tensor,
    is_high_CK: torch.Tensor,
    low_C: torch.Tensor,
    high_C: torch.Tensor,
    form: ChunkForm,
) -> torch.Tensor:
    """Return each chunk's record: uint8 of shape (C, record_bytes)."""
    bits = torch.zeros(len(kept_CK), 8 * form.record_bytes, dtype=torch.uint8)
    rank_K = torch.arange(form.k)
    for bit in range(16):
        bits[:, bit] = low_C >> bit & 1
        bits[:, 16 + bit] = high_C >> bit & 1
    for bit in range(form.low_bits):
        bits[:, 32 + rank_K * form.low_bits + bit] = (kept_CK >> bit & 1).to(torch.uint8)
    bits.scatter_(1, 8 * form.high_offset + (kept_CK >> form.low_bits) + rank_K, 1)
    values = 8 * form.values_offset
    bits[:, values + form.bits * rank_K] = is_negative_CK.to(torch.uint8)
    if form.bits == 2:
        bits[:, values + 2 * rank_K + 1] = is_high_CK.to(torch.uint8)
    weights = 1 << torch.arange(8)
    return (bits.view(len(kept_CK), form.record_bytes, 8) * weights).sum(dim=2).to(torch.uint8)


def _bits_of(records: torch.Tensor) -> torch.Tensor:
    return (records.long()[:, :, None] >> torch.arange(8) & 1).flatten(1)


def _kept_indices(bits: torch.Tensor, form: ChunkForm) -> torch.Tensor:
    """Return the indices of records whose unary section has k set bits: int64 of shape (C, K)."""
    start = 8 * form.high_offset
    positions_CK = bits[:, start : start + form.high_bits].nonzero()[:, 1].view(-1, form.k)
    low = bits[:, 32 : 32 + form.k * form.low_bits].view(-1, form.k, form.low_bits)
    low_CK = (low << torch.arange(form.low_bits)).sum(dim=2)
    return (positions_CK - torch.arange(form.k)) << form.low_bits | low_CK


def verify_chunks(payload_N: torch.Tensor, num_elements: int, form: ChunkForm) -> Fault:
    """Return what is wrong with a payload of form.payload_bytes(num_elements) bytes."""
    size = form.num_chunks(num_elements) * form.record_bytes
    records = payload_N[:size].view(-1, form.record_bytes)
    trailer = form.trailer_offset(num_elements)
    total = checksum(_words(records), torch.zeros(len(records), dtype=torch.int64))
    if fault := _trailer_fault(payload_N, trailer, total):
        return fault
    bits = _bits_of(records)
    levels = _words(records[:, :4])[:, 0]
    low_C, high_C = levels & 0xFFFF, levels >> 16
    unary = bits[:, 8 * form.high_offset : 8 * form.high_offset + form.high_bits]
    is_made = not payload_N[size:trailer].any()
    is_made &= bool(((low_C < _LEVEL_LIMIT) & (high_C < (_LEVEL_LIMIT if form.bits == 2 else 1))).all())
    is_made &= bool(((unary.sum(dim=1) == form.k) & (unary[:, -1] == 0)).all())
    if not is_made or bool((_kept_indices(bits, form).diff(dim=1) <= 0).any()):
        return Fault.GRAMMAR
    return Fault.NONE


def add_chunks(payload_N: torch.Tensor, into_N: torch.Tensor, form: ChunkForm) -> None:
    """Add the elements of a verified payload to float32 `into_N`; an index of the padding is passed over."""
    num_elements = len(into_N)
    records = payload_N[: form.num_chunks(num_elements) * form.record_bytes].view(-1, form.record_bytes)
    bits = _bits_of(records)
    levels = _words(records[:, :4])[:, 0]
    values = bits[:, 8 * form.values_offset :].view(len(records), form.k, form.bits)
    is_high_CK = values[:, :, 1] == 1 if form.bits == 2 else torch.zeros_like(values[:, :, 0], dtype=torch.bool)
    level_CK = bfloat16_value(torch.where(is_high_CK, (levels >> 16)[:, None], (levels & 0xFFFF)[:, None]))
    value_CK = torch.where(values[:, :, 0] == 1, -level_CK, level_CK)
    index_CK = _kept_indices(bits, form) + CHUNK * torch.arange(len(records))[:, None]
    is_element = index_CK < num_elements
    into_N[index_CK[is_element]] += value_CK[is_element]


# Planes: words split into bytes of like rank, for a general compressor


def split_planes(words_N: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
    """Return the bytes of int16 or int32 words, the highest of each first: uint8 of shape (bytes a word, N).

    A float's sign is rotated to the lowest bit, so that the first plane is its exponent. With a base, what is split is
    the difference to the base's word, modulo its range, zigzag-coded: near 0 both ways where the two are close.
    """
    width = 8 * words_N.element_size()
    mask = (1 << width) - 1
    words_N = words_N.long() & mask
    if base_N is None:
        words_N = (words_N << 1 | words_N >> (width - 1)) & mask
    else:
        difference_N = (words_N - base_N.long()) & mask
        words_N = (difference_N << 1 & mask) ^ (mask * (difference_N >> (width - 1)))
    return torch.stack([words_N >> shift & 0xFF for shift in range(width - 8, -8, -8)]).to(torch.uint8)


def merge_planes(planes: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
    """Return the words that `split_planes` split: int16 or int32 of shape (N,)."""
    width = 8 * len(planes)
    mask = (1 << width) - 1
    words_N = torch.zeros(planes.shape[1], dtype=torch.int64)
    for plane_N in planes.long():
        words_N = words_N << 8 | plane_N
    if base_N is None:
        words_N = words_N >> 1 | (words_N & 1) << (width - 1)
    else:
        words_N = ((words_N >> 1) ^ (mask * (words_N & 1))) + base_N.long() & mask
    words_N = torch.where(words_N > mask >> 1, words_N - (mask + 1), words_N)
    return words_N.to(torch.int16 if width == 16 else torch.int32)
