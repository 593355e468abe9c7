"""The compiled CPU backend: built once for this machine by g++, cached on disk, called through ctypes.

A call runs on the calling thread alone and releases the GIL. Each function does what its namesake in
`actors.kernels.reference` does, to the byte.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch

from actors.kernels.cache import cache_folder
from actors.kernels.layout import BlockForm, ChunkForm, Fault

SOURCES = Path(__file__).parent / "src"
# Of the sources, those that the library is made of.
_OURS = ("cpu_*", "arithmetic.cuh", "blocks.cuh", "chunks.cuh", "planes.cuh")
# No product joins a sum. Nobody reads the floating-point exception flags, or no compiler would vectorise floor().
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared")
COMPILE_TIMEOUT_S = 120.0
CPUINFO = Path("/proc/cpuinfo")
# What a processor must have, as Linux names it, for a level of the x86-64 psABI above the one below; best first.
LEVELS = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    "x86-64-v2": frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
}
# Any other processor: what its compiler makes by default.
GENERIC = "generic"
# Of the compiler's complaint, what a warning repeats.
_COMPLAINT_LINES = 3

_INTO_FLOAT32, _INTO_BFLOAT16, _ADD_FLOAT32 = range(3)
# What each function returns and takes; the sources say what each is.
_SIGNATURES = {
    "isthmus_encode_blocks": (
        None,
        [c_void_p, c_int32, c_int64, c_int32, c_int32, c_int32, c_uint32, c_void_p],
    ),
    "isthmus_verify_blocks": (c_int32, [c_void_p, c_int64, c_int32]),
    "isthmus_decode_blocks": (None, [c_void_p, c_int64, c_int32, c_int32, c_int32, c_void_p]),
    "isthmus_encode_chunks": (None, [c_void_p, c_void_p, c_int64, c_float, c_int32, c_int32, c_void_p]),
    "isthmus_verify_chunks": (c_int32, [c_void_p, c_int64, c_int32, c_int32]),
    "isthmus_add_chunks": (None, [c_void_p, c_int64, c_int32, c_int32, c_void_p]),
    "isthmus_split_planes": (None, [c_void_p, c_void_p, c_int64, c_int32, c_void_p]),
    "isthmus_merge_planes": (None, [c_void_p, c_void_p, c_int64, c_int32, c_void_p]),
}


class NativeUnavailable(Exception):
    """No CPU library can be built or loaded here; says why."""


class NativeKernels:
    """The CPU library of one level; `actors.kernels.reference` specifies each function.

    Each raises ValueError, before the library is called, for a tensor that is not what the function takes.
    """

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.name = f"cpu {level}"
        self._library = library

    def encode_blocks(self, source_N: torch.Tensor, form: BlockForm, seed: int) -> torch.Tensor:
        source = _pointer(source_N, "source", (torch.float32, torch.bfloat16), (len(source_N),))
        is_bfloat16 = source_N.dtype is torch.bfloat16
        if form.stochastic and not 0 <= seed < 1 << 32:
            raise ValueError(f"a seed has 32 bits, {seed} has more")
        payload_N = torch.empty(form.payload_bytes(len(source_N)), dtype=torch.uint8)
        self._library.isthmus_encode_blocks(
            source,
            is_bfloat16,
            len(source_N),
            _bits(form.bits, (4, 8)),
            form.hadamard,
            form.stochastic,
            seed if form.stochastic else 0,
            payload_N.data_ptr(),
        )
        return payload_N

    def verify_blocks(self, payload_N: torch.Tensor, num_elements: int, form: BlockForm) -> Fault:
        payload = _pointer(payload_N, "payload", (torch.uint8,), (form.payload_bytes(num_elements),))
        return Fault(self._library.isthmus_verify_blocks(payload, num_elements, _bits(form.bits, (4, 8))))

    def decode_blocks(
        self, payload_N: torch.Tensor, into_N: torch.Tensor, form: BlockForm, *, accumulate: bool
    ) -> None:
        num_elements = len(into_N)
        payload = _pointer(payload_N, "payload", (torch.uint8,), (form.payload_bytes(num_elements),))
        dtypes = (torch.float32,) if accumulate else (torch.float32, torch.bfloat16)
        into = _pointer(into_N, "result", dtypes, (num_elements,))
        how = _ADD_FLOAT32 if accumulate else _INTO_BFLOAT16 if into_N.dtype is torch.bfloat16 else _INTO_FLOAT32
        self._library.isthmus_decode_blocks(payload, num_elements, _bits(form.bits, (4, 8)), form.hadamard, how, into)

    def encode_chunks(
        self, delta_N: torch.Tensor, residual_N: torch.Tensor, beta: float, form: ChunkForm
    ) -> torch.Tensor:
        num_elements = len(delta_N)
        delta = _pointer(delta_N, "delta", (torch.float32,), (num_elements,))
        residual = _pointer(residual_N, "residual", (torch.float32,), (num_elements,))
        payload_N = torch.empty(form.payload_bytes(num_elements), dtype=torch.uint8)
        self._library.isthmus_encode_chunks(
            delta, residual, num_elements, beta, _kept(form), _bits(form.bits, (1, 2)), payload_N.data_ptr()
        )
        return payload_N

    def verify_chunks(self, payload_N: torch.Tensor, num_elements: int, form: ChunkForm) -> Fault:
        payload = _pointer(payload_N, "payload", (torch.uint8,), (form.payload_bytes(num_elements),))
        return Fault(self._library.isthmus_verify_chunks(payload, num_elements, _kept(form), _bits(form.bits, (1, 2))))

    def add_chunks(self, payload_N: torch.Tensor, into_N: torch.Tensor, form: ChunkForm) -> None:
        num_elements = len(into_N)
        payload = _pointer(payload_N, "payload", (torch.uint8,), (form.payload_bytes(num_elements),))
        into = _pointer(into_N, "result", (torch.float32,), (num_elements,))
        self._library.isthmus_add_chunks(payload, num_elements, _kept(form), _bits(form.bits, (1, 2)), into)

    def split_planes(self, words_N: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        num_words, width = len(words_N), words_N.element_size()
        words = _pointer(words_N, "words", (torch.int16, torch.int32), (num_words,))
        base = None if base_N is None else _pointer(base_N, "base", (words_N.dtype,), (num_words,))
        planes = torch.empty(width, num_words, dtype=torch.uint8)
        self._library.isthmus_split_planes(words, base, num_words, width, planes.data_ptr())
        return planes

    def merge_planes(self, planes: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        width, num_words = planes.shape
        dtype = torch.int16 if _bits(8 * width, (16, 32)) == 16 else torch.int32
        source = _pointer(planes, "planes", (torch.uint8,), (width, num_words))
        base = None if base_N is None else _pointer(base_N, "base", (dtype,), (num_words,))
        words_N = torch.empty(num_words, dtype=dtype)
        self._library.isthmus_merge_planes(source, base, num_words, width, words_N.data_ptr())
        return words_N


def _bits(bits: int, known: Sequence[int]) -> int:
    if bits not in known:
        raise ValueError(f"{bits} bits, where there may be {' or '.join(map(str, known))}")
    return bits


def _kept(form: ChunkForm) -> int:
    if form.k not in (32, 64, 128):
        raise ValueError(f"{form.k} kept of a chunk, where there may be 32, 64 or 128")
    return form.k


def _pointer(tensor: torch.Tensor, what: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]) -> int:
    """Return where a tensor's elements lie; ValueError where it is not just what the library reads or writes."""
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes or tensor.shape != shape:
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, where "
            f"{' or '.join(map(str, dtypes))} of shape {shape} on the CPU is due"
        )
    pointer = tensor.data_ptr()
    if not tensor.is_contiguous() or pointer % tensor.element_size():
        raise ValueError(f"{what} does not lie contiguous and aligned in memory")
    return pointer


