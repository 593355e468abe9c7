"""The CPU library: the specification's bytes at every level, how good they are, faults and hostile payloads."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actors.kernels import reference
from actors.kernels.cpu import levels_here, load_native
from actors.kernels.dispatch import Kernels
from actors.kernels.layout import BLOCK, CHUNK, BlockForm, ChunkForm, Fault
from tests.golden.frames import CASES, GoldenCase, golden, produced
from tests.kernel_cases import (
    BLOCK_FORMS,
    CHUNK_FORMS,
    bits_equal,
    fault_of,
    require_safe_on_hostile,
    require_same_blocks_on_nasty,
    require_same_chunks_on_nasty,
    require_same_planes,
    resealed,
)

CPU = torch.device("cpu")
Q8, HQ4, TK2 = BlockForm(bits=8), BlockForm(bits=4, hadamard=True), ChunkForm(k=64)
NEAREST = [form for form in BLOCK_FORMS if not form.stochastic]


@pytest.fixture(scope="module")
def natives() -> list[Kernels]:
    """The library of every level that this processor runs."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    with ThreadPoolExecutor(max_workers=2) as executor:
        return list(executor.map(load_native, levels_here()))


@pytest.fixture(scope="module")
def backends(natives: list[Kernels]) -> list[Kernels]:
    return [reference, *natives]


def gaussian(num_elements: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))


def decoded(kernels: Kernels, payload_N: torch.Tensor, num_elements: int, form: BlockForm | ChunkForm) -> torch.Tensor:
    into_N = torch.zeros(num_elements)
    assert fault_of(kernels, payload_N, num_elements, form) is Fault.NONE
    if isinstance(form, BlockForm):
        kernels.decode_blocks(payload_N, into_N, form, accumulate=False)
    else:
        kernels.add_chunks(payload_N, into_N, form)
    return into_N


# The same bytes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_frames_stay_as_they_are(backends: list[Kernels], case: GoldenCase) -> None:
    for kernels in backends:
        assert produced(kernels, case, CPU) == golden()[case.name], kernels.name


def test_every_case_has_a_golden_frame() -> None:
    assert [case.name for case in CASES] == list(golden())


@pytest.mark.parametrize("num_elements", [0, 1, 127, 128, 129, 4096 + 5])
def test_blocks_are_the_specification_s(natives: list[Kernels], num_elements: int) -> None:
    require_same_blocks_on_nasty(natives, [num_elements])


@pytest.mark.parametrize("num_elements", [0, 1, 63, 4096, 2 * 4096 + 5])
def test_chunks_are_the_specification_s(natives: list[Kernels], num_elements: int) -> None:
    require_same_chunks_on_nasty(natives, [num_elements])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("num_words", [0, 1, 255, 1000])
def test_planes_are_the_specification_s(natives: list[Kernels], dtype: torch.dtype, num_words: int) -> None:
    require_same_planes(natives, dtype, num_words)


def test_a_result_too_large_for_the_caches_is_the_same(natives: list[Kernels]) -> None:
    num_elements = (8 << 20) // 4 + 129
    source_N = gaussian(num_elements)
    # Aligned for stores past the caches, and not.
    room_N = torch.zeros(num_elements + 1)
    for form in (Q8, HQ4):
        payload_N = natives[0].encode_blocks(source_N, form, 1)
        expected_N = torch.zeros(num_elements)
        reference.decode_blocks(payload_N, expected_N, form, accumulate=False)
        for kernels in natives:
            for into_N in (room_N[:-1], room_N[1:]):
                kernels.decode_blocks(payload_N, into_N.fill_(9.0), form, accumulate=False)
                assert bits_equal(into_N, expected_N), kernels.name


def test_an_encoder_finds_the_largest_however_chunks_differ(natives: list[Kernels]) -> None:
    # The search starts from the chunk before: growing, shrinking, all alike, and none at all.
    scales = torch.tensor([1.0, 1e-20, 1e20, 0.0, 1e-37, 1.0, 1.0, 0.0, 0.0, 1e30])
    delta_N = (gaussian(len(scales) * CHUNK).view(-1, CHUNK) * scales[:, None]).flatten()
    delta_N[6 * CHUNK : 7 * CHUNK] = 1.0
    for form in CHUNK_FORMS:
        expected_N = torch.zeros(len(delta_N))
        payload_N = reference.encode_chunks(delta_N, expected_N, 0.5, form)
        for kernels in natives:
            left_N = torch.zeros(len(delta_N))
            assert bits_equal(kernels.encode_chunks(delta_N, left_N, 0.5, form), payload_N), kernels.name
            assert bits_equal(left_N, expected_N), kernels.name


