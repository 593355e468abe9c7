"""Frames to one peer: encoded, cut into chunks, kept under way within a window, acknowledged, repeated where needed.

    compute thread -> send(tensor) -> [outbox thread: encode, split, push, collect receipts] -> Carrier -> peer

A `Carrier` is how bytes reach the peer; on a cluster it is a Ray actor call (`actors.node`), in tests a function. The
outbox thread owns all its state: sends, receipts and failures reach it as messages on one queue.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from actors.codecs import Codec
from actors.encoding import Encoder, mark_ready
from actors.errors import FrameUnexpected, IsthmusError, PeerLost, PeerTimeout, StageError
from actors.frame import FrameHeader, rounding_seed, run_id, split_frame, wire_bytes
from actors.frame_log import SendLog
from actors.mailbox import WIRE_DTYPES, Receipt, Verdict
from actors.outgoing import Answer, Frame, Pending, Send
from actors.patience import Patience
from actors.spec import CanaryReading, Kind, LinkCount, LinkReading, LinkSizes
from actors.tally import Tally

# How soon a chunk goes out again where the peer had no room, twice as long each time, and at most.
_BUSY_RETRY_S = 0.02
_MAX_BUSY_RETRY_S = 1.0
# The same where the chunk came damaged or not at all.
_ERROR_RETRY_S = 0.5
# After these a chunk need never go out again.
_SETTLED = (Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.STALE)


class Carrier(Protocol):
    """Takes one chunk to one peer."""

    peer: str

    def push(self, chunk: bytes) -> Future[Receipt]:
        """Start sending; the future gives the peer's receipt, or PeerLost, or any IsthmusError worth a repeat.

        What `push` itself raises is final.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """One direction from a stage to a neighbour, as the plan has it."""

    run: str
    source: int
    target: int
    # Until `resize` says otherwise.
    sizes: LinkSizes
    ack_s: float
    give_up_s: float
    # Steps from one frame that is compared with its raw tensor to the next; 0: none.
    canary_every: int = 0


