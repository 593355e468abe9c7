"""A run's last steps as a trace that chrome://tracing and ui.perfetto.dev open: a process a stage, a slice an action.

PURE. The Trace Event Format, in microseconds: complete events ("ph": "X"), and a flow ("s" to "f") from each frame on
its way to the forward or backward that takes it. Steps follow one another by their lengths; within a step the stages
are on one clock where their frames tell it (`orchestrator.clocks`), else each on its own. What is not a number is left
out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.spec import WAITS
from orchestrator.clocks import LinkFigures, is_time, step_starts
from orchestrator.records import StageRecord, StepRecord

# A viewer takes some hundred thousand slices with ease.
MOST_SLICES = 200_000
_COMPUTES, _WAITS, _DECODES = "computes", "waits", "decodes"
_NAMES = {
    "F": "forward",
    "B": "backward",
    "W": "weight gradients",
    "C": "commit",
    "S": "exchange of gradients",
    "wF": "wait for activation",
    "wB": "wait for gradient",
}
_BLOCKED = {"window": "window full", "room": "no room at the peer"}


def trace_document(
    steps: Sequence[StepRecord], figures: Mapping[tuple[int, int], LinkFigures] | None = None
) -> dict[str, Any]:
    """Return the trace of as many of the last steps as `MOST_SLICES` holds, ready for JSON."""
    kept: list[StepRecord] = []
    slices = 0
    for step in reversed(steps):
        slices += sum(len(stage.actions) + 2 * len(stage.frames) for stage in step.stages)
        if kept and slices > MOST_SLICES:
            break
        kept.append(step)
    trace = _Trace(figures or {})
    for step in reversed(kept):
        trace.add(step)
    return {"displayTimeUnit": "ms", "traceEvents": [*trace.names(), *trace.events]}


class _Trace:
    """A trace that grows step by step."""

    def __init__(self, figures: Mapping[tuple[int, int], LinkFigures]) -> None:
        self.events: list[dict[str, Any]] = []
        self._figures = figures
        self._nodes: dict[int, str] = {}
        # Of each stage's track the lanes: when each is free. What overlaps goes side by side.
        self._lanes: dict[tuple[int, str], list[float]] = defaultdict(list)
        # The line of each lane, by stage.
        self._lines: dict[int, dict[tuple[str, int], int]] = defaultdict(dict)
        self._start_s = 0.0
        self._num_flows = 0

    def names(self) -> Iterator[dict[str, Any]]:
        """Yield the names of processes and their lines."""
        for stage, node in sorted(self._nodes.items()):
            name = f"stage {stage}" + (f" ({node})" if node else "")
            yield {"ph": "M", "name": "process_name", "pid": stage, "args": {"name": name}}
            yield {"ph": "M", "name": "process_sort_index", "pid": stage, "args": {"sort_index": stage}}
            for (track, _), line in self._lines[stage].items():
                yield {"ph": "M", "name": "thread_name", "pid": stage, "tid": line, "args": {"name": track}}
                yield {"ph": "M", "name": "thread_sort_index", "pid": stage, "tid": line, "args": {"sort_index": line}}

    def add(self, step: StepRecord) -> None:
        """Add one step after those before it."""
        starts = self._starts(step)
        for stage in step.stages:
            on_seat = "" if stage.seat is None else f"on the node of stage {stage.seat}"
            self._nodes[stage.stage] = stage.node or on_seat
            # These two are always there, and first.
            for track in (_COMPUTES, _WAITS):
                self._line(stage.stage, track, 0)
            self._add_actions(step, stage, starts[stage.stage])
        for stage in step.stages:
            self._add_frames(step, stage, starts)
        self._add_flows(step, starts)
        ends_s = [action.end_s for stage in step.stages for action in stage.actions]
        self._start_s += step.step_s if is_time(step.step_s) else _most(ends_s)

    def _starts(self, step: StepRecord) -> dict[int, float]:
        """Return when each stage begins the step on the trace's clock."""
        own = {stage.stage: 0.0 for stage in step.stages}
        is_one_each = len(own) == len(step.stages)
        told = step_starts(step.stages, self._figures) if is_one_each and step.stages else None
        if told is None or not all(map(is_time, told.values())):
            told = own
        first_s = min(told.values(), default=0.0)
        return {stage: self._start_s + start_s - first_s for stage, start_s in told.items()}

    def _add_actions(self, step: StepRecord, stage: StageRecord, start_s: float) -> None:
        for action in stage.actions:
            self._slice(
                step,
                stage.stage,
                _WAITS if action.name in WAITS else _COMPUTES,
                _NAMES.get(action.name, action.name),
                start_s + action.start_s,
                start_s + action.end_s,
                lane=0,
                microbatch=action.microbatch,
            )

    def _add_frames(self, step: StepRecord, stage: StageRecord, starts: Mapping[int, float]) -> None:
        start_s = starts[stage.stage]
        for frame in stage.frames.arrived:
            args = {"microbatch": frame.microbatch, "source": frame.source_stage}
            name = f"decode {_kind(frame.is_gradient)}"
            self._slice(step, stage.stage, _DECODES, name, start_s + frame.whole_s, start_s + frame.decoded_s, **args)
        for frame in stage.frames.sent:
            kind, to = _kind(frame.is_gradient), _to(frame.target_stage)
            times = start_s + frame.encode_start_s, start_s + frame.encode_end_s
            self._slice(step, stage.stage, f"encodes {to}", f"encode {kind}", *times, microbatch=frame.microbatch)
        for block in stage.frames.blocked:
            times = start_s + block.start_s, start_s + block.end_s
            self._slice(step, stage.stage, f"held up {_to(block.target_stage)}", _BLOCKED[block.why], *times)

    def _add_flows(self, step: StepRecord, starts: Mapping[int, float]) -> None:
        """Add frames under way, each with an arrow to whatever takes it."""
        arrived = {
            (frame.source_stage, stage.stage, frame.is_gradient, frame.microbatch): starts[stage.stage] + frame.whole_s
            for stage in step.stages
            for frame in stage.frames.arrived
        }
        used = {
            (stage.stage, action.name, action.microbatch): starts[stage.stage] + action.start_s
            for stage in step.stages
            for action in stage.actions
        }
        for stage in step.stages:
            start_s = starts[stage.stage]
            for frame in stage.frames.sent:
                target, name = frame.target_stage, "B" if frame.is_gradient else "F"
                pushed_s, settled_s = start_s + frame.pushed_s, start_s + frame.settled_s
                if math.isnan(settled_s):
                    # Its stage reported before the receipt came.
                    settled_s = arrived.get((stage.stage, target, frame.is_gradient, frame.microbatch), math.nan)
                line = self._slice(
                    step,
                    stage.stage,
                    f"link {_to(target)}",
                    _kind(frame.is_gradient),
                    pushed_s,
                    settled_s,
                    microbatch=frame.microbatch,
                    wire_bytes=frame.wire_bytes,
                )
                used_s = used.get((target, name, frame.microbatch), math.nan)
                if line is not None and is_time(used_s):
                    self._num_flows += 1
                    flow = {"name": "frame", "cat": "frame", "id": self._num_flows}
                    taken = {"pid": target, "tid": self._line(target, _COMPUTES, 0), "ts": _us(used_s)}
                    self.events.append({"ph": "s", **flow, "pid": stage.stage, "tid": line, "ts": _us(pushed_s)})
                    # "e": it ends in the slice that is there at that time, not in the next.
                    self.events.append({"ph": "f", "bp": "e", **flow, **taken})

    def _slice(
        self,
        step: StepRecord,
        stage: int,
        track: str,
        name: str,
        start_s: float,
        end_s: float,
        lane: int | None = None,
        **args: int,
    ) -> int | None:
        """Add a slice and return its line, in a lane of its track that is free; None where its times are no numbers."""
        if not is_time(start_s) or not is_time(end_s):
            return None
        if lane is None:
            free = self._lanes[stage, track]
            lane = next((index for index, free_s in enumerate(free) if free_s <= start_s), len(free))
            free[lane : lane + 1] = [end_s]
        line = self._line(stage, track, lane)
        self.events.append(
            {
                "ph": "X",
                "name": name,
                "cat": "simulated" if step.is_simulated else "measured",
                "pid": stage,
                "tid": line,
                "ts": _us(start_s),
                "dur": max(0.0, round((end_s - start_s) * 1e6, 1)),
                "args": {"step": step.step, **args},
            }
        )
        return line

    def _line(self, stage: int, track: str, lane: int) -> int:
        lines = self._lines[stage]
        return lines.setdefault((track, lane), len(lines))


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _to(stage: int) -> str:
    return f"to stage {stage}"


def _kind(is_gradient: bool) -> str:
    return "gradient" if is_gradient else "activation"


def _most(seconds: Sequence[float]) -> float:
    """Return the largest number among these; 0 where none is one."""
    return max((s for s in seconds if is_time(s)), default=0.0)
