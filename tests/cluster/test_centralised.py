"""Baselines through Ray Train on a real cluster: exact against the plain loop, beside the pipeline."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from actors.errors import DataError
from orchestrator.baseline import train_baseline
from orchestrator.config import RunConfig
from orchestrator.controller import train
from orchestrator.events import History, read_history
from orchestrator.report import comparison, totals, write_report
from orchestrator.runfolder import RunFolder
from orchestrator.status import read_status, state_text
from tests.reference import train_plainly
from tests.small_run import small_config

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
STEPS = 5


def run_baseline(config: RunConfig, address: str) -> tuple[RunFolder, History]:
    with open(os.devnull, "w") as nowhere:
        folder = RunFolder(train_baseline(config, address=address, console=Console(file=nowhere)))
    return folder, read_history(folder.events)


def test_baseline_equals_the_pipeline_and_the_plain_loop(tmp_path: Path, ray_address: str) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "train.eval_every=2", "plan.stages=2")
    stale = RunFolder.open(Path(config.runs_dir), "small-baseline")
    stale.events.write_text('{"type":"event","step":9,"name":"finished","text":"an earlier baseline"}\n')
    folder, baseline = run_baseline(config, ray_address)

    torch.set_num_threads(1)
    assert [step.loss for step in baseline.steps] == train_plainly(config).losses
    with open(os.devnull, "w") as nowhere:
        run = train(config, address=ray_address, console=Console(file=nowhere), interrupted=lambda: False)
    pipeline = read_history(RunFolder(run.folder).events)
    for of_run, of_baseline in zip(pipeline.steps, baseline.steps, strict=True):
        assert (of_run.loss, of_run.grad_norm, of_run.lr) == (of_baseline.loss, of_baseline.grad_norm, of_baseline.lr)
        assert of_run.total_tokens == of_baseline.total_tokens
    assert [(e.step, e.loss) for e in pipeline.evaluations] == [(e.step, e.loss) for e in baseline.evaluations]

    # As a run's: one stage, no link, money by the node's label, told from start to end, nothing left of the earlier.
    assert [len(step.stages) for step in baseline.steps] == [1] * STEPS
    assert not any(step.links for step in baseline.steps)
    assert baseline.steps[-1].dollars > 0
    assert [event.name for event in baseline.events] == ["started", "finished"]
    assert state_text(read_status(folder.path), time.time()) == "finished"
    rows = {what: both for what, *both in comparison(totals(pipeline), totals(baseline))}
    assert rows["nodes"] == ["2", "1"]
    for same in ("steps", "tokens", "training loss", "held-out loss"):
        assert rows[same][0] == rows[same][1] != "-"
    page = write_report(run.folder, folder.path, tmp_path / "report.html").read_text()
    assert all(f"<td>{cell}</td>" in page for cell in rows["held-out loss"])


def test_two_workers_equal_the_plain_loop_to_rounding(tmp_path: Path, ray_address: str) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "fleet.baseline_workers=2")
    folder, baseline = run_baseline(config, ray_address)
    torch.set_num_threads(1)
    # The sums over 6 microbatches in another order, in float32, and what that does to 5 steps.
    assert [step.loss for step in baseline.steps] == pytest.approx(train_plainly(config).losses, rel=1e-5)
    assert [len(step.stages) for step in baseline.steps] == [2] * STEPS
    pairs = {(link.source_stage, link.target_stage): link.wire_bytes for link in baseline.steps[-1].links}
    assert pairs == {(0, 1): 4 * config.model.num_params, (1, 0): 4 * config.model.num_params}
    plan = read_status(folder.path).plan
    assert plan is not None
    assert plan.dollars_per_hour >= 2.0


def test_a_workers_error_comes_out_as_ours_and_is_recorded(tmp_path: Path, ray_address: str) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}")
    for shard in (tmp_path / "data").glob("**/*train*"):
        shard.unlink()
    with pytest.raises(DataError):
        run_baseline(config, ray_address)
    history = read_history(RunFolder(Path(config.runs_dir) / "small-baseline").events)
    assert [event.name for event in history.events][-1] == "failed"
