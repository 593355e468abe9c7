"""When nodes come and go: read from the public formats of spot traces, or drawn from how often nodes are lost.

    [{"Time": 630, "GPUs": 9}, ...]         seconds and how many there are (Oobleck's and ReCycle's traces)
    2021-12-11, 11:15:50, 54                a moment and how many there are (SkyPilot's availability traces)
    480000,add,node1                        milliseconds, and which node comes or is removed (Bamboo's traces)

PURE but for `read_trace`. Files are bounded in size, lines and numbers before anything is made of them.
"""

from __future__ import annotations

import json
import math
import re
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from actors.errors import UserError
from orchestrator.planner.problem import Floats

MAX_TRACE_BYTES = 16_777_216
_MAX_LINES, _MAX_COUNT = 1_000_000, 1_000_000
# A hundred years.
_MAX_SECONDS = 3.2e9
_MOMENT = re.compile(r"\s*(\d{4}-\d\d-\d\d),\s*(\d\d:\d\d:\d\d),\s*(\d{1,9})\s*")
_EVENT = re.compile(r"\s*(\d{1,15})\s*,\s*(add|remove)\s*,\s*([^,\s]{1,100})\s*")
_FORMATS = (
    'give a JSON list of {"Time": seconds, "GPUs": count}, lines of "date, time, count", or lines of '
    '"milliseconds,add,node" and "milliseconds,remove,node"'
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One node comes or goes; `node` is an index into the fleet."""

    time_s: float
    node: int
    joins: bool


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Which nodes are there at first, and what changes until the end, in order of time."""

    first: tuple[int, ...]
    changes: tuple[Change, ...]
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How many nodes there are from each moment on, from 0 s on, in order of time."""

    times_s: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Named:
    """Which node of the trace comes (True) or goes (False), in order of time, from 0 s on."""

    events: tuple[tuple[float, str, bool], ...]


def read_trace(path: Path) -> Counted | Named:
    """Return what a trace file says; raises UserError where there is none, or it is none of the known formats."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TRACE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "name a trace file") from error
    if len(content) > MAX_TRACE_BYTES:
        raise UserError(f"{path} is larger than {MAX_TRACE_BYTES} bytes", "cut the trace to the time that you need")
    return parse_trace(content, str(path))


def parse_trace(content: bytes, name: str) -> Counted | Named:
    """Return what a trace says; raises UserError, naming the line, where it is none of the known formats."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text", _FORMATS) from error
    if text.lstrip().startswith("["):
        return _parse_json(text, name)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or len(lines) > _MAX_LINES:
        raise UserError(f"{name} has {len(lines):,} lines", f"{_FORMATS}; 1 to {_MAX_LINES:,} of them")
    if _EVENT.fullmatch(lines[0][1]):
        return _parse_events(lines, name)
    return _parse_moments(lines, name)


def lay_on(told: Counted | Named, num_nodes: int, *, seed: int) -> Trace:
    """Return what the trace means for a fleet of so many nodes; what is beyond them is passed over.

    A trace that only counts does not say who goes: that is drawn from `seed`; who comes is the first in the fleet's
    order that is away. A trace's own node stands for the first of the fleet that is away when it comes.
    """
    if isinstance(told, Named):
        return _lay_events(told, num_nodes)
    rng = np.random.default_rng(seed)
    here, away = list(range(min(told.counts[0], num_nodes))), list(range(min(told.counts[0], num_nodes), num_nodes))
    first = tuple(here)
    changes: list[Change] = []
    for time_s, count in zip(told.times_s[1:], told.counts[1:], strict=True):
        while len(here) > min(count, num_nodes):
            node = here.pop(int(rng.integers(len(here))))
            insort(away, node)
            changes.append(Change(time_s=time_s, node=node, joins=False))
        while len(here) < min(count, num_nodes):
            node = away.pop(0)
            insort(here, node)
            changes.append(Change(time_s=time_s, node=node, joins=True))
    return Trace(first=first, changes=tuple(changes), duration_s=told.times_s[-1])


def drawn_trace(losses_per_hour_N: Floats | Sequence[float], *, duration_s: float, away_s: float, seed: int) -> Trace:
    """Return lives of exponential length, each node's by its own rate, and absences of exponential length."""
    rates_N = np.asarray(losses_per_hour_N, dtype=np.float64) / 3600
    if not (np.isfinite(rates_N).all() and (rates_N >= 0).all() and away_s > 0 and math.isfinite(duration_s)):
        raise UserError("a node's losses an hour are negative or not finite", "give each node 0 or more")
    rng = np.random.default_rng(seed)
    # One clock for each node, all forward by a life and an absence at a time.
    clock_N = np.zeros(len(rates_N))
    changes: list[tuple[float, int, bool]] = []
    going_N = rates_N > 0
    while going_N.any():
        nodes = np.flatnonzero(going_N)
        lost_s = clock_N[nodes] + rng.exponential(1 / rates_N[nodes])
        back_s = lost_s + rng.exponential(away_s, len(nodes))
        changes += [(float(t), int(n), False) for t, n in zip(lost_s, nodes, strict=True) if t < duration_s]
        changes += [(float(t), int(n), True) for t, n in zip(back_s, nodes, strict=True) if t < duration_s]
        clock_N[nodes] = back_s
        going_N[nodes] = back_s < duration_s
    changes.sort()
    return Trace(
        first=tuple(range(len(rates_N))),
        changes=tuple(Change(time_s=t, node=n, joins=joins) for t, n, joins in changes),
        duration_s=duration_s,
    )


def _parse_json(text: str, name: str) -> Counted:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error}", _FORMATS) from error
    if not isinstance(rows, list) or not 0 < len(rows) <= _MAX_LINES:
        raise UserError(f"{name} holds no list of 1 to {_MAX_LINES:,} rows", _FORMATS)
    pairs: list[tuple[float, int]] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not _is_row(row.get("Time"), row.get("GPUs")):
            raise UserError(f"row {number} of {name} is {str(row)[:60]!r}", _FORMATS)
        pairs.append((float(row["Time"]), row["GPUs"]))
    return _counted(pairs)


