"""Traces of a link that is known: a queue of one server, as the meter takes links for, with what real ones add."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.link_meter import LinkMeter

# Bytes that TCP sends in its first round trip after a pause.
_FIRST_WINDOW_BYTES = 14_600


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A link in simulated time: rate at a time, delay of each way, and what makes readings of it hard."""

    rate_mbps: Callable[[float], float]
    delay_s: float
    # Receipts come later by up to this.
    jitter_s: float = 0.0
    # The peer answers a frame's last chunk only when the frame is decoded.
    decode_s: float = 0.0
    # TCP's window starts small after each pause of a round trip, and doubles with each.
    starts_slowly: bool = False


@dataclass(frozen=True, kw_only=True)
class Burst:
    """Frames that are there to send at a time, each cut into chunks of these sizes."""

    at_s: float
    frames: Sequence[Sequence[int]]


def even_chunks(frame_bytes: int, chunk_bytes: int) -> list[int]:
    """Return the sizes of a frame's chunks."""
    whole, rest = divmod(frame_bytes, chunk_bytes)
    return [chunk_bytes] * whole + [rest] * (rest > 0)


def play(meter: LinkMeter, wire: Wire, bursts: Sequence[Burst], *, window_bytes: int, seed: int = 1) -> float:
    """Send the bursts over the wire within a window, as a link does; return when the last receipt came."""
    rng = random.Random(seed)
    arrivals = deque((burst.at_s, size, n + 1 == len(frame))
                     for burst in bursts for frame in burst.frames for n, size in enumerate(frame))  # fmt: skip
    receipts: list[tuple[float, int, int, float]] = []
    under_way = number = 0
    now_s = free_s = last_s = 0.0
    ramp_s, ramp_bytes = 0.0, 0
    trip_s = 2 * wire.delay_s
    while arrivals or receipts:
        at_s, size, is_last = arrivals[0] if arrivals else (float("inf"), 0, False)
        if arrivals and at_s <= now_s and (not under_way or under_way + size <= window_bytes):
            arrivals.popleft()
            number += 1
            meter.pushed(number, size, now_s)
            under_way += size
            start_s = max(now_s, free_s)
            free_s = start_s + size * 8e-6 / wire.rate_mbps(start_s)
            if wire.starts_slowly:
                if start_s - last_s > trip_s:
                    ramp_s, ramp_bytes = start_s, 0
                ramp_bytes += size
                # After k round trips 2^(k+1) - 1 first windows are out.
                rounds, sent = 0, _FIRST_WINDOW_BYTES
                while sent < ramp_bytes:
                    rounds, sent = rounds + 1, 2 * sent + _FIRST_WINDOW_BYTES
                free_s = max(free_s, ramp_s + rounds * trip_s)
            held_s = wire.decode_s if is_last else 0.0
            heard_s = free_s + trip_s + held_s + rng.uniform(0, wire.jitter_s)
            heapq.heappush(receipts, (heard_s, number, size, held_s))
            last_s = free_s
            continue
        if receipts and (receipts[0][0] <= at_s or at_s <= now_s):
            now_s, settled, size, held_s = heapq.heappop(receipts)
            meter.settled(settled, now_s, held_s)
            under_way -= size
        else:
            now_s = max(now_s, at_s)
    return now_s
