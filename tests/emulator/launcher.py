"""Builds the CUDA kernels for the CPU with g++, and runs them in place of a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_char_p, c_float, c_uint32, c_uint64, c_void_p
from pathlib import Path

import torch

from actors.kernels.cuda import SCRATCH_WORDS, SOURCES, Argument

HERE = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILD_TIMEOUT_S = 100.0
# Of the functions in kernels_on_cpu.cpp, what comes after the kernel, the number of CTAs and the schedule.
_PARAMETERS = {
    "emulate_encode_blocks": [c_void_p, c_uint64, c_uint64, c_void_p, c_void_p],
    "emulate_encode_chunks": [c_void_p, c_void_p, c_uint64, c_float, c_void_p, c_void_p],
    "emulate_decode": [c_void_p, c_uint64, c_void_p],
    "emulate_planes": [c_void_p, c_void_p, c_uint64, c_void_p],
}


class EmulationError(Exception):
    """A kernel broke a rule of CUDA."""


def _build(target: Path, kernels: Path, *options: str) -> Path:
    sources = [str(HERE / name) for name in ("kernels_on_cpu.cpp", "emulator.cpp")]
    command = ["g++", *OPTIONS, f"-I{HERE}", f"-I{kernels}", *sources, *options, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return target


def build_library(folder: Path, *options: str, kernels: Path = SOURCES) -> ctypes.CDLL:
    """Compile the kernels of a folder to a library for `EmulatedLauncher`, and load it."""
    library = ctypes.CDLL(str(_build(folder / "kernels.so", kernels, "-fPIC", "-shared", *options)))
    for name, parameters in _PARAMETERS.items():
        function = getattr(library, name)
        function.restype = c_char_p
        function.argtypes = [c_void_p, c_uint32, c_uint64, *parameters]
    return library


def build_program(folder: Path, *options: str, kernels: Path = SOURCES) -> Path:
    """Compile the kernels of a folder to the program of run_kernel.cpp."""
    return _build(folder / "run_kernel", kernels, str(HERE / "run_kernel.cpp"), "-rdynamic", *options)


def entry_of(kernel: str) -> str:
    """Return which function of kernels_on_cpu.cpp runs a kernel."""
    if kernel.startswith("encode_chunks"):
        return "emulate_encode_chunks"
    if kernel.startswith("encode"):
        return "emulate_encode_blocks"
    return "emulate_planes" if "planes" in kernel else "emulate_decode"


class EmulatedLauncher:
    """Runs each launch on up to `max_ctas` CTAs, whose threads take turns as `schedule` has it."""

    def __init__(self, library: ctypes.CDLL, schedule: int, max_ctas: int = 3) -> None:
        self.schedule = schedule
        self._library = library
        self._max_ctas = max_ctas
        self._scratch = torch.zeros(SCRATCH_WORDS, dtype=torch.int64)

    def scratch(self, device: torch.device) -> torch.Tensor:
        return self._scratch

    def launch(self, kernel: str, num_tiles: int, device: torch.device, *arguments: Argument) -> None:
        function = ctypes.cast(getattr(self._library, kernel), c_void_p)
        num_ctas = max(1, min(num_tiles, self._max_ctas))
        error = getattr(self._library, entry_of(kernel))(function, num_ctas, self.schedule, *arguments)
        if error is not None:
            raise EmulationError(f"{kernel}: {error.decode()}")
        if "encode" in kernel:
            assert not self._scratch.any(), f"{kernel} left its scratch in disorder"
