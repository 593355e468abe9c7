"""`q8` and `hq4`: blocks of 128 elements share one step; 8.125 and 4.125 bits an element."""

from __future__ import annotations

import torch

from actors.codecs.payload import checked, flat
from actors.codecs.protocol import HADAMARD, STOCHASTIC, CodecOptions
from actors.kernels.dispatch import kernels_for
from actors.kernels.layout import BLOCK, BlockForm
from actors.spec import TensorRole


class BlockCodec:
    """Block quantisation to 8 or 4 bits, optionally after a randomised Hadamard rotation, optionally stochastic.

    To nearest, every element lies within half a step in the domain that was rounded, and what was decoded encodes to
    the same payload again, but at the very ends of the range. The rotation spreads outliers over their block: QuIP#,
    arXiv 2402.04396.
    """

    roles = frozenset({TensorRole.ACTIVATION, TensorRole.GRADIENT, TensorRole.PSEUDO_GRADIENT})
    has_fixed_size = True

    def __init__(self, name: str, code: int, form: BlockForm) -> None:
        self.name = name
        self.code = code
        self.form = form
        self.is_stochastic = form.stochastic
        flags = (HADAMARD if form.hadamard else 0) | (STOCHASTIC if form.stochastic else 0)
        self.options = CodecOptions(flags=flags, bits=form.bits, block=BLOCK)

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return self.form.payload_bytes(num_elements)

    def encode(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        return kernels_for(tensor.device).encode_blocks(flat(tensor), self.form, seed)

    def decode(
        self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        decoded = torch.empty(shape, dtype=dtype, device=device)
        self._decode(payload, decoded, accumulate=False)
        return decoded

    def decode_add(self, payload: memoryview, into: torch.Tensor) -> None:
        self._decode(payload, into, accumulate=True)

    def _decode(self, payload: memoryview, into: torch.Tensor, *, accumulate: bool) -> None:
        into_N = into.view(-1)
        payload_N = checked(payload, self.name, self.form, len(into_N)).to(into.device, non_blocking=True)
        kernels_for(into.device).decode_blocks(payload_N, into_N, self.form, accumulate=accumulate)


Q8 = BlockCodec("q8", 3, BlockForm(bits=8))
HQ4 = BlockCodec("hq4", 4, BlockForm(bits=4, hadamard=True))
HQ4_STOCHASTIC = BlockCodec("hq4-stochastic", 4, BlockForm(bits=4, hadamard=True, stochastic=True))
Q4 = BlockCodec("q4", 4, BlockForm(bits=4))
Q4_STOCHASTIC = BlockCodec("q4-stochastic", 4, BlockForm(bits=4, stochastic=True))
