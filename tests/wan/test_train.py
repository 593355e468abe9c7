"""A run over thin links between machines: it plans with what it measures of them, and trains as if they were none."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path as File

import pytest
import torch

from orchestrator.environment import RAY_SETTINGS
from orchestrator.events import History, read_history
from orchestrator.runfolder import RunFolder
from tests.lab.raycluster import REPOSITORY, RayCluster
from tests.lab.wanlab import Host, Path, WanLab
from tests.reference import train_plainly
from tests.small_run import small_config, small_run

pytestmark = [pytest.mark.wan, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

RATE_MBPS, DELAY_MS = 50.0, 25.0
STEPS = 4
CUT_S = 6.0
TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    hosts = [Host(congestion_control="cubic")] * 3
    with WanLab(hosts, Path(rate_mbps=RATE_MBPS, delay_ms=DELAY_MS)) as lab, RayCluster(lab, env=RAY_SETTINGS) as ray:
        yield ray


def losses_alone(folder: File, *words: str) -> list[float]:
    """The losses of the same training in this process, without a pipeline."""
    torch.set_num_threads(1)
    return train_plainly(small_config(folder, *words)).losses


def history_of(folder: File) -> History:
    return read_history(RunFolder(folder / "runs" / "small").events)


def isthmus(cluster: RayCluster, *words: str) -> str:
    """Run a verb on the first host and return what it printed."""
    done = cluster.run_driver(["-m", "orchestrator.cli", *words], timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_plan_shows_the_links_as_they_are(cluster: RayCluster, tmp_path: File) -> None:
    words = small_run(tmp_path, "plan.stages=3", "fleet.probe_bytes=1000000")
    printed = isthmus(cluster, "plan", "--address", cluster.address, *words)
    plan = json.loads(RunFolder(tmp_path / "runs" / "small").plan.read_text())
    assert len({stage["node"] for stage in plan["stages"]}) == 3
    for link in plan["links"]:
        assert DELAY_MS <= link["delay_s"] * 1e3 < DELAY_MS + 10
        assert 0.7 * RATE_MBPS < link["rate_mbps"] <= RATE_MBPS
        assert f"{link['delay_s'] * 1e3:.1f} ms" in printed


def test_three_hosts_train_as_one_process_does(cluster: RayCluster, tmp_path: File) -> None:
    words = (f"train.steps={STEPS}", "plan.stages=3", "checkpoints.every_steps=2")
    alone = losses_alone(tmp_path, *words)
    # Relative to the driver's folder, which is no other process's.
    data = os.path.relpath(tmp_path / "data", REPOSITORY)
    store = os.path.relpath(tmp_path / "store", REPOSITORY)
    paths = (f"data.path={data}", f"checkpoints.url={store}")
    isthmus(cluster, "train", "--address", cluster.address, *small_run(tmp_path, *words, *paths))
    assert [step.loss for step in history_of(tmp_path).steps] == alone
    assert len(list((tmp_path / "store" / "small").glob("step-*"))) == 2


@pytest.mark.chaos
def test_a_cut_costs_time_and_nothing_else(cluster: RayCluster, tmp_path: File) -> None:
    words = ("train.steps=12", "plan.stages=3")
    alone = losses_alone(tmp_path, *words)
    command = ["-m", "orchestrator.cli", "train", "--address", cluster.address, *small_run(tmp_path, *words)]
    driver = cluster.start_driver(command)
    deadline_s = time.monotonic() + TIMEOUT_S
    events = RunFolder(tmp_path / "runs" / "small").events
    while not (events.exists() and len(history_of(tmp_path).steps) >= 2):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline_s, "no step was done"
        time.sleep(0.02)
    cluster.lab.cut({2})
    time.sleep(CUT_S)
    cluster.lab.heal()
    said = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 0, said
    history = history_of(tmp_path)
    assert max(step.step_s for step in history.steps) > CUT_S
    assert [step.loss for step in history.steps] == alone
    # The step that was cut went on where it was.
    assert not {"retried", "node_lost"} & {event.name for event in history.events}
