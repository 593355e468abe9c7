"""What holds of every tensor, however nasty, and of every backend that this machine can build."""

from __future__ import annotations

import shutil
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.kernels import reference
from actors.kernels.cpu import levels_here, load_native
from actors.kernels.dispatch import Kernels
from actors.kernels.layout import CHUNK, BlockForm, ChunkForm, Fault
from tests.kernel_cases import (
    BLOCK_FORMS,
    CHUNK_FORMS,
    bits_equal,
    fault_of,
    require_same_blocks,
    require_same_chunks,
    resealed,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
# Machines that run tests are slow at times.
relaxed = settings(deadline=None, max_examples=60)

ANY_FLOAT = st.integers(0, 2**32 - 1)
# Zeros of either sign, the smallest, the largest that can be encoded, and its neighbours; ties of any size.
EDGES = (
    0,
    0x80000000,
    1,
    0x80000001,
    0x007FFFFF,
    0x00800000,
    0x0DA24260,
    0x7E7FFFFF,
    0xFE7FFFFF,
    0x3F800000,
    0xBF800000,
)
SOUND_FLOAT = st.one_of(st.sampled_from(EDGES), st.integers(0, 0x7E7FFFFF), st.integers(0x80000000, 0xFE7FFFFF))


@cache
def natives() -> tuple[Kernels, ...]:
    return tuple(load_native(level) for level in levels_here())


@st.composite
def tensors(draw: st.DrawFn, floats: st.SearchStrategy[int], max_size: int) -> torch.Tensor:
    """A few floats of any bits, each in many places: ties, and blocks that mix magnitudes."""
    palette = np.array(draw(st.lists(floats, min_size=1, max_size=200)), dtype=np.uint32)
    num_elements = draw(st.integers(1, max_size))
    places = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(len(palette), size=num_elements)
    return torch.from_numpy(palette[places].view(np.float32))


@relaxed
@given(tensors(ANY_FLOAT, 700), st.sampled_from(BLOCK_FORMS), st.integers(0, 2**32 - 1), st.booleans())
def test_blocks_of_any_floats_are_the_specification_s(
    source_N: torch.Tensor, form: BlockForm, seed: int, in_bfloat16: bool
) -> None:
    require_same_blocks(natives(), source_N.bfloat16() if in_bfloat16 else source_N, form, seed)


@relaxed
@given(st.data(), st.sampled_from(CHUNK_FORMS))
def test_chunks_of_any_floats_are_the_specification_s(data: st.DataObject, form: ChunkForm) -> None:
    delta_N = data.draw(tensors(ANY_FLOAT, 2 * CHUNK))
    residual_N = torch.roll(delta_N, 1) if data.draw(st.booleans()) else torch.zeros(len(delta_N))
    require_same_chunks(natives(), delta_N, residual_N, form)


@relaxed
@given(tensors(SOUND_FLOAT, 2 * CHUNK), st.sampled_from(CHUNK_FORMS))
def test_the_largest_are_sent_and_nothing_is_lost(sum_N: torch.Tensor, form: ChunkForm) -> None:
    for kernels in (reference, *natives()):
        left_N, sent_N = torch.zeros(len(sum_N)), torch.zeros(len(sum_N))
        payload_N = kernels.encode_chunks(sum_N, left_N, 0.0, form)
        assert kernels.verify_chunks(payload_N, len(sum_N), form) is Fault.NONE
        kernels.add_chunks(payload_N, sent_N, form)
        # Bit for bit, but for the sign of a zero, which adding 0 makes positive.
        assert bits_equal(sent_N + left_N, sum_N + 0.0), kernels.name
        kept = kept_indices(payload_N, form, num_chunks=form.num_chunks(len(sum_N)))
        assert kept == [largest_indices(chunk_N, form.k) for chunk_N in sum_N.split(CHUNK)], kernels.name


def largest_indices(chunk_N: torch.Tensor, k: int) -> list[int]:
    """The k largest of a chunk, padded with zeros, by magnitude and then by index, as plain sorting finds them."""
    magnitudes = np.pad(np.abs(chunk_N.numpy()), (0, CHUNK - len(chunk_N)))
    return sorted(np.argsort(-magnitudes, kind="stable")[:k].tolist())


def kept_indices(payload_N: torch.Tensor, form: ChunkForm, num_chunks: int) -> list[list[int]]:
    """The indices of each record, by the letter of ChunkForm."""
    chunks = []
    for record in payload_N[: num_chunks * form.record_bytes].view(num_chunks, -1).numpy():
        bits = int.from_bytes(record.tobytes(), "little")
        unary = bits >> (8 * form.high_offset)
        places = [place for place in range(form.high_bits) if unary >> place & 1]
        lows = [bits >> (32 + rank * form.low_bits) & ((1 << form.low_bits) - 1) for rank in range(form.k)]
        chunks.append([(place - rank) << form.low_bits | lows[rank] for rank, place in enumerate(places)])
    return chunks


@relaxed
@given(
    st.data(),
    st.sampled_from((*BLOCK_FORMS[::2], *CHUNK_FORMS)),
    st.integers(1, 500),
)
def test_altered_payloads_get_the_specification_s_verdict(
    data: st.DataObject, form: BlockForm | ChunkForm, num_elements: int
) -> None:
    source_N = torch.randn(num_elements, generator=torch.Generator().manual_seed(num_elements))
    if isinstance(form, BlockForm):
        payload_N = reference.encode_blocks(source_N, form, 0)
    else:
        payload_N = reference.encode_chunks(source_N, torch.zeros(num_elements), 0.0, form)
    for _ in range(data.draw(st.integers(1, 3))):
        payload_N[data.draw(st.integers(0, len(payload_N) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        payload_N = resealed(payload_N, num_elements, form)
    fault = fault_of(reference, payload_N, num_elements, form)
    for kernels in natives():
        assert fault_of(kernels, payload_N, num_elements, form) is fault, kernels.name
