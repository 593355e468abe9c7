"""How far a codec's output is from what went in: measured now and then on what really travels."""

from __future__ import annotations

import torch
from torch.linalg import vector_norm

from actors.codecs import Codec
from actors.errors import NonFinite


def compare(codec: Codec, payload: memoryview, raw: torch.Tensor) -> tuple[float, float]:
    """Return the relative error (L2) of a decoded payload against the raw tensor, and their cosine.

    Both are NaN where the raw tensor was not finite; an all-zero tensor that stays so has error 0 and cosine 1.
    """
    try:
        # A copy, because decoding may take the payload's memory over.
        decoded = codec.decode(memoryview(bytearray(payload)), tuple(raw.shape), raw.dtype, raw.device)
    except NonFinite:
        return float("nan"), float("nan")
    raw_N, decoded_N = raw.detach().double().view(-1), decoded.double().view(-1)
    raw_norm, decoded_norm = float(vector_norm(raw_N)), float(vector_norm(decoded_N))
    if raw_norm == 0 or decoded_norm == 0:
        is_equal = raw_norm == decoded_norm
        return (0.0, 1.0) if is_equal else (1.0, 0.0)
    error = float(vector_norm(decoded_N - raw_N)) / raw_norm
    return error, float(torch.dot(raw_N, decoded_N)) / (raw_norm * decoded_norm)
