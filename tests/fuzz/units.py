"""Weights without loss as a peer or a checkpoint may send them: payloads of codec lx, and units' blobs around them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any
from unittest.mock import patch as replaced

import torch
from torch import Tensor

from actors.codecs.lx import decode_lossless, encode_lossless
from actors.errors import FrameCorrupt, FrameUnexpected
from actors.packing import VERSION, TensorForm, content_sha256, form_of, hold_unit, pack_unit, unpack_unit, unpack_whole
from tests.fuzz.choices import Choices, edit, patch

_CPU = torch.device("cpu")
_PREFIX = struct.Struct("<6sHI")
# So that a few elements are pieces, and some of their planes are compressed.
_PIECE_WORDS = 100
_MAX_BYTES = 1 << 16


def _weights(seed: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight/a": scale * torch.randn(12, 20, generator=generator),
        "weight/b": (scale * torch.randn(150, generator=generator)).bfloat16(),
        "exp_avg/b": torch.zeros(130),
        "step/b": torch.tensor(7.0),
        "none": torch.empty(0, 3),
        "numbers": torch.arange(20),
    }


_BASE = _weights(1, 0.02)
_UNIT = {name: (tensor * 1.5).to(tensor.dtype) for name, tensor in _BASE.items()}
_HELD = hold_unit(_BASE)
_EXPECTED = {name: form_of(tensor) for name, tensor in _UNIT.items()}
_NAMES = tuple(_UNIT)
_BOTH = (False, True)


def check(data: bytes) -> None:
    """Read one payload or blob that the input describes."""
    choices = Choices(data)
    with replaced("actors.codecs.lx.PIECE_WORDS", _PIECE_WORDS):
        choices.pick((_check_edited_unit, _check_payload, _check_bytes))(choices)


@cache
def _good_unit(has_base: bool) -> bytes:
    return pack_unit(_UNIT, _HELD if has_base else None)


@cache
def _good_payload(name: str, has_base: bool) -> bytes:
    return bytes(encode_lossless(_UNIT[name], _BASE[name] if has_base else None))


def _check_payload(choices: Choices) -> None:
    """Decode a payload of one tensor, patched, cut or extended, with the base that it was made with or another."""
    name, is_made_with_base, has_base = choices.pick(_NAMES), choices.pick(_BOTH), choices.pick(_BOTH)
    payload = bytearray(_good_payload(name, is_made_with_base))
    if payload:
        patch(payload, choices)
    kept_bytes = max(0, len(payload) - choices.number())
    _decode(payload[:kept_bytes] + choices.rest(), _EXPECTED[name], _BASE[name] if has_base else None)


def _decode(payload: bytearray, form: TensorForm, base: Tensor | None) -> Tensor | None:
    try:
        decoded = decode_lossless(memoryview(payload), form.shape, form.dtype, _CPU, base)
    except FrameCorrupt:
        return None
    assert form_of(decoded) == form
    again = decode_lossless(memoryview(encode_lossless(decoded, base)), form.shape, form.dtype, _CPU, base)
    assert content_sha256({"": again}) == content_sha256({"": decoded}), "what was decoded does not come back"
    return decoded


def _check_edited_unit(choices: Choices) -> None:
    """Unpack a good blob with its payloads patched, the hash of what they now hold, and its header edited."""
    blob = _good_unit(choices.pick(_BOTH))
    _, _, header_bytes = _PREFIX.unpack_from(blob)
    document = json.loads(blob[_PREFIX.size : _PREFIX.size + header_bytes])
    payloads = bytearray(blob[_PREFIX.size + header_bytes :])
    patch(payloads, choices)
    if choices.number() % 2 == 0:
        _rehash(document, payloads)
    header = json.dumps(edit(document, choices)).encode()
    prefix = bytearray(_PREFIX.pack(b"ISTHLX", VERSION, len(header)))
    patch(prefix, choices)
    _unpack(bytes(prefix) + header + payloads)


def _rehash(document: dict[str, Any], payloads: bytearray) -> None:
    """Put the content hash of what the payloads decode to in the header, where they decode at all."""
    tensors: dict[str, Tensor] = {}
    offset = 0
    for entry in document["tensors"]:
        name, payload = entry["name"], payloads[offset : offset + entry["size_bytes"]]
        decoded = _decode(payload, _EXPECTED[name], _BASE[name] if entry["delta"] else None)
        if decoded is None:
            return
        tensors[name] = decoded
        offset += entry["size_bytes"]
    document["content"] = content_sha256(tensors)


def _check_bytes(choices: Choices) -> None:
    _unpack(choices.rest())


def _unpack(blob: bytes) -> None:
    with suppress(FrameCorrupt, FrameUnexpected):
        tensors = unpack_unit(blob, _EXPECTED, {_HELD.sha256: _BASE})
        assert {name: form_of(tensor) for name, tensor in tensors.items()} == _EXPECTED
    with suppress(FrameCorrupt):
        tensors = unpack_whole(blob, _MAX_BYTES)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= _MAX_BYTES


def seeds() -> Iterator[bytes]:
    """Yield good and edited units, payloads as they are and as others, and whole blobs."""
    for base in range(2):
        yield bytes([0, base])
        # A patched payload; a changed value of the header, of an entry, of an entry's shape.
        yield bytes([0, base, 1, 30, 0, 0, 0x55])
        yield bytes([0, base, 0, 0, 1, 4, 0, 0, 15])
        yield bytes([0, base, 0, 0, 1, 4, 2, 4, 1, 4, 2, 0, 8])
        yield bytes([0, base, 0, 0, 1, 2, 1])
        for name in range(len(_NAMES)):
            yield bytes([1, name, base, base])
            yield bytes([1, name, base, 1, 1, 2, 0, 0, 1])
        with replaced("actors.codecs.lx.PIECE_WORDS", _PIECE_WORDS):
            yield bytes([2]) + _good_unit(_BOTH[base])
