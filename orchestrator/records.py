"""What a run says of itself: the records that console, events file, W&B, metrics and report all show.

PURE. A step's record is made once, by `Progress.after`; every sink only formats it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.frame_times import FrameTimes
from actors.spec import ActionTime, StepReport


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage in one step, in seconds."""

    stage: int
    compute_s: float
    wait_s: float
    # The share of the step in which this node did not compute.
    idle_share: float
    peak_memory_bytes: int
    actions: tuple[ActionTime, ...]
    # Where a stage has more nodes than one: which of them.
    node: str = ""
    # Interleaved, stages of one seat share a node; None: each has its own.
    seat: int | None = None
    # Of the peak, what training took: over what the idle process held.
    held_bytes: int = 0
    # The step on this node's own clock; None where it was not kept. The frames beside `actions`, where they are kept.
    step_s: float | None = None
    frames: FrameTimes = field(default_factory=FrameTimes)
    # What was missing in the frames of the step before: see orchestrator.late_frames.
    late_frames: FrameTimes = field(default_factory=FrameTimes)


@dataclass(frozen=True, kw_only=True)
class LinkRecord:
    """Both kinds of frames that went from one stage to another in one step."""

    source_stage: int
    target_stage: int
    num_frames: int
    raw_bytes: int
    wire_bytes: int
    # Where a canary was read in this step: its codec, and how far decoded was from raw.
    codec: str | None = None
    relative_error: float | None = None
    cosine: float | None = None
    # What the link was seen to do in this step, where anything was: see actors.spec.LinkReading.
    rate_mbps: float | None = None
    is_measured: bool = False
    delay_s: float | None = None

    @property
    def rate_text(self) -> str:
        """The link's rate as it was seen, for people: a lower bound says so."""
        if self.rate_mbps is None:
            return "-"
        return f"{'' if self.is_measured else '>= '}{self.rate_mbps:.3g} Mbit/s"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One committed (or skipped) step of the whole pipeline."""

    step: int
    num_steps: int
    loss: float
    lr: float
    grad_norm: float
    clip_scale: float
    skipped: bool
    num_skipped: int
    num_targets: int
    # Tokens trained on since the run's first step, this one included; those of skipped steps are not.
    total_tokens: int
    step_s: float
    tokens_per_s: float
    eta_s: float
    # The price of the time that all steps took so far.
    dollars: float
    stages: tuple[StageRecord, ...]
    links: tuple[LinkRecord, ...]
    # Made by the simulator: nothing was trained, so loss and norm are NaN.
    is_simulated: bool = False

    @property
    def raw_bytes(self) -> int:
        return sum(link.raw_bytes for link in self.links)

    @property
    def wire_bytes(self) -> int:
        return sum(link.wire_bytes for link in self.links)

    @property
    def slowest(self) -> StageRecord:
        return max(self.stages, key=lambda stage: stage.compute_s)


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """The held-out loss before a step, in nats a token."""

    step: int
    loss: float
    num_targets: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Anything else worth a line: started, resumed, checkpoint saved or failed, retry, stop; with its remedy if any."""

    step: int
    # One word: started, resumed, saved, save_failed, checkpoint_bad, retried, node_lost, skipped, stepped_down,
    # retuned, warned, stopped, finished, failed.
    name: str
    text: str


def stage_records(
    reports: Sequence[StepReport], step_s: float, num_nodes: int | None = None
) -> tuple[StageRecord, ...]:
    """Return one record a stage, in stage order; idle is what of `step_s` its node did not compute.

    With fewer nodes than stages each holds every so many-th.
    """
    num_nodes = num_nodes or len(reports)
    compute_s: dict[int, float] = defaultdict(float)
    for report in reports:
        compute_s[report.stage % num_nodes] += report.compute_s
    return tuple(
        StageRecord(
            stage=report.stage,
            compute_s=report.compute_s,
            wait_s=report.wait_s,
            idle_share=max(0.0, 1.0 - compute_s[report.stage % num_nodes] / step_s) if step_s > 0 else 0.0,
            peak_memory_bytes=report.peak_memory_bytes,
            actions=report.actions,
            held_bytes=report.held_bytes,
            step_s=report.step_s,
            frames=report.frames,
            late_frames=report.late_frames,
            seat=report.stage % num_nodes if num_nodes < len(reports) else None,
        )
        for report in sorted(reports, key=lambda report: report.stage)
    )


def link_records(reports: Sequence[StepReport]) -> tuple[LinkRecord, ...]:
    """Return one record for each ordered pair of stages that sent frames."""
    totals: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for report in reports:
        for link in report.links:
            total = totals[link.source_stage, link.target_stage]
            total[0] += link.num_frames
            total[1] += link.raw_bytes
            total[2] += link.wire_bytes
    readings = {(r.source_stage, r.target_stage): r for report in reports for r in report.readings}
    canaries = {(c.source_stage, c.target_stage): c for report in reports for c in report.canaries}
    records: list[LinkRecord] = []
    for pair, (num_frames, raw_bytes, wire_bytes) in sorted(totals.items()):
        canary, reading = canaries.get(pair), readings.get(pair)
        records.append(
            LinkRecord(
                source_stage=pair[0],
                target_stage=pair[1],
                num_frames=num_frames,
                raw_bytes=raw_bytes,
                wire_bytes=wire_bytes,
                codec=canary.codec if canary else None,
                relative_error=canary.relative_error if canary else None,
                cosine=canary.cosine if canary else None,
                rate_mbps=reading.rate_mbps if reading else None,
                is_measured=reading is not None and reading.is_measured,
                delay_s=reading.delay_s if reading and not math.isnan(reading.delay_s) else None,
            )
        )
    return tuple(records)
