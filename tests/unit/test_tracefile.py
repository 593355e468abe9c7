"""A run as a trace: every action once, in its stage's process, steps one after the other."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import orchestrator.tracefile as tracefile
from orchestrator.records import StageRecord, StepRecord
from orchestrator.tracefile import trace_document
from tests.played_frames import Line, Rig, played_step
from tests.unit.synthetic_run import make_step

RIG = Rig(
    forward_s=(1.0, 1.0),
    backward_s=(2.0, 2.0),
    num_microbatches=4,
    encode_s=0.1,
    decode_s=0.2,
    line=Line(delay_s=4.0, rate_mbps=8.0, frame_bytes=500_000, room_s=0.3),
    starts=(0.0, -5.0),
)


def events_of(*steps: StepRecord) -> list[dict[str, Any]]:
    """The trace's events after a trip through JSON proper, which has no NaN."""
    return json.loads(json.dumps(trace_document(steps), allow_nan=False))["traceEvents"]


def slices_by_line(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    lines: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lines[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    return lines


def test_every_action_is_a_slice_of_its_stage() -> None:
    steps = [make_step(3), replace(make_step(4), is_simulated=True)]
    document = json.loads(json.dumps(trace_document(steps)))
    slices = [event for event in document["traceEvents"] if event["ph"] == "X"]
    names = {
        event["pid"]: event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"
    }
    assert set(names) == {0, 1}
    assert names[1].startswith("stage 1")
    assert len(slices) == 2 * 2 * 4
    forward = [event for event in slices if event["name"] == "forward" and event["pid"] == 1]
    # The second step begins when the first, of 2 s, is over.
    assert [(event["ts"], event["dur"], event["args"]) for event in forward] == [
        (200_000, 500_000, {"step": 3, "microbatch": 0}),
        (2_200_000, 500_000, {"step": 4, "microbatch": 0}),
    ]
    assert [event["cat"] for event in forward] == ["measured", "simulated"]
    lines = {(event["name"], event["tid"]) for event in slices}
    assert lines == {("wait for activation", 1), ("forward", 0), ("backward", 0), ("commit", 0)}


def test_a_long_run_is_cut_to_its_last_steps(monkeypatch) -> None:
    steps = [make_step(step) for step in range(10)]
    monkeypatch.setattr(tracefile, "MOST_SLICES", 20)
    kept = {event["args"]["step"] for event in trace_document(steps)["traceEvents"] if event["ph"] == "X"}
    assert kept == {8, 9}
    # One step is always there.
    monkeypatch.setattr(tracefile, "MOST_SLICES", 1)
    assert {e["args"]["step"] for e in trace_document(steps)["traceEvents"] if e["ph"] == "X"} == {9}
    assert trace_document([]) == {"displayTimeUnit": "ms", "traceEvents": []}


def test_frames_have_lines_of_their_own_and_nothing_overlaps_on_a_line() -> None:
    events = events_of(played_step(RIG, 3), played_step(RIG, 4))
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    counts: dict[tuple[int, str, str], int] = defaultdict(int)
    for event in events:
        if event["ph"] == "X":
            counts[event["pid"], tracks[event["pid"], event["tid"]], event["name"]] += 1
    for stage, other, sent, came in ((0, 1, "activation", "gradient"), (1, 0, "gradient", "activation")):
        assert counts[stage, f"encodes to stage {other}", f"encode {sent}"] == 8
        assert counts[stage, f"link to stage {other}", sent] == 8
        assert counts[stage, "decodes", f"decode {came}"] == 8
        assert counts[stage, f"held up to stage {other}", "no room at the peer"] == 8
    # Two frames are under way at once: their track has two lanes.
    assert sum(name == "link to stage 1" for (pid, _), name in tracks.items() if pid == 0) >= 2
    for spans in slices_by_line(events).values():
        spans.sort()
        # Times are rounded to a tenth of a microsecond.
        assert all(a[1] <= b[0] + 0.2 for a, b in pairwise(spans))


def test_each_frame_points_at_the_action_that_takes_it() -> None:
    events = events_of(played_step(RIG))
    arrows = {phase: {e["id"]: e for e in events if e["ph"] == phase} for phase in "sf"}
    assert len(arrows["s"]) == 8
    assert arrows["s"].keys() == arrows["f"].keys()
    slices = [e for e in events if e["ph"] == "X"]

    def slice_at(arrow: dict[str, Any]) -> dict[str, Any]:
        (found,) = (e for e in slices if (e["pid"], e["tid"], e["ts"]) == (arrow["pid"], arrow["tid"], arrow["ts"]))
        return found

    for number, start in arrows["s"].items():
        frame, taken = slice_at(start), slice_at(arrows["f"][number])
        assert frame["args"]["microbatch"] == taken["args"]["microbatch"]
        assert (frame["name"], taken["name"]) in {("activation", "forward"), ("gradient", "backward")}
        assert frame["pid"] != taken["pid"]
        # On one clock: nothing is taken before it was sent, though the stages' own clocks are 5 s apart.
        assert frame["ts"] < taken["ts"]


def test_stages_without_frames_are_each_on_their_own_clock() -> None:
    def first_forward(events: list[dict[str, Any]]) -> dict[int, float]:
        return {e["pid"]: e["ts"] for e in reversed(events) if e["name"] == "forward"}

    record = played_step(RIG)
    bare = replace(record, stages=tuple(replace(s, frames=make_step(0).stages[0].frames) for s in record.stages))
    first = {s.stage: next(a.start_s for a in s.actions if a.name == "F") for s in record.stages}
    assert first_forward(events_of(bare)) == {stage: pytest.approx(at_s * 1e6) for stage, at_s in first.items()}
    # Stage 1 began 5 s before stage 0.
    together = first_forward(events_of(record))
    assert together == {0: pytest.approx(5e6 + first[0] * 1e6), 1: pytest.approx(first[1] * 1e6)}


def test_what_is_not_a_number_is_left_out_and_the_rest_is_there() -> None:
    record = played_step(RIG)
    (first, second) = record.stages

    def broken(stage: StageRecord) -> StageRecord:
        (action, *actions), (sent, *others) = stage.actions, stage.frames.sent
        actions = (replace(action, start_s=math.nan), *actions[:-1], replace(actions[-1], end_s=math.inf))
        sent = replace(sent, encode_end_s=math.nan, pushed_s=math.nan, settled_s=math.nan)
        return replace(stage, actions=actions, frames=replace(stage.frames, sent=(sent, *others)))

    odd = [
        replace(record, stages=(broken(first), second)),
        replace(record, step_s=math.nan, step=6),
        replace(record, step_s=math.inf, step=7),
        replace(record, step=8),
    ]
    events = events_of(*odd)
    whole = len([e for e in events_of(record) if e["ph"] == "X"])
    by_step: dict[int, list[float]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            by_step[event["args"]["step"]].append(event["ts"])
    # Two actions, one frame encoded and under way.
    assert [len(by_step[step]) for step in (5, 6, 7, 8)] == [whole - 4, whole, whole, whole]
    # Steps whose length is no number still follow one another.
    assert [min(by_step[step]) for step in (6, 7, 8)] == sorted(min(by_step[step]) for step in (6, 7, 8))
    assert min(by_step[7]) > min(by_step[6])


def test_a_frame_whose_receipt_came_after_the_report_ends_where_it_arrived() -> None:
    record = played_step(replace(RIG, starts=()))
    first, second = record.stages
    *others, last = first.frames.sent
    late = replace(first.frames, sent=(*others, replace(last, settled_s=math.nan)))
    events = events_of(replace(record, stages=(replace(first, frames=late), second)))
    (arrived,) = (f for f in second.frames.arrived if f.microbatch == last.microbatch)
    (sent,) = (
        e for e in events if e["ph"] == "X" and e["name"] == "activation" and e["args"]["microbatch"] == last.microbatch
    )
    assert sent["ts"] + sent["dur"] == pytest.approx(arrived.whole_s * 1e6)


def test_frames_count_towards_the_most_slices(monkeypatch) -> None:
    steps = [played_step(RIG, step) for step in range(5)]
    monkeypatch.setattr(tracefile, "MOST_SLICES", sum(len(s.actions) + 2 * len(s.frames) for s in steps[0].stages) * 2)
    assert {e["args"]["step"] for e in trace_document(steps)["traceEvents"] if e["ph"] == "X"} == {3, 4}
