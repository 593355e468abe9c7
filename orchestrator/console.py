"""A run as lines of text: one live line on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from actors.spec import Plan
from orchestrator.events import is_due
from orchestrator.records import EvalRecord, EventRecord, LinkRecord, StepRecord

_BAD_NEWS = frozenset(
    {"failed", "node_lost", "save_failed", "retried", "skipped", "warned", "checkpoint_bad", "stepped_down"}
)
# A line has room for so many.
_MAX_LINKS_SHOWN = 4


def duration_text(seconds: float) -> str:
    """Return seconds as h:mm:ss, or "-" where they are not known."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


def wire_text(raw_bytes: int, wire_bytes: int) -> str:
    """Return what links carried of what was to be sent: "12.3 MB of 24.6 MB (2.0x saved)"."""
    saved = f" ({raw_bytes / wire_bytes:.1f}x saved)" if wire_bytes else ""
    return f"{decimal(wire_bytes)} of {decimal(raw_bytes)}{saved}"


def links_text(links: Sequence[LinkRecord]) -> str:
    """Return what each link carried, both ways, wire of raw: "MB 0-1 1.1/8.4, 1-2 1.1/8.4"; the heaviest of many."""
    totals: dict[tuple[int, int], tuple[int, int]] = {}
    for link in links:
        ends = min(link.source_stage, link.target_stage), max(link.source_stage, link.target_stage)
        wire_bytes, raw_bytes = totals.get(ends, (0, 0))
        totals[ends] = wire_bytes + link.wire_bytes, raw_bytes + link.raw_bytes
    heaviest = sorted(totals, key=lambda ends: -totals[ends][0])[:_MAX_LINKS_SHOWN]
    shown = [f"{a}-{b} {totals[a, b][0] / 1e6:.1f}/{totals[a, b][1] / 1e6:.1f}" for a, b in sorted(heaviest)]
    return f"MB {', '.join(shown)}"


def canary_text(links: Sequence[LinkRecord]) -> str:
    """Return the worst canary of a step: "canary 0>1 hq4 cosine 0.9931"; empty where none was read."""
    read = [link for link in links if link.cosine is not None]
    if not read:
        return ""
    worst = min(read, key=lambda link: link.cosine if link.cosine is not None else 1.0)
    return f"canary {worst.source_stage}>{worst.target_stage} {worst.codec} cosine {worst.cosine:.4f}"


def stage_text(stage: int, plan: Plan | None) -> str:
    """Return "stage 2 (node-1)", or without the node where no plan is known."""
    return f"stage {stage} ({plan.stages[stage].node})" if plan and stage < len(plan.stages) else f"stage {stage}"


def step_line(record: StepRecord, plan: Plan | None) -> str:
    """Return one step as a line of fixed-width fields; `step` counts the steps that are done."""
    width = len(str(record.num_steps))
    fields = [
        f"step {record.step + 1:>{width}}/{record.num_steps}",
        f"loss {record.loss:7.4f}{' SKIPPED' if record.skipped else ''}",
        f"tok/s {record.tokens_per_s:>9,.0f}",
        f"eta {duration_text(record.eta_s):>8}",
    ]
    if record.stages:
        slowest = record.slowest
        fields.append(f"slowest {stage_text(slowest.stage, plan)} idle {slowest.idle_share:4.0%}")
    if record.links:
        fields.append(f"wire {wire_text(record.raw_bytes, record.wire_bytes)}")
        fields.append(links_text(record.links))
    if canary := canary_text(record.links):
        fields.append(canary)
    return "  ".join(fields)


def evaluation_line(record: EvalRecord) -> str:
    """Return one evaluation as a line."""
    return (
        f"eval step {record.step}  val_loss {record.loss:.4f}  {record.num_targets:,} tokens in {record.seconds:.1f} s"
    )


def event_line(record: EventRecord) -> str:
    """Return one event as a line."""
    return f"{record.name} step {record.step}  {record.text}"


class ConsoleSink:
    """The sink that shows a run on a terminal as one live line, elsewhere as a line every `log_every` steps."""

    def __init__(self, console: Console, log_every: int) -> None:
        self._console = console
        self._log_every = log_every
        self._plan: Plan | None = None
        self._live: Live | None = None

    def start(self, config: Mapping[str, object], plan: Plan) -> None:
        self._plan = plan
        expected = f"{plan.tokens_per_s:,.0f} tokens/s expected, {plan.binds} sets the pace"
        self._print(f"plan {len(plan.stages)} stages, schedule {plan.schedule}, {expected}")
        if self._console.is_terminal:
            # No thread of its own: the line changes when a step is done, and other prints go above it.
            live = Live(console=self._console, auto_refresh=False)
            live.start()
            self._live = live

    def step(self, record: StepRecord) -> None:
        line = step_line(record, self._plan)
        if self._live:
            self._live.update(Text(line, style="bold"), refresh=True)
        elif is_due(record, self._log_every):
            self._print(line)

    def evaluation(self, record: EvalRecord) -> None:
        self._print(evaluation_line(record), style="cyan")

    def event(self, record: EventRecord) -> None:
        # What ends the run is the verb's to say, with its remedy.
        if record.name == "failed":
            return
        self._print(event_line(record), style="yellow" if record.name in _BAD_NEWS else "")

    def finish(self, exit_code: int) -> None:
        if self._live:
            self._live.stop()

    def _print(self, line: str, style: str = "") -> None:
        # As Text: a bracket in an error's message is not markup.
        self._console.print(Text(line, style=style), soft_wrap=True, highlight=False)
