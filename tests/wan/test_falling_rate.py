"""A real run whose link falls to a twenty-fifth of its rate: soon as fast as a run planned for that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path as File

import pytest

from orchestrator.environment import RAY_SETTINGS
from orchestrator.events import History, read_history
from orchestrator.runfolder import RunFolder
from tests.lab.raycluster import RayCluster
from tests.lab.wanlab import Host, Path, WanLab
from tests.small_run import small_run

pytestmark = [pytest.mark.wan, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

FAT, THIN = Path(rate_mbps=100.0, delay_ms=20.0), Path(rate_mbps=4.0, delay_ms=20.0)
# A frame of 65 kB takes 5 ms on the one, 131 on the other.
SHAPE = ("model.hidden_size=64", "batch.seq_len=64", "batch.microbatch_size=4", "batch.num_microbatches=6")
WORDS = (*SHAPE, "plan.split=[2,2]", "plan.schedule=bdp", "fleet.probe_bytes=1000000", "timeouts.ack_s=5")
TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    hosts = [Host(congestion_control="cubic")] * 2
    with WanLab(hosts, FAT) as lab, RayCluster(lab, env=RAY_SETTINGS) as ray:
        yield ray


def history_of(folder: File) -> History:
    return read_history(RunFolder(folder / "runs" / "small").events)


def train(cluster: RayCluster, folder: File, *words: str, falls: bool) -> History:
    """Train; where it `falls`, the link does once three steps are done."""
    command = ["-m", "orchestrator.cli", "train", "--address", cluster.address, *small_run(folder, *WORDS, *words)]
    driver = cluster.start_driver(command)
    events = RunFolder(folder / "runs" / "small").events
    deadline_s = time.monotonic() + TIMEOUT_S
    while falls and not (events.exists() and len(history_of(folder).steps) >= 3):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline_s, "no step was done"
        time.sleep(0.02)
    cluster.lab.set_path(0, 1, THIN)
    said = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 0, said
    return history_of(folder)


@pytest.mark.chaos
def test_a_run_over_a_link_that_falls_is_soon_as_fast_as_one_planned_for_it(
    cluster: RayCluster, tmp_path: File
) -> None:
    fallen = train(cluster, tmp_path / "fallen", "train.steps=16", falls=True)
    planned = train(cluster, tmp_path / "planned", "train.steps=5", falls=False)
    told = [event for event in fallen.events if event.name == "retuned"]
    assert told
    assert "were planned" in told[0].text
    assert not {"retried", "node_lost", "failed"} & {event.name for event in fallen.events}
    fell_at = next(step.step for step in fallen.steps if step.step_s > 4 * fallen.steps[1].step_s)
    # Within ten steps.
    after = [step.step_s for step in fallen.steps if step.step >= fell_at + 9]
    assert fell_at + 9 <= fallen.steps[-1].step, "the run was over too soon"
    assert statistics.median(after) <= 1.2 * statistics.median(step.step_s for step in planned.steps[1:])
