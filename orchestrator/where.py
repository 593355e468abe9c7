"""Where the time of a step went, for each stage: compute, commit, and every wait by its cause.

PURE. A stage that waits for a frame waits for whatever that frame is held by at that moment: the codec, its link, or
the stage that has not made it yet; and where that stage waits too, for whatever holds up the frame that it waits for.
So each moment of each wait is followed to the one place where something goes on.

What is waited for while another stage computes is one of three. The pipeline fills (until a stage has its first
activation and its first gradient) and drains (after its last forward, as long as the last stage still has forwards of
its own between two gradients, and after its last action). The other stage has more to compute in a step than the one
that waits: a slower stage. Or neither: then a link is full, or the one that waits would have more to do with more
microbatches in flight.

The step as the driver sees it begins with its order and ends with the last report; what of it is on no stage's clock is
the driver's round trip.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from actors.spec import COMPUTES, WAITS, ActionTime
from orchestrator.causes import Cause, Part, Place, StageTime
from orchestrator.clocks import LinkFigures, is_time, step_starts
from orchestrator.frame_ways import FrameKey, FrameWays, Leg, Stretch, frame_ways
from orchestrator.records import StageRecord, StepRecord

# Longer chains of stages that wait for one another are clocks that do not fit.
_MOST_TURNS = 64
_TIMELINE_STEPS = 5
# A link is full where frames follow one another for this share of the time, and there are some.
_FULL_SHARE, _FEWEST_TURNS = 0.9, 3
# What is noted is rounded to microseconds.
_CLOCK_DIGITS_S = 1e-5


_COMPUTES = {"F": Cause.FORWARD, "B": Cause.BACKWARD, "W": Cause.WEIGHTS, "C": Cause.COMMIT}
_LEGS = {
    Leg.CODEC: Cause.CODEC,
    Leg.BUSY: Cause.BUSY,
    Leg.DELAY: Cause.DELAY,
    Leg.WINDOW: Cause.WINDOW,
    Leg.ROOM: Cause.ROOM,
}


def where_time_went(
    steps: Sequence[StepRecord], figures: Mapping[tuple[int, int], LinkFigures]
) -> tuple[StageTime, ...]:
    """Return where the time of these steps went, stage by stage; nothing where no step has what it takes to tell.

    `figures`: what is known of the links beforehand; without it a link that is held up by its window counts as busy.
    """
    totals: dict[int, dict[tuple[Cause, Place], float]] = defaultdict(lambda: defaultdict(float))
    num_steps: dict[int, int] = defaultdict(int)
    num_on_node: dict[int, int] = {}
    for record in steps:
        starts = step_starts(record.stages, figures) if _can_tell(record) else None
        if starts is None:
            continue
        step = _Step(record, starts, frame_ways(record.stages, starts, figures))
        num_on_node |= {stage: len(node) for stage, node in _nodes(record)}
        for stage in record.stages:
            num_steps[stage.stage] += 1
            for cause, place, seconds in step.parts(stage.stage):
                totals[stage.stage][cause, place] += seconds
    return tuple(
        StageTime(
            stage=stage,
            num_steps=num_steps[stage],
            num_on_node=num_on_node[stage],
            parts=tuple(
                Part(cause=cause, place=place, seconds=seconds)
                for (cause, place), seconds in sorted(totals[stage].items(), key=lambda item: -item[1])
                if seconds > 0
            ),
        )
        for stage in sorted(totals)
    )


def telling_steps(steps: Iterable[StepRecord]) -> tuple[StepRecord, ...]:
    """Return the last few steps that tell where their time went, without the run's first where there are others."""
    telling = {record.step: record for record in steps if _can_tell(record)}
    if len(telling) > 1:
        # It warms up what later ones find warm.
        telling.pop(0, None)
    return tuple(telling[step] for step in sorted(telling))[-_TIMELINE_STEPS:]