def test_blocks_that_cannot_be_encoded_are_counted(backends: list[Kernels]) -> None:
    source_N = gaussian(5 * BLOCK)
    source_N[BLOCK], source_N[3 * BLOCK + 7] = math.inf, 2.0**126
    for kernels in backends:
        for form in BLOCK_FORMS:
            payload_N = kernels.encode_blocks(source_N, form, 1)
            assert payload_N[-8:].view(torch.int64).tolist() == [2], kernels.name
            assert kernels.verify_blocks(payload_N, len(source_N), form) is Fault.NOT_FINITE


def test_a_chunk_that_cannot_be_encoded_keeps_its_residual(backends: list[Kernels]) -> None:
    delta_N, residual_N = gaussian(2 * CHUNK), gaussian(2 * CHUNK, seed=2)
    delta_N[5] = math.nan
    for kernels in backends:
        left_N = residual_N.clone()
        payload_N = kernels.encode_chunks(delta_N, left_N, 0.95, TK2)
        assert payload_N[-8:].view(torch.int64).tolist() == [1], kernels.name
        assert kernels.verify_chunks(payload_N, 2 * CHUNK, TK2) is Fault.NOT_FINITE
        assert bits_equal(left_N[:CHUNK], residual_N[:CHUNK])
        assert not torch.equal(left_N[CHUNK:], residual_N[CHUNK:])


# How good they are


def test_relative_error_of_gaussian_values(backends: list[Kernels]) -> None:
    source_N = gaussian(1 << 16)
    for kernels in backends:
        for form, least, most in ((Q8, 0.0, 0.008), (HQ4, 0.1145, 0.1205)):
            sent_N = decoded(kernels, kernels.encode_blocks(source_N, form, 0), len(source_N), form)
            assert least <= float((sent_N - source_N).norm() / source_N.norm()) <= most, (kernels.name, form)


@pytest.mark.parametrize("form", NEAREST, ids=str)
def test_every_element_is_within_half_a_step(backends: list[Kernels], form: BlockForm) -> None:
    source_N = gaussian(64 * BLOCK) * torch.logspace(-25, 25, 64).repeat_interleave(BLOCK)
    for kernels in backends:
        payload_N = kernels.encode_blocks(source_N, form, 0)
        sent_N = decoded(kernels, payload_N, len(source_N), form)
        start = form.steps_offset(len(source_N))
        steps_C = payload_N[start : start + 2 * 64].clone().view(torch.bfloat16).double()
        error_CB = (sent_N.double() - source_N.double()).view(-1, BLOCK)
        if form.hadamard:
            error_CB = reference.walsh_hadamard(error_CB * reference.hadamard_signs())
        assert bool((error_CB.abs() <= 0.51 * steps_C[:, None]).all()), kernels.name


