"""What is running, read from a run folder: status.json says how far, the lock says whether anybody drives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from actors.errors import UserError
from actors.spec import Plan
from orchestrator.console import duration_text, event_line, wire_text
from orchestrator.events import decode, encode, with_few_frames, without_frames
from orchestrator.records import EvalRecord, EventRecord, StepRecord
from orchestrator.runfolder import BASELINE_SUFFIX, RunFolder, write_atomic

_STATUS_EVERY_S = 1.0
_MAX_STATUS_BYTES = 16_777_216


@dataclass(frozen=True, kw_only=True)
class Status:
    """status.json: the latest of each kind of record; the driver alone writes it."""

    run: str
    step: StepRecord | None = None
    # When `step` was recorded; 0 where a driver before this one did.
    step_unix_s: float = 0.0
    evaluation: EvalRecord | None = None
    event: EventRecord | None = None
    # Set when the driver ended by itself.
    exit_code: int | None = None


class StatusFile:
    """The sink that keeps status.json true, at most a write a second for steps. Raises DiskFull.

    It goes on from what the driver before left there: a run that has nothing more to do is still finished. The times of
    single frames are written only at the end: they would be most of what is written every second.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float]) -> None:
        self._path = folder.status
        self._clock = clock
        self._status = Status(run=folder.name)
        # What cannot be read is written anew.
        with suppress(UserError):
            self._status = replace(_read_json(Status, self._path) or self._status, step_unix_s=0.0, exit_code=None)
        self._written_unix_s = 0.0

    def start(self, config: Mapping[str, object], plan: Plan) -> None:
        self._write()

    def step(self, record: StepRecord) -> None:
        self._status = replace(self._status, step=record, step_unix_s=self._clock())
        if not 0 <= self._clock() - self._written_unix_s < _STATUS_EVERY_S:
            self._write()

    def evaluation(self, record: EvalRecord) -> None:
        self._status = replace(self._status, evaluation=record)
        self._write()

    def event(self, record: EventRecord) -> None:
        self._status = replace(self._status, event=record)
        self._write()

    def finish(self, exit_code: int) -> None:
        self._status = replace(self._status, exit_code=exit_code)
        self._write(has_ended=True)

    def _write(self, *, has_ended: bool = False) -> None:
        step = self._status.step
        if step is not None:
            step = with_few_frames(step) if has_ended else without_frames(step)
        write_atomic(self._path, json.dumps(encode(replace(self._status, step=step)), allow_nan=False))
        self._written_unix_s = self._clock()


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run as `isthmus status` shows it."""

    folder: RunFolder
    is_live: bool
    holder: str
    # None where the run has not said anything yet.
    status: Status | None
    plan: Plan | None
    # False where a file of it is damaged.
    is_readable: bool = True


def read_status(run: Path) -> RunView:
    """Return what is known of the run in folder `run`; raises UserError where there is none, or it is not readable."""
    if not run.is_dir():
        raise UserError(
            f"there is no run in {run}", f"list the runs beside it with `isthmus status`, or look in {run.parent}"
        )
    folder = RunFolder(run)
    return RunView(
        folder=folder,
        is_live=folder.is_live(),
        holder=folder.holder(),
        status=_read_json(Status, folder.status),
        plan=_read_json(Plan, folder.plan),
    )


def list_status(root: Path) -> tuple[RunView, ...]:
    """Return every run in `root`, the live ones first, then by name; one that is not readable says so itself."""
    runs = [path for path in root.iterdir() if RunFolder(path).config.exists()] if root.is_dir() else []
    views = [_view_for_list(path) for path in runs]
    return tuple(sorted(views, key=lambda view: (not view.is_live, view.folder.name)))


def _view_for_list(run: Path) -> RunView:
    """Return what is known of a run; one whose files cannot be read must not hide the others."""
    try:
        return read_status(run)
    except UserError:
        folder = RunFolder(run)
        return RunView(
            folder=folder,
            is_live=folder.is_live(),
            holder=folder.holder(),
            status=None,
            plan=None,
            is_readable=False,
        )


def _read_json(kind: type, path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return decode(kind, json.loads(file.read(_MAX_STATUS_BYTES)))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", "move it away; the next `isthmus train` writes it anew"
        ) from error


def render(view: RunView, now_unix_s: float) -> RenderableType:
    """Return one run for a rich console: state, headline, stages, links."""
    parts: list[RenderableType] = [Text(f"run {view.folder.name}: {state_text(view, now_unix_s)}", style="bold")]
    status = view.status
    if status and status.step:
        parts.append(Text(_headline(status.step)))
    if status and status.evaluation:
        parts.append(Text(f"val loss {status.evaluation.loss:.4f} at step {status.evaluation.step}"))
    if status and status.event:
        parts.append(Text(f"last event: {event_line(status.event)}"))
    if view.plan:
        parts.append(_stage_table(view.plan, status.step if status else None))
        if view.plan.links:
            parts.append(_link_table(view.plan, status.step if status else None))
    return Group(*parts)


def render_list(views: Sequence[RunView], now_unix_s: float) -> RenderableType:
    """Return all runs of a root for a rich console, a row each."""
    if not views:
        return Text("no runs here; start one with: isthmus train conf/demo.yaml")
    table = Table("run", "state", "step", "loss", "tok/s", "$", box=None, pad_edge=False)
    for view in views:
        step = view.status.step if view.status else None
        cells = (
            [
                f"{step.step + 1}/{step.num_steps}",
                f"{step.loss:.4f}",
                f"{step.tokens_per_s:,.0f}",
                f"{step.dollars:.2f}",
            ]
            if step
            else ["-"] * 4
        )
        table.add_row(Text(view.folder.name), Text(state_text(view, now_unix_s)), *cells)
    return table


def state_text(view: RunView, now_unix_s: float) -> str:
    """Return what the run does now, with the command to go on where it does nothing."""
    step = view.status.step if view.status else None
    if not view.is_readable:
        return f"not readable; see: isthmus status {view.folder.name}"
    if view.is_live:
        if view.status is None or step is None or not view.status.step_unix_s:
            return f"starting ({view.holder})"
        age = duration_text(max(0.0, now_unix_s - view.status.step_unix_s))
        return f"running ({view.holder}), last step {age} ago"
    if view.status and view.status.exit_code == 0 and step and step.step + 1 == step.num_steps:
        return "finished"
    if view.folder.name.endswith(BASELINE_SUFFIX):
        return f"not running; start afresh with: isthmus baseline {view.folder.config}"
    return f"not running; resume with: isthmus train {view.folder.config}"


def _headline(step: StepRecord) -> str:
    progress = [
        f"step {step.step + 1}/{step.num_steps}",
        f"loss {step.loss:.4f}",
        f"{step.tokens_per_s:,.0f} tokens/s",
        f"eta {duration_text(step.eta_s)}",
    ]
    per_mtoken = f" (${step.dollars * 1e6 / step.total_tokens:.3f}/M tokens)" if step.total_tokens else ""
    spent = [
        f"{step.total_tokens:,} tokens",
        f"${step.dollars:.2f}{per_mtoken}",
        f"wire {wire_text(step.raw_bytes, step.wire_bytes)} a step",
    ]
    return "  ".join(progress) + "\n" + "  ".join(spent)


def _stage_table(plan: Plan, step: StepRecord | None) -> Table:
    records = {stage.stage: stage for stage in step.stages} if step else {}
    table = Table("stage", "node", "layers", "compute", "wait", "idle", "peak memory", box=None, pad_edge=False)
    for stage in plan.stages:
        record = records.get(stage.stage)
        measured = (
            [
                f"{record.compute_s:.2f} s",
                f"{record.wait_s:.2f} s",
                f"{record.idle_share:.0%}",
                decimal(record.peak_memory_bytes),
            ]
            if record
            else ["-"] * 4
        )
        layers = f"{stage.layer_start}-{stage.layer_stop - 1}"
        table.add_row(str(stage.stage), Text(stage.node), layers, *measured)
    return table


def _link_table(plan: Plan, step: StepRecord | None) -> Table:
    records = {(link.source_stage, link.target_stage): link for link in step.links} if step else {}
    table = Table("link", "codec", "rate", "delay", "wire bytes a step", "rate now", box=None, pad_edge=False)
    for link in plan.links:
        a, b = link.source_stage, link.target_stage
        for source, target, codec in ((a, b, link.forward_codec), (b, a, link.backward_codec)):
            record = records.get((source, target))
            table.add_row(
                f"{source} -> {target}",
                codec,
                f"{link.rate_mbps:,.0f} Mbit/s",
                f"{link.delay_s * 1e3:.0f} ms",
                wire_text(record.raw_bytes, record.wire_bytes) if record else "-",
                record.rate_text if record else "-",
            )
    return table
