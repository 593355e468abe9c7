"""One unit's tensors as one compact blob, for a checkpoint's file and for a move from node to node.

    prefix: magic, version, header's size | header, JSON | payloads of codec lx, one a tensor, in the header's order
    header: {"content": sha256, "base": sha256 or null, "tensors": [{"name", "dtype", "shape", "delta", "size_bytes"}]}

The content hash is that of the tensors themselves, however they travel: by it a receiver says which copy it holds, a
sender names that copy as the base of its differences, and both see that what came out is what went in.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.codecs.lx import decode_lossless, encode_lossless, prefers_base
from actors.codecs.payload import flat
from actors.errors import CheckpointError, FrameCorrupt, FrameUnexpected

VERSION = 1
# 200 bytes a tensor; what is larger was not written by us.
MAX_HEADER_BYTES = 1 << 20

_PREFIX = struct.Struct("<6sHI")
_MAGIC = b"ISTHLX"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_DIMS = 8
# Beyond what any memory holds, and well below what overflows.
_COUNT_LIMIT = 1 << 48
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class TensorForm:
    """What a tensor is but for its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class HeldUnit:
    """A copy of a unit that a node has, and its content hash: what a difference is made to."""

    sha256: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    form: TensorForm
    # Whether the payload is the difference to the base's tensor of this name.
    is_delta: bool
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Header:
    content: str
    base: str | None
    entries: tuple[_Entry, ...]


def form_of(tensor: Tensor) -> TensorForm:
    """Return a tensor's dtype and shape."""
    return TensorForm(dtype=tensor.dtype, shape=tuple(tensor.shape))


