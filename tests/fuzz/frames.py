"""Chunks of frames as a peer may send them, through a mailbox whose steps open, end and change codecs meanwhile."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch

from actors.codecs import CODECS
from actors.errors import FrameCorrupt, FrameUnexpected, PeerTimeout, StepAborted
from actors.frame import (
    HEADER_BYTES,
    FrameHeader,
    WireDtype,
    pack_chunk,
    parse_chunk,
    rounding_seed,
    run_id,
    split_frame,
)
from actors.mailbox import TORCH_DTYPES, Expectation, Mailbox
from actors.settings import MIN_CHUNK_BYTES
from actors.spec import Kind, TensorRole
from tests.fuzz.choices import Choices, patch
from tests.fuzz.payloads import good_payload, reseal

_RUN, _STAGE, _NUM_MICROBATCHES, _WINDOW = "demo", 1, 6, 2
# Not a multiple of any block; up to ten of the smallest chunks.
_SHAPE = (3, 16, 50)
_NUM_ELEMENTS = 2400
_SOURCES = {Kind.ACTIVATION: 0, Kind.GRADIENT: 2, Kind.EVAL_ACTIVATION: 0}
_DTYPES = {
    Kind.ACTIVATION: WireDtype.FLOAT32,
    Kind.GRADIENT: WireDtype.BFLOAT16,
    Kind.EVAL_ACTIVATION: WireDtype.FLOAT32,
}
_KINDS = tuple(Kind)
_CODECS = tuple(name for name, codec in CODECS.items() if TensorRole.ACTIVATION in codec.roles)
# These carry what is not finite, element by element.
_EXACT = {"none", "bf16"}
_CHUNK_BYTES = (MIN_CHUNK_BYTES, 1500, 1 << 20)
_SCALES = (1.0, float("nan"), 1e36)
# Of one session: more would take long, and show what less does.
_MAX_STEPS = 20


def check(data: bytes, mailbox_type: type[Mailbox] = Mailbox) -> None:
    """Do with a mailbox what the input says, and check after each step what must hold."""
    choices = Choices(data)
    session = _Session(mailbox_type, choices.pick(_CODECS))
    for _ in range(_MAX_STEPS):
        if choices.are_over:
            break
        choices.pick(_STEPS)(session, choices)
        session.require_bounded()


class _Session:
    """A mailbox, and how far its stage is."""

    def __init__(self, mailbox_type: type[Mailbox], codec: str) -> None:
        expected = tuple(
            Expectation(
                kind=kind, source=_SOURCES[kind], codec=codec, dtype=_DTYPES[kind], shape=_SHAPE, window=_WINDOW
            )
            for kind in _KINDS
        )
        self.mailbox = mailbox_type(_RUN, _STAGE, _NUM_MICROBATCHES, expected)
        self.generation, self.step = 1, 4
        self.mailbox.open(self.generation, self.step)
        self.codecs = dict.fromkeys(_KINDS, codec)
        # The codecs that frames of a kind may have come in.
        self.used = {kind: {codec} for kind in _KINDS}
        self.next_microbatch = dict.fromkeys(_KINDS, 0)

    def open(self, generations: int, steps: int, codecs: dict[Kind, str]) -> None:
        """Begin a step that is so much further on, or the same one again."""
        self.codecs |= codecs
        for kind, codec in codecs.items():
            self.used[kind].add(codec)
        try:
            self.mailbox.open(self.generation + generations, self.step + steps, codecs)
        except StepAborted:
            return
        if generations or steps:
            self.generation, self.step = self.generation + generations, self.step + steps
            self.next_microbatch = dict.fromkeys(_KINDS, 0)

    def offer(self, chunk: bytes) -> None:
        """Offer bytes; what the parser takes must be just what the header's fields say again."""
        with suppress(FrameCorrupt, FrameUnexpected):
            assert pack_chunk(*parse_chunk(chunk)) == chunk
        self.mailbox.offer(chunk)

    def take(self, kind: Kind) -> None:
        """Take the next microbatch's tensor, where it is there."""
        try:
            tensor = self.mailbox.take(kind, self.next_microbatch[kind], timeout_s=0.0, monotonic=lambda: 0.0)
        except (PeerTimeout, StepAborted):
            return
        self.next_microbatch[kind] += 1
        assert (tuple(tensor.shape), tensor.dtype) == (_SHAPE, TORCH_DTYPES[_DTYPES[kind]])
        if not self.used[kind] & _EXACT:
            assert tensor.isfinite().all() or tensor.isnan().all(), "a tensor is neither finite nor refused as a whole"

    def header(self, kind: Kind, codec: str, microbatch: int, generation: int, step: int, size: int) -> FrameHeader:
        """Return the header of a good frame."""
        options, run, source = CODECS[codec].options, run_id(_RUN), _SOURCES[kind]
        return FrameHeader(
            codec=CODECS[codec].code,
            kind=kind,
            dtype=_DTYPES[kind],
            shape=_SHAPE,
            run=run,
            generation=generation,
            step=step,
            microbatch=microbatch,
            source=source,
            target=_STAGE,
            frame_bytes=size,
            flags=options.flags,
            bits=options.bits,
            block=options.block,
            kept=options.kept,
            seed=rounding_seed(run, step, microbatch, kind, source) if CODECS[codec].is_stochastic else 0,
        )

    def require_bounded(self) -> None:
        """Require that no more waits than the plan allows: of each kind a window of frames, of two steps."""
        partial, ready = self.mailbox._partial, self.mailbox._ready
        of_step = Counter(key[:3] for key in (*partial, *ready))
        assert max(of_step.values(), default=0) <= _WINDOW, f"more frames wait than the window has: {of_step}"
        num_steps = Counter(kind for _, _, kind in of_step)
        assert max(num_steps.values(), default=0) <= 2, f"frames of more than two steps wait: {of_step}"
        most_bytes = max(CODECS[codec].size_bytes(_NUM_ELEMENTS, torch.float32) for codec in _CODECS)
        for assembly in partial.values():
            assert len(assembly.payload) <= most_bytes, f"a frame takes {len(assembly.payload)} bytes"
            assert len(assembly.parts) <= most_bytes // MIN_CHUNK_BYTES + 1, f"a frame has {len(assembly.parts)} parts"
        for arrival in filter(None, ready.values()):
            assert arrival.tensor.numel() == _NUM_ELEMENTS


