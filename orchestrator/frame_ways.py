"""The way of every frame of a step, on one clock: encoded, waiting for its link, carried, decoded; and what each took.

PURE. A link is taken for one that carries frames one after another: a frame's turn begins when it is encoded and the
frame before has left, and ends one delay before its last byte came. What of that is not needed to carry its bytes at
the link's rate was lost where the outbox says that it was held up: by a peer without room, or by a window smaller than
rate times round trip.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean

from actors.frame_times import ArrivedFrame, BlockedTime, SentFrame
from orchestrator.clocks import LinkFigures, frame_pairs, least_way_s
from orchestrator.records import StageRecord

# (source stage, target stage, whether it is a gradient, microbatch)
FrameKey = tuple[int, int, bool, int]


class Leg(Enum):
    """What a frame is held by."""

    CODEC = "codec"
    BUSY = "busy"
    DELAY = "delay"
    WINDOW = "window"
    ROOM = "room"


@dataclass(frozen=True)
class Stretch:
    """Some time of a frame's way, and the shares of it that each leg took."""

    start_s: float
    end_s: float
    shares: tuple[tuple[Leg, float], ...]


@dataclass(frozen=True, kw_only=True)
class FrameWay:
    """A frame from when it was made to when it was decoded; `stretches` leave no gap."""

    made_s: float
    decoded_s: float
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, kw_only=True)
class _Carried:
    """One frame on the common clock."""

    key: FrameKey
    made_s: float
    encode_start_s: float
    encode_end_s: float
    whole_s: float
    decoded_s: float
    wire_bytes: float


@dataclass(frozen=True, kw_only=True)
class FrameWays:
    """All frames of a step, and what each link, by (source, target), did all the time: its frames' turns, in order."""

    ways: Mapping[FrameKey, FrameWay]
    turns: Mapping[tuple[int, int], tuple[Stretch, ...]]


def frame_ways(
    stages: Sequence[StageRecord], starts: Mapping[int, float], figures: Mapping[tuple[int, int], LinkFigures]
) -> FrameWays:
    """Return the way of each frame that arrived in the step, in seconds on the clock that `starts` are on."""
    ways: dict[FrameKey, FrameWay] = {}
    turns: dict[tuple[int, int], tuple[Stretch, ...]] = {}
    for source in stages:
        for target in stages:
            pairs = list(frame_pairs(source, target))
            if not pairs:
                continue
            ends = source.stage, target.stage
            known = figures.get(ends)
            # The least way of all is taken for the delay.
            delay_s = least_way_s(source, target, known) + starts[target.stage] - starts[source.stage]
            delay_s = max(0.0, delay_s) if math.isfinite(delay_s) else 0.0
            blocked = _on_clock(source, target.stage, starts[source.stage])
            carried = _carried(source, target, pairs, starts)
            turns[ends] = _turns(carried, delay_s, blocked, known)
            ways |= {frame.key: _way(frame, delay_s, turns[ends]) for frame in carried}
    return FrameWays(ways=ways, turns=turns)


def _on_clock(source: StageRecord, target: int, start_s: float) -> list[tuple[str, float, float]]:
    def span(block: BlockedTime) -> tuple[str, float, float]:
        return block.why, block.start_s + start_s, block.end_s + start_s

    return sorted((span(b) for b in source.frames.blocked if b.target_stage == target), key=lambda each: each[1])


