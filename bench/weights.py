"""How small `lx` makes a trained model's weights and AdamW moments, beside zstd alone and the exponents' entropy.

    python -m bench.weights [--quick] [--check]

Trains a model of 3 million parameters in this process, on the bytes of Python's own standard library, at a constant
learning rate; then packs what a checkpoint or a move holds: whole, and as a difference to copies some steps older.
"""

from __future__ import annotations

import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from pyarrow import Codec
from torch import Tensor

from actors.codecs.lx import decode_lossless, encode_lossless
from actors.kernels.dispatch import host_kernels
from actors.model.decoder import DecoderStage, token_losses
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig, build_optimizer
from actors.shards import snapshot
from bench.record import parse_arguments, save

MODEL = ModelSpec(vocab_size=256, num_layers=4, num_kv_heads=2, max_positions=128)
OPTIM = OptimConfig(lr=1e-3)
BATCH_SIZE = 4
# How many steps older than the newest copy the base of a difference is.
AGES = (1, 10, 50)
KINDS = ("weight", "exp_avg", "exp_avg_sq")
TIMED_BYTES = 64 << 20
CPU = torch.device("cpu")
# Shares of the raw bytes; zstd codes a byte at a time, with a table for every 128 KiB.
BOUNDS = {"weight bfloat16": 0.70, "weight float32": 0.86, "over_entropy": 0.035}

# Case ("weight bfloat16") -> tensors by parameter.
Cases = dict[str, dict[str, Tensor]]


def corpus() -> Tensor:
    """Return the standard library's top-level sources, in order: uint8 of shape (N,)."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.from_numpy(np.frombuffer(b"".join(map(Path.read_bytes, sources)), dtype=np.uint8).copy())


def train(num_steps: int) -> tuple[Mapping[int, Cases], list[float]]:
    """Return the state at each age before the end, and the losses."""
    text_N, seq_len = corpus(), MODEL.max_positions
    model = DecoderStage(MODEL, 0, MODEL.num_layers)
    initialise(model, seed=1)
    optimizer = build_optimizer(model, OPTIM)
    generator = torch.Generator().manual_seed(1)
    states: dict[int, Cases] = {}
    losses: list[float] = []
    for step in range(num_steps):
        if (age := num_steps - step) in AGES:
            states[age] = cases_of(model, optimizer)
        starts_B = torch.randint(len(text_N) - seq_len, (BATCH_SIZE,), generator=generator)
        tokens_BT = text_N[starts_B[:, None] + torch.arange(seq_len + 1)].long()
        loss = token_losses(model(tokens_BT[:, :-1]), tokens_BT[:, 1:]) / (BATCH_SIZE * seq_len)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return states | {0: cases_of(model, optimizer)}, losses


def cases_of(model: DecoderStage, optimizer: torch.optim.Optimizer) -> Cases:
    """Return what a checkpoint holds now, by kind and dtype; weights as bfloat16 too, as nodes with a GPU send them."""
    cases: Cases = {f"{kind} float32": {} for kind in KINDS}
    for tensors in snapshot(model.named_global_parameters(), optimizer).values():
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind in KINDS:
                cases[f"{kind} float32"][name] = tensor
    weights = cases["weight float32"].items()
    return {"weight bfloat16": {name: tensor.bfloat16() for name, tensor in weights}} | cases


def share_of(size_of: Callable[[str, Tensor], int], tensors: Mapping[str, Tensor]) -> float:
    """Return what tensors take together, as a share of their raw bytes."""
    return sum(size_of(name, tensor) for name, tensor in tensors.items()) / sum(t.nbytes for t in tensors.values())


def exponent_bound(tensor: Tensor) -> float:
    """Return the bytes of a tensor whose exponents are coded at their entropy, each by itself, and the rest not."""
    counts = np.bincount(planes_of(tensor)[0].numpy(), minlength=256)
    chances = counts[counts > 0] / counts.sum()
    entropy_bits = float(-(chances * np.log2(chances)).sum())
    return tensor.numel() * (entropy_bits / 8 + tensor.itemsize - 1)


def planes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's byte planes, the exponents first."""
    word = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
    return host_kernels().split_planes(tensor.flatten().view(word), None)


