"""Where frames from peers wait for the schedule: checked, assembled, decoded, each taken once.

    peer -> offer(chunk) -> Receipt            any thread, any order, any number of times
    schedule -> take(kind, microbatch)         one thread, in microbatch order

Nothing but what the plan foresees gets in: an `Expectation` for each kind fixes sender, codec, dtype, shape and size.
Memory is bounded: of each kind there are at most `window` frames of the open step, from the next needed one on, and as
many of one step ahead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from actors.codecs import CODECS, Codec
from actors.codecs.protocol import CodecOptions
from actors.encoding import Arrival, Decoder
from actors.errors import FrameCorrupt, FrameUnexpected, IsthmusError, NonFinite, PeerTimeout, StepAborted
from actors.frame import FrameHeader, WireDtype, parse_chunk, rounding_seed, run_id
from actors.frame_log import ArrivalLog
from actors.settings import MIN_CHUNK_BYTES
from actors.spec import Kind

TORCH_DTYPES = {WireDtype.FLOAT32: torch.float32, WireDtype.BFLOAT16: torch.bfloat16}
WIRE_DTYPES = {dtype: wire for wire, dtype in TORCH_DTYPES.items()}


_CPU = torch.device("cpu")
# Every number that some codec of this release has.
_KNOWN_CODES = frozenset(codec.code for codec in CODECS.values())


class Verdict(Enum):
    """What became of a chunk."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    # Of a generation or step that has ended: never send it again.
    STALE = "stale"
    # No room yet: send it again a little later.
    BUSY = "busy"
    # Damaged on the way: send it again.
    CORRUPT = "corrupt"
    # Not what the plan foresees: the sender is wrong.
    REFUSED = "refused"


@dataclass(frozen=True)
class Receipt:
    """The answer to one chunk."""

    verdict: Verdict
    reason: str = ""
    # How long the chunk was looked at, and its frame decoded, before this answer: not the link's time.
    held_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The only frames of one kind that this node takes."""

    kind: Kind
    source: int
    codec: str
    dtype: WireDtype
    shape: tuple[int, ...]
    # How many microbatches beyond the next needed one may wait here.
    window: int

    @property
    def frame_bytes(self) -> int:
        return CODECS[self.codec].size_bytes(torch.Size(self.shape).numel(), TORCH_DTYPES[self.dtype])

    def codec_misfit(self, header: FrameHeader) -> str:
        """Say how a frame is not of this expectation's codec; empty where it is."""
        codec = CODECS[self.codec]
        theirs = (header.codec, header.frame_bytes, *_options(header), header.seed)
        ours = (codec.code, self.frame_bytes, *_options(codec.options), _seed(codec, header))
        names = ("codec", "frame size", "flags", "bits", "block", "kept", "seed")
        wrong = [f"{n} {a} is not {b}" for n, a, b in zip(names, theirs, ours, strict=True) if a != b]
        return f"a {header.kind.name} frame came whose {', '.join(wrong)}" if wrong else ""


def _options(form: FrameHeader | CodecOptions) -> tuple[int, ...]:
    return form.flags, form.bits, form.block, form.kept


def _seed(codec: Codec, header: FrameHeader) -> int:
    """Return the seed that a frame of this codec carries."""
    if not codec.is_stochastic:
        return 0
    return rounding_seed(header.run, header.step, header.microbatch, header.kind, header.source)


# (generation, step, kind, microbatch)
_Key = tuple[int, int, Kind, int]


@dataclass
class _Assembly:
    """One frame's bytes while its chunks come in."""

    payload: bytearray
    num_chunks: int
    # When the first of them came.
    first_s: float
    # (offset, size) of each chunk that is in, by its number.
    parts: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])

    @property
    def is_complete(self) -> bool:
        return len(self.parts) == self.num_chunks

    def covers_payload(self) -> bool:
        """Whether the parts follow one another without gap or overlap from the first byte to the last."""
        end = 0
        for offset, size in sorted(self.parts.values()):
            if offset != end:
                return False
            end += size
        return end == len(self.payload)


