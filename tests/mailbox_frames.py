"""A mailbox in the middle of a step, and the frames that come to it."""

import time
import zlib
from dataclasses import replace

import torch

from actors.codecs import CODECS
from actors.errors import PeerTimeout
from actors.frame import FrameHeader, WireDtype, pack_chunk, run_id, split_frame
from actors.mailbox import Expectation, Mailbox, Verdict
from actors.spec import Kind

STAGE, BEFORE, AFTER, NUM_MICROBATCHES, WINDOW = 1, 0, 2, 6, 2
# 4 KiB of float32: large enough to be cut into chunks.
SHAPE = (2, 16, 32)
CHUNK_BYTES = 1024


def expectation(kind: Kind, source: int, **fields: object) -> Expectation:
    base = Expectation(kind=kind, source=source, codec="none", dtype=WireDtype.FLOAT32, shape=SHAPE, window=WINDOW)
    return replace(base, **fields)


EXPECTED = (
    expectation(Kind.ACTIVATION, BEFORE),
    expectation(Kind.GRADIENT, AFTER),
    expectation(Kind.EVAL_ACTIVATION, BEFORE),
)


def open_box() -> Mailbox:
    """One that has step 4 open, in generation 2."""
    box = Mailbox("demo", STAGE, NUM_MICROBATCHES, EXPECTED)
    box.open(2, 4)
    return box


def tensor_of(microbatch: int, step: int = 4, kind: Kind = Kind.ACTIVATION) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * step + 10 * microbatch + kind)
    return torch.randn(SHAPE, generator=generator)


def header_of(microbatch: int = 0, *, step: int = 4, kind: Kind = Kind.ACTIVATION, **fields: object) -> FrameHeader:
    base = FrameHeader(
        codec=CODECS["none"].code,
        kind=kind,
        dtype=WireDtype.FLOAT32,
        shape=SHAPE,
        run=run_id("demo"),
        generation=2,
        step=step,
        microbatch=microbatch,
        source=AFTER if kind is Kind.GRADIENT else BEFORE,
        target=STAGE,
        frame_bytes=4096,
    )
    return replace(base, **fields)


def chunks_of(header: FrameHeader, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    tensor = tensor_of(header.microbatch, header.step, header.kind)
    return list(split_frame(header, memoryview(CODECS["none"].encode(tensor, seed=0).numpy()), chunk_bytes))


def forge(header: FrameHeader) -> bytes:
    """The chunk of zeros that this header describes, its checksums right."""
    payload = bytes(header.payload_bytes)
    return pack_chunk(replace(header, payload_crc=zlib.crc32(payload)), memoryview(payload))


def offer_all(mailbox: Mailbox, header: FrameHeader) -> list[Verdict]:
    return [mailbox.offer(chunk).verdict for chunk in chunks_of(header)]


def take_now(mailbox: Mailbox, microbatch: int, kind: Kind = Kind.ACTIVATION) -> torch.Tensor:
    return mailbox.take(kind, microbatch, timeout_s=0.0, monotonic=time.monotonic)


def waits_for(mailbox: Mailbox, microbatch: int) -> bool:
    """Whether nothing can be taken yet."""
    try:
        take_now(mailbox, microbatch)
    except PeerTimeout:
        return True
    return False


ACCEPTED = [Verdict.ACCEPTED] * 4
