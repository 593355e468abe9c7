"""The unmodified CUDA kernels, run on the CPU: the specification's bytes, whatever order their threads take."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from actors.kernels import reference
from actors.kernels.cuda import CudaKernels, decode_kernel, encode_kernel
from actors.kernels.layout import BLOCK, CHUNK, BlockForm, ChunkForm
from tests.emulator.launcher import (
    SANITIZERS,
    EmulatedLauncher,
    EmulationError,
    build_library,
    build_program,
    entry_of,
)
from tests.emulator.sources import barriers, with_change, without_barrier
from tests.kernel_cases import (
    BLOCK_FORMS,
    CHUNK_FORMS,
    require_same_blocks_on_nasty,
    require_same_chunks_on_nasty,
    require_same_planes,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SCHEDULES = range(8)
Q8 = BlockForm(bits=8)
TK2 = ChunkForm(k=64)
# More tiles than CTAs, and a last block or chunk of which little is there.
NUM_ELEMENTS = 70 * BLOCK + 37
NUM_CHUNK_ELEMENTS = 4 * CHUNK + 100


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_library(tmp_path_factory.mktemp("emulator"))


def nasty_values(num_elements: int) -> torch.Tensor:
    """Return heavy-tailed values with blocks of zeros, ties, tiny and huge values, infinity and NaN."""
    generator = torch.Generator().manual_seed(num_elements)
    values_N = torch.randn(num_elements, generator=generator)
    values_N *= torch.exp(1.5 * torch.randn(num_elements, generator=generator))
    values_N[: 1 * BLOCK] = 0.0
    values_N[1 * BLOCK : 2 * BLOCK] = 1.0
    values_N[2 * BLOCK : 3 * BLOCK] = torch.randint(-3, 4, (BLOCK,), generator=generator).float()
    values_N[3 * BLOCK : 4 * BLOCK] *= 1e-38
    values_N[4 * BLOCK : 5 * BLOCK] *= 1e36
    values_N[5 * BLOCK + 1] = float("nan")
    values_N[6 * BLOCK + 127] = float("inf")
    # Overflows only when rotated, to infinities that meet again.
    values_N[7 * BLOCK : 8 * BLOCK : 32] = torch.tensor([1.0, 1.0, -1.0, 1.0]) * 3e38
    values_N[8 * BLOCK] = -0.0
    return values_N


def chunk_values() -> tuple[torch.Tensor, torch.Tensor]:
    """Return delta and residual: a chunk of zeros, one of ties, one with NaN, one without a like, and a short one."""
    generator = torch.Generator().manual_seed(1)
    delta_N = torch.randn(NUM_CHUNK_ELEMENTS, generator=generator)
    residual_N = torch.randn(NUM_CHUNK_ELEMENTS, generator=generator)
    delta_N[:CHUNK] = residual_N[:CHUNK] = 0.0
    delta_N[CHUNK : 2 * CHUNK] = torch.randint(-3, 4, (CHUNK,), generator=generator).float()
    residual_N[CHUNK : 2 * CHUNK] = 0.0
    delta_N[2 * CHUNK + 77] = float("nan")
    return delta_N, residual_N


def encode_chunks(kernels: CudaKernels, form: ChunkForm) -> tuple[bytes, bytes]:
    delta_N, residual_N = chunk_values()
    payload_N = kernels.encode_chunks(delta_N, residual_N, 0.95, form)
    return payload_N.numpy().tobytes(), residual_N.numpy().tobytes()


def encode_chunks_by_reference(form: ChunkForm) -> tuple[bytes, bytes]:
    delta_N, residual_N = chunk_values()
    payload_N = reference.encode_chunks(delta_N, residual_N, 0.95, form)
    return payload_N.numpy().tobytes(), residual_N.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", BLOCK_FORMS, ids=lambda form: encode_kernel(torch.float32, form))
def test_blocks_are_encoded_as_specified(library: ctypes.CDLL, form: BlockForm, dtype: torch.dtype) -> None:
    source_N = nasty_values(NUM_ELEMENTS).to(dtype)
    expected = reference.encode_blocks(source_N, form, seed=123)
    for schedule in SCHEDULES:
        payload_N = CudaKernels(EmulatedLauncher(library, schedule)).encode_blocks(source_N, form, seed=123)
        assert torch.equal(payload_N, expected), f"schedule {schedule}"


@pytest.mark.parametrize(
    ("dtype", "accumulate"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("form", [form for form in BLOCK_FORMS if not form.stochastic], ids=str)
def test_blocks_are_decoded_as_specified(
    library: ctypes.CDLL, form: BlockForm, dtype: torch.dtype, accumulate: bool
) -> None:
    payload_N = reference.encode_blocks(nasty_values(NUM_ELEMENTS).nan_to_num(1.0, 1.0), form, seed=0)
    before_N = torch.linspace(-1.0, 1.0, NUM_ELEMENTS).to(dtype)
    expected_N = before_N.clone()
    reference.decode_blocks(payload_N, expected_N, form, accumulate=accumulate)
    for schedule in SCHEDULES:
        into_N = before_N.clone()
        kernels = CudaKernels(EmulatedLauncher(library, schedule))
        kernels.decode_blocks(payload_N, into_N, form, accumulate=accumulate)
        assert into_N.view(torch.uint8).equal(expected_N.view(torch.uint8)), f"schedule {schedule}"


@pytest.mark.parametrize("num_elements", [0, 1, 7, 8, 127, 128, 129, 32 * BLOCK, 32 * BLOCK + 1])
@pytest.mark.parametrize("bits", [8, 4])
def test_any_number_of_elements_is_encoded_and_decoded(library: ctypes.CDLL, bits: int, num_elements: int) -> None:
    form = BlockForm(bits=bits, hadamard=True)
    kernels = CudaKernels(EmulatedLauncher(library, schedule=num_elements))
    source_N = torch.linspace(-3.0, 5.0, num_elements)
    payload_N = kernels.encode_blocks(source_N, form, seed=0)
    assert torch.equal(payload_N, reference.encode_blocks(source_N, form, seed=0))
    into_N, expected_N = torch.zeros(num_elements), torch.zeros(num_elements)
    kernels.decode_blocks(payload_N, into_N, form, accumulate=False)
    reference.decode_blocks(payload_N, expected_N, form, accumulate=False)
    assert torch.equal(into_N, expected_N)


def test_no_elements_are_chunks_too(library: ctypes.CDLL) -> None:
    kernels, empty_N = CudaKernels(EmulatedLauncher(library, schedule=1)), torch.zeros(0)
    payload_N = kernels.encode_chunks(empty_N, torch.zeros(0), 0.95, TK2)
    assert torch.equal(payload_N, reference.encode_chunks(empty_N, torch.zeros(0), 0.95, TK2))
    kernels.add_chunks(payload_N, empty_N, TK2)


@pytest.mark.parametrize("form", CHUNK_FORMS, ids=str)
def test_chunks_are_encoded_as_specified(library: ctypes.CDLL, form: ChunkForm) -> None:
    expected = encode_chunks_by_reference(form)
    for schedule in SCHEDULES:
        kernels = CudaKernels(EmulatedLauncher(library, schedule, max_ctas=2))
        assert encode_chunks(kernels, form) == expected, f"schedule {schedule}"


@pytest.mark.parametrize("form", CHUNK_FORMS, ids=str)
def test_chunks_are_added_as_specified(library: ctypes.CDLL, form: ChunkForm) -> None:
    delta_N, residual_N = (values_N.nan_to_num(1.0) for values_N in chunk_values())
    payload_N = reference.encode_chunks(delta_N, residual_N, 0.95, form)
    expected_N = delta_N.clone()
    reference.add_chunks(payload_N, expected_N, form)
    for schedule in SCHEDULES:
        into_N = delta_N.clone()
        CudaKernels(EmulatedLauncher(library, schedule)).add_chunks(payload_N, into_N, form)
        assert torch.equal(into_N, expected_N), f"schedule {schedule}"


@pytest.mark.parametrize("num_words", [4096, 1001])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_planes_are_split_and_merged_as_specified(library: ctypes.CDLL, dtype: torch.dtype, num_words: int) -> None:
    require_same_planes([CudaKernels(EmulatedLauncher(library, schedule=1))], dtype, num_words)


def test_nasty_tensors_are_encoded_and_decoded_as_specified(library: ctypes.CDLL) -> None:
    backends = [CudaKernels(EmulatedLauncher(library, schedule=2))]
    require_same_blocks_on_nasty(backends, [300])
    require_same_chunks_on_nasty(backends, [CHUNK + 300])


def test_tensors_that_start_within_a_vector_are_taken_too(library: ctypes.CDLL) -> None:
    kernels, form = CudaKernels(EmulatedLauncher(library, schedule=1)), Q8
    source_N = torch.linspace(-1.0, 1.0, 1001)[1:]
    payload_N = kernels.encode_blocks(source_N, form, seed=0)
    assert torch.equal(payload_N, reference.encode_blocks(source_N, form, seed=0))
    whole_N = torch.zeros(1001)
    kernels.decode_blocks(payload_N, whole_N[1:], form, accumulate=True)
    kernels.decode_blocks(payload_N, whole_N[1:], form, accumulate=True)
    assert torch.allclose(whole_N[1:], 2 * source_N, atol=0.02)
    residual_N = torch.zeros(1001)
    kernels.encode_chunks(source_N, residual_N[1:], 1.0, TK2)
    assert residual_N[1:].count_nonzero() > 900


def test_a_wrong_tensor_is_refused_before_anything_runs(library: ctypes.CDLL) -> None:
    kernels, form = CudaKernels(EmulatedLauncher(library, schedule=1)), Q8
    payload_N = torch.zeros(form.payload_bytes(1000) - 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="payload is"):
        kernels.decode_blocks(payload_N, torch.zeros(1000), form, accumulate=False)
    with pytest.raises(ValueError, match="source is"):
        kernels.encode_blocks(torch.zeros(1000, dtype=torch.float64), form, seed=0)
    with pytest.raises(ValueError, match="32 bits"):
        kernels.encode_blocks(torch.zeros(1000), BlockForm(bits=8, stochastic=True), seed=1 << 32)
    with pytest.raises(ValueError, match="residual is"):
        kernels.encode_chunks(torch.zeros(1000), torch.zeros(999), 0.9, TK2)


@pytest.mark.slow
def test_devices_without_warp_reductions_make_the_same_bytes(tmp_path: Path) -> None:
    library = build_library(tmp_path, "-DISTHMUS_SHUFFLES_ONLY")
    kernels = CudaKernels(EmulatedLauncher(library, schedule=1))
    assert encode_chunks(kernels, TK2) == encode_chunks_by_reference(TK2)


@pytest.mark.slow
def test_a_barrier_that_not_all_threads_reach_is_reported(tmp_path: Path) -> None:
    changed = with_change(
        tmp_path, "kernels_grid.cuh", "  __syncthreads();\n", "  if (threadIdx.x != 77) __syncthreads();\n"
    )
    kernels = CudaKernels(EmulatedLauncher(build_library(tmp_path, "-O0", kernels=changed), schedule=1))
    with pytest.raises(EmulationError, match="divergent barrier: CTA 0, thread 0 waits at"):
        kernels.encode_blocks(torch.ones(1000), Q8, seed=0)


# One kernel's run by a program of its own: its name, and the sizes of what it reads and writes.
Run = tuple[str, int, int, int]
TK2_RUN: Run = ("encode_chunks_64_2", NUM_CHUNK_ELEMENTS, 4 * NUM_CHUNK_ELEMENTS, TK2.payload_bytes(NUM_CHUNK_ELEMENTS))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program(tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


def run_program(program: Path, runs: list[Run], schedule: int) -> subprocess.CompletedProcess[str]:
    """Run kernels in a process, which prints a line for each: its name, and a hash of its buffers."""
    words: list[str | Path | int] = [program]
    for kernel, num_elements, source_bytes, target_bytes in runs:
        words += [kernel, entry_of(kernel), 2, schedule, num_elements, source_bytes, target_bytes]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def every_run(num_elements: int) -> list[Run]:
    """Return a run of each kernel."""
    runs: list[Run] = []
    for form in BLOCK_FORMS:
        payload_bytes = form.payload_bytes(num_elements)
        for dtype in (torch.float32, torch.bfloat16):
            size_bytes = num_elements * dtype.itemsize
            runs.append((encode_kernel(dtype, form), num_elements, size_bytes, payload_bytes))
            runs.append((decode_kernel(dtype, form, accumulate=False), num_elements, payload_bytes, size_bytes))
        add_kernel = decode_kernel(torch.float32, form, accumulate=True)
        runs.append((add_kernel, num_elements, payload_bytes, 4 * num_elements))
    for form in CHUNK_FORMS:
        name, payload_bytes = f"chunks_{form.k}_{form.bits}", form.payload_bytes(num_elements)
        runs.append((f"encode_{name}", num_elements, 4 * num_elements, payload_bytes))
        runs.append((f"add_{name}", num_elements, payload_bytes, 4 * num_elements))
    for what in ("split", "merge"):
        for word_bytes in (2, 4):
            size_bytes = word_bytes * num_elements
            runs.append((f"{what}_planes_{8 * word_bytes}", num_elements, size_bytes, size_bytes))
    return list(dict.fromkeys(runs))


@pytest.mark.slow
@pytest.mark.parametrize("num_elements", [5, 32 * BLOCK + 131])
def test_nothing_is_touched_beside_the_buffers(sanitized: Path, num_elements: int) -> None:
    done = run_program(sanitized, every_run(num_elements), schedule=1)
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr}"


@pytest.mark.slow
def test_a_store_out_of_bounds_is_noticed(tmp_path: Path) -> None:
    changed = with_change(tmp_path, "kernels_blocks.cuh", "      steps[block] =", "      steps[block + 12] =")
    program = build_program(tmp_path, *SANITIZERS, "-O0", kernels=changed)
    run = (encode_kernel(torch.float32, Q8), 300, 1200, Q8.payload_bytes(300))
    done = run_program(program, [run], schedule=1)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


RUNS_WITH_BARRIERS: list[Run] = [
    TK2_RUN,
    (encode_kernel(torch.float32, Q8), NUM_ELEMENTS, 4 * NUM_ELEMENTS, Q8.payload_bytes(NUM_ELEMENTS)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "start"), barriers())
def test_a_removed_barrier_is_noticed(sanitized: Path, tmp_path: Path, file: str, start: int) -> None:
    program = build_program(tmp_path, "-O0", kernels=without_barrier(tmp_path, file, start))
    right = run_program(sanitized, RUNS_WITH_BARRIERS, schedule=0)
    assert right.returncode == 0
    # Other bytes, a report, or a crash.
    assert any(run_program(program, RUNS_WITH_BARRIERS, schedule).stdout != right.stdout for schedule in SCHEDULES)


@pytest.mark.slow
def test_with_all_barriers_no_schedule_gives_other_bytes(sanitized: Path, tmp_path: Path) -> None:
    # What the test above sees is the barrier, then, and neither the schedule nor how the program was built.
    program = build_program(tmp_path, "-O0")
    right = run_program(sanitized, RUNS_WITH_BARRIERS, schedule=0)
    for schedule in SCHEDULES:
        done = run_program(program, RUNS_WITH_BARRIERS, schedule)
        assert (done.returncode, done.stdout) == (0, right.stdout), f"schedule {schedule}"