def _send_frame(session: _Session, choices: Choices) -> None:
    """Send a good frame, its payload and one chunk's header patched as chosen, perhaps without one of its chunks."""
    kind = choices.pick(_KINDS)
    codec = choices.pick((session.codecs[kind], *_CODECS))
    microbatch = session.next_microbatch[kind] + choices.pick((0, 1, 2, 255))
    generation = max(0, session.generation + choices.pick((0, 1, -1)))
    step = max(0, session.step + choices.pick((0, 1, 2, -1)))
    good = good_payload(codec, _NUM_ELEMENTS, TORCH_DTYPES[_DTYPES[kind]], choices.pick(_SCALES))
    payload = bytearray(good)
    patch(payload, choices)
    if choices.number() % 2 == 0 and payload != good:
        reseal(payload, CODECS[codec], _NUM_ELEMENTS)
    header = session.header(kind, codec, microbatch, generation, step, len(payload))
    chunks = list(split_frame(header, memoryview(payload), choices.pick(_CHUNK_BYTES)))
    # Of the latter two 0 means none, else they count from 1.
    first, missing, patched = choices.number(), choices.number(), choices.number()
    for turn in range(len(chunks)):
        at = (first + turn) % len(chunks)
        if at + 1 == missing:
            continue
        session.offer(_forged(chunks[at], choices) if at + 1 == patched else chunks[at])


def _forged(chunk: bytes, choices: Choices) -> bytes:
    """Return the chunk with its header patched and, mostly, its checksums right again."""
    body, payload = bytearray(chunk[: HEADER_BYTES - 4]), chunk[HEADER_BYTES:]
    patch(body, choices)
    crc = choices.number(4) if choices.number() % 8 == 7 else zlib.crc32(body)
    return bytes(body) + struct.pack("<I", crc) + payload