def load_native(level: str | None = None, *, cache: Path | None = None, options: Sequence[str] = ()) -> NativeKernels:
    """Return the CPU library, built by g++ unless it lies in the cache.

    Of the best level that this processor runs and the compiler can build, or of the one asked for; `options` are the
    compiler's, besides the usual ones. Where the cache cannot be used, warns and builds for this process alone. Raises
    NativeUnavailable.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise NativeUnavailable("there is no g++")
    reasons: list[str] = []
    for candidate in [level] if level else levels_here():
        try:
            return _load_level(compiler, candidate, cache or cache_folder(), options)
        except NativeUnavailable as error:
            reasons.append(str(error))
    # Levels may fail for the same reason.
    raise NativeUnavailable("; ".join(dict.fromkeys(reasons)))


def levels_here() -> list[str]:
    """Return the levels that this processor runs, the best first."""
    if platform.machine() != "x86_64" or not CPUINFO.exists():
        return [GENERIC]
    return levels_of(CPUINFO.read_text())


def levels_of(cpuinfo: str) -> list[str]:
    """Return the levels of the processor that a text like /proc/cpuinfo tells of, the best first."""
    flags = next((set(line.split()) for line in cpuinfo.splitlines() if line.startswith("flags")), set[str]())
    levels: list[str] = []
    for level, needs in reversed(LEVELS.items()):
        if not needs <= flags:
            break
        levels.insert(0, level)
    return [*levels, GENERIC]


def _load_level(compiler: str, level: str, cache: Path, options: Sequence[str]) -> NativeKernels:
    """Return the library of a level, compiled now if it was not before; NativeUnavailable."""
    architecture = () if level == GENERIC else (f"-march={level}",)
    options = (*OPTIONS, *architecture, *options)
    library = cache / f"cpu-{level}-{_fingerprint(compiler, options)}.so"
    try:
        if not library.exists():
            _compile(compiler, options, library)
    except OSError as error:
        warnings.warn(
            f"{cache} cannot be used ({error.strerror}), so that each process compiles the codecs anew; "
            "set ISTHMUS_CACHE to a folder that can be written",
            stacklevel=2,
        )
        return _load_uncached(compiler, options, library.name, level)
    return _load(library, level)


def _load_uncached(compiler: str, options: Sequence[str], name: str, level: str) -> NativeKernels:
    """Compile to a folder that goes when the library is loaded; NativeUnavailable."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / name
            _compile(compiler, options, library)
            return _load(library, level)
    except OSError as error:
        raise NativeUnavailable(f"no folder can be written to compile in: {error.strerror}") from error


