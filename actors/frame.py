"""The wire format: what one stage sends another, in chunks, each checked by itself.

PURE. A frame is one encoded boundary tensor. It crosses as chunks; every chunk is this fixed little-endian header and
a slice of the payload, so each is parsed, checked and placed alone, in any order, any number of times. The parser
allocates nothing: a chunk's payload is a view of the bytes that came.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

from actors.errors import FrameCorrupt, FrameUnexpected
from actors.spec import Kind

MAGIC = b"ISTH"
# Any version has this in the fifth byte, and a header of this size with its checksum at the end.
VERSION = 1
MAX_DIMS = 4
# A header may not announce a frame beyond this, whatever the plan allows.
MAX_FRAME_BYTES = 1 << 34

# magic, version, codec, kind, dtype | flags, bits, block, dims, kept | shape | seed, run | generation, step,
# microbatch | source, target | chunk, num_chunks | offset, frame size | payload size, payload checksum
_BEFORE_TARGET = "<4sBBBB BBHBxH 4I QQ IQI H"
_BODY = struct.Struct(f"{_BEFORE_TARGET} H II QQ II")
_TARGET, _TARGET_OFFSET = struct.Struct("<H"), struct.calcsize(_BEFORE_TARGET)
_CRC = struct.Struct("<I")
HEADER_BYTES = _BODY.size + _CRC.size


class WireDtype(IntEnum):
    """The element type of a tensor before its codec."""

    FLOAT32 = 1
    BFLOAT16 = 2


@dataclass(frozen=True, kw_only=True)
class FrameHeader:
    """One chunk's header, in the order of the bytes."""

    codec: int
    kind: Kind
    dtype: WireDtype
    shape: tuple[int, ...]
    run: int
    generation: int
    step: int
    microbatch: int
    source: int
    target: int
    # The size of the whole encoded tensor, and where in it this chunk's payload goes.
    frame_bytes: int
    offset: int = 0
    chunk: int = 0
    num_chunks: int = 1
    payload_bytes: int = 0
    payload_crc: int = 0
    # Of the codec: its form, as `actors.codecs.protocol.CodecOptions` has it, and the seed of its rounding.
    flags: int = 0
    bits: int = 0
    block: int = 0
    kept: int = 0
    seed: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def run_id(run: str) -> int:
    """Return the 64-bit number that stands for a run's name in its frames."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "little")


def rounding_seed(run: int, step: int, microbatch: int, kind: Kind, source: int) -> int:
    """Return the 32-bit seed of one frame's stochastic rounding, from 1 on.

    The same in every try of a step, whatever its generation, so that a step that is run again is the same step.
    """
    words = struct.pack("<QQIBH", run, step, microbatch, kind, source)
    return max(1, int.from_bytes(hashlib.sha256(words).digest()[:4], "little"))


def count_chunks(frame_bytes: int, chunk_bytes: int) -> int:
    """Return how many chunks a frame goes in, none larger than `chunk_bytes`; an empty frame has one."""
    return max(1, -(-frame_bytes // chunk_bytes))


def even_chunk_bytes(frame_bytes: int, chunk_bytes: int) -> int:
    """Return the size of a frame's chunks, the last of which may be smaller, where they are `chunk_bytes` at most."""
    return -(-frame_bytes // count_chunks(frame_bytes, chunk_bytes))


def split_frame(header: FrameHeader, payload: memoryview, chunk_bytes: int) -> Iterator[bytes]:
    """Yield the frame's chunks, at most `chunk_bytes` of payload each; `header` describes the whole frame.

    They are even: times of chunks that follow one another tell a link's rate best where none is a small rest.
    """
    num_chunks = count_chunks(len(payload), chunk_bytes)
    even_bytes = even_chunk_bytes(len(payload), chunk_bytes)
    for chunk in range(num_chunks):
        offset = chunk * even_bytes
        part = payload[offset : offset + even_bytes]
        yield pack_chunk(
            replace(
                header,
                frame_bytes=len(payload),
                offset=offset,
                chunk=chunk,
                num_chunks=num_chunks,
                payload_bytes=len(part),
                payload_crc=zlib.crc32(part),
            ),
            part,
        )


def wire_bytes(frame_bytes: int, chunk_bytes: int) -> int:
    """Return what a frame takes on its link, the headers of its chunks included."""
    return frame_bytes + HEADER_BYTES * count_chunks(frame_bytes, chunk_bytes)


def pack_chunk(header: FrameHeader, payload: memoryview) -> bytes:
    """Return the bytes of one chunk; the header must already describe this payload."""
    shape = header.shape + (0,) * (MAX_DIMS - len(header.shape))
    body = _BODY.pack(
        MAGIC,
        VERSION,
        header.codec,
        header.kind,
        header.dtype,
        header.flags,
        header.bits,
        header.block,
        len(header.shape),
        header.kept,
        *shape,
        header.seed,
        header.run,
        header.generation,
        header.step,
        header.microbatch,
        header.source,
        header.target,
        header.chunk,
        header.num_chunks,
        header.offset,
        header.frame_bytes,
        header.payload_bytes,
        header.payload_crc,
    )
    return b"".join((body, _CRC.pack(zlib.crc32(body)), payload))


def parse_chunk(chunk: bytes | memoryview) -> tuple[FrameHeader, memoryview]:
    """Return the header and a view of the payload of one chunk that may come from anyone.

    Raises FrameCorrupt for what was damaged or cut on the way, FrameUnexpected for what was made like this: of another
    version, or with fields that contradict one another.
    """
    view = memoryview(chunk).cast("B")
    if len(view) < HEADER_BYTES:
        raise _corrupt(f"{len(view)} bytes are less than a header's {HEADER_BYTES}")
    body = view[: _BODY.size]
    if bytes(body[:4]) != MAGIC:
        raise _corrupt(f"it starts with {bytes(body[:4])!r}, not {MAGIC!r}")
    (crc,) = _CRC.unpack_from(view, _BODY.size)
    if crc != zlib.crc32(body):
        raise _corrupt(f"the checksum of its header, of version {body[4]}, is wrong")
    if body[4] != VERSION:
        raise _unexpected(f"a frame of version {body[4]} came; this node speaks version {VERSION}")
    header = _header(body)
    payload = view[HEADER_BYTES:]
    if len(payload) != header.payload_bytes:
        raise _corrupt(f"the payload has {len(payload)} bytes, the header says {header.payload_bytes}")
    if zlib.crc32(payload) != header.payload_crc:
        raise _corrupt("the payload's checksum is wrong")
    return header, payload


def target_of(chunk: bytes | memoryview) -> int | None:
    """Return the stage that a chunk says it is for, nothing checked; None where it is shorter than a header."""
    if len(chunk) < HEADER_BYTES:
        return None
    (target,) = _TARGET.unpack_from(chunk, _TARGET_OFFSET)
    return target


def _header(body: memoryview) -> FrameHeader:
    """Return the header that these bytes hold, its fields checked against one another."""
    (_, _, codec, kind, dtype, flags, bits, block, num_dims, kept, *rest) = _BODY.unpack(body)
    shape, rest = tuple(rest[:MAX_DIMS]), rest[MAX_DIMS:]
    (
        seed,
        run,
        generation,
        step,
        microbatch,
        source,
        target,
        chunk,
        num_chunks,
        offset,
        frame_bytes,
        size,
        crc,
    ) = rest
    if body[13]:
        raise _unexpected("a frame's reserved byte is not zero")
    if kind not in Kind.__members__.values() or dtype not in WireDtype.__members__.values():
        raise _unexpected(f"a frame's kind {kind} or dtype {dtype} is unknown")
    if not 1 <= num_dims <= MAX_DIMS or any(shape[num_dims:]) or not all(shape[:num_dims]):
        raise _unexpected(f"a frame's shape {shape} of {num_dims} dimensions makes no sense")
    if frame_bytes > MAX_FRAME_BYTES or chunk >= num_chunks or offset + size > frame_bytes:
        raise _unexpected(f"chunk {chunk} of {num_chunks}, {size} bytes at {offset}, does not fit in {frame_bytes}")
    return FrameHeader(
        codec=codec,
        kind=Kind(kind),
        dtype=WireDtype(dtype),
        shape=shape[:num_dims],
        run=run,
        generation=generation,
        step=step,
        microbatch=microbatch,
        source=source,
        target=target,
        frame_bytes=frame_bytes,
        offset=offset,
        chunk=chunk,
        num_chunks=num_chunks,
        payload_bytes=size,
        payload_crc=crc,
        flags=flags,
        bits=bits,
        block=block,
        kept=kept,
        seed=seed,
    )


def _corrupt(why: str) -> FrameCorrupt:
    return FrameCorrupt(f"a frame is corrupt: {why}", "the sender repeats it; if this goes on, check that link")


def _unexpected(why: str) -> FrameUnexpected:
    return FrameUnexpected(why, "run the same release of Isthmus on every node")
