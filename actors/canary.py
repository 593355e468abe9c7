"""How far a codec's output is from what went in: measured now and then on what really travels."""

from __future__ import annotations

import math

import torch

from actors.codecs import Codec
from actors.codecs.payload import flat
from actors.errors import NonFinite

# Elements compared at a time: in float64 these take 24 MiB, however large the tensor is.
_PIECE = 1 << 20


def compare(codec: Codec, payload: memoryview, raw: torch.Tensor) -> tuple[float, float]:
    """Return the relative error (L2) of a decoded payload against the raw tensor, and their cosine.

    Both are NaN where the raw tensor was not finite; an all-zero tensor that stays so has error 0 and cosine 1.
    """
    try:
        # A copy, because decoding may take the payload's memory over.
        decoded = codec.decode(memoryview(bytearray(payload)), tuple(raw.shape), raw.dtype, raw.device)
    except NonFinite:
        return float("nan"), float("nan")
    # Squares of raw, decoded and their difference, and the product of both.
    sums = torch.zeros(4, dtype=torch.float64, device=raw.device)
    for raw_N, decoded_N in zip(flat(raw).split(_PIECE), flat(decoded).split(_PIECE), strict=True):
        raw_N, decoded_N = raw_N.double(), decoded_N.double()
        difference_N = decoded_N - raw_N
        pairs = ((raw_N, raw_N), (decoded_N, decoded_N), (difference_N, difference_N), (raw_N, decoded_N))
        sums += torch.stack([torch.dot(a, b) for a, b in pairs])
    raw_sq, decoded_sq, difference_sq, product = sums.tolist()
    if raw_sq == 0 or decoded_sq == 0:
        is_equal = raw_sq == decoded_sq
        return (0.0, 1.0) if is_equal else (1.0, 0.0)
    return math.sqrt(difference_sq / raw_sq), product / math.sqrt(raw_sq * decoded_sq)