class Mailbox:
    """The frames that one stage awaits, of the current step and, where a peer is a little ahead, of the next."""

    def __init__(
        self,
        run: str,
        stage: int,
        num_microbatches: int,
        expectations: tuple[Expectation, ...],
        device: torch.device = _CPU,
    ) -> None:
        self._run = run_id(run)
        self._stage = stage
        self._num_microbatches = num_microbatches
        self._expected = {expectation.kind: expectation for expectation in expectations}
        self._decoder = Decoder(device)
        # When frames came and were decoded.
        self.log = ArrivalLog()
        self._changed = threading.Condition()
        self._generation = 0
        self._step = -1
        self._ended_generation = -1
        self._failure: IsthmusError | None = None
        self._taken: dict[Kind, int] = {}
        self._partial: dict[_Key, _Assembly] = {}
        # None while the payload is being decoded.
        self._ready: dict[_Key, Arrival | None] = {}

    @property
    def generation(self) -> int:
        """The generation of the step that is open."""
        return self._generation

    def open(
        self,
        generation: int,
        step: int,
        codecs: Mapping[Kind, str] | None = None,
        windows: Mapping[Kind, int] | None = None,
    ) -> None:
        """Begin a step: forget whatever belongs to earlier ones; from now on frames of `codecs` come, where given.

        `windows`: how many of each kind may wait from now on; what waits already stays.
        """
        with self._changed:
            for kind, codec in (codecs or {}).items():
                self._change_codec(kind, codec)
            for kind, expected in self._expected.items():
                self._expected[kind] = replace(expected, window=(windows or {}).get(kind, expected.window))
            if generation <= self._ended_generation:
                raise StepAborted(f"stage {self._stage}: generation {generation} has ended")
            if (generation, step) == (self._generation, self._step):
                return
            self._generation, self._step = generation, step
            self._failure = None
            self._taken = {}
            self._forget_before(generation, step)

    def abort(self, generation: int) -> None:
        """End every generation up to this one; whoever waits for its frames gets StepAborted."""
        with self._changed:
            self._ended_generation = max(self._ended_generation, generation)
            self._forget_before(self._ended_generation + 1, 0)
            self._changed.notify_all()

    def fail(self, generation: int, error: IsthmusError) -> None:
        """Make the open step fail: a link of this stage did, with frames of this generation; an old one matters not."""
        with self._changed:
            if generation >= self._generation:
                self._failure = error
                self._changed.notify_all()

    def offer(self, chunk: bytes | memoryview) -> Receipt:
        """Take one chunk from a peer; never raises for what the chunk holds."""
        try:
            header, payload = parse_chunk(chunk)
            self._require_expected(header)
        except FrameCorrupt as error:
            return Receipt(Verdict.CORRUPT, str(error))
        except FrameUnexpected as error:
            return Receipt(Verdict.REFUSED, str(error))
        key: _Key = (header.generation, header.step, header.kind, header.microbatch)
        with self._changed:
            receipt = self._admission(key, header)
            if receipt.verdict is not Verdict.ACCEPTED:
                return receipt
            assembly = self._partial.get(key)
            if assembly is None:
                assembly = _Assembly(bytearray(header.frame_bytes), header.num_chunks, self.log.clock())
                self._partial[key] = assembly
            assembly.payload[header.offset : header.offset + len(payload)] = payload
            assembly.parts[header.chunk] = (header.offset, len(payload))
            if not assembly.is_complete:
                return Receipt(Verdict.ACCEPTED)
            del self._partial[key]
            if not assembly.covers_payload():
                return Receipt(Verdict.REFUSED, f"the chunks of {_name(key)} overlap")
            self._ready[key] = None
            codec = CODECS[self._expected[header.kind].codec]
        return self._decode(key, header, codec, assembly)

    def take(self, kind: Kind, microbatch: int, *, timeout_s: float, monotonic: Callable[[], float]) -> torch.Tensor:
        """Return the decoded tensor of one microbatch, waiting for it at most `timeout_s`.

        Raises PeerTimeout naming the sender, StepAborted, or whatever made the step fail.
        """
        with self._changed:
            key = self._key(kind, microbatch)
            self._wait([key], timeout_s, monotonic)
            arrival = self._ready.pop(key)
            assert arrival is not None, "it was decoded"
            self._taken[kind] = microbatch + 1
        return arrival.use()

    def has(self, kind: Kind, microbatch: int) -> bool:
        """Return whether this microbatch's tensor is there to take; raises what made the step fail."""
        with self._changed:
            self._require_going()
            return self._ready.get(self._key(kind, microbatch)) is not None

    def wait_for_any(
        self, wanted: Sequence[tuple[Kind, int]], *, timeout_s: float, monotonic: Callable[[], float]
    ) -> None:
        """Wait until one of these is there to take; raises as `take` does."""
        with self._changed:
            self._wait([self._key(*each) for each in wanted], timeout_s, monotonic)

    def _key(self, kind: Kind, microbatch: int) -> _Key:
        return self._generation, self._step, kind, microbatch

    def _wait(self, keys: Sequence[_Key], timeout_s: float, monotonic: Callable[[], float]) -> None:
        """Wait until one of these frames is decoded; the lock is held."""
        deadline_s = monotonic() + timeout_s
        while all(self._ready.get(key) is None for key in keys):
            self._require_going()
            remaining_s = deadline_s - monotonic()
            if remaining_s <= 0:
                named = " and for ".join(f"{_name(key)} from stage {self._expected[key[2]].source}" for key in keys)
                raise PeerTimeout(
                    f"stage {self._stage} waited {timeout_s:.0f} s for {named}",
                    "check that node and its link, or raise timeouts.frame_s",
                )
            self._changed.wait(remaining_s)

    def _require_going(self) -> None:
        """Raise what made the open step fail, or StepAborted; the lock is held."""
        if self._generation <= self._ended_generation:
            raise StepAborted(f"stage {self._stage}: generation {self._generation} has ended")
        if self._failure is not None:
            raise self._failure

    def _change_codec(self, kind: Kind, codec: str) -> None:
        """Take frames of this kind in another codec; what has come in part is of the one before. The lock is held."""
        if codec != self._expected[kind].codec:
            self._expected[kind] = replace(self._expected[kind], codec=codec)
            self._partial = {key: assembly for key, assembly in self._partial.items() if key[2] is not kind}

    def _require_expected(self, header: FrameHeader) -> None:
        """Raise FrameUnexpected where the plan foresees no such frame."""
        expected = self._expected.get(header.kind)
        if expected is None:
            raise _unexpected(f"stage {self._stage} takes no {header.kind.name} frames")
        if header.codec not in _KNOWN_CODES:
            raise _unexpected(f"a frame of codec number {header.codec} came, which this release does not know")
        theirs = (header.run, header.target, header.source, header.dtype, header.shape)
        ours = (self._run, self._stage, expected.source, expected.dtype, expected.shape)
        if theirs != ours:
            names = ("run", "target", "source", "dtype", "shape")
            wrong = [f"{n} {a} is not {b}" for n, a, b in zip(names, theirs, ours, strict=True) if a != b]
            raise _unexpected(f"a {header.kind.name} frame came whose {', '.join(wrong)}")
        # An evaluation may have more microbatches than a step; the window bounds those.
        if header.kind is not Kind.EVAL_ACTIVATION and header.microbatch >= self._num_microbatches:
            raise _unexpected(f"microbatch {header.microbatch} came; the plan has {self._num_microbatches}")
        if header.num_chunks > header.frame_bytes // MIN_CHUNK_BYTES + 1:
            raise _unexpected(f"a frame of {header.frame_bytes} bytes came in {header.num_chunks} chunks")

    def _admission(self, key: _Key, header: FrameHeader) -> Receipt:
        """Return whether a chunk has its place here now."""
        generation, step, kind, microbatch = key
        moment, current = (generation, step), (self._generation, self._step)
        if generation <= self._ended_generation or moment < current:
            return Receipt(Verdict.STALE)
        expected = self._expected[kind]
        if misfit := expected.codec_misfit(header):
            # A step that is not open yet may begin another codec.
            return Receipt(Verdict.REFUSED if moment == current else Verdict.BUSY, misfit)
        next_needed = self._taken.get(kind, 0) if moment == current else 0
        if microbatch < next_needed or key in self._ready:
            return Receipt(Verdict.DUPLICATE)
        if microbatch >= next_needed + expected.window or step > self._step + 1:
            return Receipt(Verdict.BUSY)
        if moment != current and self._moments_ahead(kind) - {moment}:
            return Receipt(Verdict.BUSY)
        assembly = self._partial.get(key)
        if assembly is None:
            return Receipt(Verdict.ACCEPTED)
        if header.chunk in assembly.parts:
            return Receipt(Verdict.DUPLICATE)
        if header.num_chunks != assembly.num_chunks:
            both = f"{assembly.num_chunks} and in {header.num_chunks} chunks"
            return Receipt(Verdict.REFUSED, f"{_name(key)} came in {both}")
        return Receipt(Verdict.ACCEPTED)

    def _moments_ahead(self, kind: Kind) -> set[tuple[int, int]]:
        """Return the (generation, step) of the frames here that are ahead of the open step; the lock is held."""
        held = {key[:2] for key in (*self._partial, *self._ready) if key[2] is kind}
        return held - {(self._generation, self._step)}

    def _forget_before(self, generation: int, step: int) -> None:
        """Drop the frames of earlier steps; the lock is held."""
        self._partial = {key: a for key, a in self._partial.items() if key[:2] >= (generation, step)}
        self._ready = {key: t for key, t in self._ready.items() if key[:2] >= (generation, step)}

    def _decode(self, key: _Key, header: FrameHeader, codec: Codec, assembly: _Assembly) -> Receipt:
        """Decode outside the lock, so that other chunks come in meanwhile."""
        dtype = TORCH_DTYPES[header.dtype]
        whole_s = self.log.clock()
        try:
            arrival = self._decoder.decode(codec, assembly.payload, header.shape, dtype)
        except NonFinite:
            # The sender's values were not finite, and a codec that cannot carry them says so. The step goes on with
            # NaN, as it would with codec none, and is skipped by whoever judges it.
            arrival = Arrival(tensor=torch.full(header.shape, math.nan, dtype=dtype))
        except FrameCorrupt as error:
            # Every checksum of the chunks held, so it was sent like this: to repeat it would not help.
            with self._changed:
                self._ready.pop(key, None)
            return Receipt(Verdict.REFUSED, str(error))
        # Before anyone can take it: whoever does may report the step at once.
        self.log.arrived(header, assembly.first_s, whole_s)
        with self._changed:
            if key in self._ready:
                self._ready[key] = arrival
                self._changed.notify_all()
        return Receipt(Verdict.ACCEPTED)


def _name(key: _Key) -> str:
    generation, step, kind, microbatch = key
    return f"{kind.name} of microbatch {microbatch}, step {step}, generation {generation}"


def _unexpected(why: str) -> FrameUnexpected:
    return FrameUnexpected(why, "sender and receiver follow different plans: run the same release and run name")
