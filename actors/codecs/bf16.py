"""`bf16`: sixteen bits an element, rounded to nearest even."""

from __future__ import annotations

import torch

from actors.kernels import reference
from actors.spec import TensorRole


class Bf16:
    """Half of float32's bytes, and all of its range."""

    name = "bf16"
    code = 2
    roles = frozenset({TensorRole.ACTIVATION, TensorRole.GRADIENT})

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return num_elements * torch.bfloat16.itemsize

    def encode(self, tensor: torch.Tensor) -> memoryview:
        return reference.host_bytes(reference.pack_bf16(tensor))

    def decode(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        payload_N = torch.frombuffer(payload, dtype=torch.uint8)
        return reference.unpack_bf16(payload_N, dtype).view(shape)
