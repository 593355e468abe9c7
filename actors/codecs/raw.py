"""`none`: the tensor's own bytes. What every exact comparison runs on."""

from __future__ import annotations

import math

import torch

from actors.codecs.payload import flat, of_size
from actors.codecs.protocol import CodecOptions
from actors.spec import TensorRole


class Raw:
    """The tensor as it is: 32 bits an element on CPU, 16 on CUDA."""

    name = "none"
    code = 1
    options = CodecOptions()
    roles = frozenset({TensorRole.ACTIVATION, TensorRole.GRADIENT, TensorRole.PSEUDO_GRADIENT, TensorRole.WEIGHT})
    has_fixed_size = True
    is_stochastic = False

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return num_elements * dtype.itemsize

    def encode(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        return flat(tensor).view(torch.uint8)

    def decode(
        self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        num_elements = math.prod(shape)
        payload_N = of_size(payload, self.name, num_elements, self.size_bytes(num_elements, dtype))
        return payload_N.to(device, non_blocking=True).view(dtype).view(shape)

    def decode_add(self, payload: memoryview, into: torch.Tensor) -> None:
        into += self.decode(payload, tuple(into.shape), into.dtype, into.device)
