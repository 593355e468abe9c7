"""Lossy links on a real Ray cluster: unbroken when stopped, stepped down where they do harm, saved losslessly small."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.config import RunConfig
from orchestrator.controller import RunResult, train
from orchestrator.events import History, read_history
from orchestrator.runfolder import RunFolder
from tests.small_run import small_config

pytestmark = pytest.mark.cluster
STEPS = 6


def drive(config: RunConfig, address: str, interrupted: Callable[[], bool] = lambda: False) -> RunResult:
    with open(os.devnull, "w") as nowhere:
        return train(config, address=address, console=Console(file=nowhere), interrupted=interrupted)


def history_of(result: RunResult) -> History:
    return read_history(RunFolder(result.folder).events)


def losses_of(result: RunResult) -> list[float]:
    return [step.loss for step in history_of(result).steps]


def codecs_of(result: RunResult) -> list[tuple[str, str]]:
    plan = json.loads(RunFolder(result.folder).plan.read_text())
    return [(link["forward_codec"], link["backward_codec"]) for link in plan["links"]]


def after_steps(config: RunConfig, count: int) -> Callable[[], bool]:
    events = RunFolder(Path(config.runs_dir) / config.name).events
    return lambda: events.exists() and len(read_history(events).steps) >= count


def test_a_stochastic_run_stopped_and_resumed_is_unbroken_with_lx_checkpoints(tmp_path: Path, ray_address: str) -> None:
    words = (f"train.steps={STEPS}", "plan.split=[1,2,1]", "wire.forward=hq4", "wire.backward=hq4-stochastic")
    unbroken = drive(small_config(tmp_path, *words, "wire.canary_every=2", "name=unbroken"), ray_address)
    links = [link for step in history_of(unbroken).steps for link in step.links]
    assert all(link.wire_bytes < link.raw_bytes / 4 for link in links)
    assert {link.codec for link in links if link.cosine is not None} == {"hq4", "hq4-stochastic"}

    # The seed of the rounding is the run's name, so the same run in another folder, with the same cut, rounds the same.
    words = (*words, "name=unbroken", "checkpoints.codec=lx", f"runs_dir={tmp_path / 'elsewhere'}")
    stopped = drive(small_config(tmp_path, *words), ray_address, after_steps(small_config(tmp_path, *words), 2))
    assert not stopped.finished
    names = {path.suffix for path in (stopped.folder / "checkpoints").rglob("*") if path.stem.startswith("layer")}
    assert names == {".lx"}
    resumed = drive(small_config(tmp_path, *words), ray_address)
    assert losses_of(resumed) == losses_of(unbroken)


def test_a_codec_that_does_harm_steps_down_and_stays_down(tmp_path: Path, ray_address: str) -> None:
    # No codec of 4 bits reaches this cosine.
    words = (f"train.steps={STEPS}", "plan.split=[2,2]", "wire.forward=hq4", "wire.canary_every=2")
    config = small_config(tmp_path, *words, "wire.canary_min_cosine=0.999")
    stopped = drive(config, ray_address, after_steps(config, 4))
    told = [event for event in history_of(stopped).events if event.name == "stepped_down"]
    assert len(told) == 1
    assert "hq4 from stage 0 to 1 gives q8 its place" in told[0].text
    assert codecs_of(stopped) == [("q8", "none")]
    forward = [step.links[0] for step in history_of(stopped).steps]
    assert forward[0].wire_bytes < forward[-1].wire_bytes < forward[-1].raw_bytes / 3

    # The limit is set back, and the resumed run still has the codec that was put in place.
    resumed = drive(small_config(tmp_path, *words), ray_address)
    assert codecs_of(resumed) == [("q8", "none")]
    assert history_of(resumed).steps[-1].links[0].wire_bytes == forward[-1].wire_bytes
