"""The CPU library under sanitizers, with a coverage-guided driver: how it is built, and what it starts from."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from actors.kernels import reference
from actors.kernels.cpu import SOURCES, levels_here
from actors.kernels.layout import BlockForm, ChunkForm

_HERE = Path(__file__).parent
TARGET, DRIVER = _HERE / "payload_target.cpp", _HERE / "driver.cpp"
BUILD_TIMEOUT_S = 300.0

_OPTIONS = ("-std=c++17", "-O1", "-g", "-ffp-contract=off")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_COVERAGE = "-fsanitize-coverage=trace-pc,trace-cmp"

# As payload_target.cpp numbers them.
_BLOCKS = {8: 0, 4: 1}
_CHUNKS = {(32, 2): 2, (64, 2): 3, (128, 2): 4, (32, 1): 5, (64, 1): 6, (128, 1): 7}
_PLANES = {2: 8, 4: 9}
_RESEAL, _HADAMARD, _BASE = 8, 16, 32
# Whole units, partial ones, and last chunks with fewer elements than are kept.
_SIZES = (1, 128, 300, 4096, 4120, 8400)


class BuildFailed(Exception):
    """g++ could not build the fuzzer; says why."""


def build(folder: Path, sources: Path = SOURCES, target: Path = TARGET) -> Path:
    """Return the fuzzer of the library's sources, built in `folder` for this machine's best level; BuildFailed."""
    level = levels_here()[0]
    options = [*_OPTIONS, *_SANITIZERS, *([f"-march={level}"] if level.startswith("x86") else []), f"-I{sources}"]
    units = [(source, [*options, _COVERAGE]) for source in (*sorted(sources.glob("cpu_*.cpp")), target)]
    folder.mkdir(parents=True, exist_ok=True)

    def compile_unit(unit: tuple[Path, list[str]]) -> Path:
        source, unit_options = unit
        made = folder / f"{source.stem}.o"
        _run(["g++", *unit_options, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(max_workers=2) as executor:
        objects = list(executor.map(compile_unit, [*units, (DRIVER, options)]))
    program = folder / "fuzzer"
    _run(["g++", *_SANITIZERS, *map(str, objects), "-o", str(program)])
    return program


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{' '.join(command)} took more than {BUILD_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def seeds(sizes: Sequence[int] = _SIZES) -> Iterator[bytes]:
    """Yield good inputs of every form and so many elements, as payload_target.cpp reads them."""
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        values_N = torch.randn(size, generator=generator)
        for bits, form in _BLOCKS.items():
            for hadamard in (False, True):
                payload_N = reference.encode_blocks(values_N, BlockForm(bits=bits, hadamard=hadamard), 0)
                yield _input(form, _HADAMARD if hadamard else 0, size, payload_N)
        for (k, bits), form in _CHUNKS.items():
            payload_N = reference.encode_chunks(values_N, torch.zeros(size), 0.0, ChunkForm(k=k, bits=bits))
            yield _input(form, 0, size, payload_N)
        for width, form in _PLANES.items():
            for options in (0, _BASE):
                yield _input(form, options, size, torch.randint(0, 256, (size * width,), generator=generator))


def _input(form: int, options: int, size: int, payload_N: torch.Tensor) -> bytes:
    return struct.pack("<BBH", form, options | _RESEAL, size) + payload_N.to(torch.uint8).numpy().tobytes()
