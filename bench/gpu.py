"""How fast a GPU encodes and decodes: against its own copy, in microseconds for small tensors, beside a stage's work.

    python -m bench.gpu [--quick] [--check]

Needs a CUDA device, torch and cuda-core; not Ray. Bandwidths are of 256 MiB and more, well beyond any cache; bytes are
those that must be read and written. Writes bench/results/gpu-<device>.json.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.codecs import CODECS
from actors.engine import StageEngine
from actors.kernels.dispatch import Kernels, kernels_for
from actors.kernels.layout import BlockForm, ChunkForm
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from bench.gpu_pipeline import compare_codecs
from bench.record import RESULTS, parse_arguments, save

SOURCE_BYTES = 256 << 20
SEED, BETA = 1, 0.95
Q8, HQ4, TK2 = BlockForm(bits=8), BlockForm(bits=4, hadamard=True), ChunkForm(k=64)
# DRAM is read and written in sectors of so many bytes, however little of one is wanted.
SECTOR_BYTES = 32
# Bytes of float32, all of them below 8 MB.
SMALL_BYTES = (64 << 10, 1 << 20, 7 << 20)
SMALL_LAUNCHES = 200
# A stage of these layers, one sequence, the default codecs of a slow link.
LAYER_SHAPES = ("1b", "8b")
STAGE_LAYERS, SEQ_LEN = 4, 4096
FORWARD, BACKWARD = "hq4", "q8"

# What --check wants: shares of the copy's bandwidth by what the name ends in, and the most otherwise.
LEAST_SHARE = {"q8 encode": 0.8, "decode": 0.8, "decode and add": 0.8, "hq4 encode": 0.6, "tk2 encode": 0.6}
MOST_SMALL_US = 15.0
MOST_STAGE_SHARE = 0.01
SANITIZER_TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """One launch, and the bytes that it must move."""

    name: str
    call: Callable[[], object]
    moved_bytes: int


def median_ms(call: Callable[[], object], num_rounds: int) -> float:
    """Return how long the device takes for a call, by its own clock."""
    call()
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_rounds)]
    for start, end in spans:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans)


def block_work(kernels: Kernels, name: str, form: BlockForm, source_N: torch.Tensor) -> list[Work]:
    """Return encoding and decoding of one form and dtype."""
    num_elements, dtype = len(source_N), str(source_N.dtype).removeprefix("torch.")
    dense_bytes, payload_bytes = source_N.nbytes, form.payload_bytes(num_elements)
    payload_N, into_N = kernels.encode_blocks(source_N, form, SEED), torch.zeros_like(source_N)

    def decode(*, accumulate: bool) -> None:
        kernels.decode_blocks(payload_N, into_N, form, accumulate=accumulate)

    works = [
        Work(
            name=f"{dtype} {name} encode",
            call=lambda: kernels.encode_blocks(source_N, form, SEED),
            moved_bytes=dense_bytes + payload_bytes,
        ),
        Work(
            name=f"{dtype} {name} decode",
            call=lambda: decode(accumulate=False),
            moved_bytes=payload_bytes + dense_bytes,
        ),
    ]
    if source_N.dtype is torch.float32:
        works.append(
            Work(
                name=f"{dtype} {name} decode and add",
                call=lambda: decode(accumulate=True),
                moved_bytes=payload_bytes + 2 * dense_bytes,
            )
        )
    return works


def chunk_work(kernels: Kernels, delta_N: torch.Tensor) -> list[Work]:
    num_elements = len(delta_N)
    residual_N, into_N = torch.zeros_like(delta_N), torch.zeros_like(delta_N)
    payload_N = kernels.encode_chunks(delta_N, residual_N, BETA, TK2)
    payload_bytes = TK2.payload_bytes(num_elements)
    touched_bytes = 2 * SECTOR_BYTES * TK2.k * TK2.num_chunks(num_elements)
    return [
        Work(
            name="float32 tk2 encode",
            call=lambda: kernels.encode_chunks(delta_N, residual_N, BETA, TK2),
            moved_bytes=3 * delta_N.nbytes + payload_bytes,
        ),
        Work(
            name="float32 tk2 decode and add",
            call=lambda: kernels.add_chunks(payload_N, into_N, TK2),
            moved_bytes=payload_bytes + touched_bytes,
        ),
    ]


def measure_bandwidth(device: torch.device, num_rounds: int) -> dict[str, dict[str, float]]:
    """Return GB/s and the share of the copy's GB/s, by work; the copy first."""
    kernels = kernels_for(device)
    values_N = torch.randn(SOURCE_BYTES // 4, device=device, generator=torch.Generator(device).manual_seed(SEED))
    halves_N = torch.cat([values_N, values_N]).bfloat16()
    copied_N = torch.empty_like(values_N)
    works = [Work(name="copy", call=lambda: copied_N.copy_(values_N), moved_bytes=2 * SOURCE_BYTES)]
    for name, form in (("q8", Q8), ("hq4", HQ4), ("hq4-stochastic", dataclasses.replace(HQ4, stochastic=True))):
        for source_N in (values_N, halves_N):
            works += block_work(kernels, name, form, source_N)
    works += chunk_work(kernels, values_N)
    gbps = {work.name: work.moved_bytes / median_ms(work.call, num_rounds) / 1e6 for work in works}
    return {name: {"gbps": rate, "share_of_copy": rate / gbps["copy"]} for name, rate in gbps.items()}


def small_calls(kernels: Kernels, source_N: torch.Tensor) -> dict[str, Callable[[], object]]:
    residual_N, into_N = torch.zeros_like(source_N), torch.empty_like(source_N)
    payload_N = kernels.encode_blocks(source_N, Q8, SEED)
    return {
        "q8 encode": lambda: kernels.encode_blocks(source_N, Q8, SEED),
        "hq4 encode": lambda: kernels.encode_blocks(source_N, HQ4, SEED),
        "q8 decode": lambda: kernels.decode_blocks(payload_N, into_N, Q8, accumulate=False),
        "tk2 encode": lambda: kernels.encode_chunks(source_N, residual_N, BETA, TK2),
    }


def measure_small(device: torch.device) -> dict[str, float]:
    """Return the microseconds from one launch to the next, each with its output's memory, by codec and size."""
    kernels = kernels_for(device)
    spent_us: dict[str, float] = {}
    for size_bytes in SMALL_BYTES:
        for name, call in small_calls(kernels, torch.randn(size_bytes // 4, device=device)).items():
            call()
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            for _ in range(SMALL_LAUNCHES):
                call()
            torch.cuda.synchronize()
            spent_us[f"{name} of {size_bytes >> 10} KiB"] = (time.perf_counter() - began_s) / SMALL_LAUNCHES * 1e6
    return spent_us


def shape_of(name: str) -> ModelSpec:
    """Return the shape in conf/model, read without a YAML library, which a machine for kernels alone may lack."""
    text = (Path(__file__).parents[1] / "conf" / "model" / f"{name}.yaml").read_text()
    lines = (line.strip().split(": ") for line in text.splitlines() if line.startswith("  "))
    numbers = {key: float(value) for key, value in lines}
    rope_theta = numbers.pop("rope_theta")
    return dataclasses.replace(ModelSpec(rope_theta=rope_theta), **{key: int(value) for key, value in numbers.items()})


def measure_stage(device: torch.device, name: str, num_rounds: int) -> dict[str, float]:
    """Return what a middle stage computes for a microbatch, what encoding its outputs takes, and the share."""
    spec = shape_of(name)
    stage = DecoderStage(spec, 1, 1 + STAGE_LAYERS, device=device)
    initialise(stage, SEED)
    engine = StageEngine(stage, OptimConfig())
    hidden_BTD = torch.randn(1, SEQ_LEN, spec.hidden_size, device=device, dtype=torch.bfloat16)

    def compute() -> None:
        engine.forward(0, hidden_BTD, None)
        engine.backward(0, hidden_BTD)

    def encode() -> None:
        CODECS[FORWARD].encode(hidden_BTD, SEED)
        CODECS[BACKWARD].encode(hidden_BTD, SEED)

    engine.begin(0, SEQ_LEN)
    compute_ms, encode_ms = median_ms(compute, num_rounds), median_ms(encode, num_rounds)
    return {"compute_ms": compute_ms, "encode_ms": encode_ms, "encode_share": encode_ms / (compute_ms + encode_ms)}


def run_sanitizer() -> dict[str, str]:
    """Return how compute-sanitizer's tools ended on the golden frames, where it is installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"compute-sanitizer": "not installed"}
    tests = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-o", "addopts="]
    tests += ["tests/gpu/test_kernels_cuda.py", "-k", "golden"]
    outcomes: dict[str, str] = {}
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", *tests]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            outcomes[tool] = f"not done in {SANITIZER_TIMEOUT_S:.0f} s"
            continue
        outcomes[tool] = "clean" if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout[-400:]}"
    return outcomes


def driver_version() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: no nvidia-smi"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.split("\n")[0]


def misses(
    bandwidth: Mapping[str, Mapping[str, float]],
    small_us: Mapping[str, float],
    stages: Mapping[str, Mapping[str, float]],
    sanitizer: Mapping[str, str],
) -> list[str]:
    """Return what does not keep its bound, in words."""
    found: list[str] = []
    for name, figures in bandwidth.items():
        for suffix, least in LEAST_SHARE.items():
            if name.endswith(suffix) and figures["share_of_copy"] < least:
                found.append(f"{name}: {figures['share_of_copy']:.2f} of the copy's bandwidth, at least {least} is due")
    found += [f"{name}: {us:.1f} us, at most {MOST_SMALL_US}" for name, us in small_us.items() if us > MOST_SMALL_US]
    for name, figures in stages.items():
        if figures["encode_share"] > MOST_STAGE_SHARE:
            found.append(f"{name} stage: encoding takes {figures['encode_share']:.1%}, at most {MOST_STAGE_SHARE:.0%}")
    bad_tools = (f"{tool}: {end}" for tool, end in sanitizer.items() if end not in ("clean", "not installed"))
    return [*found, *bad_tools]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device: run it on a machine with one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    num_rounds = 10 if arguments.quick else 50
    bandwidth = measure_bandwidth(device, num_rounds)
    for name, figures in bandwidth.items():
        print(f"{name:40} {figures['gbps']:8.0f} GB/s  {figures['share_of_copy']:.2f} of copy")
    small_us = measure_small(device)
    for name, spent_us in small_us.items():
        print(f"{name:40} {spent_us:8.1f} us")
    stages = {name: measure_stage(device, name, num_rounds) for name in LAYER_SHAPES}
    for name, figures in stages.items():
        print(f"{STAGE_LAYERS} layers of {name}: encoding is {figures['encode_share']:.2%} of a microbatch")
    pipeline = compare_codecs(device, num_steps=10 if arguments.quick else 50)
    for name, figures in pipeline.items():
        print(f"4 stages, {name}: {figures['step_ms']:.1f} ms a step, loss {figures['loss']:.3f}")
    sanitizer = run_sanitizer()
    print(sanitizer)

    name = torch.cuda.get_device_name(device)
    suffix = "-quick" if arguments.quick else ""
    arguments.out = arguments.out or RESULTS / f"gpu-{name.replace(' ', '-')}{suffix}.json"
    measured = {
        "device": name,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "bandwidth": bandwidth,
        "small_us": small_us,
        "stages": {"layers": STAGE_LAYERS, "tokens": SEQ_LEN, "forward": FORWARD, "backward": BACKWARD, **stages},
        "pipeline": pipeline,
        "sanitizer": sanitizer,
    }
    missed = misses(bandwidth, small_us, stages, sanitizer)
    print(f"saved {save('gpu', arguments, {**measured, 'missed': missed})}")
    for miss in missed:
        print(f"missed: {miss}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
