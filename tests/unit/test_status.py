"""What `isthmus status` says of runs that live, died, ended, or never began."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from actors.errors import UserError
from orchestrator.events import encode
from orchestrator.records import EvalRecord, EventRecord
from orchestrator.runfolder import RunFolder, write_atomic
from orchestrator.status import Status, StatusFile, list_status, read_status, render, render_list
from tests.unit.synthetic_run import make_plan, make_step


class Clock:
    """A clock that stands until it is set."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.open(tmp_path, "demo")
    write_atomic(folder.config, "name: demo\n")
    write_atomic(folder.plan, json.dumps(encode(make_plan())))
    return folder


def shown(what: RenderableType) -> str:
    stream = StringIO()
    Console(file=stream, width=120).print(what)
    return stream.getvalue()


def write_run(folder: RunFolder, clock: Clock, num_steps: int) -> StatusFile:
    sink = StatusFile(folder, clock)
    sink.start({}, make_plan())
    for step in range(num_steps):
        clock.now_s += 2.0
        sink.step(make_step(step))
    return sink


def test_a_live_run_shows_stages_links_loss_money_and_the_age_of_its_step(folder: RunFolder) -> None:
    clock = Clock()
    with folder.lock():
        sink = write_run(folder, clock, num_steps=3)
        sink.evaluation(EvalRecord(step=2, loss=7.5, num_targets=10, seconds=1.0))
        sink.event(EventRecord(step=2, name="saved", text="checkpoint [2]"))
        text = shown(render(read_status(folder.path), clock.now_s + 65))
    assert "running (pid" in text
    assert "last step 0:01:05 ago" in text
    assert "step 3/20  loss 7.8000  500 tokens/s" in text
    assert "3,000 tokens  $0.03 ($10.000/M tokens)  wire 24.6 MB of 49.2 MB (2.0x saved)" in text
    assert "val loss 7.5000" in text
    assert "saved step 2  checkpoint [2]" in text
    assert "node-1  2-3     1.10 s" in text
    assert "0 -> 1  hq4    100 Mbit/s  40 ms  12.3 MB of 24.6 MB" in text
    assert "1 -> 0  q8 " in text


def test_a_dead_run_says_how_to_go_on(folder: RunFolder) -> None:
    clock = Clock()
    write_run(folder, clock, num_steps=3)
    text = shown(render(read_status(folder.path), clock.now_s))
    assert f"not running; resume with: isthmus train {folder.config}" in text.replace("\n", "")
    assert "step 3/20" in text


def test_a_run_that_did_all_its_steps_is_finished(folder: RunFolder) -> None:
    sink = write_run(folder, Clock(), num_steps=20)
    sink.finish(0)
    assert "run demo: finished" in shown(render(read_status(folder.path), 0.0))


def test_a_run_that_failed_at_its_end_is_not_finished(folder: RunFolder) -> None:
    sink = write_run(folder, Clock(), num_steps=20)
    sink.finish(1)
    assert "resume with" in shown(render(read_status(folder.path), 0.0))


def test_a_finished_run_that_is_started_again_is_still_finished(folder: RunFolder) -> None:
    write_run(folder, Clock(), num_steps=20).finish(0)
    with folder.lock():
        again = StatusFile(folder, Clock())
        again.start({}, make_plan())
        assert "run demo: starting (pid" in shown(render(read_status(folder.path), 0.0))
    again.finish(0)
    assert "run demo: finished" in shown(render(read_status(folder.path), 0.0))


def test_a_run_goes_on_where_the_status_before_cannot_be_read(folder: RunFolder) -> None:
    folder.status.write_bytes(b"{")
    write_run(folder, Clock(), num_steps=3)
    assert "step 3/20" in shown(render(read_status(folder.path), 0.0))


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, folder: RunFolder) -> None:
    write_run(folder, Clock(), num_steps=3)
    other = RunFolder.open(tmp_path, "torn")
    write_atomic(other.config, "")
    other.status.write_bytes(b"{")
    text = " ".join(shown(render_list(list_status(tmp_path), 0.0)).split())
    assert "3/20" in text
    assert "torn not readable; see: isthmus status torn" in text


def test_status_is_written_at_most_once_a_second_but_ends_true(folder: RunFolder) -> None:
    clock = Clock()
    sink = write_run(folder, clock, num_steps=1)
    clock.now_s += 0.5
    sink.step(make_step(1))
    view = read_status(folder.path)
    assert view.status is not None
    assert view.status.step == make_step(0)
    clock.now_s += 0.5
    sink.step(make_step(2))
    sink.step(make_step(3))
    view = read_status(folder.path)
    assert view.status is not None
    assert view.status.step == make_step(2)
    sink.finish(3)
    view = read_status(folder.path)
    assert view.status == Status(run="demo", step=make_step(3), step_unix_s=clock.now_s, exit_code=3)


def test_a_loss_that_is_not_finite_survives_the_file(folder: RunFolder) -> None:
    StatusFile(folder, Clock()).step(make_step(0, loss=float("nan")))
    json.loads(folder.status.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "loss nan" in shown(render(read_status(folder.path), 0.0))


def test_runs_are_listed_the_live_ones_first(tmp_path: Path, folder: RunFolder) -> None:
    other = RunFolder.open(tmp_path, "a-dead-one")
    write_atomic(other.config, "")
    (tmp_path / "not-a-run").mkdir()
    with folder.lock():
        views = list_status(tmp_path)
        assert [view.folder.name for view in views] == ["demo", "a-dead-one"]
        text = shown(render_list(views, 0.0))
    assert "starting (pid" in text
    assert "not running" in text


def test_an_empty_root_says_how_to_begin(tmp_path: Path) -> None:
    assert "isthmus train" in shown(render_list(list_status(tmp_path / "none"), 0.0))


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run in .*/nope.*isthmus status"):
        read_status(tmp_path / "nope")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"[]", b'{"run": 3}', b'{"run": "demo", "step": {}}', b"\xff"]
)
def test_a_damaged_status_file_is_a_typed_error(folder: RunFolder, content: bytes) -> None:
    folder.status.write_bytes(content)
    with pytest.raises(UserError, match=r"status\.json cannot be read"):
        read_status(folder.path)


def test_a_step_without_stages_or_links_renders(folder: RunFolder) -> None:
    sink = StatusFile(folder, Clock())
    sink.step(replace(make_step(0), stages=(), links=()))
    assert "step 1/20" in shown(render(read_status(folder.path), 0.0))
