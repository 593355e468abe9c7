"""`none`: the tensor's own bytes. What every exact comparison runs on."""

from __future__ import annotations

import torch

from actors.kernels import reference
from actors.spec import TensorRole


class Raw:
    """The tensor as it is: 32 bits an element on CPU, 16 on CUDA."""

    name = "none"
    code = 1
    roles = frozenset({TensorRole.ACTIVATION, TensorRole.GRADIENT, TensorRole.WEIGHT})

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return num_elements * dtype.itemsize

    def encode(self, tensor: torch.Tensor) -> memoryview:
        return reference.host_bytes(reference.pack_raw(tensor))

    def decode(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        payload_N = torch.frombuffer(payload, dtype=torch.uint8)
        return reference.unpack_raw(payload_N, dtype).view(shape)