class Link:
    """An outbox to one peer. `send` returns at once; `on_failure(generation, error)` is called from its thread."""

    def __init__(
        self, settings: LinkSettings, carrier: Carrier, on_failure: Callable[[int, IsthmusError], None]
    ) -> None:
        self._settings = settings
        self._sizes = settings.sizes
        self._carrier = carrier
        self._on_failure = on_failure
        self._run = run_id(settings.run)
        self._encoder = Encoder()
        # When frames were made, sent and held up.
        self.log = SendLog(settings.target)
        # None only wakes the thread.
        self._messages: queue.SimpleQueue[Send | Answer | None] = queue.SimpleQueue()
        self._waiting: deque[tuple[Frame, bytes]] = deque()
        self._pending: dict[int, Pending] = {}
        self._in_flight_bytes = 0
        self._num_chunks = 0
        self._num_pushed = 0
        self._patience = Patience(settings.ack_s, settings.give_up_s)
        self._generation = 0
        self._tally = Tally(settings.source, settings.target)
        self._is_closed = False
        # Guards the three below, which the compute thread looks at.
        self._room = threading.Condition()
        self._num_unsettled = 0
        self._num_canaries_due = 0
        self._broken: StageError | None = None
        self._thread = threading.Thread(target=self._loop, name=f"outbox-{settings.target}", daemon=True)
        self._thread.start()

    def send(
        self, tensor: torch.Tensor, codec: Codec, kind: Kind, *, generation: int, step: int, microbatch: int
    ) -> None:
        """Queue one boundary tensor; it must not change afterwards. Raises StageError once the outbox has broken."""
        dtype = WIRE_DTYPES[tensor.dtype]
        frame_bytes = codec.size_bytes(tensor.numel(), tensor.dtype)
        seed = 0
        if codec.is_stochastic:
            seed = rounding_seed(self._run, step, microbatch, kind, self._settings.source)
        header = FrameHeader(
            codec=codec.code,
            kind=kind,
            dtype=dtype,
            shape=tuple(tensor.shape),
            run=self._run,
            generation=generation,
            step=step,
            microbatch=microbatch,
            source=self._settings.source,
            target=self._settings.target,
            frame_bytes=frame_bytes,
            flags=codec.options.flags,
            bits=codec.options.bits,
            block=codec.options.block,
            kept=codec.options.kept,
            seed=seed,
        )
        with self._room:
            self._require_unbroken()
            self._num_unsettled += 1
            self._num_canaries_due += self._is_canary(header)
        chunk_bytes = self._sizes.chunk_bytes
        wire = wire_bytes(frame_bytes, chunk_bytes)
        self._tally.count(kind, num_frames=1, raw_bytes=tensor.numel() * tensor.element_size(), wire=wire)
        self._messages.put(Send(header, codec, tensor, mark_ready(tensor), chunk_bytes))

    def resize(self, sizes: LinkSizes) -> None:
        """Cut frames that are sent from now on into such chunks, with a window of so many bytes."""
        self._sizes = sizes

    def wait_for_room(self, max_frames: int, timeout_s: float) -> None:
        """Wait until fewer frames than `max_frames` are queued or under way; PeerTimeout names the peer."""
        with self._room:
            has_room = self._room.wait_for(
                lambda: self._num_unsettled < max_frames or self._broken is not None, timeout_s
            )
            self._require_unbroken()
            if not has_room:
                raise PeerTimeout(
                    f"{self._carrier.peer} left {self._num_unsettled} frames unacknowledged for {timeout_s:g} s",
                    "check that node and its link, or raise timeouts.frame_s",
                )

    def drain_counts(self) -> tuple[LinkCount, ...]:
        """Return what was sent since the last call, repeats included, and start from zero."""
        return self._tally.drain_counts()

    def drain_readings(self) -> tuple[LinkReading, ...]:
        """Return what the link was seen to do since the last call; nothing where nothing was acknowledged."""
        return self._tally.drain_readings()

    def drain_canaries(self, timeout_s: float) -> tuple[CanaryReading, ...]:
        """Return the comparisons of all that was sent since the last call, once they are made.

        Whoever judges a step must have them with that step, or codecs would change at another step in each run.
        Waits at most `timeout_s`: then PeerTimeout names the peer.
        """
        with self._room:
            is_read = self._room.wait_for(
                lambda: self._num_canaries_due == 0 or self._broken is not None or self._is_closed, timeout_s
            )
            self._require_unbroken()
            if not is_read:
                raise PeerTimeout(
                    f"frames to {self._carrier.peer} were not encoded within {timeout_s:g} s",
                    "see this node's log, or raise timeouts.frame_s",
                )
        return self._tally.drain_canaries()

    def close(self) -> None:
        """Stop sending; what is queued is dropped."""
        with self._room:
            self._is_closed = True
            self._room.notify_all()
        self._messages.put(None)
        self._thread.join(timeout=self._settings.ack_s)

    def _require_unbroken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _loop(self) -> None:
        try:
            message = self._next_message()
            while not self._is_closed:
                self._handle(message)
                message = self._next_message()
        except Exception as error:
            # A thread that dies in silence would leave the peer, and the step, to wait for their deadlines.
            broke = StageError(f"the outbox to {self._carrier.peer} broke: {error!r}", "see this node's log")
            with self._room:
                self._broken = broke
                self._room.notify_all()
            self._on_failure(self._generation, broke)
            raise

    def _handle(self, message: Send | Answer | None) -> None:
        canary = message if isinstance(message, Send) and self._is_canary(message.header) else None
        payload = None
        try:
            if isinstance(message, Send):
                payload = self._enqueue(message)
            elif isinstance(message, Answer):
                self._settle(message)
            self._repeat_due()
            self._fill_window()
            # Only now: what is compared is on its way.
            if canary is not None and payload is not None:
                self._read_canary(canary, payload)
        except IsthmusError as error:
            self._drop_all()
            self._on_failure(self._generation, error)
        finally:
            if canary is not None:
                self._settle_canary()

    def _next_message(self) -> Send | Answer | None:
        """Return the next message, or None when a chunk is due to be repeated, or the link was closed."""
        if not self._pending:
            return self._messages.get()
        due_s = min(pending.due_s for pending in self._pending.values()) - time.monotonic()
        try:
            return self._messages.get(timeout=max(0.0, due_s))
        except queue.Empty:
            return None

    def _enqueue(self, message: Send) -> memoryview:
        """Encode a frame and let its chunks wait; return the payload, which the next call overwrites."""
        if message.header.generation > self._generation:
            self._generation = message.header.generation
            self._drop_all()
            # Of a step that is run again: nobody was told of these, and each is made again.
            self._tally.forget_canaries()
        mark = self.log.encoding(message.header)
        payload = self._encoder.encode(message.codec, message.tensor, message.ready, message.header.seed)
        chunks = list(split_frame(message.header, payload, message.chunk_bytes))
        self.log.encoded(mark, sum(map(len, chunks)))
        frame = Frame(message.header.kind, len(chunks), mark)
        self._waiting.extend((frame, chunk) for chunk in chunks)
        return payload

    def _is_canary(self, header: FrameHeader) -> bool:
        every = self._settings.canary_every
        if header.kind is Kind.EVAL_ACTIVATION or header.microbatch:
            return False
        return every > 0 and header.step % every == 0

    def _read_canary(self, message: Send, payload: memoryview) -> None:
        """Compare a frame with its raw tensor, in this thread: compute goes on."""
        header = message.header
        relative_error, cosine = self._encoder.compare(message.codec, payload, message.tensor)
        reading = CanaryReading(
            source_stage=header.source,
            target_stage=header.target,
            kind=header.kind,
            step=header.step,
            codec=message.codec.name,
            relative_error=relative_error,
            cosine=cosine,
        )
        self._tally.canary(reading)

    def _settle_canary(self) -> None:
        with self._room:
            self._num_canaries_due -= 1
            self._room.notify_all()

    def _fill_window(self) -> None:
        """Push waiting chunks while the window has room; one may always be under way."""
        while self._waiting:
            frame, chunk = self._waiting[0]
            size = len(chunk)
            if self._in_flight_bytes and self._in_flight_bytes + size > self._sizes.window_bytes:
                self.log.block("window", frame.mark)
                return
            self._waiting.popleft()
            self.log.pushed(frame.mark)
            self._num_chunks += 1
            pending = self._pending[self._num_chunks] = Pending(frame, chunk, _BUSY_RETRY_S)
            self._in_flight_bytes += size
            self._push(self._num_chunks, pending)
        self.log.unblock("window")

    def _push(self, number: int, pending: Pending) -> None:
        self._num_pushed += 1
        now_s = time.monotonic()
        self._patience.begin(pending, self._num_pushed, now_s)
        attempt = pending.attempt
        if attempt > 1:
            self._tally.count(pending.frame.kind, wire=len(pending.chunk))
            self._tally.spoiled(number)
        else:
            self._tally.pushed(number, len(pending.chunk), now_s)

        def settled(future: Future[Receipt]) -> None:
            # Read here: the outbox may be busy with a frame.
            heard_s = time.monotonic()
            error = future.exception()
            if error is None:
                answer = future.result()
            elif isinstance(error, IsthmusError):
                answer = error
            else:
                answer = PeerLost(f"{self._carrier.peer} cannot be called: {error}")
            self._messages.put(Answer(number, attempt, answer, heard_s))

        self._carrier.push(pending.chunk).add_done_callback(settled)

    def _settle(self, message: Answer) -> None:
        """Act on a receipt: done, send again later, or fail."""
        pending = self._pending.get(message.chunk)
        if pending is None:
            return
        answer = message.answer
        is_busy = isinstance(answer, Receipt) and answer.verdict is Verdict.BUSY
        self.log.answered(message.chunk, pending.frame.mark, is_busy=is_busy)
        if isinstance(answer, Receipt):
            self._patience.heard(pending, self._pending.values(), message.heard_s)
        if isinstance(answer, Receipt) and answer.verdict is Verdict.REFUSED:
            raise FrameUnexpected(f"{self._carrier.peer} refused a frame: {answer.reason}")
        if isinstance(answer, Receipt) and answer.verdict in _SETTLED:
            self._tally.settled(message.chunk, message.heard_s, answer.held_s)
            self._finish(message.chunk, pending)
        elif pending.attempt == message.attempt:
            self._tally.spoiled(message.chunk)
            self._postpone(pending, answer)

    def _finish(self, number: int, pending: Pending) -> None:
        del self._pending[number]
        self._in_flight_bytes -= len(pending.chunk)
        pending.frame.chunks_left -= 1
        if pending.frame.chunks_left == 0:
            self.log.settled(pending.frame.mark)
            self._make_room(1)

    def _postpone(self, pending: Pending, answer: Receipt | IsthmusError) -> None:
        """Set when to send a chunk again, which its last attempt did not settle; raise where the peer is lost."""
        if isinstance(answer, PeerLost):
            raise answer
        pending.is_under_way = False
        now_s = time.monotonic()
        if isinstance(answer, IsthmusError) or answer.verdict is Verdict.CORRUPT:
            pending.trouble = answer.reason if isinstance(answer, Receipt) else str(answer)
            pending.due_s = now_s + _ERROR_RETRY_S
        else:
            # No room is the peer's own pace, not a fault: its clock starts anew.
            pending.give_up_s = now_s + self._settings.give_up_s
            pending.due_s = now_s + pending.busy_retry_s
            pending.busy_retry_s = min(2 * pending.busy_retry_s, _MAX_BUSY_RETRY_S)

    def _repeat_due(self) -> None:
        """Push again what was not acknowledged in time; give up on a peer that takes nothing for long."""
        now_s = time.monotonic()
        for number, pending in list(self._pending.items()):
            if pending.due_s > now_s:
                continue
            if now_s >= pending.give_up_s:
                raise PeerTimeout(
                    f"{self._carrier.peer} did not take a frame within {self._settings.give_up_s:g} s: "
                    f"{pending.trouble}",
                    "check that node and its link, or raise timeouts.frame_s",
                )
            self._push(number, pending)

    def _make_room(self, num_frames: int) -> None:
        with self._room:
            self._num_unsettled -= num_frames
            self._room.notify_all()

    def _drop_all(self) -> None:
        frames = {frame for frame, _ in self._waiting} | {pending.frame for pending in self._pending.values()}
        self._make_room(len(frames))
        self._waiting.clear()
        self._pending.clear()
        self._in_flight_bytes = 0
        self.log.drop()
        self._tally.forget_under_way()
