"""The wire format: its exact bytes, and what the parser refuses."""

import struct
import zlib
from dataclasses import replace

import pytest

from actors.errors import FrameCorrupt, FrameUnexpected
from actors.frame import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    VERSION,
    FrameHeader,
    WireDtype,
    pack_chunk,
    parse_chunk,
    run_id,
    split_frame,
    wire_bytes,
)
from actors.spec import Kind

PAYLOAD = bytes(range(48))
HEADER = FrameHeader(
    codec=1,
    kind=Kind.ACTIVATION,
    dtype=WireDtype.FLOAT32,
    shape=(2, 3, 2),
    run=run_id("demo"),
    generation=3,
    step=70_000_000_000,
    microbatch=5,
    source=0,
    target=1,
    frame_bytes=48,
    payload_bytes=48,
    payload_crc=zlib.crc32(PAYLOAD),
)
CHUNK = pack_chunk(HEADER, memoryview(PAYLOAD))


def with_valid_crc(chunk: bytes) -> bytes:
    """The same chunk with its header's checksum made right: as someone would send it who means harm."""
    return chunk[: HEADER_BYTES - 4] + struct.pack("<I", zlib.crc32(chunk[: HEADER_BYTES - 4])) + chunk[HEADER_BYTES:]


def altered(offset: int, layout: str, *values: int) -> bytes:
    chunk = bytearray(CHUNK)
    struct.pack_into(layout, chunk, offset, *values)
    return with_valid_crc(bytes(chunk))


def test_a_chunk_comes_back_as_it_was_packed() -> None:
    header, payload = parse_chunk(CHUNK)
    assert header == HEADER
    assert bytes(payload) == PAYLOAD
    assert header.num_elements == 12


def test_the_bytes_on_the_wire_do_not_change_by_accident() -> None:
    # These are what other releases of the same version read: change VERSION with them.
    assert VERSION == 1
    assert CHUNK[:16] == b"ISTH" + bytes([1, 1, 1, 1, 0, 0]) + bytes([0, 0]) + bytes([3, 0, 0, 0])
    assert struct.unpack_from("<4I", CHUNK, 16) == (2, 3, 2, 0)
    assert struct.unpack_from("<QQ", CHUNK, 32) == (0, run_id("demo"))
    assert struct.unpack_from("<IQI", CHUNK, 48) == (3, 70_000_000_000, 5)
    assert struct.unpack_from("<HHIIQQII", CHUNK, 64) == (0, 1, 0, 1, 0, 48, 48, zlib.crc32(PAYLOAD))
    assert struct.unpack_from("<I", CHUNK, 100) == (zlib.crc32(CHUNK[:100]),)
    assert CHUNK[104:] == PAYLOAD


def test_the_payload_is_a_view_of_what_came() -> None:
    buffer = bytearray(CHUNK)
    _, payload = parse_chunk(memoryview(buffer))
    buffer[HEADER_BYTES] ^= 0xFF
    assert payload[0] == PAYLOAD[0] ^ 0xFF


@pytest.mark.parametrize("position", range(len(CHUNK)))
def test_no_flipped_byte_gets_through(position: int) -> None:
    for mask in (0x01, 0x80, 0xFF):
        chunk = bytearray(CHUNK)
        chunk[position] ^= mask
        with pytest.raises(FrameCorrupt):
            parse_chunk(bytes(chunk))


def test_no_other_length_gets_through() -> None:
    for size in range(len(CHUNK)):
        with pytest.raises(FrameCorrupt):
            parse_chunk(CHUNK[:size])
    for extra in (b"\0", b"\xff" * 100, CHUNK):
        with pytest.raises(FrameCorrupt, match="payload has"):
            parse_chunk(CHUNK + extra)


def test_another_version_is_named_with_its_remedy() -> None:
    with pytest.raises(FrameUnexpected, match="version 2 came; this node speaks version 1") as caught:
        parse_chunk(altered(4, "B", 2))
    assert "same release" in caught.value.remedy


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(altered(6, "B", 0), id="kind 0"),
        pytest.param(altered(6, "B", 77), id="unknown kind"),
        pytest.param(altered(7, "B", 9), id="unknown dtype"),
        pytest.param(altered(12, "B", 0), id="no dimension"),
        pytest.param(altered(12, "B", 5), id="five dimensions"),
        pytest.param(altered(12, "B", 2), id="a size beyond the dimensions"),
        pytest.param(altered(13, "B", 1), id="a reserved byte"),
        pytest.param(altered(20, "<I", 0), id="a dimension of 0"),
        pytest.param(altered(72, "<I", 0), id="no chunks"),
        pytest.param(altered(68, "<II", 1, 1), id="chunk 1 of 1"),
        pytest.param(altered(76, "<Q", 1), id="an offset that leads beyond the frame"),
        pytest.param(altered(76, "<Q", 2**64 - 1), id="an offset beyond any frame"),
        pytest.param(altered(84, "<Q", 47), id="a payload larger than the frame"),
        pytest.param(altered(84, "<Q", MAX_FRAME_BYTES + 1), id="a frame beyond the limit"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(chunk: bytes) -> None:
    with pytest.raises(FrameUnexpected):
        parse_chunk(chunk)


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(altered(92, "<I", 47), id="a payload size that is not the payload's"),
        pytest.param(altered(96, "<I", 0), id="a payload checksum that is not the payload's"),
    ],
)
def test_a_payload_that_is_not_the_headers_is_corrupt(chunk: bytes) -> None:
    with pytest.raises(FrameCorrupt):
        parse_chunk(chunk)


def test_a_frame_is_cut_into_even_chunks_of_at_most_the_size_asked() -> None:
    chunks = [parse_chunk(chunk) for chunk in split_frame(HEADER, memoryview(PAYLOAD), 20)]
    assert [len(payload) for _, payload in chunks] == [16, 16, 16]
    assert [header.offset for header, _ in chunks] == [0, 16, 32]
    assert [header.chunk for header, _ in chunks] == [0, 1, 2]
    assert {header.num_chunks for header, _ in chunks} == {3}
    assert {header.frame_bytes for header, _ in chunks} == {48}
    whole = replace(HEADER, payload_bytes=0, payload_crc=0)
    assert {replace(h, chunk=0, num_chunks=1, offset=0, payload_bytes=0, payload_crc=0) for h, _ in chunks} == {whole}


@pytest.mark.parametrize("chunk_bytes", [1, 7, 47, 48, 49, 1000])
def test_wire_bytes_foretells_what_the_chunks_take(chunk_bytes: int) -> None:
    chunks = list(split_frame(HEADER, memoryview(PAYLOAD), chunk_bytes))
    assert wire_bytes(len(PAYLOAD), chunk_bytes) == sum(map(len, chunks))
    assert max(map(len, chunks)) - HEADER_BYTES <= chunk_bytes
    assert b"".join(bytes(parse_chunk(chunk)[1]) for chunk in chunks) == PAYLOAD


def test_runs_are_told_apart() -> None:
    assert run_id("demo") == run_id("demo")
    assert len({run_id(f"run-{number}") for number in range(100)}) == 100
