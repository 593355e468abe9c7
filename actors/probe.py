"""Measures this node: how long one microbatch takes in each part of this very model, and how much memory is free.

The planner knows nodes only by what this says of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from actors.casts import keeping_casts
from actors.errors import PlanError
from actors.fleet_spec import PartTimes
from actors.model.decoder import DecoderStage, token_losses
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec

# Training may use this share of what is free: the rest is for the allocator's and other processes' surprises. On a
# CPU more of it: processes held 1.2 to 1.4 times what their tensors took (200 to 700 MB of them).
_MEMORY_SHARE, _CPU_MEMORY_SHARE = 0.9, 0.7
_REPEATS = 3
# One run that takes longer than this is enough.
_LONG_S = 5.0
_COPY_BYTES = 64 << 20
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
    return int((available if limited is None else min(available, limited)) * _CPU_MEMORY_SHARE)


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
    needed_bytes = _parts_bytes(spec, batch)
    if needed_bytes > memory_bytes:
        raise PlanError(
            f"a stage of two layers, embedding and head needs {needed_bytes / 1e9:.2f} GB to be probed, {node} has "
            f"{memory_bytes / 1e9:.2f} GB free: {(needed_bytes - memory_bytes) / 1e9:.2f} GB short",
            "train a smaller model, or on nodes with more memory; on this machine alone, on fewer: fleet.nodes",
        )


def _parts_bytes(spec: ModelSpec, batch: BatchSpec) -> int:
    parts = replace(spec, num_layers=2)
    return _PARAM_BYTES * parts.num_params + _HEAD_COPIES * 4 * batch.microbatch_tokens * spec.vocab_size


def fitting_sizes(spec: ModelSpec, batch: BatchSpec, sizes: Sequence[int], memory_bytes: int) -> tuple[int, ...]:
    """Return the microbatch sizes of `sizes` with which the model's parts can be timed, the batch's own at least."""
    return tuple(
        size
        for size in dict.fromkeys((batch.microbatch_size, *sizes))
        if size == batch.microbatch_size or _parts_bytes(spec, replace(batch, microbatch_size=size)) <= memory_bytes
    )


def time_parts(
    spec: ModelSpec, batch: BatchSpec, device: torch.device, clock: Callable[[], float], *, document_mask: bool
) -> PartTimes:
    """Return the seconds of one microbatch in a block, the embedding and the head, forward and backward.

    `document_mask` says whether attention takes a mask, as it does where it keeps to documents. Each part runs by
    itself, a few times after one that warms up, or once where that takes long; the median counts. What a block's
    backward takes more than its input's gradient alone is what its weights' gradients take.
    """
    parts = _Parts(spec, batch, device, document_mask)
    watch = _Stopwatch(device, clock)
    layer_forward_s, layer_backward_s = watch.both(parts.layer, parts.all_gradients)
    _, layer_input_s = watch.both(parts.layer, parts.input_gradient)
    embedding_forward_s, embedding_backward_s = watch.both(parts.embedding, parts.all_gradients)
    head_forward_s, head_backward_s = watch.both(parts.head, parts.all_gradients)
    return PartTimes(
        microbatch_size=batch.microbatch_size,
        layer_forward_s=layer_forward_s,
        layer_backward_s=layer_backward_s,
        layer_weight_s=max(0.0, layer_backward_s - layer_input_s),
        embedding_forward_s=embedding_forward_s,
        embedding_backward_s=embedding_backward_s,
        head_forward_s=head_forward_s,
        head_backward_s=head_backward_s,
    )


def layer_s(
    spec: ModelSpec, batch: BatchSpec, device: torch.device, clock: Callable[[], float], *, document_mask: bool
) -> float:
    """Return the seconds of one microbatch forward and backward in a block: a quick look at how fast a node is now."""
    parts = _Parts(spec, batch, device, document_mask)
    return sum(_Stopwatch(device, clock).both(parts.layer, parts.all_gradients))


def copy_mbps(device: torch.device, clock: Callable[[], float]) -> float:
    """Return the rate between host and device in Mbit/s, of the slower way; 0 where the device is the host."""
    if device.type != "cuda":
        return 0.0
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    watch = _Stopwatch(device, clock)
    slower_s = max(watch.median_s(lambda: here.copy_(there)), watch.median_s(lambda: there.copy_(here)))
    return _COPY_BYTES * 8e-6 / slower_s


class _Parts:
    """The model's parts as a probe runs them: one block, the embedding, the norm and head with its loss."""

    def __init__(self, spec: ModelSpec, batch: BatchSpec, device: torch.device, document_mask: bool) -> None:
        self._middle = DecoderStage(replace(spec, num_layers=3), 1, 2, device=device)
        self._ends = DecoderStage(replace(spec, num_layers=1), 0, 1, device=device)
        generator = torch.Generator().manual_seed(0)
        shape = (batch.microbatch_size, batch.seq_len)
        self._tokens_BT = torch.randint(spec.vocab_size, shape, generator=generator).to(device)
        hidden_BTD = torch.randn(*shape, spec.hidden_size, generator=generator)
        self._hidden_BTD = hidden_BTD.to(device).requires_grad_()
        self._documents_BT = torch.zeros(shape, dtype=torch.int32, device=device) if document_mask else None
        initialise(self._middle, seed=0)
        initialise(self._ends, seed=0)

    def layer(self) -> torch.Tensor:
        return self._middle(self._hidden_BTD, self._documents_BT)

    def embedding(self) -> torch.Tensor:
        return self._ends.embed_tokens(self._tokens_BT)

    def head(self) -> torch.Tensor:
        return token_losses(self._ends.lm_head(self._ends.norm(self._hidden_BTD)), self._tokens_BT)

    def all_gradients(self, out: torch.Tensor) -> None:
        out.backward(torch.ones_like(out))

    def input_gradient(self, out: torch.Tensor) -> None:
        torch.autograd.grad(out, self._hidden_BTD, torch.ones_like(out))


class _Stopwatch:
    """Times what a device does, by the median of a few runs after one that warms up."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock

    def both(
        self, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], None]
    ) -> tuple[float, float]:
        """Return the median seconds of forward and of backward."""
        times: list[tuple[float, float]] = []
        # As in a run: weights are cast once, by what warms up.
        with keeping_casts():
            for _ in range(_REPEATS + 1):
                began_s = self._now_s()
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
                    out = forward()
                middle_s = self._now_s()
                backward(out)
                ended_s = self._now_s()
                times.append((middle_s - began_s, ended_s - middle_s))
                if ended_s - began_s > _LONG_S:
                    # Its warming up does not show.
                    break
        kept = times[1:] or times
        forwards, backwards = zip(*kept, strict=True)
        return sorted(forwards)[len(kept) // 2], sorted(backwards)[len(kept) // 2]

    def median_s(self, run: Callable[[], object]) -> float:
        """Return the median seconds of something."""
        times: list[float] = []
        for _ in range(_REPEATS + 1):
            began_s = self._now_s()
            run()
            times.append(self._now_s() - began_s)
        return sorted(times[1:])[_REPEATS // 2]

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