@pytest.mark.parametrize("form", NEAREST, ids=str)
def test_what_was_decoded_encodes_to_the_same_payload(backends: list[Kernels], form: BlockForm) -> None:
    source_N = gaussian(64 * BLOCK + 5) * 10.0
    for kernels in backends:
        payload_N = kernels.encode_blocks(source_N, form, 0)
        again_N = kernels.encode_blocks(decoded(kernels, payload_N, len(source_N), form), form, 0)
        # Of the last block a rotation fills the padding too, which is not kept.
        whole = 64 * form.codes_bytes if form.hadamard else len(payload_N)
        assert bits_equal(again_N[:whole], payload_N[:whole]), kernels.name


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_has_no_bias(natives: list[Kernels], bits: int) -> None:
    form = BlockForm(bits=bits, stochastic=True)
    largest, num_points, num_blocks = (1 << (bits - 1)) - 1, 64, 128
    # One element of each block makes its step 1; the others lie on one of 64 points between the codes.
    points = (torch.arange(num_points) + 0.5) * (2 * largest / num_points) - largest
    blocks_CB = points.repeat_interleave(num_blocks)[:, None].repeat(1, BLOCK)
    blocks_CB[:, 0] = largest
    payload_N = natives[0].encode_blocks(blocks_CB.flatten(), form, 12345)
    sent_CB = decoded(natives[0], payload_N, blocks_CB.numel(), form).view(-1, BLOCK)
    sent = sent_CB[:, 1:].reshape(num_points, -1).double()
    fraction = points.double() - points.double().floor()
    standard_error = (fraction * (1 - fraction) / sent.shape[1]).sqrt()
    assert bool(((sent.mean(dim=1) - points).abs() < 4 * standard_error + 1e-9).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_never_passes_the_lowest_code(natives: list[Kernels], bits: int) -> None:
    # The inverses of these steps are rounded up, so the products go beyond the code by a rounding.
    form, lowest = BlockForm(bits=bits, stochastic=True), 1.0 - (1 << (bits - 1))
    for kernels in natives:
        for step in (167 / 128, 197 / 128):
            source_N = torch.full((1 << 19,), lowest * step)
            payload_N = kernels.encode_blocks(source_N, form, 3)
            assert kernels.verify_blocks(payload_N, len(source_N), form) is Fault.NONE
            assert torch.equal(decoded(kernels, payload_N, len(source_N), form), source_N)


def test_a_seed_decides_stochastic_rounding(backends: list[Kernels]) -> None:
    form, source_N = BlockForm(bits=4, hadamard=True, stochastic=True), gaussian(1000)
    for kernels in backends:
        first_N = kernels.encode_blocks(source_N, form, 1)
        assert bits_equal(kernels.encode_blocks(source_N, form, 1), first_N)
        assert not bits_equal(kernels.encode_blocks(source_N, form, 2), first_N)


@pytest.mark.parametrize(("form", "record_bytes"), [(TK2, 84), (ChunkForm(k=64, bits=1), 76)])
def test_what_a_chunk_takes(backends: list[Kernels], form: ChunkForm, record_bytes: int) -> None:
    for kernels in backends:
        payload_N = kernels.encode_chunks(gaussian(8 * CHUNK), torch.zeros(8 * CHUNK), 0.0, form)
        assert len(payload_N) == 8 * record_bytes + 16


# What may not be decoded


@pytest.mark.parametrize("form", [*NEAREST, *CHUNK_FORMS], ids=str)
def test_every_flipped_bit_is_found(natives: list[Kernels], form: BlockForm | ChunkForm) -> None:
    num_elements = 130
    if isinstance(form, BlockForm):
        payload_N = reference.encode_blocks(gaussian(num_elements), form, 0)
    else:
        payload_N = reference.encode_chunks(gaussian(num_elements), torch.zeros(num_elements), 0.0, form)
    for bit in range(8 * len(payload_N)):
        payload_N[bit // 8] ^= 1 << (bit % 8)
        for kernels in natives:
            assert fault_of(kernels, payload_N, num_elements, form) is not Fault.NONE, (kernels.name, bit)
        # The specification is slow: every seventh bit shows that it and the library agree.
        if bit % 7 == 0:
            fault = fault_of(reference, payload_N, num_elements, form)
            assert all(fault_of(kernels, payload_N, num_elements, form) is fault for kernels in natives)
        payload_N[bit // 8] ^= 1 << (bit % 8)
    assert all(fault_of(kernels, payload_N, num_elements, form) is Fault.NONE for kernels in natives)


def require_grammar_fault(
    backends: Sequence[Kernels], payload_N: torch.Tensor, num_elements: int, form: BlockForm | ChunkForm
) -> None:
    payload_N = resealed(payload_N, num_elements, form)
    for kernels in backends:
        assert fault_of(kernels, payload_N, num_elements, form) is Fault.GRAMMAR, kernels.name


@pytest.mark.parametrize("form", NEAREST, ids=str)
def test_no_encoder_makes_such_blocks(backends: list[Kernels], form: BlockForm) -> None:
    num_elements = 3 * BLOCK
    good_N = reference.encode_blocks(gaussian(num_elements), form, 0)
    steps = form.steps_offset(num_elements)
    lowest_codes = [0x80] if form.bits == 8 else [good_N[200 % steps] & 0xF0, good_N[200 % steps] & 0x0F]
    step_limit = ((127 + 120) if form.bits == 8 else (127 + 124)) << 7
    for code in lowest_codes:
        payload_N = good_N.clone()
        payload_N[200 % steps] = code
        require_grammar_fault(backends, payload_N, num_elements, form)
    for step in (step_limit, 0x7F80, 0x8000, 0xFFFF):
        payload_N = good_N.clone()
        payload_N[steps + 2 : steps + 4] = torch.tensor([step & 0xFF, step >> 8], dtype=torch.uint8)
        require_grammar_fault(backends, payload_N, num_elements, form)
    # Three steps are six bytes; two more fill them up to eight.
    payload_N = good_N.clone()
    payload_N[steps + 7] = 1
    require_grammar_fault(backends, payload_N, num_elements, form)


def unary_bits(payload_N: torch.Tensor, form: ChunkForm) -> list[int]:
    """The positions of the set bits of the first record's unary section, in bits from the payload's start."""
    start, stop = 8 * form.high_offset, 8 * form.values_offset
    return [bit for bit in range(start, stop) if int(payload_N[bit // 8]) >> (bit % 8) & 1]


@pytest.mark.parametrize("form", CHUNK_FORMS, ids=str)
def test_no_encoder_makes_such_records(backends: list[Kernels], form: ChunkForm) -> None:
    num_elements = CHUNK + 1
    good_N = reference.encode_chunks(gaussian(num_elements), torch.zeros(num_elements), 0.0, form)
    kept = unary_bits(good_N, form)
    free = next(bit for bit in range(kept[0], 8 * form.values_offset) if bit not in kept)
    last = 8 * form.values_offset - 1

    def with_flipped(*bits: int) -> torch.Tensor:
        payload_N = good_N.clone()
        for bit in bits:
            payload_N[bit // 8] ^= 1 << (bit % 8)
        return payload_N

    # One index fewer, one more, and one in the place that none may have.
    for payload_N in (with_flipped(kept[3]), with_flipped(free), with_flipped(kept[3], last)):
        require_grammar_fault(backends, payload_N, num_elements, form)
    # All indices' high parts 0 and all low parts alike: none ascends.
    payload_N = good_N.clone()
    payload_N[4 : form.values_offset] = 0
    payload_N[form.high_offset : form.high_offset + form.k // 8] = 0xFF
    require_grammar_fault(backends, payload_N, num_elements, form)
    # Levels that no encoder makes: too large, negative, and a high one where there is one level only.
    for first, level in ((0, 0x7E80), (0, 0x8000), (2, 0x7E80), *([(2, 1)] if form.bits == 1 else [])):
        payload_N = good_N.clone()
        payload_N[first : first + 2] = torch.tensor([level & 0xFF, level >> 8], dtype=torch.uint8)
        require_grammar_fault(backends, payload_N, num_elements, form)


def test_padding_of_records_is_zero(backends: list[Kernels]) -> None:
    payload_N = reference.encode_chunks(gaussian(CHUNK), torch.zeros(CHUNK), 0.0, TK2)
    payload_N[TK2.record_bytes] = 1
    require_grammar_fault(backends, payload_N, CHUNK, TK2)


def test_any_bytes_are_verified_alike(natives: list[Kernels]) -> None:
    require_safe_on_hostile(natives)


def test_a_tensor_that_does_not_fit_is_refused_before_it_is_touched(natives: list[Kernels]) -> None:
    kernels = natives[0]
    values_N, into_N = gaussian(300), torch.zeros(300)
    payload_N, sparse_N = kernels.encode_blocks(values_N, Q8, 0), kernels.encode_chunks(values_N, into_N, 0.0, TK2)
    bytes_N = torch.zeros(4 * 300 + 1, dtype=torch.uint8)
    planes = kernels.split_planes(values_N.view(torch.int32), None)
    refused = [
        lambda: kernels.encode_blocks(values_N.double(), Q8, 0),
        lambda: kernels.encode_blocks(values_N[::2], Q8, 0),
        lambda: kernels.encode_blocks(values_N.view(3, 100), Q8, 0),
        lambda: kernels.encode_blocks(
            torch.frombuffer(bytes_N.numpy(), dtype=torch.float32, offset=1, count=300), Q8, 0
        ),
        lambda: kernels.encode_blocks(values_N, BlockForm(bits=2), 0),
        lambda: kernels.encode_blocks(values_N, BlockForm(bits=8, stochastic=True), 1 << 32),
        lambda: kernels.verify_blocks(payload_N, 385, Q8),
        lambda: kernels.verify_blocks(payload_N[:-1], 300, Q8),
        lambda: kernels.decode_blocks(payload_N, torch.zeros(500), Q8, accumulate=False),
        lambda: kernels.decode_blocks(payload_N, torch.zeros(300, dtype=torch.bfloat16), Q8, accumulate=True),
        lambda: kernels.encode_chunks(values_N, torch.zeros(299), 0.0, TK2),
        lambda: kernels.encode_chunks(values_N.bfloat16(), into_N, 0.0, TK2),
        lambda: kernels.encode_chunks(values_N, into_N, 0.0, ChunkForm(k=16)),
        lambda: kernels.verify_chunks(sparse_N[1:], 300, TK2),
        lambda: kernels.add_chunks(sparse_N, torch.zeros(5000), TK2),
        lambda: kernels.split_planes(values_N, None),
        lambda: kernels.split_planes(values_N.view(torch.int32), torch.zeros(299, dtype=torch.int32)),
        lambda: kernels.merge_planes(planes[:3], None),
        lambda: kernels.merge_planes(planes.t().contiguous().t(), None),
    ]
    for call in refused:
        with pytest.raises(ValueError):
            call()
