"""`tk2`: of each 4096 elements the 32, 64 or 128 largest, by index, sign and level; 0.164 bits an element at 64."""

from __future__ import annotations

import torch

from actors.codecs.payload import checked, flat
from actors.codecs.protocol import CodecOptions
from actors.kernels.dispatch import kernels_for
from actors.kernels.layout import CHUNK, ChunkForm
from actors.spec import TensorRole


class TopK:
    """Chunked top-k with error feedback, two levels a chunk and Elias-Fano indices.

    Top-k of chunks with error feedback for pseudo-gradients: SparseLoCo, arXiv 2508.15706. Index code: Elias, 1974;
    Fano, 1971.
    """

    code = 5
    roles = frozenset({TensorRole.PSEUDO_GRADIENT})
    has_fixed_size = True
    is_stochastic = False

    def __init__(self, name: str, form: ChunkForm) -> None:
        self.name = name
        self.form = form
        self.options = CodecOptions(bits=form.bits, block=CHUNK, kept=form.k)

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return self.form.payload_bytes(num_elements)

    def encode(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        delta_N = flat(tensor).float()
        return self.encode_with_feedback(delta_N, torch.zeros_like(delta_N), beta=0.0)

    def encode_with_feedback(self, delta_N: torch.Tensor, residual_N: torch.Tensor, beta: float) -> torch.Tensor:
        """Return the payload of beta * residual + delta, float32 both; what it does not carry stays in the residual.

        sent + residual = beta * residual + delta, bit for bit (but for the sign of a zero).
        """
        return kernels_for(delta_N.device).encode_chunks(delta_N, residual_N, beta, self.form)

    def decode(
        self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        decoded = torch.zeros(shape, dtype=torch.float32, device=device)
        self.decode_add(payload, decoded)
        return decoded.to(dtype)

    def decode_add(self, payload: memoryview, into: torch.Tensor) -> None:
        into_N = into.view(-1)
        payload_N = checked(payload, self.name, self.form, len(into_N)).to(into.device, non_blocking=True)
        kernels_for(into.device).add_chunks(payload_N, into_N, self.form)


TK2 = TopK("tk2", ChunkForm(k=64))
TK2_32 = TopK("tk2-32", ChunkForm(k=32))
TK2_128 = TopK("tk2-128", ChunkForm(k=128))
# One bit a value: the sign, with one level a chunk.
TK2_SIGN = TopK("tk2-sign", ChunkForm(k=64, bits=1))
