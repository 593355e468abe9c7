"""A step's frames in what a run writes down: kept with its timeline, and never so many that nobody can read it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

import orchestrator.events as events
from actors.frame_times import FrameTimes
from orchestrator.events import EventsFile, decode, encode, read_history, with_few_frames
from orchestrator.late_frames import with_late_frames
from orchestrator.records import StageRecord, StepRecord
from orchestrator.runfolder import RunFolder
from orchestrator.status import StatusFile, read_status
from orchestrator.where import telling_steps
from tests.played_frames import Line, Rig, played_step
from tests.unit.synthetic_run import make_step

RIG = Rig(forward_s=(1.0, 1.0), backward_s=(2.0, 2.0), line=Line(delay_s=0.5, room_s=0.1))


def num_frames(record: StepRecord | None) -> int:
    assert record is not None
    return sum(len(stage.frames) for stage in record.stages)


def test_frames_come_back_from_a_file_as_they_went_in() -> None:
    record = played_step(RIG)
    first = record.stages[0]
    # What had not happened yet is null in the file.
    late = replace(first.frames.sent[-1], settled_s=math.nan)
    first = replace(first, frames=replace(first.frames, sent=(*first.frames.sent[:-1], late)))
    record = replace(record, stages=(first, record.stages[1]))
    assert first.frames.blocked
    assert encode(late)["settled_s"] is None
    assert decode(StepRecord, encode(record)) == record


def test_records_of_before_there_were_frames_are_read_and_tell_nothing() -> None:
    old = encode(make_step(3))
    for stage in old["stages"]:
        del stage["frames"], stage["step_s"]
    record = decode(StepRecord, old)
    assert record == make_step(3)
    assert [(stage.step_s, stage.frames) for stage in record.stages] == 2 * [(None, FrameTimes())]
    assert telling_steps([record]) == ()


def test_the_events_file_keeps_frames_with_the_timelines_it_keeps(tmp_path: Path) -> None:
    file = EventsFile(tmp_path / "events.jsonl", timeline_every=10)
    for step in range(8, 11):
        file.step(played_step(RIG, step))
    file.finish(0)
    kept = read_history(tmp_path / "events.jsonl").steps
    assert [num_frames(record) for record in kept] == [0, num_frames(played_step(RIG)), 0]
    assert telling_steps(kept) == (played_step(RIG, 9),)


def test_a_step_of_too_many_frames_is_kept_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    record = played_step(RIG)
    monkeypatch.setattr(events, "_MOST_FRAMES", num_frames(record))
    assert with_few_frames(record) is record
    monkeypatch.setattr(events, "_MOST_FRAMES", num_frames(record) - 1)
    assert num_frames(with_few_frames(record)) == 0
    assert [stage.actions for stage in with_few_frames(record).stages] == [stage.actions for stage in record.stages]


def test_as_many_frames_as_may_be_kept_fit_a_line_and_a_status(tmp_path: Path) -> None:
    (stage, _) = played_step(RIG).stages
    times = replace(stage.frames.sent[0], encode_start_s=123.123456, encode_end_s=123.234567, pushed_s=123.345678)
    frames = FrameTimes(sent=(replace(times, settled_s=123.456789),) * events._MOST_FRAMES)
    crowded: StageRecord = replace(stage, frames=frames)
    record = replace(make_step(9), stages=(crowded,))
    folder = RunFolder.open(tmp_path, "demo")
    for sink in (EventsFile(folder.events, timeline_every=1), StatusFile(folder, lambda: 0.0)):
        sink.step(record)
        sink.finish(0)
    assert read_history(folder.events).steps == (record,)
    status = read_status(folder.path).status
    assert status is not None
    assert status.step == record


def test_status_has_the_last_steps_frames_only_once_the_run_has_ended(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "demo")
    sink = StatusFile(folder, lambda: 1000.0)
    sink.step(played_step(RIG))
    status = read_status(folder.path).status
    assert status is not None
    assert num_frames(status.step) == 0
    assert status.step is not None
    assert status.step.stages[0].actions
    sink.finish(0)
    status = read_status(folder.path).status
    assert status is not None
    assert status.step == played_step(RIG)


def with_late(record: StepRecord, late: FrameTimes) -> StepRecord:
    first, *others = record.stages
    return replace(record, stages=(replace(first, late_frames=late), *others))


def cut_short(record: StepRecord) -> tuple[StepRecord, FrameTimes]:
    """A step whose first stage reported before its last two frames were through, and what it tells of them later."""
    first, *others = record.stages
    *known, under_way, last = first.frames.sent
    early = replace(under_way, settled_s=math.nan)
    *blocks, held = first.frames.blocked
    frames = replace(first.frames, sent=(*known, early), blocked=tuple(blocks))
    late = FrameTimes(sent=(under_way, last), blocked=(held,))
    return replace(record, stages=(replace(first, frames=frames), *others)), late


def test_what_came_late_is_put_where_it_belongs() -> None:
    short, late = cut_short(played_step(RIG, 4))
    after = with_late(make_step(5), late)
    whole, same = with_late_frames([short, after])
    assert whole == played_step(RIG, 4)
    assert same == after
    # Only from the very next step, and only into frames that were kept.
    assert with_late_frames([short, replace(after, step=6)])[0] == short
    assert with_late_frames([make_step(4), after])[0] == make_step(4)
    assert with_late_frames([short]) == (short,)
    assert with_late_frames([]) == ()


def test_the_events_file_keeps_what_came_late_of_the_steps_it_keeps(tmp_path: Path) -> None:
    file = EventsFile(tmp_path / "events.jsonl", timeline_every=10)
    short, late = cut_short(played_step(RIG, 9))
    for record in (played_step(RIG, 8), with_late(short, late), with_late(played_step(RIG, 10), late)):
        file.step(record)
    file.step(with_late(played_step(RIG, 11), late))
    file.finish(0)
    before, kept, after, last = read_history(tmp_path / "events.jsonl").steps
    assert with_late_frames([before, kept, after, last])[1] == played_step(RIG, 9)
    late_frames = [record.stages[0].late_frames for record in (before, kept, after, last)]
    assert late_frames == [FrameTimes(), FrameTimes(), late, FrameTimes()]
    assert (num_frames(before), num_frames(after)) == (0, 0)
