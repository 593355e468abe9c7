"""The events file, events.jsonl: one JSON line a record, written as it happens, read back by report and status.

Also the JSON of the records themselves. A crash may tear the last line and a resumed run does steps again, so the
reader skips what it cannot read and keeps, of steps done twice, the later.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin, get_type_hints

from actors.frame_times import FrameTimes
from orchestrator.records import EvalRecord, EventRecord, StepRecord
from orchestrator.runfolder import disk_errors

Record = StepRecord | EvalRecord | EventRecord

_KINDS: dict[str, type[Record]] = {"step": StepRecord, "evaluation": EvalRecord, "event": EventRecord}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_MAX_LINE_BYTES = 16_777_216
# A frame takes some 140 bytes of JSON; a step that has more frames than this is kept without them.
_MOST_FRAMES = 30_000


def is_due(record: StepRecord, every: int) -> bool:
    """Return whether something done every so many steps is done for this one: the first, each `every`-th, the last."""
    num_done = record.step + 1
    return record.step == 0 or num_done % every == 0 or num_done == record.num_steps


def encode(value: object) -> Any:
    """Return a frozen dataclass as JSON's own types; a float that is not finite becomes null."""
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: Any, value: object) -> Any:
    """Return `value`, as `encode` made it, as an instance of `kind`; raises ValueError where it does not fit.

    Knows dataclasses, tuples of one type, optional types, literals, and int, float, str and bool. Keys that `kind` does
    not have are passed over: a newer Isthmus may have written them.
    """
    if is_dataclass(kind):
        return _decode_dataclass(kind, value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item) for item in value)
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else decode(inner, value)
    if origin is Literal and value in arguments:
        return value
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise ValueError(f"{str(value)[:40]!r} is not a {getattr(kind, '__name__', kind)}")


def _decode_dataclass(kind: Any, value: object) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"a {kind.__name__} is an object, not a {type(value).__name__}")
    arguments = {}
    for name, (hint, is_required) in _shape(kind).items():
        if name in value:
            arguments[name] = decode(hint, value[name])
        elif is_required:
            raise ValueError(f"a {kind.__name__} has a {name}")
    return kind(**arguments)


@cache
def _shape(kind: type) -> dict[str, tuple[Any, bool]]:
    hints = get_type_hints(kind)
    return {
        field.name: (hints[field.name], field.default is MISSING and field.default_factory is MISSING)
        for field in fields(kind)
    }


class EventsFile:
    """The sink that appends every record to events.jsonl, a line at a time, each with its `type`.

    Only every `timeline_every`-th step keeps its stages' actions and frames: they would be nine tenths of the file.
    Raises DiskFull.
    """

    def __init__(self, path: Path, timeline_every: int) -> None:
        self._path = path
        self._timeline_every = timeline_every
        # The last step that was written with its frames.
        self._kept_step = -2
        with disk_errors(path):
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by `finish`
            if _is_torn(self._file):
                self._file.write(b"\n")

    def start(self, config: object, plan: object) -> None:
        """Nothing: config.yaml and plan.json hold them."""

    def step(self, record: StepRecord) -> None:
        is_kept = is_due(record, self._timeline_every)
        kept = with_few_frames(record) if is_kept else without_actions(record)
        # The rest of the frames of a step that was kept.
        is_next = self._kept_step + 1 == record.step
        kept = with_late_of(kept, with_few_frames(record) if is_next else without_frames(record))
        if is_kept:
            self._kept_step = record.step
        self._append(kept)

    def evaluation(self, record: EvalRecord) -> None:
        self._append(record)

    def event(self, record: EventRecord) -> None:
        self._append(record)

    def finish(self, exit_code: int) -> None:
        with disk_errors(self._path):
            self._file.close()

    def _append(self, record: Record) -> None:
        line = json.dumps({"type": _NAMES[type(record)], **encode(record)}, separators=(",", ":"), allow_nan=False)
        with disk_errors(self._path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()


def _is_torn(file: BinaryIO) -> bool:
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def without_actions(record: StepRecord) -> StepRecord:
    """Return the record without the times of single actions and frames."""
    bare = without_frames(record)
    return replace(bare, stages=tuple(replace(stage, actions=()) for stage in bare.stages))


def without_frames(record: StepRecord) -> StepRecord:
    """Return the record without the times of single frames, of this step and of the one before."""
    none = FrameTimes()
    return replace(record, stages=tuple(replace(s, frames=none, late_frames=none) for s in record.stages))


def with_late_of(record: StepRecord, whole: StepRecord) -> StepRecord:
    """Return the record with the late frames of `whole`, which is the same one with all of them."""
    pairs = zip(record.stages, whole.stages, strict=True)
    return replace(record, stages=tuple(replace(stage, late_frames=full.late_frames) for stage, full in pairs))


def with_few_frames(record: StepRecord) -> StepRecord:
    """Return the record, without the times of its frames where they would make a file that nobody can read."""
    num_frames = sum(len(stage.frames) + len(stage.late_frames) for stage in record.stages)
    return record if num_frames <= _MOST_FRAMES else without_frames(record)


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run came to: steps and evaluations that count, in order, and every event."""

    steps: tuple[StepRecord, ...] = ()
    evaluations: tuple[EvalRecord, ...] = ()
    events: tuple[EventRecord, ...] = ()
    num_unreadable: int = 0


def read_history(path: Path) -> History:
    """Return what an events file tells; a file that is not there tells nothing."""
    return fold_history(_read_records(path)) if path.exists() else History()


def fold_history(records: Iterable[Record | None]) -> History:
    """Return the history of `records` in the order they were made; None stands for a line that cannot be read.

    A step that was done before takes back what was recorded of it and of all later ones: the run went back to a
    checkpoint there.
    """
    steps: list[StepRecord] = []
    evaluations: list[EvalRecord] = []
    events: list[EventRecord] = []
    num_unreadable = 0
    for record in records:
        match record:
            case StepRecord():
                _drop_from(steps, record.step)
                _drop_from(evaluations, record.step + 1)
                steps.append(record)
            case EvalRecord():
                _drop_from(steps, record.step)
                _drop_from(evaluations, record.step)
                evaluations.append(record)
            case EventRecord():
                events.append(record)
            case None:
                num_unreadable += 1
    return History(
        steps=tuple(steps), evaluations=tuple(evaluations), events=tuple(events), num_unreadable=num_unreadable
    )


def _drop_from(records: list[StepRecord] | list[EvalRecord], step: int) -> None:
    while records and records[-1].step >= step:
        records.pop()


def _read_records(path: Path) -> Iterator[Record | None]:
    with open(path, "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_MAX_LINE_BYTES)
            if line.strip():
                yield _parse(line)


def _parse(line: bytes) -> Record | None:
    try:
        content = json.loads(line)
        return decode(_KINDS[content["type"]], content)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
