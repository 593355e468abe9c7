"""Records reach every sink: console lines, the events file, W&B offline, Prometheus."""

from __future__ import annotations

import json
import math
import queue
import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from wandb.errors import CommError

from actors.errors import ConfigError, DiskFull
from actors.spec import Plan
from orchestrator import tracking
from orchestrator.console import ConsoleSink, links_text, step_line
from orchestrator.events import EventsFile, decode, encode, fold_history, is_due, read_history, without_actions
from orchestrator.records import EvalRecord, EventRecord, StepRecord
from orchestrator.runfolder import RunFolder
from orchestrator.tracking import PrometheusSink, Tracker, TrackingConfig, WandbSink, open_tracker, step_scalars
from tests.unit.synthetic_run import make_plan, make_step


def make_eval(step: int, loss: float = 3.0) -> EvalRecord:
    return EvalRecord(step=step, loss=loss, num_targets=512, seconds=1.5)


# The console.


def console_text(*, is_terminal: bool, log_every: int = 1, width: int = 160) -> str:
    stream = StringIO()
    sink = ConsoleSink(Console(file=stream, force_terminal=is_terminal, width=width), log_every)
    sink.start({}, make_plan())
    for step in range(20):
        if step == 10:
            sink.evaluation(make_eval(10))
            sink.event(EventRecord(step=10, name="retried", text="stage 1 lost [red]; went on"))
        sink.step(make_step(step))
    sink.finish(0)
    return stream.getvalue()


def test_a_plain_line_has_every_field() -> None:
    lines = console_text(is_terminal=False).splitlines()
    assert (
        "step 12/20  loss  6.9000  tok/s       500  eta  0:00:16  slowest stage 1 (node-1) idle  25%"
        "  wire 24.6 MB of 49.2 MB (2.0x saved)  MB 0-1 24.6/49.2"
    ) in lines
    assert "eval step 10  val_loss 3.0000  512 tokens in 1.5 s" in lines
    assert "retried step 10  stage 1 lost [red]; went on" in lines
    assert "2 stages" in lines[0]


def test_plain_lines_do_not_wrap_and_are_plain() -> None:
    text = console_text(is_terminal=False, width=40)
    assert text.isascii()
    assert "\x1b" not in text
    assert len(text.splitlines()) == 20 + 3


def test_plain_lines_come_every_log_every_steps_and_at_both_ends() -> None:
    lines = console_text(is_terminal=False, log_every=8).splitlines()
    assert [line.split("/")[0] for line in lines if line.startswith("step")] == [
        "step  1",
        "step  8",
        "step 16",
        "step 20",
    ]


def test_a_terminal_shows_one_line_that_changes_with_news_above_it() -> None:
    text = console_text(is_terminal=True)
    assert "\x1b[2K" in text
    # Each frame begins by wiping the line before; what is left at the end is the news and the last step.
    kept = text.replace("\r\x1b[2K", "\f").split("\f")[-1]
    assert "step 20/20" in kept
    assert "val_loss 3.0000" in text


# The events file.


