"""What a link does now, from the chunks that it carries anyway: pushes and receipts, no probes.

PURE: times are arguments. A link is taken for a queue of one server. Chunk i, of s_i bits, is pushed at p_i and its
receipt is here at a_i, the time that the peer took to answer not counted. With rate R and round trip D,

    a_i = max(p_i, a_(i-1) - D) + s_i / R + D

so chunks that wait for one another on the link are answered s_i / R apart, whatever D, and all others further apart
than that. A chunk has waited where it took longer than another one of its size or above took in the same time, by
15% of that: then others of ours were before it on the link, and not only on their way. A row of such chunks gives
R = (bits of the row after its first) / (time between its first and last receipt), and the rates of rows are put
together by their median, weighted by bytes.

A row claims nothing

- while it still gains speed (its second half is a quarter faster than its first: TCP after a pause), and a row too
  short to show that, unless its first chunk was as fast;
- where all rows together have less than 64 kB or 20 ms: there threads and timers are what is seen;
- where a chunk was refused for now, came damaged, or was sent again, which ends the row.

Then the link was not seen full, and what is known is a lower bound: bytes over the time from the first push to the last
receipt, the best of all rows; R is at least that. Where it is more than a quarter above what rows claim together, they
claim nothing either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# How much longer than its like a chunk took, as a part of that, if it waited on the link.
_WAITED_SHARE = 0.15
# A row gains speed where its second half is faster than its first by this; shorter rows do not show it.
_GAIN, _MIN_HALVED = 1.25, 5
# The first chunk of a short row had a rate of its own, delay included, of at least so much of the row's.
_FIRST_SHARE = 0.5
# A round trip is known where it is so much of a chunk's time on the link.
_MIN_TRIP_SHARE = 0.3
# The rates of rows together are at most so much below what the best of them shows to be the least.
_MOST_BELOW = 1.25
# Less is lost in what threads and timers add.
_MIN_BYTES, _MIN_SECONDS = 65_536, 0.02
# A sender that nobody asks for readings forgets all but so many chunks.
_MOST_CHUNKS = 65_536
_BITS_PER_MEGABIT = 1e6


@dataclass(frozen=True, kw_only=True)
class LinkState:
    """One direction of a link, as measured over some time."""

    # Where `is_measured`: the link's rate; else it is this at least.
    rate_mbps: float
    is_measured: bool
    # One way; at most this where the rate is not measured. NaN where chunks take so long on the link that it is lost in
    # how well the rate is known.
    delay_s: float
    # What was acknowledged in that time.
    num_bytes: int


@dataclass
class _Chunk:
    number: int
    size_bytes: int
    pushed_s: float
    heard_s: float = math.nan
    is_spoiled: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_spoiled or not math.isnan(self.heard_s)

    @property
    def took_s(self) -> float:
        return self.heard_s - self.pushed_s


class LinkMeter:
    """Listens to one sender; `drain` says what the link did since it was last asked."""

    def __init__(self) -> None:
        # In the order of the pushes, which is the order on the link.
        self._chunks: dict[int, _Chunk] = {}

    def pushed(self, number: int, size_bytes: int, now_s: float) -> None:
        """Note that a chunk goes out; numbers rise by one."""
        if len(self._chunks) >= _MOST_CHUNKS:
            del self._chunks[next(iter(self._chunks))]
        self._chunks[number] = _Chunk(number, size_bytes, now_s)

    def settled(self, number: int, heard_s: float, held_s: float) -> None:
        """Note that the peer took a chunk: when its receipt came, and how long the peer had it before it answered."""
        chunk = self._chunks.get(number)
        if chunk is not None and not chunk.is_over:
            chunk.heard_s = max(heard_s - held_s, chunk.pushed_s)

    def spoiled(self, number: int) -> None:
        """Note that a chunk says nothing of the link: it found no room, came damaged, or is sent again."""
        if number in self._chunks:
            self._chunks[number].is_spoiled = True

    def forget(self) -> None:
        """Drop what is under way: nobody waits for its receipts."""
        self._chunks = {number: chunk for number, chunk in self._chunks.items() if chunk.is_over}

    def drain(self) -> LinkState | None:
        """Return what is known of the time since the last call; None where nothing was acknowledged."""
        over = [chunk for chunk in self._chunks.values() if chunk.is_over]
        self._chunks = {number: chunk for number, chunk in self._chunks.items() if not chunk.is_over}
        heard = [chunk for chunk in over if not chunk.is_spoiled]
        if not heard:
            return None
        rows = list(_rows(over))
        at_least = max(_bits(row) / _seconds(row[0].pushed_s, row) for row in rows)
        usual_s = _usual_s(heard)
        claims = [claim for row in rows for claim in _claims(row, usual_s)]
        num_bits, seconds = sum(bits for bits, _ in claims), sum(seconds for _, seconds in claims)
        rate = _median_rate(claims)
        # Hosts that stop now and then let claims differ, and the best row of all is above their median. Much above:
        # they were made while something else than the link was slow.
        is_measured = num_bits >= 8 * _MIN_BYTES and seconds >= _MIN_SECONDS and _MOST_BELOW * rate >= at_least
        rate = max(rate, at_least) if is_measured else at_least
        quickest = min(heard, key=lambda chunk: chunk.took_s)
        own_s = 8 * quickest.size_bytes / rate if is_measured else 0.0
        trip_s = quickest.took_s - own_s
        if trip_s < _MIN_TRIP_SHARE * own_s:
            trip_s = math.nan
        return LinkState(
            rate_mbps=rate / _BITS_PER_MEGABIT,
            is_measured=is_measured,
            delay_s=trip_s / 2,
            num_bytes=sum(chunk.size_bytes for chunk in heard),
        )


_Row = Sequence[_Chunk]


def _rows(chunks: _Row) -> Iterator[_Row]:
    """Yield the longest rows of chunks in which each was pushed before the receipt of the one before was here."""
    row: list[_Chunk] = []
    for chunk in chunks:
        follows = bool(row) and chunk.number == row[-1].number + 1 and chunk.pushed_s < row[-1].heard_s
        if row and (chunk.is_spoiled or not follows):
            yield row
            row = []
        if not chunk.is_spoiled:
            row.append(chunk)
    if row:
        yield row


def _usual_s(heard: _Row) -> dict[int, float]:
    """Return for each size the least seconds that a chunk of that size or above took."""
    usual_s: dict[int, float] = {}
    least_s = math.inf
    for chunk in sorted(heard, key=lambda chunk: -chunk.size_bytes):
        least_s = min(least_s, chunk.took_s)
        usual_s[chunk.size_bytes] = least_s
    return usual_s


def _claims(row: _Row, usual_s: dict[int, float]) -> Iterator[tuple[float, float]]:
    """Yield bits and seconds of the parts of a row in which chunks waited for one another on the link."""
    part = [row[0]]
    for chunk in row[1:]:
        usual = usual_s[chunk.size_bytes]
        if chunk.took_s < (1 + _WAITED_SHARE) * usual:
            yield from _claim(part)
            part = []
        part.append(chunk)
    yield from _claim(part)


def _claim(part: _Row) -> Iterator[tuple[float, float]]:
    if len(part) < 2:
        return
    bits, seconds = _bits(part[1:]), _seconds(part[0].heard_s, part)
    if len(part) < _MIN_HALVED:
        first = part[0]
        if 8 * first.size_bytes * seconds >= _FIRST_SHARE * bits * first.took_s:
            yield bits, seconds
        return
    middle = len(part) // 2
    early, late = part[: middle + 1], part[middle:]
    rates = [_bits(half[1:]) / _seconds(half[0].heard_s, half) for half in (early, late)]
    if rates[1] <= _GAIN * rates[0]:
        yield bits, seconds


def _median_rate(claims: Sequence[tuple[float, float]]) -> float:
    """Return the rate that half of the bits were slower than; 0 where there are no claims."""
    ranked = sorted((bits / seconds, bits) for bits, seconds in claims)
    total, passed = sum(bits for _, bits in ranked), 0.0
    for rate, bits in ranked:
        passed += bits
        if 2 * passed >= total:
            return rate
    return 0.0


def _bits(row: _Row) -> float:
    return 8.0 * sum(chunk.size_bytes for chunk in row)


def _seconds(start_s: float, row: _Row) -> float:
    """Return the time up to the row's last receipt, which is never none: clocks have steps."""
    return max(row[-1].heard_s - start_s, 1e-6)
