"""Nasty tensors and payloads for the kernels' backends, and checks that they do just what the specification does.

`python -m tests.kernel_cases` runs the check on a library built under AddressSanitizer and UBSan; it wants libasan
preloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from actors.kernels import reference
from actors.kernels.cpu import load_native
from actors.kernels.dispatch import Kernels
from actors.kernels.layout import TRAILER_BYTES, BlockForm, ChunkForm, Fault

SEED = 0xFFFFFFF1
BETA = 0.95
BLOCK_FORMS = tuple(
    BlockForm(bits=bits, hadamard=hadamard, stochastic=stochastic)
    for bits in (4, 8)
    for hadamard in (False, True)
    for stochastic in (False, True)
)
CHUNK_FORMS = tuple(ChunkForm(k=k, bits=bits) for k in (32, 64, 128) for bits in (1, 2))
SANITIZER_OPTIONS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def nasty_tensors(num_elements: int) -> Iterator[torch.Tensor]:
    """Yield float32 tensors that codecs stumble over."""
    generator = torch.Generator().manual_seed(num_elements)
    gaussian_N = torch.randn(num_elements, generator=generator)
    yield gaussian_N
    for constant in (0.0, -0.0, 3.0, -1e-38, 1e-31, -1e37, 8.5e37):
        yield torch.full((num_elements,), constant)
    yield gaussian_N * 1e-31
    yield gaussian_N * 1e-42
    yield gaussian_N * 1e36
    # Ties, and halves of a step.
    yield torch.randint(-14, 15, (num_elements,), generator=generator) * 0.5
    # Every exponent there is.
    yield torch.ldexp(gaussian_N, torch.randint(-140, 120, (num_elements,), generator=generator))
    for outlier in (1e6, -3e38, torch.inf, torch.nan):
        spiked_N = gaussian_N.clone()
        spiked_N[num_elements // 2 : num_elements // 2 + 1] = outlier
        yield spiked_N


def bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def require_same_blocks(backends: Sequence[Kernels], source_N: torch.Tensor, form: BlockForm, seed: int = SEED) -> None:
    """Encode, verify and decode in every way; AssertionError where a byte differs."""
    num_elements = len(source_N)
    payload_N = reference.encode_blocks(source_N, form, seed)
    fault = reference.verify_blocks(payload_N, num_elements, form)
    for kernels in backends:
        assert bits_equal(kernels.encode_blocks(source_N, form, seed), payload_N), (kernels.name, form)
        assert kernels.verify_blocks(payload_N, num_elements, form) is fault, (kernels.name, form)
    if fault is not Fault.NONE:
        return
    for dtype, accumulate in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        expected_N = torch.full((num_elements,), 0.75, dtype=dtype)
        reference.decode_blocks(payload_N, expected_N, form, accumulate=accumulate)
        for kernels in backends:
            into_N = torch.full((num_elements,), 0.75, dtype=dtype)
            kernels.decode_blocks(off_alignment(payload_N, 1), into_N, form, accumulate=accumulate)
            assert bits_equal(into_N, expected_N), (kernels.name, form, dtype, accumulate)


def require_same_chunks(
    backends: Sequence[Kernels], delta_N: torch.Tensor, residual_N: torch.Tensor, form: ChunkForm
) -> None:
    """Encode, verify and add; AssertionError where a byte of payload, residual or sum differs."""
    num_elements = len(delta_N)
    expected_left_N, expected_sum_N = residual_N.clone(), torch.full((num_elements,), 0.75)
    payload_N = reference.encode_chunks(delta_N, expected_left_N, BETA, form)
    fault = reference.verify_chunks(payload_N, num_elements, form)
    if fault is Fault.NONE:
        reference.add_chunks(payload_N, expected_sum_N, form)
    for kernels in backends:
        left_N, sum_N = residual_N.clone(), torch.full((num_elements,), 0.75)
        assert bits_equal(kernels.encode_chunks(delta_N, left_N, BETA, form), payload_N), (kernels.name, form)
        assert bits_equal(left_N, expected_left_N), (kernels.name, form)
        assert kernels.verify_chunks(payload_N, num_elements, form) is fault, (kernels.name, form)
        if fault is Fault.NONE:
            kernels.add_chunks(off_alignment(payload_N, 3), sum_N, form)
        assert bits_equal(sum_N, expected_sum_N), (kernels.name, form)


def off_alignment(payload_N: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """Return a copy that lies so many bytes off an aligned address, as a slice of a frame may."""
    return torch.cat([payload_N[:num_bytes], payload_N])[num_bytes:]


def require_same_planes(backends: Sequence[Kernels], dtype: torch.dtype, num_words: int) -> None:
    """Split and merge, with a base and without; AssertionError where a byte differs or a word does not come back."""
    generator = torch.Generator().manual_seed(num_words)
    low, high = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    words_N = torch.randint(low, high, (num_words,), generator=generator).to(dtype)
    near_N = (words_N.long() + torch.randint(-3, 4, (num_words,), generator=generator)).to(dtype)
    for base_N in (None, near_N, words_N):
        expected = reference.split_planes(words_N, base_N)
        for kernels in (reference, *backends):
            assert torch.equal(kernels.split_planes(words_N, base_N), expected), kernels.name
            assert torch.equal(kernels.merge_planes(expected, base_N), words_N), kernels.name


def require_same_blocks_on_nasty(backends: Sequence[Kernels], sizes: Sequence[int]) -> None:
    for num_elements in sizes:
        for source_N in nasty_tensors(num_elements):
            for form in BLOCK_FORMS:
                require_same_blocks(backends, source_N, form)
            require_same_blocks(backends, source_N.bfloat16(), BLOCK_FORMS[num_elements % len(BLOCK_FORMS)])


def require_same_chunks_on_nasty(backends: Sequence[Kernels], sizes: Sequence[int]) -> None:
    for num_elements in sizes:
        for seed, delta_N in enumerate(nasty_tensors(num_elements)):
            residual_N = torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))
            form = CHUNK_FORMS[seed % len(CHUNK_FORMS)]
            require_same_chunks(backends, delta_N, residual_N, form)
            require_same_chunks(backends, delta_N, torch.zeros(num_elements), form)


def resealed(payload_N: torch.Tensor, num_elements: int, form: BlockForm | ChunkForm) -> torch.Tensor:
    """Return a payload with the checksum that its codes and steps, or its records, call for."""
    payload_N = payload_N.clone()
    trailer = form.trailer_offset(num_elements)
    if isinstance(form, BlockForm):
        start, num_blocks = form.steps_offset(num_elements), form.num_blocks(num_elements)
        steps_C = payload_N[start : start + 2 * num_blocks].clone().view(torch.int16).long() & 0xFFFF
    else:
        num_blocks = form.num_chunks(num_elements)
        start, steps_C = num_blocks * form.record_bytes, torch.zeros(num_blocks, dtype=torch.int64)
    words = payload_N[:start].clone().view(torch.int32).long() & 0xFFFFFFFF
    total = reference.checksum(words.view(num_blocks, -1), steps_C)
    payload_N[trailer : trailer + 8] = total.view(1).view(torch.uint8)
    return payload_N


def hostile_payloads(num_elements: int, form: BlockForm | ChunkForm) -> Iterator[torch.Tensor]:
    """Yield payloads of the right size and any bytes, some of them with a right checksum."""
    size_bytes = form.payload_bytes(num_elements)
    generator = torch.Generator().manual_seed(size_bytes)
    for highest in (1, 2, 256):
        payload_N = torch.randint(256 - highest, 256, (size_bytes,), generator=generator).to(torch.uint8)
        yield payload_N
        payload_N[-TRAILER_BYTES // 2 :] = 0
        yield resealed(payload_N, num_elements, form)


def require_safe_on_hostile(backends: Sequence[Kernels]) -> None:
    """Verify any bytes, as the specification does, and even decode them: nothing is read or written out of bounds."""
    for num_elements in (1, 300, 4096 + 5):
        for form in (*BLOCK_FORMS, *CHUNK_FORMS):
            for payload_N in hostile_payloads(num_elements, form):
                fault = fault_of(reference, payload_N, num_elements, form)
                for kernels in backends:
                    assert fault_of(kernels, payload_N, num_elements, form) is fault, (kernels.name, form)
                    decode(kernels, payload_N, torch.zeros(num_elements), form)


def fault_of(kernels: Kernels, payload_N: torch.Tensor, num_elements: int, form: BlockForm | ChunkForm) -> Fault:
    """Return what a backend finds wrong with a payload of either kind."""
    if isinstance(form, BlockForm):
        return kernels.verify_blocks(payload_N, num_elements, form)
    return kernels.verify_chunks(payload_N, num_elements, form)


def decode(kernels: Kernels, payload_N: torch.Tensor, into_N: torch.Tensor, form: BlockForm | ChunkForm) -> None:
    """Add a payload of either kind to a tensor."""
    if isinstance(form, BlockForm):
        kernels.decode_blocks(payload_N, into_N, form, accumulate=True)
    else:
        kernels.add_chunks(payload_N, into_N, form)


def main() -> int:
    backends = [load_native(options=SANITIZER_OPTIONS)]
    require_same_blocks_on_nasty(backends, (0, 1, 129))
    require_same_chunks_on_nasty(backends, (1, 4096 + 5))
    for dtype in (torch.int16, torch.int32):
        require_same_planes(backends, dtype, 1000)
    require_safe_on_hostile(backends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
