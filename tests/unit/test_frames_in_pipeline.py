"""What stages of a whole pipeline report of their frames, over carriers that are slow, narrow or full."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from actors.frame import parse_chunk
from actors.frame_times import FrameTimes
from actors.mailbox import Receipt
from actors.spec import COMPUTES, WAITS, StepReport
from orchestrator.causes import Cause, StageTime
from orchestrator.clocks import step_starts
from orchestrator.config import RunConfig
from orchestrator.records import stage_records
from orchestrator.where import where_time_went
from tests.lab.inprocess import DirectCarrier, Pipeline, open_pipeline
from tests.link_ends import BUSY, quicken_repeats
from tests.small_run import small_config
from tests.unit.synthetic_run import make_step


class SlowCarrier(DirectCarrier):
    """Hands chunks over in another thread, each some time after it was pushed."""

    delay_s = 0.003

    def push(self, chunk: bytes) -> Future[Receipt]:
        answer: Future[Receipt] = Future()
        hand_over = threading.Timer(self.delay_s, lambda: answer.set_result(self.stages[self.target].receive(chunk)))
        hand_over.daemon = True
        hand_over.start()
        return answer


class FullCarrier(DirectCarrier):
    """Says twice of each chunk that there is no room."""

    def push(self, chunk: bytes) -> Future[Receipt]:
        header, _ = parse_chunk(chunk)
        place = header.step, header.kind, header.microbatch, header.chunk
        tries: Counter[tuple[int, ...]] = self.__dict__.setdefault("tries", Counter())
        tries[place] += 1
        if tries[place] <= 2:
            answer: Future[Receipt] = Future()
            answer.set_result(BUSY)
            return answer
        return super().push(chunk)


@contextmanager
def pipeline_over(carrier: type[DirectCarrier], config: RunConfig, monkeypatch) -> Iterator[Pipeline]:
    monkeypatch.setattr("tests.lab.inprocess.DirectCarrier", carrier)
    with open_pipeline(config, (1, 2, 1)) as pipeline:
        pipeline.load()
        yield pipeline


def one_step(pipeline: Pipeline) -> list[StepReport]:
    return pipeline._all("step", pipeline._order(run_step=True))


def ways(report: StepReport) -> set[tuple[int, bool, int]]:
    return {(frame.target_stage, frame.is_gradient, frame.microbatch) for frame in report.frames.sent}


def test_every_frame_of_a_step_is_in_its_stages_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken_repeats(monkeypatch)
    with pipeline_over(SlowCarrier, small_config(tmp_path), monkeypatch) as pipeline:
        # An evaluation leaves no notes.
        pipeline.evaluate(2)
        first, middle, last = one_step(pipeline)
    microbatches = range(6)
    for report, sources in ((first, [1]), (middle, [0, 2]), (last, [1])):
        arrived = {(frame.source_stage, frame.microbatch) for frame in report.frames.arrived}
        assert arrived == {(source, microbatch) for source in sources for microbatch in microbatches}
        for frame in report.frames.arrived:
            assert frame.first_s <= frame.whole_s <= frame.decoded_s <= report.step_s
            # Each is taken, and so used, only once it is decoded.
            (used,) = (
                a
                for a in report.actions
                if a.name == ("B" if frame.is_gradient else "F") and a.microbatch == frame.microbatch
            )
            assert frame.decoded_s <= used.start_s + 1e-5
        # Compute and waits are what they were: frames are not in them.
        assert {action.name for action in report.actions} <= {*COMPUTES, *WAITS}
    # The last gradients may be on their way yet when a stage reports; what comes before them may not.
    assert ways(first) == {(1, False, microbatch) for microbatch in microbatches}
    assert ways(last) >= {(1, True, microbatch) for microbatch in microbatches[:-1]}
    settled = [frame for frame in first.frames.sent if not math.isnan(frame.settled_s)]
    assert settled
    assert all(frame.settled_s - frame.pushed_s >= SlowCarrier.delay_s - 1e-5 for frame in settled)
    for frame in settled:
        (made,) = (a for a in first.actions if a.name == "F" and a.microbatch == frame.microbatch)
        assert made.end_s <= frame.encode_start_s + 1e-5


def test_a_window_of_one_chunk_holds_links_up_and_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = ("wire.min_chunk_bytes=1024", "wire.max_chunk_bytes=1024", "wire.max_window_bytes=1024")
    with pipeline_over(SlowCarrier, small_config(tmp_path, *narrow), monkeypatch) as pipeline:
        reports = one_step(pipeline)
    for report in reports:
        whys = {block.why for block in report.frames.blocked}
        assert whys == {"window"}
        for block in report.frames.blocked:
            assert -1e-5 <= block.start_s <= block.end_s
    # Three of a frame's four chunks wait for the one before.
    held_s = sum(block.end_s - block.start_s for block in reports[0].frames.blocked)
    assert held_s >= 3 * SlowCarrier.delay_s


def test_a_peer_without_room_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken_repeats(monkeypatch)
    with pipeline_over(FullCarrier, small_config(tmp_path), monkeypatch) as pipeline:
        reports = one_step(pipeline)
    assert all({block.why for block in report.frames.blocked} == {"room"} for report in reports)


def test_an_order_that_runs_no_step_notes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipeline_over(DirectCarrier, small_config(tmp_path), monkeypatch) as pipeline:
        reports = pipeline._all("step", pipeline._order(run_step=False))
        assert all(report.frames == FrameTimes() for report in reports)
        assert all(len(report.frames) for report in one_step(pipeline))


def test_what_a_stage_had_not_sent_when_it_reported_is_told_a_step_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = ("wire.min_chunk_bytes=1024", "wire.max_chunk_bytes=1024", "wire.max_window_bytes=1024")
    config = small_config(tmp_path, "plan.schedule=gpipe", *narrow)
    with pipeline_over(SlowCarrier, config, monkeypatch) as pipeline:
        reports: list[list[StepReport]] = []
        order_all = pipeline._all

        def noting(method: str, order: object) -> list[StepReport]:
            reports.append(order_all(method, order))
            return reports[-1]

        monkeypatch.setattr(pipeline, "_all", noting)
        pipeline.run(2)
    (*_, last), (*_, after), (*_, settled) = reports
    # All six gradients are made at once and wait for one another's chunks.
    known = {frame.microbatch for frame in last.frames.sent if not math.isnan(frame.settled_s)}
    late = {frame.microbatch: frame for frame in after.late_frames.sent}
    assert known | late.keys() == set(range(6))
    assert len(late) >= 3
    assert all(frame.settled_s > last.step_s for frame in late.values())
    assert {block.why for block in after.late_frames.blocked} == {"window"}
    assert settled.late_frames.sent
    # Told once: of this step there are this step's only.
    assert all(frame.encode_start_s >= 0 for frame in after.frames.sent)


class FarCarrier(DirectCarrier):
    """A link with a delay both ways: a chunk comes late, and its receipt as late again."""

    delay_s = 0.05

    def push(self, chunk: bytes) -> Future[Receipt]:
        answer: Future[Receipt] = Future()

        def receive() -> None:
            receipt = self.stages[self.target].receive(chunk)
            self._later(lambda: answer.set_result(receipt))

        self._later(receive)
        return answer

    def _later(self, act: Callable[[], None]) -> None:
        timer = threading.Timer(self.delay_s, act)
        timer.daemon = True
        timer.start()


def test_what_a_real_pipeline_notes_tells_where_its_time_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    # Where the machine holds a timer up, the link seems busy: a step in which it did not comes soon.
    deadline_s = time.monotonic() + 60
    while True:
        with pipeline_over(FarCarrier, config, monkeypatch) as pipeline:
            times = where_one_step_went(pipeline)
        if all(t.share(Cause.DELAY) > t.share(*OF_LINKS_BESIDES) for t in times):
            return
        assert time.monotonic() < deadline_s, f"in no step did delay take most of what links took: {times}"


OF_LINKS_BESIDES = (Cause.BUSY, Cause.CODEC, Cause.WINDOW, Cause.ROOM)


def where_one_step_went(pipeline: Pipeline) -> Sequence[StageTime]:
    """Run a step and return where its time went; what holds of any step is checked."""
    reports = one_step(pipeline)
    step_s = max(report.step_s for report in reports) + 0.01
    record = replace(make_step(0), step_s=step_s, stages=stage_records(reports, step_s))
    starts = step_starts(record.stages, {})
    assert starts is not None
    # All were called at once; what lies between them is the time to wake three threads.
    assert all(abs(start_s) < 0.5 for start_s in starts.values())
    times = where_time_went([record], {})
    for stage_time in times:
        assert stage_time.total_s >= step_s - 1e-6
        # A microbatch is four delays on its way through three stages and back, of which compute may hide some.
        assert stage_time.seconds(Cause.DELAY) >= 2 * FarCarrier.delay_s
        assert sum(stage_time.share(cause) for cause in Cause) == pytest.approx(1.0)
    return times
