"""One Ray cluster for all cluster tests: three small nodes of this machine, with a folder and ports of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from orchestrator.environment import prepare_environment

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

# Before anything imports ray, whose core reads its environment once. Auth is off explicitly: the cluster lives only
# as long as these tests, and listens for them alone.
os.environ["RAY_AUTH_MODE"] = "disabled"
prepare_environment("tests")


@pytest.fixture(scope="session")
def ray_address(ray_cluster: Cluster) -> str:
    """The address of a cluster with three CPU nodes, in two regions at two prices."""
    return ray_cluster.address


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    cluster = Cluster()
    try:
        for region, price in (("eu", "1.0"), ("eu", "1.0"), ("us", "2.0")):
            cluster.add_node(num_cpus=1, labels={"region": region, "price": price}, include_dashboard=False)
        yield cluster
    finally:
        cluster.shutdown()
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
