"""Notes of when frames are made, sent, held up and read: a reading of the clock each, in whichever thread it happens.

    outbox thread   SendLog: encoding, encoded, pushed, answered, settled, block, unblock
    inbox threads   ArrivalLog: arrived
    compute thread  drain_times, once a step

Notes are kept by step, for frames of the next one may come while this one is under way. Memory is bounded: so many
frames a step, so many steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.frame import FrameHeader
from actors.frame_times import ArrivedFrame, BlockedBy, BlockedTime, FrameTimes, SentFrame
from actors.spec import Kind

# Of each link, and of each mailbox, in a step; what is more is not noted.
MOST_FRAMES = 4096
# The open one, one ahead, and one that failed.
_MOST_STEPS = 3
# Microseconds: what is finer would only make reports longer.
_DIGITS = 6

# (generation, step)
Moment = tuple[int, int]
_Entry = TypeVar("_Entry")


@dataclass(slots=True, eq=False)
class SendMark:
    """One frame's notes while it is on its way out, in the clock's own seconds."""

    # None: of an evaluation, which is not noted.
    moment: Moment | None
    is_gradient: bool
    microbatch: int
    encode_start_s: float
    encode_end_s: float = math.nan
    pushed_s: float = math.nan
    settled_s: float = math.nan
    wire_bytes: int = 0


class SendLog:
    """One link's notes, written by its outbox thread; `drain` may be called from another."""

    def __init__(self, target: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._target = target
        self._clock = clock
        self._lock = threading.Lock()
        self._marks: _ByStep[SendMark] = _ByStep()
        self._blocks: _ByStep[tuple[BlockedBy, float, float]] = _ByStep()
        # What holds the link up now: since when, and in which step.
        self._open: dict[BlockedBy, tuple[float, Moment]] = {}
        # Chunks that the peer did not let in yet.
        self._refused: set[int] = set()
        # Of the step that was drained last: when, its start, and its frames that were still on their way.
        self._drained: Moment | None = None
        self._drained_start_s = 0.0
        self._late: list[SendMark] = []

    def encoding(self, header: FrameHeader) -> SendMark:
        """Begin a frame's notes: it is encoded now."""
        is_noted = header.kind is not Kind.EVAL_ACTIVATION
        moment = (header.generation, header.step) if is_noted else None
        mark = SendMark(moment, header.kind is Kind.GRADIENT, header.microbatch, self._clock())
        if moment is not None:
            with self._lock:
                self._marks.add(moment, mark)
        return mark

    def encoded(self, mark: SendMark, wire_bytes: int) -> None:
        """Note that a frame is encoded and cut into chunks."""
        mark.wire_bytes = wire_bytes
        mark.encode_end_s = self._clock()

    def pushed(self, mark: SendMark) -> None:
        """Note that a chunk of this frame goes out; only the first one counts."""
        if math.isnan(mark.pushed_s):
            mark.pushed_s = self._clock()

    def answered(self, chunk: int, mark: SendMark, *, is_busy: bool) -> None:
        """Note whether the peer had room for a chunk."""
        if is_busy:
            self._refused.add(chunk)
            self.block("room", mark)
        elif chunk in self._refused:
            self._refused.discard(chunk)
            if not self._refused:
                self.unblock("room")

    def settled(self, mark: SendMark) -> None:
        """Note that the peer has the whole frame."""
        mark.settled_s = self._clock()

    def block(self, why: BlockedBy, mark: SendMark) -> None:
        """Note that this frame is held up from now on; nothing where the link is held up by that already."""
        if why not in self._open and mark.moment is not None:
            with self._lock:
                self._open[why] = self._clock(), mark.moment

    def unblock(self, why: BlockedBy) -> None:
        """Note that this holds the link up no more; nothing where it does not."""
        if why in self._open:
            with self._lock:
                start_s, moment = self._open.pop(why)
                self._blocks.add(moment, (why, start_s, self._clock()))

    def drop(self) -> None:
        """Note that the link gave up all that it had to send."""
        self._refused.clear()
        self.unblock("room")
        self.unblock("window")

    def drain(self, moment: Moment, start_s: float) -> tuple[FrameTimes, FrameTimes]:
        """Return a step's notes, and what came late of the step before; forget them and those of all steps before.

        Each in seconds from its own step's start, which for this one is `start_s`. Late is what was still on its way
        when the step before was drained; nothing where that was not the step before this one.
        """
        with self._lock:
            self._note_open()
            late_marks, late_blocks = self._late, []
            if self._drained is not None and self._drained < moment:
                # Some were not even encoded by then.
                late_marks = late_marks + self._marks.drain(self._drained)
                late_blocks = self._blocks.drain(self._drained)
            marks, blocks = self._marks.drain(moment), self._blocks.drain(moment)
        late = self._times(late_marks, late_blocks, self._drained_start_s)
        is_next = self._drained is not None and self._drained[1] + 1 == moment[1]
        self._late = [mark for mark in marks if math.isnan(mark.settled_s)]
        self._drained, self._drained_start_s = moment, start_s
        return self._times(marks, blocks, start_s), late if is_next else FrameTimes()

    def _note_open(self) -> None:
        """Cut what holds the link up in two: up to now, and what is to come; the lock is held."""
        now_s = self._clock()
        for why, (since_s, moment) in self._open.items():
            self._blocks.add(moment, (why, since_s, now_s))
            self._open[why] = now_s, moment

    def _times(
        self, marks: Sequence[SendMark], blocks: Sequence[tuple[BlockedBy, float, float]], start_s: float
    ) -> FrameTimes:
        sent = tuple(
            SentFrame(
                target_stage=self._target,
                is_gradient=mark.is_gradient,
                microbatch=mark.microbatch,
                encode_start_s=round(mark.encode_start_s - start_s, _DIGITS),
                encode_end_s=round(mark.encode_end_s - start_s, _DIGITS),
                pushed_s=round(mark.pushed_s - start_s, _DIGITS),
                settled_s=round(mark.settled_s - start_s, _DIGITS),
                wire_bytes=mark.wire_bytes,
            )
            for mark in marks
        )
        blocked = tuple(
            BlockedTime(
                target_stage=self._target,
                why=why,
                start_s=round(began_s - start_s, _DIGITS),
                end_s=round(ended_s - start_s, _DIGITS),
            )
            for why, began_s, ended_s in blocks
        )
        return FrameTimes(sent=sent, blocked=blocked)


class ArrivalLog:
    """One mailbox's notes, written by the threads that bring its frames; `drain` may be called from another."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        # For the mailbox, which holds when a frame's first chunk came.
        self.clock = clock
        self._lock = threading.Lock()
        self._arrived: _ByStep[tuple[FrameHeader, float, float, float]] = _ByStep()

    def arrived(self, header: FrameHeader, first_s: float, whole_s: float) -> None:
        """Note that a frame is decoded now, and when it began to come and was whole; `header` is any chunk's."""
        if header.kind is not Kind.EVAL_ACTIVATION:
            entry = header, first_s, whole_s, self.clock()
            with self._lock:
                self._arrived.add((header.generation, header.step), entry)

    def drain(self, moment: Moment, start_s: float) -> tuple[ArrivedFrame, ...]:
        """Return a step's notes, in seconds from `start_s`, and forget them and those of all steps before."""
        with self._lock:
            entries = self._arrived.drain(moment)
        return tuple(
            ArrivedFrame(
                source_stage=header.source,
                is_gradient=header.kind is Kind.GRADIENT,
                microbatch=header.microbatch,
                first_s=round(first_s - start_s, _DIGITS),
                whole_s=round(whole_s - start_s, _DIGITS),
                decoded_s=round(decoded_s - start_s, _DIGITS),
            )
            for header, first_s, whole_s, decoded_s in entries
        )


def drain_times(
    arrivals: ArrivalLog, links: Sequence[SendLog], moment: Moment, start_s: float
) -> tuple[FrameTimes, FrameTimes]:
    """Return all of a stage's notes of one step, and what came late of the step before, as `SendLog.drain` does."""
    drained = [log.drain(moment, start_s) for log in links]
    own = FrameTimes(
        sent=tuple(frame for times, _ in drained for frame in times.sent),
        arrived=arrivals.drain(moment, start_s),
        blocked=tuple(block for times, _ in drained for block in times.blocked),
    )
    late = FrameTimes(
        sent=tuple(frame for _, times in drained for frame in times.sent),
        blocked=tuple(block for _, times in drained for block in times.blocked),
    )
    return own, late


class _ByStep(Generic[_Entry]):
    """Entries of the few newest steps; whoever holds it holds a lock."""

    def __init__(self) -> None:
        self._entries: dict[Moment, list[_Entry]] = {}

    def add(self, moment: Moment, entry: _Entry) -> None:
        entries = self._entries.setdefault(moment, [])
        if len(entries) < MOST_FRAMES:
            entries.append(entry)
        while len(self._entries) > _MOST_STEPS:
            del self._entries[min(self._entries)]

    def drain(self, moment: Moment) -> list[_Entry]:
        """Return the entries of a step, and forget them and those of all before."""
        drained = self._entries.get(moment, [])
        self._entries = {key: entries for key, entries in self._entries.items() if key > moment}
        return drained
