"""A run as a trace: every action once, in its stage's process, steps one after the other."""

import json
from dataclasses import replace

import orchestrator.tracefile as tracefile
from orchestrator.tracefile import trace_document
from tests.unit.synthetic_run import make_step


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
