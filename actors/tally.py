"""What one outbox has to tell: counts of what it sent, canaries, and readings of its link.

Two threads use it: the outbox notes, the compute thread drains at the end of a step.
"""

from __future__ import annotations

import threading

from actors.link_meter import LinkMeter
from actors.spec import CanaryReading, Kind, LinkCount, LinkReading


class Tally:
    """The notes of one direction of a link."""

    def __init__(self, source_stage: int, target_stage: int) -> None:
        self._source, self._target = source_stage, target_stage
        self._lock = threading.Lock()
        self._counts: dict[Kind, list[int]] = {}
        self._canaries: list[CanaryReading] = []
        self._meter = LinkMeter()

    def count(self, kind: Kind, *, num_frames: int = 0, raw_bytes: int = 0, wire: int = 0) -> None:
        with self._lock:
            total = self._counts.setdefault(kind, [0, 0, 0])
            for index, amount in enumerate((num_frames, raw_bytes, wire)):
                total[index] += amount

    def pushed(self, chunk: int, size_bytes: int, now_s: float) -> None:
        with self._lock:
            self._meter.pushed(chunk, size_bytes, now_s)

    def settled(self, chunk: int, heard_s: float, held_s: float) -> None:
        with self._lock:
            self._meter.settled(chunk, heard_s, held_s)

    def spoiled(self, chunk: int) -> None:
        with self._lock:
            self._meter.spoiled(chunk)

    def forget_under_way(self) -> None:
        with self._lock:
            self._meter.forget()

    def canary(self, reading: CanaryReading) -> None:
        with self._lock:
            self._canaries.append(reading)

    def forget_canaries(self) -> None:
        with self._lock:
            self._canaries.clear()

    def drain_counts(self) -> tuple[LinkCount, ...]:
        """Return what was sent since the last call, repeats included, and start from zero."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return tuple(
            LinkCount(
                source_stage=self._source,
                target_stage=self._target,
                kind=kind,
                num_frames=num_frames,
                raw_bytes=raw_bytes,
                wire_bytes=wire,
            )
            for kind, (num_frames, raw_bytes, wire) in counts.items()
        )

    def drain_canaries(self) -> tuple[CanaryReading, ...]:
        """Return the canaries since the last call."""
        with self._lock:
            canaries, self._canaries = self._canaries, []
        return tuple(canaries)

    def drain_readings(self) -> tuple[LinkReading, ...]:
        """Return what the link was seen to do since the last call; nothing where nothing was acknowledged."""
        with self._lock:
            state = self._meter.drain()
        if state is None:
            return ()
        return (
            LinkReading(
                source_stage=self._source,
                target_stage=self._target,
                rate_mbps=state.rate_mbps,
                is_measured=state.is_measured,
                delay_s=state.delay_s,
                num_bytes=state.num_bytes,
            ),
        )
