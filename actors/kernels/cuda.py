"""The CUDA backend: compiled for the very device at first use, cached on disk, launched on torch's current stream.

Each function is one launch, and nothing waits for the device. Only this module imports cuda.core, and only when a
kernel is to run, so that a machine without a GPU can import it.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from actors.kernels.cache import cache_folder
from actors.kernels.layout import BlockForm, ChunkForm, Fault

if TYPE_CHECKING:
    from cuda.core import Kernel, ObjectCode, Stream  # pyright: ignore[reportMissingImports]

SOURCES = Path(__file__).parent / "src"
ENTRY = SOURCES / "kernels.cu"
# What a CTA of 256 threads takes at a time: blocks, chunks to decode (a warp each), words of planes.
THREADS = 256
BLOCKS_PER_TILE = 32
CHUNKS_PER_TILE = 8
WORDS_PER_TILE = 1024
# Kernels load and store vectors of so many bytes.
ALIGNMENT_BYTES = 16
# struct Scratch of kernels_grid.cuh, in words of 8 bytes.
SCRATCH_WORDS = 3
# Of what NVRTC or the driver complains of, what a message repeats.
_COMPLAINT_CHARS = 400
_REINSTALL = "install cuda-core[cu12] or cuda-core[cu13], 1.2 or later, as torch.version.cuda says"


class CudaUnavailable(Exception):
    """The CUDA kernels cannot be compiled or loaded here; says why, and what to do."""


# A pointer, a whole number, or a float.
Argument = int | c_float


class Launcher(Protocol):
    """Runs a kernel of `kernels.cu` by name; tests run them without a GPU."""

    def scratch(self, device: torch.device) -> torch.Tensor:
        """Return SCRATCH_WORDS words of the current stream's own, zeros before its first launch."""
        ...

    def launch(self, kernel: str, num_tiles: int, device: torch.device, *arguments: Argument) -> None:
        """Launch enough CTAs for `num_tiles`, at least one, on the device's current stream."""
        ...


