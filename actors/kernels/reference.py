"""The specification, in plain torch, of every byte that a codec puts on a link.

Little-endian throughout. A compiled backend is right when its bytes equal these.
"""

from __future__ import annotations

import torch


def pack_raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's own bytes, row-major: uint8 of shape (num_bytes,)."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def unpack_raw(payload_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements whose bytes `pack_raw` gave, without a copy: shape (num_elements,)."""
    return payload_N.view(dtype)


def pack_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """Return each element as bfloat16, rounded to nearest, ties to even; infinities and NaN stay such."""
    return pack_raw(tensor.to(torch.bfloat16))


def unpack_bf16(payload_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements that `pack_bf16` rounded, in `dtype`: shape (num_elements,)."""
    return payload_N.view(torch.bfloat16).to(dtype)


def host_bytes(payload_N: torch.Tensor) -> memoryview:
    """Return a payload as bytes on the host; shares the memory of a tensor that is there already."""
    return payload_N.cpu().numpy().data
