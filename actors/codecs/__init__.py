"""Codecs: how a boundary tensor becomes the bytes of a frame, and back.

One `Codec` protocol; `CODECS` holds them by name. Adding one takes its module and one line of the registry.
"""

from __future__ import annotations

from typing import Protocol

import torch

from actors.codecs.bf16 import Bf16
from actors.codecs.raw import Raw
from actors.errors import ConfigError
from actors.spec import TensorRole


class Codec(Protocol):
    """Encodes one tensor to bytes and back; holds no state of its own."""

    @property
    def name(self) -> str: ...

    @property
    def code(self) -> int:
        """The codec's number in the frame header; never used again for another."""
        ...

    @property
    def roles(self) -> frozenset[TensorRole]:
        """What kinds of tensor it suits."""
        ...

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        """Return the exact size of the payload of `num_elements` of `dtype`."""
        ...

    def encode(self, tensor: torch.Tensor) -> memoryview:
        """Return the payload: `size_bytes` bytes on the host."""
        ...

    def decode(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor on the host, in `dtype`; may share the payload's memory, which must be writable.

        Raises FrameCorrupt for a payload of the right size that `encode` cannot have made.
        """
        ...


_REGISTRY: tuple[Codec, ...] = (Raw(), Bf16())
CODECS: dict[str, Codec] = {codec.name: codec for codec in _REGISTRY}


def codec_for(name: str, role: TensorRole, key: str) -> Codec:
    """Return the named codec, or say which would do; `key` is the setting that named it."""
    suited = [codec.name for codec in _REGISTRY if role in codec.roles]
    if name not in suited:
        raise ConfigError(f"{key}={name} is no codec for an {role.value}", f"set {key} to one of {', '.join(suited)}")
    return CODECS[name]
