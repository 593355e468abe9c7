"""How fast one core encodes and decodes, beside copying memory, torch and others' quantisers; how small frames are.

    python -m bench.kernels --cpu [--quick] [--check]

64 MiB of float32, one thread. All take turns, a call each, and each one's best round counts, so that noise hits all
alike. Seconds are of processor time, which on a core of one's own is the time that passes: others on this machine may
delay a call, and do not make it slower. GB/s count the float32 side; a share is of the GB/s of a plain copy of the same
64 MiB. A decode is what a receiver runs: the payload is verified, then decoded. The GPU's figures are bench.gpu's.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from actors.codecs import CODECS
from actors.codecs.lx import PIECE_WORDS
from actors.frame import wire_bytes
from actors.kernels import reference
from actors.kernels.cpu import GENERIC, NativeKernels, levels_here, load_native
from actors.kernels.dispatch import Kernels
from actors.kernels.layout import CHUNK, BlockForm, ChunkForm, Fault
from bench.kernels_rivals import rivals
from bench.record import bench_parser, save

NUM_ELEMENTS = 1 << 24
SEED = 1
BETA = 0.95
HQ4 = BlockForm(bits=4, hadamard=True)
HQ4_STOCHASTIC = BlockForm(bits=4, hadamard=True, stochastic=True)
Q8 = BlockForm(bits=8)
TK2 = ChunkForm(k=64)

# Share of a copy's GB/s, at the best level; how much of that at each level; and how many times as fast as torch.
LEAST_SHARE = {"hq4 encode": 0.4, "hq4 decode": 0.7, "q8 encode": 0.6, "q8 decode": 0.9, "tk2 encode": 0.35}
LEVEL_SHARE = {"x86-64-v4": 1.0, "x86-64-v3": 0.6}
LEAST_OVER_TORCH = 5.0

# Frames: codec, elements, bytes an element of what it is held against, and how many times smaller it is at least.
FRAMES = (("q8", 1_000_000, 2, 1.96), ("hq4", 1_000_000, 2, 3.87), ("tk2", 32 << 20, 4, 194.9))
FRAME_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Something measured that must reach a least value."""

    name: str
    measured: float
    least: float

    @property
    def margin(self) -> float:
        return self.measured / self.least


class Workloads:
    """The tensors that every backend works on, and what it does with them."""

    def __init__(self, kernels: Kernels) -> None:
        self.source_N = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(SEED))
        self.into_N = torch.zeros(NUM_ELEMENTS)
        self.residual_N = torch.zeros(NUM_ELEMENTS)
        # Weights are split, and merged, a piece at a time.
        self.pieces = self.source_N.view(torch.int32).split(PIECE_WORDS)
        # Every backend makes the same bytes, so that one's do for all.
        self.payloads = {form: kernels.encode_blocks(self.source_N, form, SEED) for form in (HQ4, Q8)}
        self.sparse_N = kernels.encode_chunks(self.source_N, self.residual_N, BETA, TK2)
        self.planes = [kernels.split_planes(piece_N, None) for piece_N in self.pieces]

    def calls(self, kernels: Kernels) -> dict[str, Callable[[], object]]:
        return {
            "hq4 encode": lambda: kernels.encode_blocks(self.source_N, HQ4, SEED),
            "hq4-stochastic encode": lambda: kernels.encode_blocks(self.source_N, HQ4_STOCHASTIC, SEED),
            "hq4 decode": lambda: self._decode(kernels, HQ4, accumulate=False),
            "hq4 decode and add": lambda: self._decode(kernels, HQ4, accumulate=True),
            "q8 encode": lambda: kernels.encode_blocks(self.source_N, Q8, SEED),
            "q8 decode": lambda: self._decode(kernels, Q8, accumulate=False),
            "q8 decode and add": lambda: self._decode(kernels, Q8, accumulate=True),
            "tk2 encode": lambda: kernels.encode_chunks(self.source_N, self.residual_N, BETA, TK2),
            "tk2 decode and add": lambda: self._add_chunks(kernels),
            "split planes": lambda: self._split_planes(kernels),
            "merge planes": lambda: self._merge_planes(kernels),
        }

    def copy(self) -> None:
        self.into_N.copy_(self.source_N)

    def _decode(self, kernels: Kernels, form: BlockForm, *, accumulate: bool) -> None:
        payload_N = self.payloads[form]
        assert kernels.verify_blocks(payload_N, NUM_ELEMENTS, form) is Fault.NONE
        kernels.decode_blocks(payload_N, self.into_N, form, accumulate=accumulate)

    def _add_chunks(self, kernels: Kernels) -> None:
        assert kernels.verify_chunks(self.sparse_N, NUM_ELEMENTS, TK2) is Fault.NONE
        kernels.add_chunks(self.sparse_N, self.into_N, TK2)

    def _split_planes(self, kernels: Kernels) -> None:
        for piece_N in self.pieces:
            kernels.split_planes(piece_N, None)

    def _merge_planes(self, kernels: Kernels) -> None:
        for planes in self.planes:
            kernels.merge_planes(planes, None)


Rates = dict[str, float]
Name = TypeVar("Name", bound=Hashable)


def best_gbps(calls: Mapping[Name, Callable[[], object]], num_rounds: int) -> dict[Name, float]:
    """Return each call's GB/s of float32 in its best round; they take turns."""
    best_s = dict.fromkeys(calls, math.inf)
    for _ in range(num_rounds):
        for name, call in calls.items():
            began_s = time.process_time()
            call()
            best_s[name] = min(best_s[name], time.process_time() - began_s)
    return {name: 4 * NUM_ELEMENTS / seconds / 1e9 for name, seconds in best_s.items()}


