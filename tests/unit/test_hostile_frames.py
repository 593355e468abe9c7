"""Whatever bytes a stranger sends, of any codec: a typed verdict, nothing in the mailbox, no memory beyond the plan."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import pytest
import torch

from actors.codecs import CODECS
from actors.errors import PeerTimeout
from actors.frame import HEADER_BYTES, FrameHeader, WireDtype, pack_chunk, parse_chunk, rounding_seed, run_id
from actors.mailbox import Expectation, Mailbox, Verdict
from actors.spec import Kind

SHAPE = (2, 8, 60)
RUN, STEP, GENERATION = run_id("demo"), 4, 2
QUANTISING = ("q8", "hq4", "hq4-stochastic", "q4-stochastic")
pytestmark = pytest.mark.parametrize("name", QUANTISING)


def open_mailbox(name: str) -> Mailbox:
    expected = Expectation(kind=Kind.ACTIVATION, source=0, codec=name, dtype=WireDtype.FLOAT32, shape=SHAPE, window=2)
    mailbox = Mailbox("demo", 1, 6, (expected,))
    mailbox.open(GENERATION, STEP)
    return mailbox


def frame_of(name: str, microbatch: int = 0, **fields: object) -> tuple[FrameHeader, bytes]:
    """A good frame, as one chunk: its header and its payload."""
    codec = CODECS[name]
    seed = rounding_seed(RUN, STEP, microbatch, Kind.ACTIVATION, 0) if codec.is_stochastic else 0
    tensor = torch.randn(SHAPE, generator=torch.Generator().manual_seed(microbatch))
    payload = codec.encode(tensor, seed).numpy().tobytes()
    header = FrameHeader(
        codec=codec.code,
        kind=Kind.ACTIVATION,
        dtype=WireDtype.FLOAT32,
        shape=SHAPE,
        run=RUN,
        generation=GENERATION,
        step=STEP,
        microbatch=microbatch,
        source=0,
        target=1,
        frame_bytes=len(payload),
        payload_bytes=len(payload),
        payload_crc=zlib.crc32(payload),
        flags=codec.options.flags,
        bits=codec.options.bits,
        block=codec.options.block,
        kept=codec.options.kept,
        seed=seed,
    )
    return replace(header, **fields), payload


def pack(header: FrameHeader, payload: bytes) -> bytes:
    return pack_chunk(header, memoryview(payload))


def resealed(header: bytes, payload: bytes) -> bytes:
    """A chunk whose header's checksum is right again."""
    body = header[: HEADER_BYTES - 4]
    return body + struct.pack("<I", zlib.crc32(body)) + payload


def is_empty(mailbox: Mailbox, microbatch: int = 0) -> bool:
    try:
        mailbox.take(Kind.ACTIVATION, microbatch, timeout_s=0.0, monotonic=time.monotonic)
    except PeerTimeout:
        return True
    return False


def require_refused(mailbox: Mailbox, chunk: bytes) -> Verdict:
    receipt = mailbox.offer(chunk)
    assert receipt.verdict is not Verdict.ACCEPTED
    assert is_empty(mailbox)
    return receipt.verdict


def test_a_good_frame_is_taken(name: str) -> None:
    mailbox = open_mailbox(name)
    assert mailbox.offer(pack(*frame_of(name))).verdict is Verdict.ACCEPTED
    assert not is_empty(mailbox)


def test_each_header_byte_flipped_is_corrupt(name: str) -> None:
    mailbox, chunk = open_mailbox(name), bytearray(pack(*frame_of(name)))
    for position in range(HEADER_BYTES):
        for mask in (0x01, 0x80, 0xFF):
            chunk[position] ^= mask
            assert require_refused(mailbox, bytes(chunk)) is Verdict.CORRUPT
            chunk[position] ^= mask
    assert mailbox.offer(bytes(chunk)).verdict is Verdict.ACCEPTED


def test_each_header_byte_forged_with_its_checksum_right_puts_no_wrong_frame_in_place(name: str) -> None:
    mailbox, chunk = open_mailbox(name), pack(*frame_of(name))
    payload = chunk[HEADER_BYTES:]
    for position in range(HEADER_BYTES - 4):
        for mask in (0x01, 0x02, 0x80, 0xFF):
            header = bytearray(chunk[:HEADER_BYTES])
            header[position] ^= mask
            forged = resealed(bytes(header), payload)
            if mailbox.offer(forged).verdict is Verdict.ACCEPTED:
                # Only where it is honestly the frame of another place: a later generation, step or microbatch, or a
                # first chunk of several.
                changed, _ = parse_chunk(forged)
                places = ("generation", "step", "microbatch", "num_chunks")
                original, _ = parse_chunk(chunk)
                assert any(getattr(changed, place) != getattr(original, place) for place in places)
                mailbox = open_mailbox(name)
            assert is_empty(mailbox)


