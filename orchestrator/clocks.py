"""When each stage began a step, on one common clock, told from nothing but the frames that the stages exchanged.

PURE. Each node's times start at its own start of the step, and nothing says how those starts lie to each other. As NTP
does, two neighbours are compared by the frames whose way was the shortest, in both directions: with x the start of b on
a's clock,

    a frame from a to b   came on a's clock at x + first,  not before it was pushed   so  x >= pushed - first
    a frame from b to a   was pushed at x + pushed,        not after it came          so  x <= first - pushed

The greatest lower and the least upper bound are of the fastest frames. What lies between them is their two ways there
and back: half of it for each, which holds where both take as long. What a frame's first chunk needs for its bytes is
taken out first, where the link's rate is known, and frames that found no room are passed over. A receipt is a way too,
from when the frame was decoded to when its sender heard so; of frames and receipts those are believed whose ways are
shorter. The error is half the difference of the two least delays; no clock of the machines counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.frame import HEADER_BYTES, even_chunk_bytes
from actors.frame_times import ArrivedFrame, SentFrame
from actors.spec import Plan
from orchestrator.records import StageRecord

# A frame whose chunks all came within this is taken for one of a single chunk.
_AT_ONCE_S = 1e-4
_BYTES_A_MEGABIT = 125_000
_MOST_S = 1e9


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """What is known of a link beforehand, the same both ways."""

    rate_mbps: float
    chunk_bytes: int
    window_bytes: int

    def carry_s(self, num_bytes: float) -> float:
        """Return how long so many bytes keep the link busy; 0 where its rate is not known."""
        bytes_per_s = self.rate_mbps * _BYTES_A_MEGABIT
        return num_bytes / bytes_per_s if 0 < bytes_per_s < math.inf else 0.0

    def first_chunk_bytes(self, frame_bytes: int) -> int:
        """Return how long the first chunk is of a frame that takes so many bytes, headers included."""
        return even_chunk_bytes(frame_bytes, self.chunk_bytes + HEADER_BYTES)


def is_time(seconds: float) -> bool:
    """Whether this is a number, and one that a clock may show: less than thirty years from the step's start."""
    return abs(seconds) < _MOST_S


def link_figures(plan: Plan | None) -> dict[tuple[int, int], LinkFigures]:
    """Return what a plan takes its links for, by (source, target), each both ways."""
    return {
        ends: LinkFigures(rate_mbps=link.rate_mbps, chunk_bytes=link.chunk_bytes, window_bytes=link.window_bytes)
        for link in (plan.links if plan else ())
        for ends in ((link.source_stage, link.target_stage), (link.target_stage, link.source_stage))
    }


def frame_pairs(source: StageRecord, target: StageRecord) -> Iterator[tuple[SentFrame | None, ArrivedFrame]]:
    """Yield what `target` noted of each frame from `source`, with what that noted of it, or None."""
    sent = {
        (frame.is_gradient, frame.microbatch): frame
        for frame in source.frames.sent
        if frame.target_stage == target.stage
    }
    for frame in target.frames.arrived:
        if frame.source_stage == source.stage:
            yield sent.get((frame.is_gradient, frame.microbatch)), frame


def step_starts(
    stages: Sequence[StageRecord], figures: Mapping[tuple[int, int], LinkFigures]
) -> dict[int, float] | None:
    """Return each stage's start, in seconds from the first stage's; None where no frames join them all."""
    by_stage = {stage.stage: stage for stage in stages}
    starts = {min(by_stage): 0.0} if by_stage else {}
    reached = list(starts)
    for a in reached:
        for b in sorted(_neighbours(by_stage[a]) & by_stage.keys() - starts.keys()):
            apart_s = _apart_s(by_stage[a], by_stage[b], figures.get((a, b)))
            if apart_s is not None:
                starts[b] = starts[a] + apart_s
                reached.append(b)
    return starts if len(starts) == len(by_stage) else None


def _neighbours(stage: StageRecord) -> set[int]:
    return {f.target_stage for f in stage.frames.sent} | {f.source_stage for f in stage.frames.arrived}


def least_way_s(source: StageRecord, target: StageRecord, figures: LinkFigures | None) -> float:
    """Return the least that anything took from one stage to another: `target`'s clock less `source`'s.

    Either a frame's first chunk, less what its bytes take, where the peer had room for it at once; or a receipt. inf
    where nothing tells.
    """
    return min(_least_frame_s(source, target, figures), _least_receipt_s(source, target))


def _apart_s(a: StageRecord, b: StageRecord, figures: LinkFigures | None) -> float | None:
    """Return the start of b on a's clock; None where nothing bounds it from either side."""
    low_s = -min(_least_raw_s(a, b), _least_receipt_s(a, b))
    high_s = min(_least_raw_s(b, a), _least_receipt_s(b, a))
    if not math.isfinite(low_s) or not math.isfinite(high_s):
        return None
    frames = _least_frame_s(a, b, figures), _least_frame_s(b, a, figures)
    receipts = _least_receipt_s(a, b), _least_receipt_s(b, a)
    # A frame one way and a receipt the other are less alike than two of a kind.
    alike = [pair for pair in (frames, receipts) if math.isfinite(sum(pair))]
    there_s, back_s = min(alike, key=sum) if alike else (-low_s, high_s)
    return max(low_s, min(high_s, (back_s - there_s) / 2))


def _least_raw_s(source: StageRecord, target: StageRecord) -> float:
    ways_s = (arrived.first_s - sent.pushed_s for sent, arrived in frame_pairs(source, target) if sent is not None)
    return min((way_s for way_s in ways_s if not math.isnan(way_s)), default=math.inf)


def _least_frame_s(source: StageRecord, target: StageRecord, figures: LinkFigures | None) -> float:
    """Return the least that a frame's first chunk took that found room at once, less what its bytes take."""
    held = [block for block in source.frames.blocked if block.why == "room" and block.target_stage == target.stage]
    least_s = math.inf
    for sent, arrived in frame_pairs(source, target):
        if sent is None or math.isnan(sent.pushed_s):
            continue
        settled_s = math.inf if math.isnan(sent.settled_s) else sent.settled_s
        if any(block.start_s < settled_s and block.end_s > sent.pushed_s for block in held):
            continue
        carry_s = 0.0
        if figures is not None:
            is_one_chunk = arrived.whole_s - arrived.first_s < _AT_ONCE_S
            chunk_bytes = sent.wire_bytes if is_one_chunk else figures.first_chunk_bytes(sent.wire_bytes)
            carry_s = figures.carry_s(chunk_bytes)
        least_s = min(least_s, arrived.first_s - sent.pushed_s - carry_s)
    return least_s


def _least_receipt_s(source: StageRecord, target: StageRecord) -> float:
    """Return the least that a receipt took from `source`, from when it had decoded a frame, to that frame's sender."""
    return min(
        (
            sent.settled_s - arrived.decoded_s
            for sent, arrived in frame_pairs(target, source)
            if sent is not None and not math.isnan(sent.settled_s)
        ),
        default=math.inf,
    )