def _is_row(time_s: object, count: object) -> bool:
    is_time = isinstance(time_s, int | float) and not isinstance(time_s, bool) and 0 <= time_s <= _MAX_SECONDS
    return is_time and isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= _MAX_COUNT


def _parse_moments(lines: Sequence[tuple[int, str]], name: str) -> Counted:
    pairs: list[tuple[float, int]] = []
    for number, line in lines:
        found = _MOMENT.fullmatch(line)
        try:
            if found is None:
                raise ValueError
            # Of one place, whatever its time zone: only differences count.
            moment_s = (datetime.fromisoformat(f"{found[1]}T{found[2]}") - datetime(1970, 1, 1)).total_seconds()
        except ValueError as error:
            raise UserError(f"line {number} of {name} is {line[:60]!r}", _FORMATS) from error
        if int(found[3]) > _MAX_COUNT:
            raise UserError(f"line {number} of {name} counts {found[3]} nodes", f"{_MAX_COUNT:,} at most")
        pairs.append((moment_s, int(found[3])))
    return _counted(pairs)


def _counted(pairs: list[tuple[float, int]]) -> Counted:
    """Return the counts in order of time, from 0 s on: traces were joined from windows that overlap."""
    ordered = sorted(pairs, key=lambda pair: pair[0])
    begin_s = ordered[0][0]
    return Counted(
        times_s=tuple(time_s - begin_s for time_s, _ in ordered), counts=tuple(count for _, count in ordered)
    )


def _parse_events(lines: Sequence[tuple[int, str]], name: str) -> Named:
    events: list[tuple[float, str, bool]] = []
    for number, line in lines:
        found = _EVENT.fullmatch(line)
        if found is None or int(found[1]) / 1000 > _MAX_SECONDS:
            raise UserError(f"line {number} of {name} is {line[:60]!r}", _FORMATS)
        events.append((int(found[1]) / 1000, found[3], found[2] == "add"))
    events.sort(key=lambda event: event[0])
    begin_s = events[0][0]
    return Named(events=tuple((time_s - begin_s, node, joins) for time_s, node, joins in events))


def _lay_events(told: Named, num_nodes: int) -> Trace:
    stands_for: dict[str, int] = {}
    away = list(range(num_nodes))
    first: list[int] = []
    changes: list[Change] = []
    for time_s, name, joins in told.events:
        if joins and name not in stands_for and away:
            node = stands_for[name] = away.pop(0)
            if time_s == 0:
                first.append(node)
            else:
                changes.append(Change(time_s=time_s, node=node, joins=True))
        elif not joins and name in stands_for:
            node = stands_for.pop(name)
            insort(away, node)
            changes.append(Change(time_s=time_s, node=node, joins=False))
    return Trace(first=tuple(first), changes=tuple(changes), duration_s=told.events[-1][0])
