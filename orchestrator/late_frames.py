"""Frames that were still on their way when their stage reported: what the next step's reports tell of them.

PURE. A stage does not wait for its last frames before it reports, so the end of their way is told a step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from actors.frame_times import FrameTimes
from orchestrator.records import StageRecord, StepRecord


def with_late_frames(steps: Sequence[StepRecord]) -> tuple[StepRecord, ...]:
    """Return the steps, each with what the one after it tells of its frames, where that one is among them."""
    whole = [_completed(step, after) if after.step == step.step + 1 else step for step, after in pairwise(steps)]
    return (*whole, *steps[-1:])


def _completed(step: StepRecord, after: StepRecord) -> StepRecord:
    late = {stage.stage: stage.late_frames for stage in after.stages}
    stages = tuple(_with(stage, late.get(stage.stage, FrameTimes())) for stage in step.stages)
    return replace(step, stages=stages)


def _with(stage: StageRecord, late: FrameTimes) -> StageRecord:
    # A step whose own frames were not kept is not made to look as if only its last ones had been sent.
    if not len(late) or not len(stage.frames):
        return stage
    sent = {(frame.target_stage, frame.is_gradient, frame.microbatch): frame for frame in stage.frames.sent}
    sent |= {(frame.target_stage, frame.is_gradient, frame.microbatch): frame for frame in late.sent}
    frames = replace(stage.frames, sent=tuple(sent.values()), blocked=(*stage.frames.blocked, *late.blocked))
    return replace(stage, frames=frames)
