"""One page about a run that needs nothing but itself: curves, timeline, links, cost, and the baseline beside it.

The page is HTML with its pictures inside, no script and no address in it, so that it can be mailed or put in a bucket.
Everything that comes out of a file is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from io import BytesIO
from pathlib import Path
from typing import IO

from rich.filesize import decimal

from actors.errors import UserError
from actors.spec import Plan
from orchestrator.clocks import link_figures
from orchestrator.console import duration_text
from orchestrator.events import History, read_history
from orchestrator.late_frames import with_late_frames
from orchestrator.pictures import BLUE, VERMILLION, Curve, curves_picture, timeline_picture
from orchestrator.records import LinkRecord, StageRecord, StepRecord
from orchestrator.runfolder import RunFolder, disk_errors, write_atomic
from orchestrator.status import Status, read_status
from orchestrator.tracefile import trace_document
from orchestrator.where import telling_steps, where_time_went
from orchestrator.would_help import where_rows, would_help

_MAX_CONFIG_CHARS = 1_048_576
_WHERE_TITLE = "where the time went"
_LOSS_CAPTION = "loss over tokens trained on"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin: 0; font-size: 1.8rem } h1 + p { color: #666; margin-top: 0 }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ddd }
img { width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; white-space: nowrap; border-bottom: 1px solid #eee }
td:last-child { white-space: normal }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""


@dataclass(frozen=True, kw_only=True)
class RunTotals:
    """A run in a few numbers; None where its records do not tell."""

    # Of the last step: a stage each in a pipeline, the workers of a baseline.
    num_nodes: int
    num_steps: int
    tokens: int
    loss: float | None
    val_loss: float | None
    # Over the time that the steps on record took, evaluations and restarts left out.
    tokens_per_s: float | None
    seconds: float
    dollars: float
    # Of the steps on record.
    dollars_per_mtoken: float | None
    raw_bytes: int
    wire_bytes: int


def _num_nodes(stages: Sequence[StageRecord]) -> int:
    """Return how many nodes stages are on: those of one seat share one."""
    return len({stage.seat for stage in stages if stage.seat is not None}) or len(stages)


def totals(history: History) -> RunTotals:
    """Return what a run came to."""
    steps = history.steps
    seconds = sum(step.step_s for step in steps)
    return RunTotals(
        num_nodes=_num_nodes(steps[-1].stages) if steps else 0,
        num_steps=len(steps),
        tokens=steps[-1].total_tokens if steps else 0,
        loss=steps[-1].loss if steps else None,
        val_loss=history.evaluations[-1].loss if history.evaluations else None,
        tokens_per_s=sum(step.num_targets for step in steps) / seconds if seconds else None,
        seconds=seconds,
        dollars=steps[-1].dollars if steps else 0.0,
        dollars_per_mtoken=_dollars_per_mtoken(steps),
        raw_bytes=sum(step.raw_bytes for step in steps),
        wire_bytes=sum(step.wire_bytes for step in steps),
    )


def _dollars_per_mtoken(steps: Sequence[StepRecord]) -> float | None:
    """Return what a million trained tokens cost, also where the records do not begin with the run's first step."""
    if not steps:
        return None
    first = steps[0]
    # What had been spent before the first record is not known, only what had been after it.
    paid, spent_before = (steps, 0.0) if first.step == 0 else (steps[1:], first.dollars)
    tokens = sum(step.num_targets for step in paid if not step.skipped)
    return (steps[-1].dollars - spent_before) * 1e6 / tokens if tokens else None