def measure_native(
    workloads: Workloads, backends: Mapping[str, Kernels], num_rounds: int
) -> tuple[float, dict[str, Rates]]:
    """Return the GB/s of a copy, and of each backend's workloads, measured in the same rounds."""
    copy: tuple[str, str] = ("", "copy")
    calls: dict[tuple[str, str], Callable[[], object]] = {copy: workloads.copy}
    for level, kernels in backends.items():
        calls |= {(level, name): call for name, call in workloads.calls(kernels).items()}
    rates = best_gbps(calls, num_rounds)
    copy_gbps = rates.pop(copy)
    by_level: dict[str, Rates] = {level: {} for level in backends}
    for (level, name), gbps in rates.items():
        by_level[level][name] = gbps
    return copy_gbps, by_level


def speed_bounds(copy_gbps: float, by_level: Mapping[str, Rates], torch_rates: Rates) -> list[Bound]:
    bounds = []
    for level, rates in by_level.items():
        for name, gbps in rates.items():
            if name in LEAST_SHARE and level in LEVEL_SHARE:
                least = LEAST_SHARE[name] * LEVEL_SHARE[level]
                bounds.append(Bound(name=f"{level} {name}, share of copy", measured=gbps / copy_gbps, least=least))
            over_torch = gbps / torch_rates[name]
            bounds.append(Bound(name=f"{level} {name}, over torch", measured=over_torch, least=LEAST_OVER_TORCH))
    return bounds


def measure_frames() -> dict[str, dict[str, float]]:
    """Return how many bytes frames take on a link, headers included."""
    frames = {}
    for name, num_elements, dense_bytes, _ in FRAMES:
        codec = CODECS[name]
        frame_bytes = wire_bytes(codec.size_bytes(num_elements, torch.float32), FRAME_CHUNK_BYTES)
        frames[name] = {
            "elements": num_elements,
            "frame_bytes": frame_bytes,
            "ratio": num_elements * dense_bytes / frame_bytes,
            "bits_per_element": 8 * frame_bytes / num_elements,
        }
    return frames


def entropy_bound_bits(form: ChunkForm) -> float:
    """Return the bits an element of the best index code there is, and of the values as `form` sends them."""
    return (math.log2(math.comb(CHUNK, form.k)) + form.k * form.bits) / CHUNK


def print_speeds(copy_gbps: float, by_backend: Mapping[str, Rates]) -> None:
    print(f"copy {copy_gbps:.1f} GB/s\n\n{'GB/s (share of copy)':24}" + "".join(f"{name:>16}" for name in by_backend))
    for name in next(iter(by_backend.values())):
        cells = (f"{rates[name]:8.2f} ({rates[name] / copy_gbps:.2f})" for rates in by_backend.values())
        print(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))


def parse_arguments() -> argparse.Namespace:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--cpu", action="store_true", required=True, help="the CPU's backends")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    levels = [level for level in levels_here() if level != GENERIC] or [GENERIC]
    backends: dict[str, NativeKernels] = {level: load_native(level) for level in levels}
    workloads = Workloads(backends[levels[0]])
    copy_gbps, by_level = measure_native(workloads, backends, 5 if arguments.quick else 15)
    torch_rates = best_gbps(workloads.calls(reference), 1 if arguments.quick else 2)
    print_speeds(copy_gbps, {**by_level, "torch": torch_rates})

    others: dict[str, Rates | str] = {}
    for name, calls in rivals(workloads.source_N).items():
        others[name] = calls if isinstance(calls, str) else best_gbps(calls, 1 if arguments.quick else 3)
        print(f"{name}: {others[name]}")

    frames, floor_bits = measure_frames(), entropy_bound_bits(TK2)
    for name, frame in frames.items():
        print(f"{name}: {frame['ratio']:.2f} times smaller, {frame['bits_per_element']:.4f} bits an element")
    print(f"tk2's entropy bound: {floor_bits:.4f} bits an element")

    bounds = speed_bounds(copy_gbps, by_level, torch_rates)
    bounds += [
        Bound(name=f"{name}, times smaller", measured=frames[name]["ratio"], least=least)
        for name, _, _, least in FRAMES
    ]
    path = save(
        "kernels",
        arguments,
        {
            "command": f"python -m bench.kernels --cpu{' --quick' if arguments.quick else ''}",
            "elements": NUM_ELEMENTS,
            "copy_gbps": copy_gbps,
            "gbps": {**by_level, "torch": torch_rates},
            "share_of_copy": {
                level: {name: gbps / copy_gbps for name, gbps in rates.items()} for level, rates in by_level.items()
            },
            "others_gbps": others,
            "frames": frames,
            "tk2_entropy_bound_bits_per_element": floor_bits,
            "bounds": {bound.name: {"measured": bound.measured, "least": bound.least} for bound in bounds},
        },
    )
    print(f"saved {path}")
    for bound in bounds:
        if bound.margin < 1:
            print(f"missed: {bound.name} {bound.measured:.3f}, at least {bound.least:.3f}")
    worst = min(bounds, key=lambda bound: bound.margin)
    print(f"worst margin {worst.margin:.2f}: {worst.name} {worst.measured:.3f}, at least {worst.least:.3f}")
    return 1 if arguments.check and worst.margin < 1 else 0


if __name__ == "__main__":
    sys.exit(main())
