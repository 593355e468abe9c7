"""`bf16`: sixteen bits an element, rounded to nearest, ties to even; infinities and NaN stay such."""

from __future__ import annotations

import math

import torch

from actors.codecs.payload import flat, of_size
from actors.codecs.protocol import CodecOptions
from actors.spec import TensorRole


class Bf16:
    """Half of float32's bytes, and all of its range."""

    name = "bf16"
    code = 2
    options = CodecOptions()
    roles = frozenset({TensorRole.ACTIVATION, TensorRole.GRADIENT, TensorRole.PSEUDO_GRADIENT})
    has_fixed_size = True
    is_stochastic = False

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return num_elements * torch.bfloat16.itemsize

    def encode(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        return flat(tensor).to(torch.bfloat16).view(torch.uint8)

    def decode(
        self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        num_elements = math.prod(shape)
        payload_N = of_size(payload, self.name, num_elements, self.size_bytes(num_elements, dtype))
        return payload_N.to(device, non_blocking=True).view(torch.bfloat16).to(dtype).view(shape)

    def decode_add(self, payload: memoryview, into: torch.Tensor) -> None:
        into += self.decode(payload, tuple(into.shape), into.dtype, into.device)