def _fingerprint(compiler: str, options: Sequence[str]) -> str:
    """Return a name for what this compiler makes of the sources with these options, on a processor of this kind."""
    digest = hashlib.sha256(_run([compiler, "--version"]).encode())
    digest.update("\0".join((platform.machine(), *options)).encode())
    for source in sorted(path for pattern in _OURS for path in SOURCES.glob(pattern)):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()


def _compile(compiler: str, options: Sequence[str], library: Path) -> None:
    """Write a library as a whole or not at all, though several processes do so at once or the power fails.

    NativeUnavailable where the compiler fails, OSError where the folder cannot be written.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        sources = [str(source) for source in sorted(SOURCES.glob("cpu_*.cpp"))]
        _run([compiler, *options, *sources, "-o", str(made)])
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, library)


def _run(command: list[str]) -> str:
    """Return what a compiler's command prints; NativeUnavailable where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{command[0]} took more than {COMPILE_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise NativeUnavailable(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        complaint = "\n".join(done.stderr.strip().splitlines()[:_COMPLAINT_LINES])
        raise NativeUnavailable(f"{command[0]} failed: {complaint}")
    return done.stdout


def _load(path: Path, level: str) -> NativeKernels:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} cannot be loaded ({error}); delete it") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return NativeKernels(library, level)
