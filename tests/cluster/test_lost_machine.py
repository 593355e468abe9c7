"""A whole machine goes and another comes: the run takes the new one in, and ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cluster.test_run import after_steps, assert_equal_to, drive, history_of
from tests.lab.local_cluster import open_cluster
from tests.reference import train_plainly
from tests.small_run import small_config

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(240)]
STEPS = 8


def test_machine_is_replaced_by_one_that_joined(tmp_path: Path) -> None:
    words = (f"train.steps={STEPS}", "plan.stages=2", "checkpoints.every_steps=2", "timeouts.ack_s=15")
    config = small_config(tmp_path, *words)
    with open_cluster([{"num_cpus": 1}]) as cluster:
        doomed = cluster.add_node(num_cpus=1)
        replaced: list[object] = []

        def lose_a_machine_once() -> bool:
            if not replaced and after_steps(config, 5)():
                cluster.remove_node(doomed, allow_graceful=False)
                replaced.append(cluster.add_node(num_cpus=1))
            return False

        result = drive(config, cluster.address, lose_a_machine_once)
    torch.set_num_threads(1)
    assert_equal_to(train_plainly(config), result)
    assert "node_lost" in [event.name for event in history_of(result).events]
