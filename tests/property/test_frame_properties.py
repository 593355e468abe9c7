"""What holds of every header and of every sequence of bytes."""

import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import FrameCorrupt, FrameError
from actors.frame import (
    HEADER_BYTES,
    MAX_DIMS,
    MAX_FRAME_BYTES,
    FrameHeader,
    WireDtype,
    pack_chunk,
    parse_chunk,
    split_frame,
    wire_bytes,
)
from actors.spec import Kind

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
# Machines that run tests are slow at times.
relaxed = settings(deadline=None)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[FrameHeader, bytes]:
    payload = draw(st.binary(max_size=300))
    frame_bytes = draw(st.integers(len(payload), MAX_FRAME_BYTES))
    num_chunks = draw(st.integers(1, 2**32 - 1))
    header = FrameHeader(
        codec=draw(u8),
        kind=draw(st.sampled_from(Kind)),
        dtype=draw(st.sampled_from(WireDtype)),
        shape=tuple(draw(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=MAX_DIMS))),
        run=draw(u64),
        generation=draw(u32),
        step=draw(u64),
        microbatch=draw(u32),
        source=draw(u16),
        target=draw(u16),
        frame_bytes=frame_bytes,
        offset=draw(st.integers(0, frame_bytes - len(payload))),
        chunk=draw(st.integers(0, num_chunks - 1)),
        num_chunks=num_chunks,
        payload_bytes=len(payload),
        payload_crc=zlib.crc32(payload),
        flags=draw(u8),
        bits=draw(u8),
        block=draw(u16),
        seed=draw(u64),
    )
    return header, payload


@relaxed
@given(chunks())
def test_every_chunk_survives_the_wire(chunk: tuple[FrameHeader, bytes]) -> None:
    header, payload = chunk
    parsed, came = parse_chunk(pack_chunk(header, memoryview(payload)))
    assert parsed == header
    assert came == payload


@relaxed
@given(chunks(), st.data())
def test_no_damage_gets_through(chunk: tuple[FrameHeader, bytes], data: st.DataObject) -> None:
    packed = bytearray(pack_chunk(chunk[0], memoryview(chunk[1])))
    start = data.draw(st.integers(0, len(packed) - 1))
    # A burst of up to 32 bits, which a CRC-32 always detects.
    size = data.draw(st.integers(1, min(4, len(packed) - start)))
    noise = data.draw(st.binary(min_size=size, max_size=size).filter(any))
    # A burst that reaches over the border between header and payload is two, each within one checksum.
    for index, byte in enumerate(noise):
        packed[start + index] ^= byte
    with pytest.raises(FrameCorrupt):
        parse_chunk(bytes(packed))


@relaxed
@given(st.binary(max_size=400))
def test_random_bytes_are_corrupt_and_nothing_worse(noise: bytes) -> None:
    for candidate in (noise, b"ISTH\x01" + noise):
        with pytest.raises(FrameCorrupt):
            parse_chunk(candidate)


@relaxed
@given(st.binary(min_size=HEADER_BYTES - 9, max_size=HEADER_BYTES - 9), st.binary(max_size=64))
def test_any_header_with_a_right_checksum_gives_a_bounded_chunk_or_is_refused(fields: bytes, payload: bytes) -> None:
    body = b"ISTH\x01" + fields
    try:
        header, came = parse_chunk(body + struct.pack("<I", zlib.crc32(body)) + payload)
    except FrameError:
        return
    assert came == payload
    assert header.offset + len(payload) <= header.frame_bytes <= MAX_FRAME_BYTES
    assert header.chunk < header.num_chunks
    assert header.num_elements >= 1


@relaxed
@given(chunks(), st.binary(max_size=2000), st.integers(1, 600), st.randoms(use_true_random=False))
def test_a_frame_is_put_together_from_its_chunks_in_any_order(
    chunk: tuple[FrameHeader, bytes], payload: bytes, chunk_bytes: int, random
) -> None:
    whole = replace(chunk[0], offset=0, chunk=0, num_chunks=1)
    packed = list(split_frame(whole, memoryview(payload), chunk_bytes))
    random.shuffle(packed)
    frame = bytearray(len(payload))
    for part in packed:
        header, came = parse_chunk(part)
        assert header.frame_bytes == len(payload)
        assert header.num_chunks == len(packed)
        frame[header.offset : header.offset + len(came)] = came
    assert frame == payload
    assert sum(map(len, packed)) == wire_bytes(len(payload), chunk_bytes)