class CudaKernels:
    """The kernels of every CUDA device; `actors.kernels.reference` specifies each function.

    Each raises ValueError, before anything is launched, for a tensor that is not what the function takes, and
    CudaUnavailable where the kernels cannot be built.
    """

    name = "cuda"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or CudaLauncher()

    def encode_blocks(self, source_N: torch.Tensor, form: BlockForm, seed: int) -> torch.Tensor:
        device, num_elements = source_N.device, len(source_N)
        if form.stochastic and not 0 <= seed < 1 << 32:
            raise ValueError(f"a seed has 32 bits, {seed} has more")
        source_N = _aligned(_checked(source_N, "source", (torch.float32, torch.bfloat16), (num_elements,), device))
        payload_N = torch.empty(form.payload_bytes(num_elements), dtype=torch.uint8, device=device)
        self._launcher.launch(
            encode_kernel(source_N.dtype, form),
            -(-form.num_blocks(num_elements) // BLOCKS_PER_TILE),
            device,
            source_N.data_ptr(),
            num_elements,
            seed if form.stochastic else 0,
            payload_N.data_ptr(),
            self._launcher.scratch(device).data_ptr(),
        )
        return payload_N

    def verify_blocks(self, payload_N: torch.Tensor, num_elements: int, form: BlockForm) -> Fault:
        """Verify on the host: waits for a payload that is on the device."""
        return _host_kernels().verify_blocks(payload_N.cpu(), num_elements, form)

    def decode_blocks(
        self, payload_N: torch.Tensor, into_N: torch.Tensor, form: BlockForm, *, accumulate: bool
    ) -> None:
        device, num_elements = into_N.device, len(into_N)
        dtypes = (torch.float32,) if accumulate else (torch.float32, torch.bfloat16)
        _checked(into_N, "result", dtypes, (num_elements,), device)
        payload_N = _checked(payload_N, "payload", (torch.uint8,), (form.payload_bytes(num_elements),), device)
        # Held by name until the launch: a copy that nothing names may be freed, and handed out, before.
        payload_N = _aligned(payload_N)
        if not _is_aligned(into_N):
            decoded_N = torch.empty_like(into_N)
            self.decode_blocks(payload_N, decoded_N, form, accumulate=False)
            if accumulate:
                into_N += decoded_N
            else:
                into_N.copy_(decoded_N)
            return
        self._launcher.launch(
            decode_kernel(into_N.dtype, form, accumulate=accumulate),
            -(-form.num_blocks(num_elements) // BLOCKS_PER_TILE),
            device,
            payload_N.data_ptr(),
            num_elements,
            into_N.data_ptr(),
        )

    def encode_chunks(
        self, delta_N: torch.Tensor, residual_N: torch.Tensor, beta: float, form: ChunkForm
    ) -> torch.Tensor:
        device, num_elements = delta_N.device, len(delta_N)
        delta_N = _aligned(_checked(delta_N, "delta", (torch.float32,), (num_elements,), device))
        aligned_N = _aligned(_checked(residual_N, "residual", (torch.float32,), (num_elements,), device))
        payload_N = torch.empty(form.payload_bytes(num_elements), dtype=torch.uint8, device=device)
        self._launcher.launch(
            f"encode_chunks_{form.k}_{form.bits}",
            form.num_chunks(num_elements),
            device,
            delta_N.data_ptr(),
            aligned_N.data_ptr(),
            num_elements,
            c_float(beta),
            payload_N.data_ptr(),
            self._launcher.scratch(device).data_ptr(),
        )
        if aligned_N is not residual_N:
            residual_N.copy_(aligned_N)
        return payload_N

    def verify_chunks(self, payload_N: torch.Tensor, num_elements: int, form: ChunkForm) -> Fault:
        """Verify on the host: waits for a payload that is on the device."""
        return _host_kernels().verify_chunks(payload_N.cpu(), num_elements, form)

    def add_chunks(self, payload_N: torch.Tensor, into_N: torch.Tensor, form: ChunkForm) -> None:
        device, num_elements = into_N.device, len(into_N)
        _checked(into_N, "result", (torch.float32,), (num_elements,), device)
        payload_N = _checked(payload_N, "payload", (torch.uint8,), (form.payload_bytes(num_elements),), device)
        # Held by name until the launch: a copy that nothing names may be freed, and handed out, before.
        payload_N = _aligned(payload_N)
        self._launcher.launch(
            f"add_chunks_{form.k}_{form.bits}",
            -(-form.num_chunks(num_elements) // CHUNKS_PER_TILE),
            device,
            payload_N.data_ptr(),
            num_elements,
            into_N.data_ptr(),
        )

    def split_planes(self, words_N: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        device, num_words = words_N.device, len(words_N)
        words_N = _aligned(_checked(words_N, "words", (torch.int16, torch.int32), (num_words,), device))
        base_N = _aligned_base(base_N, words_N.dtype, num_words, device)
        planes = torch.empty(words_N.element_size(), num_words, dtype=torch.uint8, device=device)
        self._launch_planes("split", words_N, base_N, planes, words_N.dtype)
        return planes

    def merge_planes(self, planes: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        device, num_words = planes.device, planes.shape[1]
        dtype = torch.int16 if len(planes) == torch.int16.itemsize else torch.int32
        planes = _aligned(_checked(planes, "planes", (torch.uint8,), (dtype.itemsize, num_words), device))
        base_N = _aligned_base(base_N, dtype, num_words, device)
        words_N = torch.empty(num_words, dtype=dtype, device=device)
        self._launch_planes("merge", planes, base_N, words_N, dtype)
        return words_N

    def _launch_planes(
        self, what: str, source: torch.Tensor, base_N: torch.Tensor | None, target: torch.Tensor, word: torch.dtype
    ) -> None:
        num_words = source.numel() * source.element_size() // word.itemsize
        self._launcher.launch(
            f"{what}_planes_{8 * word.itemsize}",
            -(-num_words // WORDS_PER_TILE),
            source.device,
            source.data_ptr(),
            0 if base_N is None else base_N.data_ptr(),
            num_words,
            target.data_ptr(),
        )


def encode_kernel(source: torch.dtype, form: BlockForm) -> str:
    """Return the name of the kernel that encodes blocks of a dtype."""
    return _block_kernel("encode", source, form) + ("_stochastic" if form.stochastic else "")


def decode_kernel(target: torch.dtype, form: BlockForm, *, accumulate: bool) -> str:
    """Return the name of the kernel that decodes blocks to a dtype."""
    return _block_kernel("decode", target, form) + ("_add" if accumulate else "")


def _block_kernel(what: str, dtype: torch.dtype, form: BlockForm) -> str:
    name = "bfloat16" if dtype is torch.bfloat16 else "float32"
    return f"{what}_{form.bits}_{name}{'_hadamard' if form.hadamard else ''}"


def _host_kernels():
    # Here, because `dispatch` chooses between this module and the host's.
    from actors.kernels.dispatch import host_kernels

    return host_kernels()


def _checked(
    tensor: torch.Tensor, what: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a tensor; ValueError where it is not just what a kernel reads or writes."""
    if tensor.device != device or tensor.dtype not in dtypes or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, where "
            f"{' or '.join(map(str, dtypes))} of shape {shape}, contiguous, on {device} is due"
        )
    return tensor


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT_BYTES == 0


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or a copy where it starts in the middle of a vector."""
    return tensor if _is_aligned(tensor) else tensor.clone()


def _aligned_base(
    base_N: torch.Tensor | None, dtype: torch.dtype, num_words: int, device: torch.device
) -> torch.Tensor | None:
    return None if base_N is None else _aligned(_checked(base_N, "base", (dtype,), (num_words,), device))


def compile_kernels(arch: str, cache: Path) -> ObjectCode:
    """Return all kernels compiled for an architecture, such as "sm_90"; from the cache where they lie there.

    Needs NVRTC but no driver. The cache's key covers sources, options, architecture and NVRTC's version; one that
    cannot be used is passed over with a warning. Raises CudaUnavailable.
    """
    _require_cuda_core()
    from cuda.core import ObjectCode, Program, ProgramOptions  # pyright: ignore[reportMissingImports]
    from cuda.core.utils import (  # pyright: ignore[reportMissingImports]
        FileStreamProgramCache,
        make_program_cache_key,
    )

    source = ENTRY.read_text()
    headers = hashlib.sha256()
    for header in sorted(SOURCES.glob("*.cuh")):
        headers.update(f"\0{header.name}\0".encode() + header.read_bytes())
    options = ProgramOptions(
        arch=arch, std="c++17", fma=False, ftz=False, prec_div=True, prec_sqrt=True, include_path=str(SOURCES)
    )
    try:
        key = make_program_cache_key(
            code=source, code_type="c++", options=options, target_type="cubin", extra_digest=headers.digest()
        )
        compiled = None
        try:
            with FileStreamProgramCache(cache) as programs:
                if (cubin := programs.get(key)) is not None:
                    return ObjectCode.from_cubin(cubin)
                compiled = Program(source, "c++", options).compile("cubin")
                programs[key] = compiled
        except OSError as error:
            warnings.warn(
                f"{cache} cannot be used ({error.strerror}), so that each process compiles the kernels anew; "
                "set ISTHMUS_CACHE to a folder that can be written",
                stacklevel=2,
            )
        return compiled or Program(source, "c++", options).compile("cubin")
    except _build_errors() as error:
        raise CudaUnavailable(
            f"NVRTC cannot compile the kernels for {arch}: {_in_a_line(error)}; {_REINSTALL}"
        ) from error


def _in_a_line(error: Exception) -> str:
    """Return the start of what NVRTC or the driver says, whose logs have many lines and end in a zero byte."""
    return " ".join(str(error).replace("\0", "").split())[:_COMPLAINT_CHARS]


def _require_cuda_core() -> None:
    """Raise CudaUnavailable where cuda.core, or something that it needs, is not installed."""
    try:
        import_module("cuda.core.utils")
    except ImportError as error:
        raise CudaUnavailable(f"cuda.core cannot be imported ({error}); {_REINSTALL}") from error


def _build_errors() -> tuple[type[Exception], ...]:
    """Return what cuda.core raises where NVRTC or the driver refuses, or NVRTC is not found."""
    # cuda.core raises the former, but has no public name for it.
    from cuda.core._utils.cuda_utils import CUDAError  # pyright: ignore[reportMissingImports]
    from cuda.pathfinder import DynamicLibNotFoundError  # pyright: ignore[reportMissingImports]

    return CUDAError, DynamicLibNotFoundError


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A kernel of one device."""

    kernel: Kernel
    # As many CTAs as the device holds at once.
    max_ctas: int


@dataclass(frozen=True, kw_only=True)
class _StreamState:
    stream: Stream
    scratch: torch.Tensor


class CudaLauncher:
    """Launches through cuda.core; several threads may share one."""

    def __init__(self) -> None:
        _require_cuda_core()
        self._lock = threading.Lock()
        self._code: dict[str, ObjectCode] = {}
        self._loaded: dict[tuple[str, int], _Loaded] = {}
        # By device and stream: a launch's sums must not meet those of a launch beside it.
        self._streams: dict[tuple[int, int], _StreamState] = {}
        # Now, so that what is missing, or a driver that refuses the code, is told before a run needs it.
        device = torch.device("cuda", torch.cuda.current_device())
        self._load_on(encode_kernel(torch.float32, BlockForm(bits=8)), device)

    def scratch(self, device: torch.device) -> torch.Tensor:
        return self._stream_state(device).scratch

    def launch(self, kernel: str, num_tiles: int, device: torch.device, *arguments: Argument) -> None:
        from cuda.core import LaunchConfig, launch  # pyright: ignore[reportMissingImports]

        with torch.cuda.device(device):
            loaded = self._load_on(kernel, device)
            config = LaunchConfig(grid=max(1, min(num_tiles, loaded.max_ctas)), block=THREADS)
            launch(self._stream_state(device).stream, config, loaded.kernel, *arguments)

    def _load_on(self, kernel: str, device: torch.device) -> _Loaded:
        """Return a kernel of torch's current device, which is made cuda.core's current one too; CudaUnavailable."""
        from cuda.core import Device  # pyright: ignore[reportMissingImports]

        try:
            # A thread that never called CUDA has no context yet, and torch makes none for memory that it had.
            Device(_index(device)).set_current()
            return self._load(kernel, _index(device))
        except _build_errors() as error:
            raise CudaUnavailable(
                f"the driver cannot load the kernels compiled for {torch.cuda.get_device_name(device)}: "
                f"{_in_a_line(error)}; update the driver, or {_REINSTALL}"
            ) from error

    def _stream_state(self, device: torch.device) -> _StreamState:
        from cuda.core import Stream  # pyright: ignore[reportMissingImports]

        handle = torch.cuda.current_stream(device).cuda_stream
        key = _index(device), handle
        with self._lock:
            if key not in self._streams:
                scratch = torch.zeros(SCRATCH_WORDS, dtype=torch.int64, device=device)
                self._streams[key] = _StreamState(stream=Stream.from_handle(handle), scratch=scratch)
            return self._streams[key]

    def _load(self, kernel: str, device: int) -> _Loaded:
        """Return a kernel, compiled and loaded at its first use; the device is the current one."""
        loaded = self._loaded.get((kernel, device))
        if loaded is not None:
            return loaded
        code = self._code_of(device)
        with self._lock:
            found = code.get_kernel(kernel)
            ctas = found.occupancy.max_active_blocks_per_multiprocessor(THREADS, 0)
            num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            loaded = _Loaded(kernel=found, max_ctas=ctas * num_multiprocessors)
            self._loaded[kernel, device] = loaded
            return loaded

    def _code_of(self, device: int) -> ObjectCode:
        major, minor = torch.cuda.get_device_capability(device)
        arch = f"sm_{major}{minor}"
        with self._lock:
            if arch not in self._code:
                self._code[arch] = compile_kernels(arch, cache_folder())
            return self._code[arch]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
