"""A step of a made-up pipeline played exactly, with every frame's way, as its stages would report it.

Times are known beforehand, so what is told from the reports can be held to them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from actors.frame_times import ArrivedFrame, BlockedTime, FrameTimes, SentFrame
from actors.schedule import Action, Op, stage_actions
from actors.spec import ActionTime, ScheduleName
from orchestrator.clocks import LinkFigures
from orchestrator.records import StageRecord, StepRecord
from tests.unit.synthetic_run import make_step

BYTES_A_MEGABIT = 125_000


@dataclass(frozen=True, kw_only=True)
class Line:
    """One direction of a link."""

    rate_mbps: float = 1e9
    delay_s: float = 0.0
    frame_bytes: int = 1000
    chunk_bytes: int = 1 << 20
    # How long each frame is held up beyond what its bytes need, and by what the outbox says.
    window_s: float = 0.0
    room_s: float = 0.0

    @property
    def carry_s(self) -> float:
        return self.frame_bytes / (self.rate_mbps * BYTES_A_MEGABIT)


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A pipeline: a forward and a backward of each stage, all links alike but those that `lines` names."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    num_microbatches: int = 8
    schedule: ScheduleName = "1f1b"
    commit_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    line: Line = Line()
    # By (source, target).
    lines: dict[tuple[int, int], Line] = field(default_factory=dict)
    # When each stage begins, on the true clock; 0 where not given.
    starts: tuple[float, ...] = ()
    # What the driver's step is longer than all that.
    trip_s: float = 0.0

    @property
    def num_stages(self) -> int:
        return len(self.forward_s)

    def line_of(self, source: int, target: int) -> Line:
        return self.lines.get((source, target), self.line)

    def start_s(self, stage: int) -> float:
        return self.starts[stage] if self.starts else 0.0

    def figures(self) -> dict[tuple[int, int], LinkFigures]:
        """What a plan would know of the links; windows that hold up nothing unless a line says so."""
        figures: dict[tuple[int, int], LinkFigures] = {}
        for a in range(self.num_stages - 1):
            for ends in ((a, a + 1), (a + 1, a)):
                line = self.line_of(*ends)
                window_bytes = 1 << 40
                if line.window_s:
                    window_bytes = round(line.frame_bytes * 2 * line.delay_s / (line.carry_s + line.window_s))
                figures[ends] = LinkFigures(
                    rate_mbps=line.rate_mbps, chunk_bytes=line.chunk_bytes, window_bytes=max(1, window_bytes)
                )
        return figures


class _Player:
    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.free_s = [rig.start_s(stage) + rig.commit_s for stage in range(rig.num_stages)]
        self.actions: list[list[ActionTime]] = [[] for _ in range(rig.num_stages)]
        self.sent: dict[int, list[SentFrame]] = defaultdict(list)
        self.arrived: dict[int, list[ArrivedFrame]] = defaultdict(list)
        self.blocked: dict[int, list[BlockedTime]] = defaultdict(list)
        # When outboxes and lines have done what they had to.
        self.outbox_s: dict[tuple[int, int], float] = defaultdict(float)
        self.line_s: dict[tuple[int, int], float] = defaultdict(lambda: -1e9)
        # (stage, is_gradient, microbatch) -> when it is decoded there
        self.there_s: dict[tuple[int, bool, int], float] = {}
        if rig.commit_s:
            for stage in range(rig.num_stages):
                self._note(stage, "C", -1, rig.start_s(stage), self.free_s[stage])

    def play(self) -> None:
        rig = self.rig
        todo = [
            list(stage_actions(rig.schedule, stage, rig.num_stages, rig.num_microbatches))
            for stage in range(rig.num_stages)
        ]
        while any(todo):
            ready = [stage for stage in range(rig.num_stages) if todo[stage] and self._is_ready(stage, todo[stage][0])]
            for stage in ready:
                self._do(stage, todo[stage].pop(0))

    def _needs(self, stage: int, action: Action) -> tuple[int, bool, int] | None:
        is_gradient = action.op is Op.BACKWARD
        if stage == (self.rig.num_stages - 1 if is_gradient else 0):
            return None
        return stage, is_gradient, action.microbatch

    def _is_ready(self, stage: int, action: Action) -> bool:
        needs = self._needs(stage, action)
        return needs is None or needs in self.there_s

    def _note(self, stage: int, name: str, microbatch: int, start_s: float, end_s: float) -> None:
        zero_s = self.rig.start_s(stage)
        times = ActionTime(name=name, microbatch=microbatch, start_s=start_s - zero_s, end_s=end_s - zero_s)
        self.actions[stage].append(times)

    def _do(self, stage: int, action: Action) -> None:
        rig, needs = self.rig, self._needs(stage, action)
        is_gradient = action.op is Op.BACKWARD
        begin_s = self.free_s[stage]
        if needs is not None:
            begin_s = max(begin_s, self.there_s[needs])
            self._note(stage, "wB" if is_gradient else "wF", action.microbatch, self.free_s[stage], begin_s)
        end_s = begin_s + (rig.backward_s if is_gradient else rig.forward_s)[stage]
        self._note(stage, "B" if is_gradient else "F", action.microbatch, begin_s, end_s)
        self.free_s[stage] = end_s
        target = stage - 1 if is_gradient else stage + 1
        if 0 <= target < rig.num_stages:
            self._carry(stage, target, is_gradient, action.microbatch, end_s)

    def _carry(self, source: int, target: int, is_gradient: bool, microbatch: int, made_s: float) -> None:
        rig, line = self.rig, self.rig.line_of(source, target)
        here_s, away_s = rig.start_s(source), rig.start_s(target)
        encode_s = max(made_s, self.outbox_s[source, target])
        pushed_s = encode_s + rig.encode_s
        self.outbox_s[source, target] = pushed_s
        begin_s = max(pushed_s, self.line_s[source, target])
        left_s = begin_s + line.carry_s + line.window_s + line.room_s
        self.line_s[source, target] = left_s
        spans = (("window", begin_s, begin_s + line.window_s), ("room", begin_s + line.window_s, left_s - line.carry_s))
        for why, from_s, to_s in spans:
            if to_s - from_s > 1e-12:
                assert why == "window" or why == "room"
                self.blocked[source].append(
                    BlockedTime(target_stage=target, why=why, start_s=from_s - here_s, end_s=to_s - here_s)
                )
        whole_s = left_s + line.delay_s
        decoded_s = whole_s + rig.decode_s
        first_s = whole_s
        if line.chunk_bytes < line.frame_bytes:
            # Its first chunk is not held up by the window.
            first_s = begin_s + line.room_s + line.carry_s * line.chunk_bytes / line.frame_bytes + line.delay_s
        self.there_s[target, is_gradient, microbatch] = decoded_s
        self.sent[source].append(
            SentFrame(
                target_stage=target,
                is_gradient=is_gradient,
                microbatch=microbatch,
                encode_start_s=encode_s - here_s,
                encode_end_s=pushed_s - here_s,
                pushed_s=pushed_s - here_s,
                settled_s=decoded_s + rig.line_of(target, source).delay_s - here_s,
                wire_bytes=line.frame_bytes,
            )
        )
        self.arrived[target].append(
            ArrivedFrame(
                source_stage=source,
                is_gradient=is_gradient,
                microbatch=microbatch,
                first_s=first_s - away_s,
                whole_s=whole_s - away_s,
                decoded_s=decoded_s - away_s,
            )
        )


def played_step(rig: Rig, step: int = 5) -> StepRecord:
    """Return the step that this pipeline does."""
    player = _Player(rig)
    player.play()
    stages = range(rig.num_stages)
    span_s = max(player.free_s) - min(rig.start_s(stage) for stage in stages)
    record = make_step(step, num_stages=rig.num_stages)
    return replace(
        record,
        step_s=span_s + rig.trip_s,
        stages=tuple(
            StageRecord(
                stage=stage,
                compute_s=0.0,
                wait_s=0.0,
                idle_share=0.0,
                peak_memory_bytes=0,
                actions=tuple(player.actions[stage]),
                step_s=player.free_s[stage] - rig.start_s(stage),
                frames=FrameTimes(
                    sent=tuple(player.sent[stage]),
                    arrived=tuple(player.arrived[stage]),
                    blocked=tuple(player.blocked[stage]),
                ),
            )
            for stage in stages
        ),
    )
