"""What the codecs of compiled kernels share: a payload's bytes, checked on the host before anything is decoded."""

from __future__ import annotations

import torch

from actors.errors import FrameCorrupt, NonFinite
from actors.kernels.dispatch import host_kernels
from actors.kernels.layout import BlockForm, ChunkForm, Fault


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements in row-major order, without their graph: shape (num_elements,)."""
    return tensor.detach().contiguous().view(-1)


def of_size(payload: memoryview, codec: str, num_elements: int, size_bytes: int) -> torch.Tensor:
    """Return a payload's bytes as a tensor that shares them; FrameCorrupt where they are too few or too many."""
    if len(payload) != size_bytes:
        raise _corrupt(codec, f"it has {len(payload)} bytes, {num_elements} elements take {size_bytes}")
    # torch makes no view of nothing.
    return torch.frombuffer(payload, dtype=torch.uint8) if size_bytes else torch.empty(0, dtype=torch.uint8)


def checked(payload: memoryview, codec: str, form: BlockForm | ChunkForm, num_elements: int) -> torch.Tensor:
    """Return a payload's bytes as a tensor that shares them; FrameCorrupt or NonFinite where it may not be decoded."""
    payload_N = of_size(payload, codec, num_elements, form.payload_bytes(num_elements))
    kernels = host_kernels()
    if isinstance(form, BlockForm):
        fault = kernels.verify_blocks(payload_N, num_elements, form)
    else:
        fault = kernels.verify_chunks(payload_N, num_elements, form)
    if fault is Fault.NOT_FINITE:
        raise NonFinite(
            f"a tensor held an infinity, NaN or a value that codec {codec} cannot carry",
            "lower optim.lr or raise optim.warmup_steps if this goes on; codec none shows what the values are",
        )
    if fault is not Fault.NONE:
        raise _corrupt(codec, "its checksum is wrong" if fault is Fault.CHECKSUM else "no encoder makes such bytes")
    return payload_N


def _corrupt(codec: str, why: str) -> FrameCorrupt:
    return FrameCorrupt(f"a payload of codec {codec} cannot be decoded: {why}", "run the same release on every node")
