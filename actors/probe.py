"""Measures this node: how long one microbatch takes in each part of this very model, and how much memory is free.

The planner knows nodes only by what this says of them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

from actors.errors import PlanError
from actors.model.decoder import DecoderStage, token_losses
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec
from actors.spec import PartTimes

# Training may use this share of what is free: the rest is for the allocator's and other processes' surprises.
_MEMORY_SHARE = 0.9
_REPEATS = 3
# While they are timed: a float32 weight and its gradient; logits, their float32 copy, log-softmax and gradient.
_PARAM_BYTES, _HEAD_COPIES = 8, 4


def free_memory_bytes(device: torch.device) -> int:
    """Return what a process may still take of the device's memory; of a container's limit where there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _MEMORY_SHARE)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limited = cgroup_free_bytes(Path("/sys/fs/cgroup"))
    return int((available if limited is None else min(available, limited)) * _MEMORY_SHARE)


def cgroup_free_bytes(folder: Path) -> int | None:
    """Return what a control group (version 2) may still take of its memory limit; None where it has none."""
    limit = folder / "memory.max"
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return None
    used = int((folder / "memory.current").read_text())
    # Of files read a while ago: the kernel gives it back before it refuses anyone.
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(0, int(text) - used + int(stat["inactive_file"]))


def device_name(device: torch.device) -> str:
    """Return what the device is called, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU x{torch.get_num_threads()}"


def require_probe_memory(spec: ModelSpec, batch: BatchSpec, memory_bytes: int, node: str) -> None:
    """Raise PlanError where `time_parts` would not fit: two layers, the embedding and the head, with gradients.

    A first stage of one layer needs about as much, with its optimizer's state.
    """
    parts = dataclasses.replace(spec, num_layers=2)
    logits_bytes = _HEAD_COPIES * 4 * batch.microbatch_tokens * spec.vocab_size
    needed_bytes = _PARAM_BYTES * parts.num_params + logits_bytes
    if needed_bytes > memory_bytes:
        raise PlanError(
            f"a stage of two layers, embedding and head needs {needed_bytes / 1e9:.2f} GB to be probed, {node} has "
            f"{memory_bytes / 1e9:.2f} GB free: {(needed_bytes - memory_bytes) / 1e9:.2f} GB short",
            "train a smaller model, or on nodes with more memory; on this machine alone, on fewer: fleet.nodes",
        )


def time_parts(
    spec: ModelSpec, batch: BatchSpec, device: torch.device, clock: Callable[[], float], *, document_mask: bool
) -> PartTimes:
    """Return the seconds of one microbatch in a block (forward, backward), the embedding and the head.

    `document_mask` says whether attention takes a mask, as it does where it keeps to documents. Each part runs by
    itself, a few times after one that warms up; the median counts.
    """
    middle = DecoderStage(dataclasses.replace(spec, num_layers=3), 1, 2, device=device)
    ends = DecoderStage(dataclasses.replace(spec, num_layers=1), 0, 1, device=device)
    generator = torch.Generator().manual_seed(0)
    shape = (batch.microbatch_size, batch.seq_len)
    tokens_BT = torch.randint(spec.vocab_size, shape, generator=generator).to(device)
    hidden_BTD = torch.randn(*shape, spec.hidden_size, generator=generator).to(device).requires_grad_()
    documents_BT = torch.zeros(shape, dtype=torch.int32, device=device) if document_mask else None
    initialise(middle, seed=0)
    initialise(ends, seed=0)

    def timed(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
        """Return the median seconds of forward and of backward."""
        times: list[tuple[float, float]] = []
        for _ in range(_REPEATS + 1):
            began_s = _now(device, clock)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = run()
            middle_s = _now(device, clock)
            out.backward(torch.ones_like(out))
            times.append((middle_s - began_s, _now(device, clock) - middle_s))
        forwards, backwards = zip(*times[1:], strict=True)
        return sorted(forwards)[_REPEATS // 2], sorted(backwards)[_REPEATS // 2]

    layer_forward_s, layer_backward_s = timed(lambda: middle(hidden_BTD, documents_BT))
    embedding_forward_s, embedding_backward_s = timed(lambda: ends.embed_tokens(tokens_BT))
    head_forward_s, head_backward_s = timed(lambda: token_losses(ends.lm_head(ends.norm(hidden_BTD)), tokens_BT))
    return PartTimes(
        microbatch_size=batch.microbatch_size,
        layer_forward_s=layer_forward_s,
        layer_backward_s=layer_backward_s,
        layer_weight_s=layer_backward_s / 2,
        embedding_forward_s=embedding_forward_s,
        embedding_backward_s=embedding_backward_s,
        head_forward_s=head_forward_s,
        head_backward_s=head_backward_s,
    )


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