def _can_tell(record: StepRecord) -> bool:
    """Whether a step has one node for each stage, each with its own clock's step, and times that are numbers."""
    stages = record.stages
    if record.is_simulated or not stages or len({stage.stage for stage in stages}) < len(stages):
        return False
    if len(stages) > 1 and not all(stage.frames.arrived for stage in stages):
        return False
    seconds = [record.step_s]
    for stage in stages:
        seconds.append(math.nan if stage.step_s is None else stage.step_s)
        seconds += [t for action in stage.actions for t in (action.start_s, action.end_s)]
        sent = [t for f in stage.frames.sent for t in (f.encode_start_s, f.encode_end_s, f.pushed_s, f.settled_s)]
        # What had not happened yet is not a number, and need not be.
        seconds += [t for t in sent if not math.isnan(t)]
        seconds += [t for frame in stage.frames.arrived for t in (frame.first_s, frame.whole_s, frame.decoded_s)]
        seconds += [t for block in stage.frames.blocked for t in (block.start_s, block.end_s)]
    return all(map(is_time, seconds))


@dataclass(frozen=True)
class _Piece:
    """Some time in which a stage did one thing, on the common clock."""

    start_s: float
    end_s: float
    stage: int
    action: ActionTime


class _Step:
    """One step on one clock, and what each moment of it is due to."""

    def __init__(self, record: StepRecord, starts: Mapping[int, float], ways: FrameWays) -> None:
        self._ways = ways.ways
        self._full = _fullest(ways.turns)
        self._starts = starts
        self._ends = {stage.stage: starts[stage.stage] + (stage.step_s or 0.0) for stage in record.stages}
        self._pieces = {
            stage.stage: _pieces(stage, starts[stage.stage], self._ends[stage.stage]) for stage in record.stages
        }
        # With what the stage's node does for other stages meanwhile.
        self._on_node = {stage: _merged(self._pieces[other] for other in node) for stage, node in _nodes(record)}
        self._compute_s = {
            stage: sum(piece.end_s - piece.start_s for piece in pieces if piece.action.name in ("F", "B", "W"))
            for stage, pieces in self._on_node.items()
        }
        self._began_s, self._ended_s = min(starts.values()), max(self._ends.values())
        # What of the driver's step is on no stage's clock.
        self._trip_s = max(0.0, record.step_s - (self._ended_s - self._began_s))

    def parts(self, stage: int) -> Iterator[tuple[Cause, Place, float]]:
        """Yield what a stage's time went into, from the driver's order to its next."""
        start_s, end_s = self._starts[stage], self._ends[stage]
        yield Cause.DRIVER, (), self._trip_s + start_s - self._began_s
        # While others compute: of each frame that is waited for, on whom, how long.
        computing: dict[FrameKey, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for lo_s, hi_s, piece in self._between(stage, start_s, end_s):
            if piece is None:
                yield Cause.OTHER, (stage,), hi_s - lo_s
            elif piece.stage != stage:
                yield Cause.TURN, (piece.stage,), hi_s - lo_s
            elif piece.action.name in _COMPUTES:
                yield _COMPUTES[piece.action.name], (stage,), hi_s - lo_s
            else:
                key = self._awaited(stage, piece)
                for cause, place, seconds in self._held(stage, piece, lo_s, hi_s, 0):
                    if cause is None:
                        computing[key][place[0]] += seconds
                    else:
                        yield cause, place, seconds
        yield from self._why_others_compute(stage, computing)
        last = max(self._ends, key=lambda each: self._ends[each])
        for cause, place, seconds in self._trace(last, end_s, self._ended_s, 0):
            yield cause or Cause.BUBBLE, () if cause is None else place, seconds

    def _why_others_compute(
        self, stage: int, computing: Mapping[FrameKey, Mapping[int, float]]
    ) -> Iterator[tuple[Cause, Place, float]]:
        """Divide waits for stages that compute into the pipeline's bubble, slower stages, and too few in flight."""
        pieces = self._pieces[stage]
        forwards = [piece for piece in pieces if piece.action.name == "F"]
        backwards = [piece for piece in pieces if piece.action.name == "B"]
        fills = {
            (stage - 1, stage, False, forwards[0].action.microbatch) if forwards else None,
            (stage + 1, stage, True, backwards[0].action.microbatch) if backwards else None,
        }
        forward_s = fmean(piece.end_s - piece.start_s for piece in forwards) if forwards else 0.0
        draining = {
            piece.action.microbatch for piece in backwards if forwards and piece.start_s >= forwards[-1].end_s
        } & self._drained_between_forwards()
        slower_s: dict[int, float] = defaultdict(float)
        for key, on_stages in computing.items():
            total_s = sum(on_stages.values())
            bubble_s = 0.0
            if key in fills:
                bubble_s = total_s
            elif key[2] and key[3] in draining:
                # In the steady state this stage would have done a forward meanwhile.
                bubble_s = min(total_s, forward_s)
            yield Cause.BUBBLE, (), bubble_s
            for other, seconds in on_stages.items():
                slower_s[other] += seconds * (1 - bubble_s / total_s) if total_s else 0.0
        for other, seconds in slower_s.items():
            most_s = max(0.0, self._compute_s[other] - self._compute_s[stage])
            if self._full is not None and self._full.busy_s > self._compute_s[other]:
                # No stage sets the pace: whatever this one waits for queued at that link before.
                most_s = 0.0
            yield Cause.SLOWER, (other,), min(seconds, most_s)
            yield from self._why_few_in_flight(max(0.0, seconds - most_s))

    def _why_few_in_flight(self, seconds: float) -> Iterator[tuple[Cause, Place, float]]:
        """Put what more in flight would spare down to the link that could not carry it, where there is one."""
        if self._full is None:
            yield Cause.IN_FLIGHT, (), seconds
            return
        for leg, share in self._full.shares.items():
            yield _LEGS[leg], self._full.ends, share * seconds

    def _drained_between_forwards(self) -> set[int]:
        """Return the microbatches before whose backward the last stage did a forward."""
        between: set[int] = set()
        had_forward = False
        for piece in self._pieces[max(self._pieces)]:
            if piece.action.name == "F":
                had_forward = True
            elif piece.action.name == "B":
                if had_forward:
                    between.add(piece.action.microbatch)
                had_forward = False
        return between

    def _trace(self, stage: int, lo_s: float, hi_s: float, turns: int) -> Iterator[tuple[Cause | None, Place, float]]:
        """Yield what goes on where a stage is looked at from outside; None: it computes."""
        if hi_s <= lo_s:
            return
        if lo_s < self._starts[stage]:
            yield Cause.DRIVER, (), min(hi_s, self._starts[stage]) - lo_s
            lo_s = self._starts[stage]
        for start_s, end_s, piece in self._between(stage, lo_s, hi_s):
            if piece is None:
                yield Cause.OTHER, (stage,), end_s - start_s
            elif piece.action.name in COMPUTES:
                yield None, (piece.stage,), end_s - start_s
            else:
                yield from self._held(piece.stage, piece, start_s, end_s, turns + 1)

    def _held(
        self, stage: int, wait: _Piece, lo_s: float, hi_s: float, turns: int
    ) -> Iterator[tuple[Cause | None, Place, float]]:
        """Yield what holds up, between two moments, the frame that a stage waits for."""
        key = self._awaited(stage, wait)
        way = self._ways.get(key)
        if way is None or turns > _MOST_TURNS:
            yield Cause.OTHER, (stage,), hi_s - lo_s
            return
        source, target = key[:2]
        made_s = min(hi_s, max(lo_s, way.made_s))
        yield from self._trace(source, lo_s, made_s, turns)
        at_s = made_s
        for stretch in way.stretches:
            end_s = min(hi_s, stretch.end_s)
            if end_s > at_s:
                for leg, share in stretch.shares:
                    yield _LEGS[leg], (source, target), share * (end_s - at_s)
                at_s = end_s
        # It is there, and its thread has not gone on yet.
        yield Cause.OTHER, (stage,), hi_s - at_s

    def _awaited(self, stage: int, wait: _Piece) -> FrameKey:
        """Return the frame that ended a wait: the one it names, or where either would do, the one used next."""
        named = _key(stage, wait.action.name == "wB", wait.action.microbatch)
        way = self._ways.get(named)
        if way is not None and way.decoded_s <= self._starts[stage] + wait.action.end_s + _CLOCK_DIGITS_S:
            return named
        pieces = self._pieces[stage]
        for piece in pieces[bisect_right(pieces, wait.start_s, key=_start_s) :]:
            if piece.action.name in ("F", "B"):
                return _key(stage, piece.action.name == "B", piece.action.microbatch)
        return named

    def _between(self, stage: int, lo_s: float, hi_s: float) -> Iterator[tuple[float, float, _Piece | None]]:
        """Yield what a stage's node does between two moments, without gap; None: nothing that is known."""
        pieces = self._on_node[stage]
        at_s = lo_s
        for piece in pieces[max(0, bisect_right(pieces, lo_s, key=_start_s) - 1) :]:
            if piece.start_s >= hi_s:
                break
            start_s, end_s = max(at_s, piece.start_s), min(hi_s, piece.end_s)
            if end_s <= start_s:
                continue
            if start_s > at_s:
                yield at_s, start_s, None
            yield start_s, end_s, piece
            at_s = end_s
        if hi_s > at_s:
            yield at_s, hi_s, None


@dataclass(frozen=True)
class _FullLink:
    """A link that carries frames nearly all of the time."""

    ends: Place
    # Without what the peer had no room for: that may be the peer's own pace.
    busy_s: float
    shares: Mapping[Leg, float]


def _fullest(turns: Mapping[tuple[int, int], tuple[Stretch, ...]]) -> _FullLink | None:
    """Return the link that its frames' turns fill, from the first to the last; of several the one that took longest."""
    fullest, most_s = None, 0.0
    for ends, own in turns.items():
        legs_s: dict[Leg, float] = defaultdict(float)
        for turn in own:
            for leg, share in turn.shares:
                legs_s[leg] += share * (turn.end_s - turn.start_s)
        total_s = math.fsum(legs_s.values())
        if len(own) < _FEWEST_TURNS or total_s < _FULL_SHARE * (own[-1].end_s - own[0].start_s):
            continue
        if total_s > most_s:
            shares = {leg: seconds / total_s for leg, seconds in legs_s.items()}
            fullest, most_s = _FullLink(ends, total_s - legs_s.get(Leg.ROOM, 0.0), shares), total_s
    return fullest


def _start_s(piece: _Piece) -> float:
    return piece.start_s


def _merged(pieces: Iterable[Sequence[_Piece]]) -> list[_Piece]:
    return sorted(chain.from_iterable(pieces), key=_start_s)


def _nodes(record: StepRecord) -> Iterator[tuple[int, list[int]]]:
    """Yield each stage with all the stages of its node."""
    for stage in record.stages:
        shared = [other.stage for other in record.stages if other.seat == stage.seat is not None]
        yield stage.stage, shared or [stage.stage]


def _key(stage: int, is_gradient: bool, microbatch: int) -> FrameKey:
    return stage + (1 if is_gradient else -1), stage, is_gradient, microbatch


def _pieces(stage: StageRecord, start_s: float, end_s: float) -> list[_Piece]:
    """Return what a stage did, in order and without overlap; where it computes it does not wait, as on CUDA it may."""
    # Computing first, so that waits are cut around it.
    ordered = sorted(stage.actions, key=lambda action: (action.name not in COMPUTES, action.start_s))
    free = [(start_s, end_s)]
    pieces: list[_Piece] = []
    for action in ordered:
        if action.name not in COMPUTES and action.name not in WAITS:
            continue
        pieces += _take(free, stage.stage, action, start_s)
    return sorted(pieces, key=_start_s)


def _take(free: list[tuple[float, float]], stage: int, action: ActionTime, start_s: float) -> Iterator[_Piece]:
    """Yield what of an action falls into time that is free, which it takes."""
    lo_s, hi_s = start_s + action.start_s, start_s + action.end_s
    index = max(0, bisect_right(free, (lo_s, math.inf)) - 1)
    while index < len(free) and free[index][0] < hi_s:
        begun_s, ended_s = free[index]
        piece_lo_s, piece_hi_s = max(lo_s, begun_s), min(hi_s, ended_s)
        if piece_hi_s <= piece_lo_s:
            index += 1
            continue
        yield _Piece(piece_lo_s, piece_hi_s, stage, action)
        left = [span for span in ((begun_s, piece_lo_s), (piece_hi_s, ended_s)) if span[1] > span[0]]
        free[index : index + 1] = left
        index += sum(1 for span in left if span[1] <= piece_lo_s)
