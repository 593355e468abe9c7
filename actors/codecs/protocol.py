"""What every codec can do, and how its form is told in a frame's header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from actors.spec import TensorRole

# Bits of CodecOptions.flags.
HADAMARD = 1
STOCHASTIC = 2


@dataclass(frozen=True, kw_only=True)
class CodecOptions:
    """A codec's form, as each frame's header says it: what a receiver must know besides the codec's number."""

    flags: int = 0
    # An element's code.
    bits: int = 0
    # Elements that share a step or level, and how many of them are kept; 0: all.
    block: int = 0
    kept: int = 0


class Codec(Protocol):
    """Encodes one tensor to bytes and back; holds no state of its own."""

    @property
    def name(self) -> str: ...

    @property
    def code(self) -> int:
        """The codec's number in the frame header; never used again for another."""
        ...

    @property
    def options(self) -> CodecOptions: ...

    @property
    def is_stochastic(self) -> bool:
        """Whether `encode` looks at its seed."""
        ...

    @property
    def roles(self) -> frozenset[TensorRole]:
        """What kinds of tensor it suits."""
        ...

    @property
    def has_fixed_size(self) -> bool:
        """Whether a payload's size follows from the number of elements alone, as frames of a pipeline need."""
        ...

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        """Return the exact size of the payload of so many elements; where it is not fixed, the most it can be."""
        ...

    def encode(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the payload, on the tensor's device, without waiting for it: uint8 of `size_bytes` elements.

        The seed is for stochastic rounding; others do not look at it. A quantising codec cannot carry an infinity or
        NaN: its payload then says so, and `decode` raises.
        """
        ...

    def decode(
        self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return the tensor on `device`; on the CPU it may share the payload's memory, which must be writable.

        Raises, before anything is decoded, FrameCorrupt for a payload that `encode` cannot have made, and NonFinite
        where its source held what the codec cannot carry.
        """
        ...

    def decode_add(self, payload: memoryview, into: torch.Tensor) -> None:
        """Add the decoded tensor to a contiguous float32 one; raises as `decode` does, before it is touched."""
        ...