def hold_unit(tensors: Mapping[str, Tensor]) -> HeldUnit:
    """Return tensors with their content hash; they must not change while the hash is used."""
    return HeldUnit(content_sha256(tensors), tensors)


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a unit's names, dtypes, shapes and values, whatever their order or device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        form = form_of(tensors[name])
        digest.update(json.dumps([name, _dtype_name(name, form), form.shape]).encode())
        digest.update(flat(tensors[name]).cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_unit(tensors: Mapping[str, Tensor], base: HeldUnit | None = None) -> bytes:
    """Return a unit's blob; with a base, which the receiver must hold, each tensor as a difference where that is less.

    CheckpointError for a dtype that no blob holds.
    """
    entries: list[dict[str, object]] = []
    payloads: list[bytearray] = []
    for name, tensor in tensors.items():
        form = form_of(tensor)
        held = None if base is None else base.tensors.get(name)
        if held is not None and not (form_of(held) == form and prefers_base(tensor, held)):
            held = None
        payloads.append(encode_lossless(tensor, held))
        entries.append(
            {
                "name": name,
                "dtype": _dtype_name(name, form),
                "shape": form.shape,
                "delta": held is not None,
                "size_bytes": len(payloads[-1]),
            }
        )
    document = {"content": content_sha256(tensors), "base": base.sha256 if base else None, "tensors": entries}
    header = json.dumps(document).encode()
    return b"".join((_PREFIX.pack(_MAGIC, VERSION, len(header)), header, *payloads))


def unpack_unit(
    blob: bytes | memoryview, expected: Mapping[str, TensorForm], held: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors of a moved unit, on the CPU; `held` maps content hashes to copies that this node has.

    FrameUnexpected where the unit has other tensors than expected, or its base is not held; FrameCorrupt where the
    blob is torn, or what comes out is not what went in.
    """
    header, payloads = _parse(memoryview(blob))
    if odd := sorted(_odd_names(header, expected)):
        raise FrameUnexpected(
            f"a moved unit has other tensors than this stage, among them {', '.join(odd)[:200]!r}",
            "place stages anew; run the same release of Isthmus on every node",
        )
    if header.base is not None and header.base not in held:
        raise FrameUnexpected(
            f"a moved unit is a difference to a copy that this node does not hold, {header.base}",
            "send it again without a base",
        )
    return _decode(header, payloads, {} if header.base is None else held[header.base])


def unpack_whole(blob: bytes | memoryview, max_bytes: int) -> dict[str, Tensor]:
    """Return the tensors of a blob without a base, on the CPU, whose tensors take `max_bytes` at most in all.

    FrameCorrupt where it is torn, takes more, or what comes out is not what went in.
    """
    header, payloads = _parse(memoryview(blob))
    size_bytes = sum(entry.form.size_bytes for entry in header.entries)
    if size_bytes > max_bytes:
        raise _corrupt(f"its tensors take {size_bytes} bytes, more than the {max_bytes} of this model")
    if header.base is not None:
        raise _corrupt("it is a difference to another")
    return _decode(header, payloads, {})


def _odd_names(header: _Header, expected: Mapping[str, TensorForm]) -> set[str]:
    forms = {entry.name: entry.form for entry in header.entries}
    return {name for name in forms.keys() | expected.keys() if forms.get(name) != expected.get(name)}


def _decode(header: _Header, payloads: memoryview, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset = 0
    for entry in header.entries:
        held = base.get(entry.name) if entry.is_delta else None
        if entry.is_delta and (held is None or form_of(held) != entry.form):
            raise _corrupt(f"{entry.name!r} is a difference to a tensor that its base lacks")
        payload = payloads[offset : offset + entry.size_bytes]
        tensors[entry.name] = decode_lossless(payload, entry.form.shape, entry.form.dtype, _HOST, held)
        offset += entry.size_bytes
    if content_sha256(tensors) != header.content:
        raise _corrupt("its tensors are not those that went in: the hash of their content differs")
    return tensors


# The header


def _parse(blob: memoryview) -> tuple[_Header, memoryview]:
    """Return the header, its fields checked against one another, and all payloads."""
    if len(blob) < _PREFIX.size:
        raise _corrupt(f"{len(blob)} bytes are less than its prefix")
    magic, version, header_bytes = _PREFIX.unpack_from(blob)
    if magic != _MAGIC:
        raise _corrupt(f"it starts with {magic!r}, not {_MAGIC!r}")
    if version != VERSION:
        raise _corrupt(f"it is of version {version}, not {VERSION}")
    if header_bytes > MAX_HEADER_BYTES:
        raise _corrupt(f"its header has {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
    payloads = blob[_PREFIX.size + header_bytes :]
    try:
        document = json.loads(bytes(blob[_PREFIX.size : _PREFIX.size + header_bytes]))
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"its header is not JSON: {error}") from error
    header = _header(document)
    size_bytes = sum(entry.size_bytes for entry in header.entries)
    if size_bytes != len(payloads):
        raise _corrupt(f"its payloads have {len(payloads)} bytes, not {size_bytes}")
    return header, payloads


def _header(document: object) -> _Header:
    match document:
        case {"content": str(content), "base": str() | None as base, "tensors": list(items), **rest} if not rest:
            hashes = (content,) if base is None else (content, base)
            if not all(map(_SHA256.fullmatch, hashes)):
                raise _corrupt("its header holds a hash that is not SHA-256")
            entries = tuple(map(_entry, items))
            if len({entry.name for entry in entries}) != len(entries):
                raise _corrupt("its header names a tensor twice")
            return _Header(content=content, base=base, entries=entries)
        case _:
            raise _corrupt("its header has other keys than content, base and tensors")


def _entry(item: object) -> _Entry:
    match item:
        case {
            "name": str(name),
            "dtype": str(dtype),
            "shape": list(shape),
            "delta": bool(is_delta),
            "size_bytes": size_bytes,
            **rest,
        } if not rest and dtype in _DTYPES and _is_shape(shape) and _is_count(size_bytes):
            form = TensorForm(dtype=_DTYPES[dtype], shape=tuple(shape))
            return _Entry(name=name, form=form, is_delta=is_delta, size_bytes=size_bytes)
        case _:
            raise _corrupt(f"its header describes no tensor: {repr(item)[:200]}")


def _is_shape(sizes: list[Any]) -> bool:
    # Zeros aside: a tensor without elements has strides all the same.
    return (
        len(sizes) <= _MAX_DIMS and all(map(_is_count, sizes)) and math.prod(size or 1 for size in sizes) < _COUNT_LIMIT
    )


def _is_count(value: object) -> bool:
    # JSON's true is an int to Python.
    return type(value) is int and 0 <= value < _COUNT_LIMIT


def _dtype_name(name: str, form: TensorForm) -> str:
    if form.dtype not in _NAMES:
        raise CheckpointError(f"{name} is {form.dtype}, which codec lx does not hold", "set checkpoints.codec=none")
    return _NAMES[form.dtype]


def _corrupt(why: str) -> FrameCorrupt:
    return FrameCorrupt(f"a packed unit is corrupt: {why}", "send it again; if this goes on, check that link or disk")
