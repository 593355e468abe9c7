"""Runs on a real Ray cluster: exact against the plain loop, exact when stopped, cut anew, or hit by a lost node."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console

from actors.errors import CheckpointError
from actors.node import NAMESPACE
from orchestrator.config import RunConfig
from orchestrator.controller import RunResult, train
from orchestrator.events import History, read_history
from orchestrator.runfolder import RunFolder
from orchestrator.whole import load_model, open_trained
from tests.reference import Trained, train_plainly
from tests.small_run import small_config

pytestmark = pytest.mark.cluster
STEPS = 8


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    return train_plainly(small_config(tmp_path_factory.mktemp("reference"), f"train.steps={STEPS}"))


def drive(config: RunConfig, address: str | None, interrupted: Callable[[], bool] = lambda: False) -> RunResult:
    with open(os.devnull, "w") as nowhere:
        return train(config, address=address, console=Console(file=nowhere), interrupted=interrupted)


def history_of(result: RunResult) -> History:
    return read_history(RunFolder(result.folder).events)


def assert_equal_to(reference: Trained, result: RunResult) -> None:
    assert [step.loss for step in history_of(result).steps] == reference.losses
    model = load_model(open_trained(result.folder))
    for name, parameter in model.named_global_parameters().items():
        assert torch.equal(parameter, reference.weights[name]), name


def after_steps(config: RunConfig, count: int) -> Callable[[], bool]:
    """Return an interrupt that comes once `count` steps are in the events file."""
    events = RunFolder(Path(config.runs_dir) / config.name).events
    return lambda: events.exists() and len(read_history(events).steps) >= count


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "bdp-split"])
def test_three_stages_equal_the_plain_loop(tmp_path: Path, ray_address: str, reference: Trained, schedule: str) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "plan.stages=3", f"plan.schedule={schedule}")
    result = drive(config, ray_address)
    assert_equal_to(reference, result)
    history = history_of(result)
    assert result.finished
    assert history.evaluations[-1].step == STEPS
    assert history.steps[-1].dollars > 0
    assert {(link.source_stage, link.target_stage) for link in history.steps[0].links} == {
        (0, 1),
        (1, 2),
        (2, 1),
        (1, 0),
    }


def test_stopped_and_resumed_with_another_cut_is_unbroken(tmp_path: Path, ray_address: str, reference: Trained) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "plan.split=[2,1,1]")
    stopped = drive(config, ray_address, after_steps(config, 3))
    assert not stopped.finished
    assert stopped.step == 3
    resumed = drive(small_config(tmp_path, f"train.steps={STEPS}", "plan.split=[1,3]"), ray_address)
    assert resumed.finished
    assert_equal_to(reference, resumed)
    assert [event.name for event in history_of(resumed).events].count("resumed") == 1


def test_killed_node_rolls_back_and_ends_the_same(tmp_path: Path, ray_address: str, reference: Trained) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "plan.stages=3", "checkpoints.every_steps=2")
    killed: list[int] = []

    def kill_once() -> bool:
        if not killed and after_steps(config, 5)():
            actor = ray.get_actor("small/node-1", namespace=NAMESPACE)
            pid = ray.get(actor.ping.remote(None), timeout=30)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return False

    result = drive(config, ray_address, kill_once)
    assert killed
    assert_equal_to(reference, result)
    assert "node_lost" in [event.name for event in history_of(result).events]


def test_altered_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, ray_address: str, reference: Trained
) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "plan.stages=2", "checkpoints.every_steps=2")
    stopped = drive(config, ray_address, after_steps(config, 5))
    bad = stopped.folder / "checkpoints" / "step-00000005" / "layer-00001.safetensors"
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    result = drive(config, ray_address)
    assert_equal_to(reference, result)
    told = [event.text for event in history_of(result).events if event.name == "checkpoint_bad"]
    assert any("step-00000005/layer-00001.safetensors" in text for text in told)
    resumed = [event for event in history_of(result).events if event.name == "resumed"]
    assert resumed[-1].step == 4


def test_run_whose_only_checkpoint_is_altered_never_starts_over(tmp_path: Path, ray_address: str) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "plan.stages=1", "checkpoints.every_steps=0")
    stopped = drive(config, ray_address, after_steps(config, 2))
    bad = stopped.folder / "checkpoints" / "step-00000002" / "head.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none that can be used"):
            drive(config, ray_address)
    assert len(history_of(stopped).steps) == 2


def test_checkpoints_on_s3_resume_too(tmp_path: Path, reference: Trained, s3_url: str) -> None:
    # A Ray of its own: workers have the credentials of whoever started their node.
    words = (f"train.steps={STEPS}", "plan.stages=2", f"checkpoints.url={s3_url}", "checkpoints.every_steps=2")
    config = small_config(tmp_path, *words)
    stopped = drive(config, None, after_steps(config, 3))
    assert not (stopped.folder / "checkpoints").exists() or not list((stopped.folder / "checkpoints").iterdir())
    resumed = drive(config, None)
    assert_equal_to(reference, resumed)
    assert "resumed" in [event.name for event in history_of(resumed).events]
