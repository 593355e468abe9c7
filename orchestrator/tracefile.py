"""A run's last steps as a trace that chrome://tracing and ui.perfetto.dev open: a process a stage, a slice an action.

PURE. The Trace Event Format's complete events ("ph": "X"), in microseconds. Steps follow one another by their lengths;
within a step each stage's actions are on that node's own clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from actors.spec import WAITS
from orchestrator.records import StepRecord

# A viewer takes some hundred thousand slices with ease.
MOST_SLICES = 200_000
# Waits have a line of their own, for on CUDA they may overlap with compute.
_COMPUTING, _WAITING = 0, 1
_NAMES = {
    "F": "forward",
    "B": "backward",
    "W": "weight gradients",
    "C": "commit",
    "S": "exchange of gradients",
    "wF": "wait for activation",
    "wB": "wait for gradient",
}


def trace_document(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Return the trace of as many of the last steps as `MOST_SLICES` holds, ready for JSON."""
    kept: list[StepRecord] = []
    slices = 0
    for step in reversed(steps):
        slices += sum(len(stage.actions) for stage in step.stages)
        if kept and slices > MOST_SLICES:
            break
        kept.append(step)
    kept.reverse()
    return {"displayTimeUnit": "ms", "traceEvents": [*_lines(kept), *_slices(kept)]}


def _lines(steps: Sequence[StepRecord]) -> Iterator[dict[str, Any]]:
    """Yield the names of processes and their two lines."""
    nodes: dict[int, str] = {}
    for step in steps:
        nodes |= {stage.stage: stage.node for stage in step.stages}
    for stage, node in sorted(nodes.items()):
        name = f"stage {stage}" + (f" ({node})" if node else "")
        yield {"ph": "M", "name": "process_name", "pid": stage, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": stage, "args": {"sort_index": stage}}
        for line, words in ((_COMPUTING, "computes"), (_WAITING, "waits")):
            yield {"ph": "M", "name": "thread_name", "pid": stage, "tid": line, "args": {"name": words}}


def _slices(steps: Sequence[StepRecord]) -> Iterator[dict[str, Any]]:
    start_s = 0.0
    for step in steps:
        for stage in step.stages:
            for action in stage.actions:
                yield {
                    "ph": "X",
                    "name": _NAMES.get(action.name, action.name),
                    "cat": "simulated" if step.is_simulated else "measured",
                    "pid": stage.stage,
                    "tid": _WAITING if action.name in WAITS else _COMPUTING,
                    "ts": round((start_s + action.start_s) * 1e6, 1),
                    "dur": round((action.end_s - action.start_s) * 1e6, 1),
                    "args": {"step": step.step, "microbatch": action.microbatch},
                }
        start_s += step.step_s