def measure_sizes(states: Mapping[int, Cases]) -> dict[str, dict[str, float]]:
    """Return each case's shares of its raw bytes: packed whole, with zstd alone, at the bound, and as differences."""
    zstd = Codec("zstd", compression_level=1)
    sizes: dict[str, dict[str, float]] = {}
    for case, tensors in states[0].items():
        sizes[case] = {
            "lx": share_of(lambda _, tensor: len(encode_lossless(tensor)), tensors),
            "zstd": share_of(lambda _, t: len(zstd.compress(t.view(torch.uint8).numpy())), tensors),
            "entropy": share_of(lambda _, tensor: round(exponent_bound(tensor)), tensors),
        }
        for age in AGES:
            older = states[age][case]
            sizes[case][f"lx_after_{age}"] = share_of(
                lambda name, tensor, older=older: len(encode_lossless(tensor, older[name])), tensors
            )
    return sizes


def measure_speed(states: Mapping[int, Cases], case: str, age: int | None, rounds: int) -> dict[str, float]:
    """Return the median GB of raw bytes that one core encodes, and decodes, in a second of its own time."""
    tensor = repeated(states[0][case])
    base = None if age is None else repeated(states[age][case])
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(rounds):
        began_s = time.process_time()
        payload = memoryview(encode_lossless(tensor, base))
        encoded_s = time.process_time()
        decoded = decode_lossless(payload, tuple(tensor.shape), tensor.dtype, CPU, base)
        times["encode"].append(encoded_s - began_s)
        times["decode"].append(time.process_time() - encoded_s)
        assert torch.equal(decoded.view(torch.uint8), tensor.view(torch.uint8))
    return {f"{name}_gb_per_cpu_s": tensor.nbytes / statistics.median(seconds) / 1e9 for name, seconds in times.items()}


def repeated(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return all tensors in one, over and over: zstd sees one piece at a time, which is shorter than they are."""
    flat_N = torch.cat([tensor.flatten() for tensor in tensors.values()])
    return flat_N.repeat(-(-TIMED_BYTES // flat_N.nbytes))


def missed_bounds(sizes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the cases whose size is over its bound."""
    return [
        case
        for case in ("weight bfloat16", "weight float32")
        if sizes[case]["lx"] > BOUNDS[case] or sizes[case]["lx"] > sizes[case]["entropy"] + BOUNDS["over_entropy"]
    ]


def main() -> int:
    """Train, measure, print a row for each case, save."""
    arguments = parse_arguments(__doc__ or "")
    num_steps, rounds = (60, 3) if arguments.quick else (300, 9)
    torch.set_num_threads(1)
    states, losses = train(num_steps)
    sizes = measure_sizes(states)
    speeds = {
        f"{case}{'' if age is None else f', difference after {age}'}": measure_speed(states, case, age, rounds)
        for case in ("weight bfloat16", "weight float32")
        for age in (None, AGES[1])
    }
    path = save(
        "weights",
        arguments,
        {
            "backend": host_kernels().name,
            "num_params": MODEL.num_params,
            "steps": num_steps,
            "first_loss": losses[0],
            "last_loss": statistics.mean(losses[-10:]),
            "share_of_raw_bytes": sizes,
            "speed": speeds,
            "bounds": BOUNDS,
        },
    )
    print("| share of raw bytes | " + " | ".join(next(iter(sizes.values()))) + " |")
    for case, shares in sizes.items():
        print(f"| {case} | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |")
    for case, speed in speeds.items():
        print(f"{case}: " + ", ".join(f"{name} {value:.2f}" for name, value in speed.items()))
    missed = missed_bounds(sizes)
    print(f"saved {path}" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
