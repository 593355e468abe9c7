"""The report: whole, self-contained, and true to the records."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest

from actors.errors import UserError
from orchestrator.cli import main
from orchestrator.events import EventsFile, encode, fold_history
from orchestrator.pictures import centred_mean, curves_picture, timeline_picture
from orchestrator.records import EvalRecord, EventRecord
from orchestrator.report import (
    comparison,
    link_totals,
    loss_curves,
    summary_text,
    totals,
    trace_path,
    where_text,
    write_report,
)
from orchestrator.runfolder import RunFolder, write_atomic
from orchestrator.status import StatusFile
from tests.played_frames import Line, Rig, played_step
from tests.unit.synthetic_run import make_plan, make_step

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page that is checked as it is read: tags nest, and what it shows is collected."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def pictures(self) -> list[str]:
        prefix = "data:image/svg+xml;base64,"
        assert all(reference.startswith(prefix) for reference in self.references)
        return [base64.b64decode(reference.removeprefix(prefix)).decode() for reference in self.references]


def make_run(root: Path, name: str, num_stages: int, event: str = "checkpoint step-2") -> Path:
    folder = RunFolder.open(root, name)
    write_atomic(folder.config, "name: <script>alert(1)</script>\n")
    write_atomic(folder.plan, json.dumps(encode(make_plan(num_stages))))
    events, status = EventsFile(folder.events, timeline_every=1000), StatusFile(folder, lambda: 1000.0)
    for sink in (events, status):
        for step in range(4):
            sink.evaluation(EvalRecord(step=step, loss=9.0 - step, num_targets=10, seconds=1.0))
            sink.step(make_step(step, num_stages=num_stages))
        sink.event(EventRecord(step=2, name="saved", text=event))
        sink.finish(0)
    return folder.path


def test_the_page_holds_run_and_baseline_and_needs_nothing_else(tmp_path: Path) -> None:
    run, baseline = make_run(tmp_path, "demo", 2), make_run(tmp_path, "demo-baseline", 1)
    out = tmp_path / "report.html"
    assert write_report(run, baseline, out) == out
    assert json.loads((tmp_path / "report.trace.json").read_text())["traceEvents"]
    page = Page(out.read_text())
    curves, timeline = page.pictures
    for name in ("demo: training", "demo: held-out", "demo-baseline: training", "demo-baseline: held-out"):
        assert f'id="curve {name}"' in curves
    assert "<svg" in timeline
    assert ["", "demo", "demo-baseline"] in page.rows
    assert ["$/M tokens", "10.0000", "10.0000"] in page.rows
    assert ["held-out loss", "6.0000", "6.0000"] in page.rows
    assert ["0 -> 1", "16", "98.4 MB", "49.2 MB", "2.0x", "-", "-"] in page.rows
    assert ["1", "55.0%", "10.0%", "1.0 GB"] in page.rows
    assert ["1", "node-1", "2-3", "1.0 GB of 2.0 GB", "0.500 s", "-"] in page.rows
    assert ["2", "saved", "checkpoint step-2"] in page.rows
    assert "script" not in page.tags
    assert "link" not in page.tags


def make_timed_run(root: Path, name: str = "timed", timeline_every: int = 3) -> Path:
    """A run of five steps that fill and drain a pipeline, with every frame on record."""
    folder = RunFolder.open(root, name)
    rig = Rig(forward_s=(1.0, 1.0), backward_s=(2.0, 2.0), num_microbatches=4, line=Line(delay_s=0.125))
    write_atomic(folder.plan, json.dumps(encode(make_plan(2))))
    events, status = EventsFile(folder.events, timeline_every=timeline_every), StatusFile(folder, lambda: 1000.0)
    for sink in (events, status):
        for step in range(5):
            sink.step(played_step(rig, step))
        sink.finish(0)
    return folder.path


def test_the_page_says_where_time_went_and_what_would_help(tmp_path: Path) -> None:
    run = make_timed_run(tmp_path)
    page = Page(write_report(run, None, tmp_path / "report.html").read_text())
    assert "Where the time went" in page.text
    header = page.rows.index(["stage", "step", "forward", "backward", "fill and drain", "few in flight", "link delay"])
    for stage, row in enumerate(page.rows[header + 1 : header + 3]):
        assert row[:2] == [f"stage {stage} (node-{stage})", "15.500 s"]
        assert sum(float(cell.removesuffix("%")) for cell in row[2:]) == pytest.approx(100.0, abs=0.3)
    assert "Would help: filling and draining the pipeline takes" in page.text
    # The console says the same.
    lines = where_text(run).splitlines()
    assert lines[0] == "where the time went"
    assert lines[1].split("  ")[0] == "stage"
    assert lines[2].startswith("stage 0 (node-0)  15.500 s  25.8%")
    assert lines[-1].startswith("would help: ")


def test_the_verb_says_it_too_and_where_its_trace_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_timed_run(tmp_path)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert where_text(run) in said
    assert "page.trace.json" in said.replace("\n", "")
    assert (tmp_path / "page.trace.json").exists()


def test_the_very_last_step_tells_though_only_status_has_its_frames(tmp_path: Path) -> None:
    run = make_timed_run(tmp_path, timeline_every=1000)
    # Step 0 and, from status.json, step 4.
    write_report(run, None, tmp_path / "report.html")
    trace = json.loads((tmp_path / "report.trace.json").read_text())["traceEvents"]
    assert {event["args"]["step"] for event in trace if event["ph"] == "X"} == {0, 4}
    assert any(event["ph"] == "s" for event in trace)
    # At the end of a run the last step is enough, and its history, which may be long, is not read.
    RunFolder(run).events.unlink()
    assert where_text(run, is_last_enough=True).splitlines()[0] == "where the time went"
    assert where_text(run) == ""


def test_runs_of_before_frames_were_noted_have_no_such_section(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo", 2)
    for path in (RunFolder(run).events, RunFolder(run).status):
        path.write_text(path.read_text().replace('"step_s":null,', "").replace('"step_s": null,', ""))
    write_report(run, None, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "Where the time" not in page.text
    assert where_text(run) == ""


def test_each_page_has_a_trace_of_its_own(tmp_path: Path) -> None:
    timed, plain = make_timed_run(tmp_path), make_run(tmp_path, "demo", 3)
    pages = [tmp_path / name for name in ("a.html", "b.html", "b", "b.v1", "b.v2")]
    assert len({trace_path(page) for page in pages}) == len(pages) - 1
    # A page without its ending shares with that with it, and nothing else does.
    assert trace_path(pages[1]) == trace_path(pages[2]) == tmp_path / "b.trace.json"
    write_report(timed, None, pages[0])
    write_report(plain, None, pages[1])

    def stages(page: Path) -> set[int]:
        return {event["pid"] for event in json.loads(trace_path(page).read_text())["traceEvents"]}

    assert (stages(pages[0]), stages(pages[1])) == ({0, 1}, {0, 1, 2})


@pytest.mark.parametrize(
    "spoil",
    [
        {"start_s": None},
        {"end_s": 1e308},
        {"microbatch": -7},
        {"pushed_s": 1e308},
        {"settled_s": -1e308},
        {"name": "a_new_one"},
    ],
)
def test_damaged_times_leave_a_page_and_a_trace(tmp_path: Path, spoil: dict[str, object]) -> None:
    run = make_timed_run(tmp_path)
    lines = RunFolder(run).events.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        for stage in record["stages"]:
            for action in stage["actions"]:
                action |= spoil
            for frame in (*stage["frames"]["sent"], *stage["frames"]["arrived"], *stage["frames"]["blocked"]):
                frame |= {key: value for key, value in spoil.items() if key in frame}
    RunFolder(run).events.write_text("".join(json.dumps(record) + "\n" for record in records))
    RunFolder(run).status.unlink()
    write_report(run, None, tmp_path / "report.html")
    json.loads((tmp_path / "report.trace.json").read_text(), parse_constant=pytest.fail)
    where_text(run)


def test_the_timeline_is_of_the_very_last_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo", 2)
    write_report(run, None, tmp_path / "report.html")
    # Text is drawn as glyphs; what it says stands beside it as a comment.
    assert "step 4: 2.00 s" in Page((tmp_path / "report.html").read_text()).pictures[1]


def test_whatever_files_say_is_text(tmp_path: Path) -> None:
    hostile = '</td><img src="http://example.org/x.png"><script>alert(1)</script>'
    run = make_run(tmp_path, "demo", 2, event=hostile)
    write_report(run, None, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == len(page.pictures) == 2
    assert ["2", "saved", hostile] in page.rows
    assert "name: <script>alert(1)</script>" in page.text


def test_a_run_without_baseline_plan_or_status_still_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo", 2)
    for path in (RunFolder(run).plan, RunFolder(run).status, RunFolder(run).config):
        path.unlink()
    write_report(run, None, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert ["", "demo", "no baseline"] in page.rows
    assert "Plan" not in page.text


def test_no_run_and_no_step_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        write_report(tmp_path / "none", None, tmp_path / "report.html")
    with pytest.raises(UserError, match="has not done a step"):
        write_report(RunFolder.open(tmp_path, "fresh").path, None, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_summary_puts_both_side_by_side(tmp_path: Path) -> None:
    run, baseline = make_run(tmp_path, "demo", 2), make_run(tmp_path, "demo-baseline", 1)
    lines = summary_text(run, baseline).splitlines()
    assert lines[0].split() == ["demo", "demo-baseline"]
    assert any(line.split() == ["tokens/s", "500", "500"] for line in lines)
    assert any(line.split() == ["bytes", "saved", "2.0x", "-"] for line in lines)


def test_totals_add_up_over_steps() -> None:
    result = totals(fold_history([make_step(step) for step in range(3)]))
    assert result.tokens == 3000
    assert result.tokens_per_s == pytest.approx(500.0)
    assert result.dollars_per_mtoken == pytest.approx(10.0)
    assert result.raw_bytes == 3 * 2 * 24_600_000
    assert result.val_loss is None


def test_totals_of_records_that_begin_late_are_of_what_is_there() -> None:
    result = totals(fold_history([make_step(step) for step in range(10, 14)]))
    assert result.tokens == 14_000
    assert result.tokens_per_s == pytest.approx(500.0)
    assert result.dollars_per_mtoken == pytest.approx(10.0)
    assert totals(fold_history([make_step(10)])).dollars_per_mtoken is None


def test_a_skipped_step_makes_tokens_dearer() -> None:
    result = totals(fold_history([make_step(0), replace(make_step(1), skipped=True)]))
    assert result.dollars_per_mtoken == pytest.approx(20.0)


def test_a_history_of_nothing_has_dashes() -> None:
    rows = {label: value for label, value, _ in comparison(totals(fold_history([])), None)}
    assert rows["training loss"] == rows["tokens/s"] == rows["$/M tokens"] == rows["bytes saved"] == "-"


def test_links_are_summed_by_direction() -> None:
    links = link_totals([make_step(0, num_stages=3), make_step(1, num_stages=3)])
    assert [(link.source_stage, link.target_stage) for link in links] == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert {link.wire_bytes for link in links} == {2 * 12_300_000}


def test_held_out_loss_lies_at_the_tokens_before_its_step() -> None:
    evaluations = [EvalRecord(step=step, loss=1.0, num_targets=1, seconds=0.0) for step in (0, 2)]
    history = fold_history([evaluations[0], make_step(0), make_step(1), evaluations[1], make_step(2)])
    train, held_out = loss_curves(history, "demo", "blue")
    assert train.tokens == (1000, 2000, 3000)
    assert held_out.tokens == (0, 2000)


def test_the_mean_follows_a_straight_line_and_passes_over_what_is_not_finite() -> None:
    assert centred_mean([5.0, 4.0, 3.0, 2.0, 1.0], 1) == pytest.approx([5.0, 4.0, 3.0, 2.0, 1.0])
    assert centred_mean([2.0, math.nan, 4.0], 1) == pytest.approx([2.0, 3.0, 4.0])
    assert math.isnan(centred_mean([math.inf], 0)[0])


def test_pictures_of_nothing_and_of_odd_numbers_are_drawn(tmp_path: Path) -> None:
    empty = BytesIO()
    curves_picture([], empty)
    assert empty.getvalue().startswith(b"\x89PNG")
    timeline_picture(make_step(0, num_stages=1, loss=math.nan), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
