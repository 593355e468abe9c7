"""The driver is stopped by Ctrl-C, by SIGTERM, by kill -9: the same command goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from orchestrator.events import read_history
from orchestrator.runfolder import RunFolder
from tests.reference import train_plainly
from tests.small_run import small_config, small_run

pytestmark = [pytest.mark.chaos, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]
STEPS = 60


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start `isthmus train` as a shell does: in a process group of its own, on a Ray of its own."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        start_new_session=True,
    )


def await_steps(process: subprocess.Popen[str], folder: RunFolder, count: int, timeout_s: float = 90.0) -> None:
    """Wait until the run has done `count` steps."""
    deadline_s = time.monotonic() + timeout_s
    while not folder.events.exists() or len(read_history(folder.events).steps) < count:
        assert process.poll() is None, end(process)
        assert time.monotonic() < deadline_s, f"{count} steps took more than {timeout_s} s"
        time.sleep(0.05)


def newest_checkpoint(folder: RunFolder) -> int:
    """Return the step of the newest whole checkpoint."""
    whole = [path.parent.name for path in folder.checkpoints.glob("*/manifest.json")]
    return max(int(name.removeprefix("step-")) for name in whole)


def end(process: subprocess.Popen[str], timeout_s: float = 60.0) -> str:
    """Return the output of a process that is about to end; kill its group where it does not."""
    try:
        return process.communicate(timeout=timeout_s)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_sigterm_and_kill_cost_nothing(tmp_path: Path) -> None:
    words = small_run(tmp_path, f"train.steps={STEPS}", "fleet.nodes=2", "checkpoints.every_steps=5", "plan.stages=2")
    config = small_config(tmp_path, *words)
    folder = RunFolder(Path(config.runs_dir) / config.name)

    # Ctrl-C reaches the whole foreground group of a terminal.
    process = start(words)
    await_steps(process, folder, 3)
    os.killpg(process.pid, signal.SIGINT)
    output = end(process)
    assert process.returncode == 0, output
    assert "the same command goes on" in output
    stopped_at = len(read_history(folder.events).steps)
    assert (folder.checkpoints / f"step-{stopped_at:08d}" / "manifest.json").exists()

    process = start(words)
    await_steps(process, folder, stopped_at + 3)
    process.send_signal(signal.SIGTERM)
    output = end(process)
    assert process.returncode == 0, output
    stopped_at = len(read_history(folder.events).steps)

    # Kill -9 of the driver loses at most what came after the last checkpoint.
    process = start(words)
    deadline_s = time.monotonic() + 90
    while newest_checkpoint(folder) <= stopped_at:
        assert time.monotonic() < deadline_s, "no checkpoint came"
        time.sleep(0.02)
    process.kill()
    end(process)
    resume_at = newest_checkpoint(folder)
    assert stopped_at < resume_at < STEPS

    process = start(words)
    output = end(process, timeout_s=120)
    assert process.returncode == 0, output
    assert f"resumed step {resume_at}" in output
    torch.set_num_threads(1)
    assert [step.loss for step in read_history(folder.events).steps] == train_plainly(config).losses