def test_records_come_back_from_the_events_file_as_they_went_in(tmp_path: Path) -> None:
    sink = EventsFile(tmp_path / "events.jsonl", timeline_every=4)
    steps = [make_step(step, num_steps=7) for step in range(6)]
    for step in steps:
        sink.step(step)
    sink.evaluation(make_eval(6))
    sink.event(EventRecord(step=6, name="saved", text="a\nb"))
    sink.finish(0)
    history = read_history(tmp_path / "events.jsonl")
    assert history.steps == tuple(step if step.step in (0, 3) else without_actions(step) for step in steps)
    assert history.evaluations == (make_eval(6),)
    assert history.events == (EventRecord(step=6, name="saved", text="a\nb"),)
    assert history.num_unreadable == 0
    types = [json.loads(line)["type"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert types == ["step"] * 6 + ["evaluation", "event"]


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    sink = EventsFile(tmp_path / "events.jsonl", timeline_every=1)
    sink.step(make_step(0))
    assert read_history(tmp_path / "events.jsonl").steps == (make_step(0),)
    sink.finish(0)


@pytest.mark.parametrize(
    "torn", [b'{"type":"step","st', b"\xff\xfe", b"[" * 100_000, b'{"type":[]}', b'{"type":"step"}', b"7"]
)
def test_a_torn_line_costs_itself_only(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    first = EventsFile(path, timeline_every=1)
    first.step(make_step(0))
    first.finish(0)
    with open(path, "ab") as file:
        file.write(torn)
    assert read_history(path).steps == (make_step(0),)
    # The next attempt appends: its first line must not hang on the torn one.
    second = EventsFile(path, timeline_every=1)
    second.step(make_step(1))
    second.finish(0)
    history = read_history(path)
    assert history.steps == (make_step(0), make_step(1))
    assert history.num_unreadable == 1


def test_a_line_beyond_all_bounds_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    good = json.dumps({"type": "evaluation", **encode(make_eval(1))}).encode()
    path.write_bytes(b'"' + b"x" * 9_000_000 + b'"\n' + good + b"\n")
    history = read_history(path)
    assert history.evaluations == (make_eval(1),)
    assert history.num_unreadable == 1


def test_no_events_file_is_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none.jsonl").steps == ()


@given(st.lists(st.integers(0, 9), max_size=30))
def test_steps_done_again_replace_what_came_of_them(order: list[int]) -> None:
    records: list[StepRecord] = [make_step(step, loss=float(i)) for i, step in enumerate(order)]
    steps = fold_history(records).steps
    numbers = [step.step for step in steps]
    assert numbers == sorted(set(numbers))
    assert list(steps[-1:]) == records[-1:]
    # Each step kept is the last of its number, and no lower number came after it.
    for kept in steps:
        assert all(later.step > kept.step for later in records[int(kept.loss) + 1 :])


def test_going_back_to_a_checkpoint_takes_later_evaluations_back() -> None:
    before = [make_step(0), make_eval(1, 5.0), make_step(1), make_eval(2, 4.0), make_step(2)]
    history = fold_history([*before, make_eval(1, 3.0), make_step(1)])
    assert [step.step for step in history.steps] == [0, 1]
    assert history.evaluations == (make_eval(1, 3.0),)


@given(st.integers(-(2**70), 2**70), st.floats(allow_infinity=False) | st.none(), st.text())
def test_decode_undoes_encode(number: int, loss: float | None, text: str) -> None:
    loss = math.nan if loss is None else loss
    record = replace(make_step(0, loss=loss), step=number)
    again = decode(StepRecord, json.loads(json.dumps(encode(record), allow_nan=False)))
    assert again == record or (math.isnan(loss) and replace(again, loss=0.0) == replace(record, loss=0.0))
    event = EventRecord(step=number, name="failed", text=text)
    assert decode(EventRecord, json.loads(json.dumps(encode(event)))) == event


def test_a_plan_survives_json() -> None:
    assert decode(Plan, json.loads(json.dumps(encode(make_plan())))) == make_plan()


def test_decode_refuses_what_does_not_fit() -> None:
    good = encode(make_plan())
    for key, value in (("schedule", "zigzag"), ("stages", 3), ("stages", [7]), ("step_s", "2"), ("binds", None)):
        with pytest.raises(ValueError, match=r"is not a|is an object"):
            decode(Plan, {**good, key: value})
    with pytest.raises(ValueError, match="has a step_s"):
        decode(Plan, {key: value for key, value in good.items() if key != "step_s"})


def test_a_full_disk_is_a_typed_error() -> None:
    sink = EventsFile(Path("/dev/full"), timeline_every=1)
    with pytest.raises(DiskFull, match="free some space"):
        sink.step(make_step(0))


# W&B, Prometheus and the fan-out.


def test_settings_out_of_range_name_their_key() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.log_every"):
        TrackingConfig(log_every=0)


@pytest.mark.parametrize(
    ("asked", "environ", "mode"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "k"}, "online"),
        (None, {"WANDB_API_KEY": ""}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_wandb_is_online_where_a_key_is_set(asked, environ: dict[str, str], mode: str) -> None:
    assert TrackingConfig(wandb=asked).wandb_mode(environ) == mode


def test_wandb_plots_every_stage_and_link_over_the_step() -> None:
    scalars = step_scalars(make_step(3))
    assert scalars["train/step"] == 3
    assert scalars["train/loss"] == pytest.approx(7.7)
    assert scalars["stage/1/compute_s"] == pytest.approx(1.1)
    assert scalars["link/1-0/wire_bytes"] == 12_300_000


def test_a_run_leaves_a_wandb_run_that_a_resumed_run_continues(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "demo")
    config = TrackingConfig(wandb="offline", picture_every=1000)
    for attempt in range(2):
        stream = StringIO()
        tracker = open_tracker(
            config, folder, run_id="abc123", console=Console(file=stream, width=200), clock=lambda: 1000.0
        )
        tracker.start({"model": {"num_layers": 4}}, make_plan())
        for step in range(2 * attempt, 2 * attempt + 2):
            tracker.step(make_step(step))
        tracker.evaluation(make_eval(2 * attempt + 2))
        tracker.finish(0)
        assert "warned" not in stream.getvalue()
    offline = list(folder.wandb.glob("offline-run-*-abc123/run-abc123.wandb"))
    assert offline
    logged = b"".join(path.read_bytes() for path in offline)
    for name in (b"train/loss", b"val/loss", b"stage/1/compute_s", b"link/0-1/wire_bytes", b"num_layers"):
        assert name in logged
    assert folder.timeline.read_bytes().startswith(b"\x89PNG")
    assert len(read_history(folder.events).steps) == 4


def test_a_wandb_failure_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "demo")
    stream = StringIO()
    # W&B refuses a project's name of more than 128 letters, before it opens any connection.
    config = TrackingConfig(wandb="offline", project="x" * 200)
    tracker = open_tracker(
        config, folder, run_id="abc123", console=Console(file=stream, width=400), clock=lambda: 1000.0
    )
    tracker.start({}, make_plan())
    for step in range(3):
        tracker.step(make_step(step))
    tracker.finish(0)
    history = read_history(folder.events)
    assert len(history.steps) == 3
    assert [event.name for event in history.events] == ["warned"]
    assert "W&B stopped: " in history.events[0].text
    assert "tracking.wandb" in history.events[0].text
    assert stream.getvalue().count("W&B stopped") == 1


def test_no_step_waits_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_start = threading.Event()

    def slow_init(**_: object) -> None:
        assert may_start.wait(60)
        raise CommError("no answer")

    monkeypatch.setattr(wandb, "init", slow_init)
    monkeypatch.setattr(tracking, "_WANDB_MAX_WAITING", 2)
    warnings: queue.SimpleQueue[EventRecord] = queue.SimpleQueue()
    sink = WandbSink(TrackingConfig(picture_every=100), "offline", RunFolder(tmp_path), "abc", warnings)
    sink.start({}, make_plan())
    # Were `step` or `evaluation` to wait, it would be for ever: W&B starts only below.
    for step in range(1, 6):
        sink.step(make_step(step))
        sink.evaluation(make_eval(step))
    may_start.set()
    sink.finish(0)
    assert "no answer" in warnings.get_nowait().text
    # Ten records and, at the end, a picture; room for two.
    assert "too slow to take" in warnings.get_nowait().text
    assert warnings.empty()


def test_wandb_that_was_never_started_ends_at_once(tmp_path: Path) -> None:
    sink = WandbSink(TrackingConfig(), "offline", RunFolder(tmp_path), "abc", queue.SimpleQueue())
    sink.step(make_step(0))
    sink.finish(1)


class Recorder:
    """Stands in for Ray's Gauge and Counter, and remembers what was set."""

    values: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self._name, self._tag_keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> Recorder:
        self._default = tags
        return self

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        all_tags = {**self._default, **(tags or {})}
        self.values[(self._name, *(all_tags[key] for key in self._tag_keys))] = value

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        all_tags = {**self._default, **(tags or {})}
        key = (self._name, *(all_tags[key] for key in self._tag_keys))
        self.values[key] = self.values.get(key, 0) + value


def test_prometheus_gets_the_run_as_a_tag_and_links_that_count_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "values", {}, raising=False)
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorder)
    monkeypatch.setattr("ray.util.metrics.Counter", Recorder)
    sink = PrometheusSink("demo")
    sink.start({}, make_plan())
    sink.step(make_step(0))
    sink.step(make_step(1))
    sink.step(replace(make_step(2), links=tuple(replace(link, wire_bytes=0) for link in make_step(2).links)))
    sink.evaluation(make_eval(3))
    sink.event(EventRecord(step=3, name="saved", text=""))
    sink.finish(0)
    values = Recorder.values
    assert values["isthmus_loss", "demo"] == pytest.approx(7.8)
    assert values["isthmus_val_loss", "demo"] == 3.0
    assert values["isthmus_tokens_per_s", "demo"] == 500.0
    assert values["isthmus_stage_compute_seconds", "demo", "1"] == pytest.approx(1.1)
    assert values["isthmus_link_wire_bytes_total", "demo", "0-1"] == 2 * 12_300_000
    assert values["isthmus_events_total", "demo", "saved"] == 1


def test_rays_own_metrics_take_what_is_set() -> None:
    sink = PrometheusSink("demo")
    sink.step(make_step(0))
    sink.event(EventRecord(step=0, name="saved", text=""))


class Failing:
    """A sink whose end fails."""

    def start(self, config: object, plan: object) -> None: ...
    def step(self, record: object) -> None: ...
    def evaluation(self, record: object) -> None: ...
    def event(self, record: object) -> None: ...
    def finish(self, exit_code: int) -> None:
        raise DiskFull("events.jsonl could not be written", "free some space")


def test_every_sink_is_ended_though_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first, last = EventsFile(path, timeline_every=1), EventsFile(path, timeline_every=1)
    tracker = Tracker([first, Failing(), last])
    with pytest.raises(DiskFull):
        tracker.finish(1)
    for sink in (first, last):
        with pytest.raises(ValueError, match="closed"):
            sink.step(make_step(0))


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4]), (2, [0, 1, 3, 4]), (100, [0, 4])])
def test_what_is_done_every_so_often_is_done_first_and_last(every: int, due: list[int]) -> None:
    assert [step for step in range(5) if is_due(make_step(step, num_steps=5), every)] == due