def _carried(
    source: StageRecord,
    target: StageRecord,
    pairs: Sequence[tuple[SentFrame | None, ArrivedFrame]],
    starts: Mapping[int, float],
) -> list[_Carried]:
    """Return a link's frames in the order they were encoded; of what was not noted yet, what others took on average."""
    here_s, there_s = starts[source.stage], starts[target.stage]
    made_s = {
        (action.name == "B", action.microbatch): action.end_s for action in source.actions if action.name in ("F", "B")
    }
    whole = [sent for sent, _ in pairs if sent is not None and not math.isnan(sent.encode_end_s)]
    mean_encode_s = fmean(s.encode_end_s - s.encode_start_s for s in whole) if whole else 0.0
    mean_bytes = fmean(s.wire_bytes for s in whole) if whole else 0.0
    carried: list[_Carried] = []
    for sent, arrived in pairs:
        made = made_s.get((arrived.is_gradient, arrived.microbatch))
        begun_s = sent.encode_start_s if sent else math.nan if made is None else made
        if math.isnan(begun_s):
            continue
        # On CUDA the outbox begins to wait for a tensor before it is computed.
        begun_s = begun_s if made is None else max(begun_s, made)
        is_encoded = sent is not None and not math.isnan(sent.encode_end_s)
        encoded_s = sent.encode_end_s if sent and is_encoded else begun_s + mean_encode_s
        # No frame came before it was made, whatever the clocks' estimate says.
        whole_s = max(arrived.whole_s + there_s, begun_s + here_s)
        carried.append(
            _Carried(
                key=(source.stage, target.stage, arrived.is_gradient, arrived.microbatch),
                made_s=min(begun_s if made is None else made, begun_s) + here_s,
                encode_start_s=begun_s + here_s,
                encode_end_s=min(max(encoded_s, begun_s) + here_s, whole_s),
                whole_s=whole_s,
                decoded_s=max(arrived.decoded_s + there_s, whole_s),
                wire_bytes=sent.wire_bytes if sent and is_encoded else mean_bytes,
            )
        )
    return sorted(carried, key=lambda frame: frame.encode_start_s)


def _turns(
    carried: Sequence[_Carried],
    delay_s: float,
    blocked: Sequence[tuple[str, float, float]],
    known: LinkFigures | None,
) -> tuple[Stretch, ...]:
    """Return the turns of one link's frames, each from the end of the one before or later."""
    turns: list[Stretch] = []
    for frame in carried:
        begun_s = max(frame.encode_end_s, turns[-1].end_s if turns else -math.inf)
        left_s = max(begun_s, frame.whole_s - delay_s)
        turns.append(Stretch(begun_s, left_s, _turn(begun_s, left_s, frame.wire_bytes, delay_s, blocked, known)))
    return tuple(turns)


def _way(frame: _Carried, delay_s: float, turns: Sequence[Stretch]) -> FrameWay:
    """Return the way of one frame: others' turns while it waits for its own are its own time too."""
    left_s = max(frame.encode_end_s, frame.whole_s - delay_s)
    waited: list[Stretch] = []
    first = bisect_right(turns, frame.encode_end_s, key=lambda turn: turn.end_s)
    for turn in turns[first:]:
        start_s, end_s = max(turn.start_s, frame.encode_end_s), min(turn.end_s, left_s)
        if turn.start_s >= left_s:
            break
        if end_s > start_s:
            waited.append(Stretch(start_s, end_s, turn.shares))
    codec, delay = ((Leg.CODEC, 1.0),), ((Leg.DELAY, 1.0),)
    return FrameWay(
        made_s=frame.made_s,
        decoded_s=frame.decoded_s,
        stretches=(
            Stretch(frame.made_s, frame.encode_end_s, codec),
            *waited,
            Stretch(left_s, frame.whole_s, delay),
            Stretch(frame.whole_s, frame.decoded_s, codec),
        ),
    )


def _turn(
    start_s: float,
    end_s: float,
    wire_bytes: float,
    delay_s: float,
    blocked: Sequence[tuple[str, float, float]],
    known: LinkFigures | None,
) -> tuple[tuple[Leg, float], ...]:
    """Return what a frame's turn on its link went into, as shares of it."""

    def held_s(why: str) -> float:
        return sum(max(0.0, min(end, end_s) - max(start, start_s)) for name, start, end in blocked if name == why)

    total_s = end_s - start_s
    if total_s <= 0:
        return ()
    room_s = min(total_s, held_s("room"))
    carry_s = known.carry_s(wire_bytes) if known else 0.0
    window_s = 0.0
    if known and carry_s and known.window_bytes > 0:
        # A window lets through no more than itself in each round trip.
        most_s = max(0.0, wire_bytes / known.window_bytes * 2 * delay_s - carry_s)
        window_s = max(0.0, min(held_s("window"), total_s - room_s - carry_s, most_s))
    legs = ((Leg.ROOM, room_s), (Leg.WINDOW, window_s), (Leg.BUSY, total_s - room_s - window_s))
    return tuple((leg, seconds / total_s) for leg, seconds in legs if seconds > 0)
