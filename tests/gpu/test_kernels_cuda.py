"""The kernels on a real device: the bytes of the specification, golden frames, streams, threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actors.codecs import CODECS
from actors.kernels import reference
from actors.kernels.dispatch import Kernels, host_kernels, kernels_for
from actors.kernels.layout import BLOCK, CHUNK, BlockForm, ChunkForm, Fault
from tests.golden.frames import CASES, GoldenCase, golden, produced
from tests.kernel_cases import (
    BLOCK_FORMS,
    CHUNK_FORMS,
    require_same_blocks,
    require_same_blocks_on_nasty,
    require_same_chunks,
    require_same_chunks_on_nasty,
    require_same_planes,
)

pytest.importorskip("cuda.core", reason="needs cuda-core")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HQ4, TK2 = BlockForm(bits=4, hadamard=True), ChunkForm(k=64)
# Enough for several tiles on each multiprocessor, and a tail.
LARGE = (1 << 22) + 77


class ThroughDevice:
    """Takes the host's tensors through the device's kernels, so that the host's cases hold for them too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kernels = kernels_for(device)
        self.name = self._kernels.name

    def encode_blocks(self, source_N: torch.Tensor, form: BlockForm, seed: int) -> torch.Tensor:
        return self._kernels.encode_blocks(source_N.to(self._device), form, seed).cpu()

    def verify_blocks(self, payload_N: torch.Tensor, num_elements: int, form: BlockForm) -> Fault:
        return self._kernels.verify_blocks(payload_N.to(self._device), num_elements, form)

    def decode_blocks(
        self, payload_N: torch.Tensor, into_N: torch.Tensor, form: BlockForm, *, accumulate: bool
    ) -> None:
        on_device_N = into_N.to(self._device)
        self._kernels.decode_blocks(payload_N.to(self._device), on_device_N, form, accumulate=accumulate)
        into_N.copy_(on_device_N)

    def encode_chunks(
        self, delta_N: torch.Tensor, residual_N: torch.Tensor, beta: float, form: ChunkForm
    ) -> torch.Tensor:
        on_device_N = residual_N.to(self._device)
        payload_N = self._kernels.encode_chunks(delta_N.to(self._device), on_device_N, beta, form)
        residual_N.copy_(on_device_N)
        return payload_N.cpu()

    def verify_chunks(self, payload_N: torch.Tensor, num_elements: int, form: ChunkForm) -> Fault:
        return self._kernels.verify_chunks(payload_N.to(self._device), num_elements, form)

    def add_chunks(self, payload_N: torch.Tensor, into_N: torch.Tensor, form: ChunkForm) -> None:
        on_device_N = into_N.to(self._device)
        self._kernels.add_chunks(payload_N.to(self._device), on_device_N, form)
        into_N.copy_(on_device_N)

    def split_planes(self, words_N: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        base_N = None if base_N is None else base_N.to(self._device)
        return self._kernels.split_planes(words_N.to(self._device), base_N).cpu()

    def merge_planes(self, planes: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        base_N = None if base_N is None else base_N.to(self._device)
        return self._kernels.merge_planes(planes.to(self._device), base_N).cpu()


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def backend(device: torch.device) -> Kernels:
    return ThroughDevice(device)


def heavy_tailed(num_elements: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values_N = torch.randn(num_elements, generator=generator)
    return values_N * torch.exp(1.5 * torch.randn(num_elements, generator=generator))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_frames_are_made_here_too(device: torch.device, case: GoldenCase) -> None:
    assert produced(kernels_for(device), case, device) == golden()[case.name]


def test_nasty_tensors_are_encoded_and_decoded_as_specified(backend: Kernels) -> None:
    require_same_blocks_on_nasty([backend], [1, 129, 5 * BLOCK])
    require_same_chunks_on_nasty([backend], [1, CHUNK, CHUNK + 300])


def sizes(seed: int) -> Iterator[int]:
    """Yield sizes of every magnitude, most of them odd."""
    generator = torch.Generator().manual_seed(seed)
    for exponent in range(4, 20):
        yield int(torch.randint(1 << exponent, 2 << exponent, (1,), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_random_sizes_are_as_specified(backend: Kernels, dtype: torch.dtype) -> None:
    for seed, num_elements in enumerate(sizes(seed=1)):
        source_N = heavy_tailed(num_elements, seed).to(dtype)
        for form in BLOCK_FORMS:
            require_same_blocks([backend], source_N, form, seed)


def test_chunks_of_random_sizes_are_as_specified(backend: Kernels) -> None:
    for seed, num_elements in enumerate(sizes(seed=2)):
        delta_N, residual_N = heavy_tailed(num_elements, seed), heavy_tailed(num_elements, seed + 100)
        require_same_chunks([backend], delta_N, residual_N, CHUNK_FORMS[seed % len(CHUNK_FORMS)])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_planes_of_random_sizes_are_as_specified(backend: Kernels, dtype: torch.dtype) -> None:
    for num_words in sizes(seed=3):
        require_same_planes([backend], dtype, num_words)


def test_large_tensors_are_as_the_host_makes_them(backend: Kernels) -> None:
    host = host_kernels()
    source_N = heavy_tailed(LARGE, seed=5)
    for form in BLOCK_FORMS:
        assert torch.equal(backend.encode_blocks(source_N, form, 7), host.encode_blocks(source_N, form, 7)), form
    for form in CHUNK_FORMS:
        residuals = [torch.zeros(LARGE), torch.zeros(LARGE)]
        payloads = [
            kernels.encode_chunks(source_N, residual_N, 0.95, form)
            for kernels, residual_N in zip((backend, host), residuals, strict=True)
        ]
        assert torch.equal(*payloads), form
        assert torch.equal(*residuals), form


def test_launches_on_many_streams_and_threads_do_not_meet(device: torch.device) -> None:
    kernels = kernels_for(device)
    sources = [heavy_tailed(1 << 18, seed) for seed in range(8)]
    expected = [host_kernels().encode_blocks(source_N, HQ4, 0) for source_N in sources]

    def encode_often(index: int) -> bool:
        # A thread that never called CUDA, on a stream of its own.
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            source_N = sources[index].to(device)
            payloads = [kernels.encode_blocks(source_N, HQ4, 0) for _ in range(50)]
        stream.synchronize()
        return all(torch.equal(payload_N.cpu(), expected[index]) for payload_N in payloads)

    with ThreadPoolExecutor(len(sources)) as threads:
        assert all(threads.map(encode_often, range(len(sources))))


def test_a_launch_waits_for_what_its_stream_did_before(device: torch.device) -> None:
    kernels = kernels_for(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        factor = torch.randn(4096, 4096, device=device)
        for _ in range(10):
            factor = (factor @ factor).clamp(-1.0, 1.0)
        payload_N = kernels.encode_blocks(factor.view(-1), HQ4, 0)
    stream.synchronize()
    assert torch.equal(payload_N.cpu(), host_kernels().encode_blocks(factor.cpu().view(-1), HQ4, 0))


def test_tensors_that_start_within_a_vector_are_taken_too(device: torch.device) -> None:
    kernels = kernels_for(device)
    source_N = torch.linspace(-1.0, 1.0, 1001)
    payload_N = kernels.encode_blocks(source_N.to(device)[1:], HQ4, 0)
    assert torch.equal(payload_N.cpu(), reference.encode_blocks(source_N[1:], HQ4, 0))
    into_N = torch.zeros(1001, device=device)
    kernels.decode_blocks(payload_N, into_N[1:], HQ4, accumulate=True)
    expected_N = torch.zeros(1000)
    reference.decode_blocks(payload_N.cpu(), expected_N, HQ4, accumulate=False)
    assert torch.equal(into_N[1:].cpu(), expected_N)
    assert into_N[0] == 0.0


@pytest.mark.parametrize("name", ["q8", "hq4", "hq4-stochastic", "tk2"])
def test_codecs_decode_to_the_device_what_the_host_encoded(device: torch.device, name: str) -> None:
    codec, tensor = CODECS[name], heavy_tailed(3 * CHUNK, seed=1).view(3, CHUNK)
    payload = memoryview(bytearray(codec.encode(tensor, 5).numpy().tobytes()))
    on_device = codec.decode(payload, (3, CHUNK), torch.float32, device)
    assert torch.equal(on_device.cpu(), codec.decode(payload, (3, CHUNK), torch.float32, torch.device("cpu")))
    codec.decode_add(payload, on_device)
    assert torch.equal(on_device.cpu(), 2 * codec.decode(payload, (3, CHUNK), torch.float32, torch.device("cpu")))