def comparison(run: RunTotals, baseline: RunTotals | None) -> list[tuple[str, str, str]]:
    """Return rows of (what, of the run, of the baseline), as text, for page and console."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else form.format(value)

    def row(label: str, of: Callable[[RunTotals], str]) -> tuple[str, str, str]:
        return label, of(run), of(baseline) if baseline else "-"

    return [
        row("nodes", lambda t: str(t.num_nodes)),
        row("steps", lambda t: f"{t.num_steps:,}"),
        row("tokens", lambda t: f"{t.tokens:,}"),
        row("training loss", lambda t: shown(t.loss, "{:.4f}")),
        row("held-out loss", lambda t: shown(t.val_loss, "{:.4f}")),
        row("tokens/s", lambda t: shown(t.tokens_per_s, "{:,.0f}")),
        row("time in steps", lambda t: duration_text(t.seconds)),
        row("dollars", lambda t: f"{t.dollars:.2f}"),
        row("$/M tokens", lambda t: shown(t.dollars_per_mtoken, "{:.4f}")),
        row("sent between nodes", lambda t: decimal(t.raw_bytes)),
        row("of that on the wire", lambda t: decimal(t.wire_bytes)),
        row("bytes saved", lambda t: f"{t.raw_bytes / t.wire_bytes:.1f}x" if t.wire_bytes else "-"),
    ]


def summary_text(run: Path, baseline: Path | None) -> str:
    """Return the comparison of a run with its baseline as lines of text; raises UserError where there is no run."""
    rows = [("", run.name, baseline.name if baseline else "no baseline")]
    rows += comparison(totals(_history(run)), totals(_history(baseline)) if baseline else None)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)


def link_totals(steps: Iterable[StepRecord]) -> tuple[LinkRecord, ...]:
    """Return what each link carried over all of `steps`, with its last canary."""
    sums: dict[tuple[int, int], LinkRecord] = {}
    for link in (link for step in steps for link in step.links):
        key = link.source_stage, link.target_stage
        before = sums.get(key)
        if before is None:
            sums[key] = link
            continue
        last_canary = link if link.cosine is not None else before
        last_seen = link if link.rate_mbps is not None else before
        sums[key] = replace(
            last_canary,
            num_frames=before.num_frames + link.num_frames,
            raw_bytes=before.raw_bytes + link.raw_bytes,
            wire_bytes=before.wire_bytes + link.wire_bytes,
            rate_mbps=last_seen.rate_mbps,
            is_measured=last_seen.is_measured,
            delay_s=last_seen.delay_s,
        )
    return tuple(sums[key] for key in sorted(sums))


def loss_curves(history: History, name: str, colour: str) -> list[Curve]:
    """Return the curves of a run that it has points for: training, and held-out at the tokens seen before it."""
    # An evaluation at step s comes before that step, so it belongs to the tokens of step s - 1.
    tokens_before = {step.step + 1: step.total_tokens for step in history.steps}
    evaluations = [e for e in history.evaluations if e.step == 0 or e.step in tokens_before]
    train = Curve(
        label=f"{name}: training",
        tokens=tuple(step.total_tokens for step in history.steps),
        losses=tuple(step.loss for step in history.steps),
        colour=colour,
        is_validation=False,
    )
    validation = Curve(
        label=f"{name}: held-out",
        tokens=tuple(tokens_before.get(e.step, 0) for e in evaluations),
        losses=tuple(e.loss for e in evaluations),
        colour=colour,
        is_validation=True,
    )
    # What is simulated has no loss at all.
    return [curve for curve in (train, validation) if any(map(math.isfinite, curve.losses))]


def write_report(run: Path, baseline: Path | None, out: Path) -> Path:
    """Write the page about run folder `run`, with `baseline`'s numbers beside it, to `out`, and return `out`.

    Beside it, in `trace_path(out)`, the last steps action by action, for a trace viewer. Raises UserError where there
    is no run, or it has not done a step yet.
    """
    history = _history(run)
    if not history.steps:
        raise UserError(
            f"run {run.name} has not done a step yet", f"see how far it is with `isthmus status {run.name}`"
        )
    base = _history(baseline) if baseline else None
    write_atomic(out, _page(run, history, baseline, base))
    view = read_status(run)
    steps = _with_last(history.steps, view.status)
    trace = trace_document(steps, link_figures(view.plan))
    write_atomic(trace_path(out), json.dumps(trace, allow_nan=False))
    return out


def trace_path(page: Path) -> Path:
    """Return where the trace that belongs to a page lies: each page has its own."""
    return page.with_name(f"{page.name.removesuffix('.html')}.trace.json")


def where_text(run: Path, *, is_last_enough: bool = False) -> str:
    """Return where the time of a run's last steps went and what would help, as text; empty where no step tells.

    `is_last_enough`: of the very last step alone, without reading the whole history.
    """
    view = read_status(run)
    last = view.status.step if view.status else None
    steps = () if last is None else (last,)
    rows, said = _where(steps if is_last_enough else _with_last(_history(run).steps, view.status), view.plan)
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_WHERE_TITLE, *lines, *(f"would help: {words}" for words in said)])


def _where(steps: Sequence[StepRecord], plan: Plan | None) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    telling = telling_steps(steps)
    times = where_time_went(telling, link_figures(plan))
    return where_rows(times, plan), would_help(times, telling, plan)


def _with_last(steps: Sequence[StepRecord], status: Status | None) -> tuple[StepRecord, ...]:
    """Return the steps on record, the last with its actions, which status.json has where the events file has not.

    Each has those of its frames too that were told a step later.
    """
    last = status.step if status else None
    if last is not None and steps and steps[-1].step == last.step and not any(s.actions for s in steps[-1].stages):
        steps = (*steps[:-1], last)
    return with_late_frames(steps)


def _history(run: Path) -> History:
    if not run.is_dir():
        raise UserError(f"there is no run in {run}", "list the runs with `isthmus status`")
    return read_history(RunFolder(run).events)


def _page(run: Path, history: History, baseline: Path | None, base: History | None) -> str:
    view = read_status(run)
    config = _config_text(RunFolder(run).config)
    compared = comparison(totals(history), totals(base) if base else None)
    curves = loss_curves(history, run.name, BLUE)
    if baseline and base:
        curves += loss_curves(base, baseline.name, VERMILLION)
    last = _last_timeline(history, view.status)
    sections = [
        ("Loss", _picture(lambda file: curves_picture(curves, file, "svg"), _LOSS_CAPTION) if curves else ""),
        ("In numbers", _table(("", run.name, baseline.name if baseline else "no baseline"), compared)),
        ("Plan", _plan_table(view.plan)),
        ("Stages", _stage_table(history.steps)),
        ("Links", _link_table(history.steps)),
        (_WHERE_TITLE.capitalize(), _where_section(*_where(_with_last(history.steps, view.status), view.plan))),
        ("One step", _picture(lambda file: timeline_picture(last, file, "svg"), "what each stage did") if last else ""),
        ("Events", _table(("step", "event", "what"), [(f"{e.step:,}", e.name, e.text) for e in history.events])),
        ("Configuration", f"<details><summary>resolved</summary><pre>{escape(config)}</pre></details>"),
    ]
    is_simulated = any(step.is_simulated for step in history.steps)
    kind = "a simulation: nothing was trained" if is_simulated else "an Isthmus run"
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    digest = hashlib.sha256(config.encode()).hexdigest()[:16] if config else "not known"
    unreadable = f" &middot; {history.num_unreadable} unreadable lines passed over" if history.num_unreadable else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(run.name)}</h1><p>{kind} &middot; configuration {digest}{unreadable}</p>"
        f"{body}</body></html>\n"
    )


def _last_timeline(history: History, status: Status | None) -> StepRecord | None:
    # status.json has the actions of the very last step, the events file those of some steps only.
    newest_first = [*([status.step] if status and status.step else []), *reversed(history.steps)]
    return next((step for step in newest_first if any(stage.actions for stage in step.stages)), None)


def _config_text(path: Path) -> str:
    if not path.exists():
        return ""
    with disk_errors(path), open(path, encoding="utf-8", errors="replace") as file:
        return file.read(_MAX_CONFIG_CHARS)


def _plan_table(plan: Plan | None) -> str:
    if plan is None:
        return ""
    codecs = {link.source_stage: f"{link.forward_codec} / {link.backward_codec}" for link in plan.links}
    rows = [
        (
            str(stage.stage),
            stage.node,
            f"{stage.layer_start}-{stage.layer_stop - 1}",
            f"{decimal(stage.memory_bytes)} of {decimal(stage.memory_limit_bytes)}",
            f"{stage.compute_s:.3f} s",
            codecs.get(stage.stage, "-"),
        )
        for stage in plan.stages
    ]
    expected = (
        f"expected {plan.step_s:.3f} s a step, {plan.even_step_s:.3f} s with even stages; {plan.tokens_per_s:,.0f} "
        f"tokens/s; {plan.dollars_per_mtoken:.4f} $/M tokens; {plan.schedule}; {plan.binds} sets the pace"
    )
    header = ("stage", "node", "layers", "memory", "compute a microbatch", "codecs to the next: forward / backward")
    return f"<p>{escape(expected)}</p>{_table(header, rows)}"


def _stage_table(steps: Sequence[StepRecord]) -> str:
    # A simulation does not write down the stages of every step.
    seconds = sum(step.step_s for step in steps if step.stages)
    compute_s: dict[int, float] = defaultdict(float)
    wait_s: dict[int, float] = defaultdict(float)
    peak_bytes: dict[int, int] = defaultdict(int)
    for stage in (stage for step in steps for stage in step.stages):
        compute_s[stage.stage] += stage.compute_s
        wait_s[stage.stage] += stage.wait_s
        peak_bytes[stage.stage] = max(peak_bytes[stage.stage], stage.peak_memory_bytes)
    rows = [
        (
            str(stage),
            f"{compute_s[stage] / seconds:.1%}" if seconds else "-",
            f"{wait_s[stage] / seconds:.1%}" if seconds else "-",
            decimal(peak_bytes[stage]),
        )
        for stage in sorted(compute_s)
    ]
    return _table(("stage", "computes", "waits for frames", "peak memory"), rows)


def _where_section(rows: Sequence[Sequence[str]], said: Sequence[str]) -> str:
    if not rows:
        return ""
    return _table(rows[0], rows[1:]) + "".join(f"<p>Would help: {escape(words)}</p>" for words in said)


def _link_table(steps: Sequence[StepRecord]) -> str:
    rows = [
        (
            f"{link.source_stage} -> {link.target_stage}",
            f"{link.num_frames:,}",
            decimal(link.raw_bytes),
            decimal(link.wire_bytes),
            f"{link.raw_bytes / link.wire_bytes:.1f}x" if link.wire_bytes else "-",
            link.rate_text,
            "-" if link.cosine is None else f"{link.codec}: error {link.relative_error:.4f}, cosine {link.cosine:.5f}",
        )
        for link in link_totals(steps)
    ]
    return _table(("link", "frames", "raw", "on the wire", "saved", "last rate", "last canary"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(draw: Callable[[IO[bytes]], None], caption: str) -> str:
    file = BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