def with_canary(cosine: float) -> StepRecord:
    """A step in which the first link's forward frames were compared."""
    first, *others = make_step(0, num_stages=3).links
    read = replace(first, codec="hq4", relative_error=0.12, cosine=cosine)
    return replace(make_step(0, num_stages=3), links=(read, *others))


def test_a_line_shows_every_link_and_the_worst_canary() -> None:
    line = step_line(with_canary(0.9931), None)
    assert line.endswith("MB 0-1 24.6/49.2, 1-2 24.6/49.2  canary 0>1 hq4 cosine 0.9931")
    assert "canary" not in step_line(make_step(0, num_stages=3), None)


def test_of_many_links_a_line_shows_the_heaviest() -> None:
    record = make_step(0, num_stages=8)
    heavy = tuple(replace(link, wire_bytes=10**9) if link.source_stage == 6 else link for link in record.links)
    text = links_text(heavy)
    assert "5-6" in text
    assert "6-7" in text
    assert text.count("/") == 4


def test_a_canary_is_plotted_where_it_was_read() -> None:
    scalars = step_scalars(with_canary(0.97))
    assert (scalars["link/0-1/canary_relative_error"], scalars["link/0-1/canary_cosine"]) == (0.12, 0.97)
    assert not any("canary" in name for name in step_scalars(make_step(0)))
