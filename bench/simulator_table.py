"""What bench.simulator found, as tables for people: every run beside what was foreseen of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_HEADER = (
    "hosts",
    "Mbit/s, ms",
    "codecs",
    "schedule, layers",
    "real step, s",
    "simulated",
    "replayed",
    "planner",
    "tensors simulated / real, MB",
)


def simulator_tables(measured: Mapping[str, Any]) -> str:
    """Return Markdown: the runs that are judged, then those that costs were fitted to, then the rivals of a choice."""
    parts = [_table(_HEADER, map(_row, measured["cases"]))] if "cases" in measured else []
    if measured.get("calibrating"):
        parts += ["Fitted to:", _table(_HEADER, map(_row, measured["calibrating"]))]
    if "rivalry" in measured:
        parts += [_choice(measured["rivalry"])]
    return "\n\n".join(parts) + "\n"


def _choice(rivalry: Mapping[str, Any]) -> str:
    chosen = rivalry["chosen"]
    again_s: dict[str, float] = rivalry["again_s"]
    words = {"chosen": f"**chosen: {chosen['schedule']}, {list(chosen['layers'])}**"}
    once_s: dict[str, float] = rivalry["rivals_s"]
    # The fastest in turns first, then the fastest of the others.
    ranked = sorted({**once_s, **again_s}, key=lambda name: (name not in again_s, {**once_s, **again_s}[name]))
    rows = [(words.get(name, name), _seconds(once_s.get(name)), _seconds(again_s.get(name))) for name in ranked]
    return _table((f"plan, on {'+'.join(map(str, rivalry['hosts']))} of a core", "step once, s", "in turns, s"), rows)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    trial = row["trial"]
    route = trial["route"]
    memory = zip(row["simulated_bytes"], row["tensor_bytes"], strict=True)
    return (
        "+".join(f"{share:g}" for share in row["hosts"]),
        f"{route['rate_mbps']:g}, {route['delay_ms']:g}",
        "/".join(dict.fromkeys(trial["codecs"])),
        f"{row['schedule']}, {' '.join(map(str, row['layers']))}",
        f"{row['real_median_s']:.2f}",
        f"{row['simulated_s']:.2f} ({row['error']:+.1%})",
        f"{statistics.median(row['replayed_errors']):+.1%}",
        f"{row['planned_s']:.2f} ({row['planned_error']:+.1%})",
        ", ".join(f"{foreseen / 1e6:.1f} / {taken / 1e6:.1f}" for foreseen, taken in memory),
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