def _send_any_part(session: _Session, choices: Choices) -> None:
    """Send a chunk that says of itself whatever is chosen, its checksums right."""
    kind = choices.pick(_KINDS)
    size = CODECS[session.codecs[kind]].size_bytes(_NUM_ELEMENTS, TORCH_DTYPES[_DTYPES[kind]])
    payload = bytes(choices.number(2) % (size + 1))
    microbatch = session.next_microbatch[kind] + choices.number() % 3
    header = session.header(kind, session.codecs[kind], microbatch, session.generation, session.step, size)
    chunk, num_chunks, offset = choices.number() % 16, choices.number() % 16 + 1, choices.number(2) % (size + 1)
    part = replace(header, chunk=chunk, num_chunks=num_chunks, offset=offset)
    part = replace(part, payload_bytes=len(payload), payload_crc=zlib.crc32(payload))
    session.offer(pack_chunk(part, memoryview(payload)))


def _send_bytes(session: _Session, choices: Choices) -> None:
    session.offer(choices.take(choices.number(2)))


def _take(session: _Session, choices: Choices) -> None:
    session.take(choices.pick(_KINDS))


def _open(session: _Session, choices: Choices) -> None:
    generations, steps = choices.pick((0, 1)), choices.pick((1, 0, 2))
    codecs = {choices.pick(_KINDS): choices.pick(_CODECS) for _ in range(choices.number() % 3)}
    session.open(generations, steps, codecs)


def _abort(session: _Session, choices: Choices) -> None:
    session.mailbox.abort(session.generation - choices.number() % 2)


_STEPS = (_send_frame, _take, _send_any_part, _open, _send_bytes, _abort)


def seeds() -> Iterator[bytes]:
    """Yield sessions of each codec: frames of this step and the next, patched, in other codecs, not finite."""
    for codec in range(len(_CODECS)):
        start, take, open_next = bytes([codec]), bytes([1, 0]), bytes([3, 0, 0, 0])
        yield start + _sent() + take + _sent(microbatch=1, first=1) + _sent(microbatch=2) + take
        yield start + _sent(kind=1) + bytes([1, 1]) + _sent(kind=2) + bytes([1, 2])
        yield start + _sent(step=1) + open_next + take + bytes([5, 0]) + _sent(generation=1)
        yield start + _sent(scale=1) + take + _sent(scale=2, chunk_bytes=2) + take
        yield start + bytes([3, 0, 0, 1, 0, (codec + 1) % len(_CODECS)]) + _sent() + take
        yield start + _sent(missing=1) + bytes([2, 0, 0, 4, 0, 0, 1, 0, 0]) + take
        # One patch of one byte in the payload; one of a byte in the header of the only chunk.
        yield start + _sent(payload_patch=bytes([1, 200, 0, 0, 0x55])) + take
        yield start + _sent(chunk_bytes=2, patched=1) + bytes([1, 8, 0, 0, 1]) + take
    session = _Session(Mailbox, "q8")
    payload = good_payload("q8", _NUM_ELEMENTS, torch.float32, 1.0)
    header = session.header(Kind.ACTIVATION, "q8", 0, session.generation, session.step, len(payload))
    [chunk] = split_frame(header, memoryview(payload), len(payload))
    yield bytes([_CODECS.index("q8"), 4]) + struct.pack("<H", len(chunk)) + chunk + bytes([1, 0])


def _sent(
    *,
    kind: int = 0,
    microbatch: int = 0,
    generation: int = 0,
    step: int = 0,
    scale: int = 0,
    payload_patch: bytes = b"\0",
    chunk_bytes: int = 0,
    first: int = 0,
    missing: int = 0,
    patched: int = 0,
) -> bytes:
    """Return the choices of one `_send_frame`, in its order."""
    frame = bytes([0, kind, 0, microbatch, generation, step, scale])
    return frame + payload_patch + bytes([0, chunk_bytes, first, missing, patched])
