"""`lx`: weights without loss. Bytes of like rank lie together, in planes, and are compressed where that pays.

    payload of bfloat16 or float32: pieces of up to 2**20 words, of each piece its planes, the highest byte first
    plane: size, uint32, little-endian | zstd, or where the size is the plane's own its bytes as they are
    payload of any other dtype: the tensor's bytes

How many pieces and planes there are, and how long each is, follows from the shape and dtype that the receiver expects.
"""

from __future__ import annotations

import math
import struct
from typing import Protocol, cast

import numpy as np
import torch

from actors.codecs.payload import flat
from actors.codecs.protocol import CodecOptions
from actors.errors import FrameCorrupt
from actors.kernels.dispatch import kernels_for
from actors.spec import TensorRole

PIECE_WORDS = 1 << 20

# What is split into planes, and the words it is split as.
_WORDS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_SIZE = struct.Struct("<I")
# A plane that zstd does not make this much smaller is kept as it is: reading it then costs nothing.
_WORTHWHILE = 0.98


class Lx:
    """Split byte planes, zstd on each: about two thirds of bfloat16 weights' bytes.

    The exponent is what compresses: ZipNN, arXiv 2411.05239; DFloat11, arXiv 2504.11651.
    """

    name = "lx"
    code = 6
    options = CodecOptions()
    roles = frozenset({TensorRole.WEIGHT})
    has_fixed_size = False
    is_stochastic = False

    def size_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        """Return the most that a payload can take, which is that of values without any pattern."""
        num_planes = dtype.itemsize * -(-num_elements // PIECE_WORDS) if dtype in _WORDS else 0
        return num_elements * dtype.itemsize + num_planes * _SIZE.size

    def encode(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the payload; compresses on the CPU, so that a device's tensor is waited for."""
        payload = encode_lossless(tensor)
        # An empty tensor has an empty payload, of which torch makes no view.
        packed = torch.frombuffer(payload, dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
        return packed.to(tensor.device)

    def decode(
        self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return decode_lossless(payload, shape, dtype, device)

    def decode_add(self, payload: memoryview, into: torch.Tensor) -> None:
        into += self.decode(payload, tuple(into.shape), into.dtype, into.device)


def encode_lossless(tensor: torch.Tensor, base: torch.Tensor | None = None) -> bytearray:
    """Return the payload of a tensor, or of its difference to a base of the same shape and dtype.

    A dtype that is not split into planes has no use for the base.
    """
    values_N = flat(tensor)
    word = _WORDS.get(tensor.dtype)
    if word is None:
        return bytearray(_bytes_of(values_N))
    words_N = values_N.view(word)
    base_N = None if base is None else flat(base).to(tensor.device).view(word)
    kernels, zstd = kernels_for(tensor.device), _zstd()
    payload = bytearray()
    for start in range(0, len(words_N), PIECE_WORDS):
        piece = slice(start, start + PIECE_WORDS)
        planes = kernels.split_planes(words_N[piece], None if base_N is None else base_N[piece])
        for plane in planes.cpu():
            raw = _bytes_of(plane)
            compressed = zstd.compress(raw)
            kept = compressed if len(compressed) < _WORTHWHILE * len(raw) else raw
            payload += _SIZE.pack(len(kept))
            payload += kept
    return payload


def decode_lossless(
    payload: memoryview,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the tensor that `encode_lossless` was given, with the same base; it shares nothing with the payload.

    Allocates what the shape and dtype take, whatever the payload says. FrameCorrupt where the payload is not theirs.
    """
    num_elements = math.prod(shape)
    word = _WORDS.get(dtype)
    if word is None:
        return _decode_bytes(payload, num_elements, dtype).to(device).view(shape)
    values_N = torch.empty(num_elements, dtype=dtype, device=device)
    words_N = values_N.view(word)
    base_N = None if base is None else flat(base).to(device).view(word)
    kernels, reader = kernels_for(device), _PlaneReader(payload)
    for start in range(0, num_elements, PIECE_WORDS):
        piece = slice(start, start + PIECE_WORDS)
        planes = torch.empty(dtype.itemsize, len(words_N[piece]), dtype=torch.uint8)
        for plane in planes:
            reader.read_into(plane)
        words_N[piece] = kernels.merge_planes(planes.to(device), None if base_N is None else base_N[piece])
    reader.require_end()
    return values_N.view(shape)


def prefers_base(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    """Return whether the difference to a base takes less than the tensor itself, judged by the first piece."""
    sample_N, base_N = flat(tensor)[:PIECE_WORDS], flat(base)[:PIECE_WORDS]
    return tensor.dtype in _WORDS and len(encode_lossless(sample_N, base_N)) < len(encode_lossless(sample_N))


class _PlaneReader:
    """Takes one plane after another from a payload that may come from anyone."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._offset = 0
        self._zstd = _zstd()

    def read_into(self, plane: torch.Tensor) -> None:
        """Fill the plane, uint8, with the next one; FrameCorrupt where it has another length."""
        size_bytes = len(plane)
        start = self._offset + _SIZE.size
        if start > len(self._payload):
            raise _corrupt("it ends before its last plane")
        (kept_bytes,) = _SIZE.unpack_from(self._payload, self._offset)
        kept = self._payload[start : start + kept_bytes]
        if kept_bytes > size_bytes or len(kept) < kept_bytes:
            raise _corrupt(f"a plane of {size_bytes} bytes is said to take {kept_bytes}, and {len(kept)} are there")
        self._offset = start + kept_bytes
        if kept_bytes < size_bytes:
            try:
                # Allocates no more than that, and refuses what does not fill it.
                kept = self._zstd.decompress(kept, size_bytes)
            except OSError as error:
                raise _corrupt(f"a plane of {size_bytes} bytes does not decompress: {error}") from error
        plane.numpy()[:] = np.frombuffer(kept, dtype=np.uint8)

    def require_end(self) -> None:
        """Raise FrameCorrupt where bytes are left."""
        if self._offset != len(self._payload):
            raise _corrupt(f"{len(self._payload) - self._offset} bytes follow its last plane")


class _Zstd(Protocol):
    """What is used of pyarrow, which has no types."""

    def compress(self, data: memoryview) -> memoryview: ...

    def decompress(self, data: memoryview, decompressed_size: int) -> memoryview: ...


def _zstd() -> _Zstd:
    # Only here: who neither writes nor reads weights need not have pyarrow.
    from pyarrow import Codec  # pyright: ignore

    return cast(_Zstd, Codec("zstd", compression_level=1))


def _bytes_of(tensor_N: torch.Tensor) -> memoryview:
    return tensor_N.cpu().view(torch.uint8).numpy().data


def _decode_bytes(payload: memoryview, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    if len(payload) != num_elements * dtype.itemsize:
        raise _corrupt(f"{num_elements} elements of {dtype} take {num_elements * dtype.itemsize} bytes")
    values_N = torch.empty(num_elements, dtype=dtype)
    values_N.view(torch.uint8).numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
    return values_N


def _corrupt(why: str) -> FrameCorrupt:
    return FrameCorrupt(f"a payload of codec lx cannot be decoded: {why}", "run the same release on every node")