def test_payload_bits_flipped_are_corrupt_and_forged_ones_refused(name: str) -> None:
    mailbox = open_mailbox(name)
    header, payload = frame_of(name)
    generator = random.Random(1)
    for bit in generator.sample(range(8 * len(payload)), 200):
        altered = bytearray(payload)
        altered[bit // 8] ^= 1 << bit % 8
        assert require_refused(mailbox, pack(header, bytes(altered))) is Verdict.CORRUPT
        forged = replace(header, payload_crc=zlib.crc32(bytes(altered)))
        # A set count of bad blocks under a right checksum is the sender's own word that its source was not finite;
        # the checksum covers codes and steps, so every other flip is found.
        receipt = mailbox.offer(pack(forged, bytes(altered)))
        if receipt.verdict is Verdict.ACCEPTED:
            assert bit // 8 >= len(payload) - 8
            taken = mailbox.take(Kind.ACTIVATION, 0, timeout_s=0.0, monotonic=time.monotonic)
            assert taken.isnan().all()
            mailbox = open_mailbox(name)
        else:
            assert receipt.verdict is Verdict.REFUSED
        assert is_empty(mailbox)


def test_truncated_and_extended_frames_are_corrupt(name: str) -> None:
    mailbox, chunk = open_mailbox(name), pack(*frame_of(name))
    for size in range(0, len(chunk), 37):
        assert require_refused(mailbox, chunk[:size]) is Verdict.CORRUPT
    for extra in (b"\0", bytes(64), chunk):
        assert require_refused(mailbox, chunk + extra) is Verdict.CORRUPT


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"codec": 77}, "codec number 77"),
        ({"codec": 2}, "codec 2 is not"),
        ({"bits": 3}, "bits 3 is not"),
        ({"block": 64}, "block 64 is not 128"),
        ({"kept": 64}, "kept 64 is not 0"),
        ({"flags": 0x80}, "flags 128 is not"),
        ({"seed": 0xFFFFFFFF}, "seed 4294967295 is not"),
        ({"shape": (2, 8, 61)}, "shape"),
        ({"frame_bytes": 1 << 33}, "frame size"),
        ({"dtype": WireDtype.BFLOAT16}, "dtype"),
    ],
)
def test_another_layout_or_a_codec_of_the_future_is_refused(name: str, fields: dict[str, object], named: str) -> None:
    mailbox = open_mailbox(name)
    receipt = mailbox.offer(pack(*frame_of(name, **fields)))
    assert receipt.verdict is Verdict.REFUSED
    assert named in receipt.reason
    assert is_empty(mailbox)


@pytest.mark.parametrize("fields", [{"generation": 1}, {"step": 3}, {"generation": 0}])
def test_a_stale_frame_is_stale_whatever_its_codec(name: str, fields: dict[str, object]) -> None:
    mailbox = open_mailbox(name)
    for codec in (CODECS[name].code, 1, 5):
        assert require_refused(mailbox, pack(*frame_of(name, codec=codec, **fields))) is Verdict.STALE


def test_hostile_frames_take_no_memory_beyond_the_plans(name: str) -> None:
    mailbox = open_mailbox(name)
    header, payload = frame_of(name)
    generator = random.Random(2)
    forged = []
    for _ in range(300):
        sizes = {field: generator.choice([0, 1, 1 << 20, 1 << 33]) for field in ("frame_bytes", "offset")}
        number = {"num_chunks": generator.choice([1, 2, 1 << 31]), "microbatch": generator.randrange(1 << 20)}
        moment = {"generation": GENERATION + generator.randrange(3), "step": STEP + generator.randrange(5)}
        forged.append(pack(replace(header, **sizes, **number, **moment), payload))
    tracemalloc.start()
    for chunk in forged:
        mailbox.offer(chunk)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 * len(payload) + 200_000
    assert is_empty(mailbox)


def test_a_codec_that_begins_with_the_next_step_is_busy_until_then(name: str) -> None:
    mailbox = open_mailbox("none")
    chunk = pack(*frame_of(name, step=STEP + 1, seed=0))
    if CODECS[name].is_stochastic:
        seed = rounding_seed(RUN, STEP + 1, 0, Kind.ACTIVATION, 0)
        payload = CODECS[name].encode(torch.randn(SHAPE), seed).numpy().tobytes()
        chunk = pack(frame_of(name, step=STEP + 1, seed=seed, payload_crc=zlib.crc32(payload))[0], payload)
    assert mailbox.offer(chunk).verdict is Verdict.BUSY
    mailbox.open(GENERATION, STEP + 1, {Kind.ACTIVATION: name})
    assert mailbox.offer(chunk).verdict is Verdict.ACCEPTED
    assert not is_empty(mailbox)
