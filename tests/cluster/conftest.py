"""One Ray cluster for all cluster tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from orchestrator.environment import prepare_environment
from tests.lab.local_cluster import open_cluster

# Before anything imports ray, whose core reads its environment once. Auth is off explicitly: the cluster lives only
# as long as these tests, and listens for them alone.
os.environ["RAY_AUTH_MODE"] = "disabled"
prepare_environment("tests")


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a cluster with three CPU nodes, in two regions at two prices."""
    places = (("eu", "1.0"), ("eu", "1.0"), ("us", "2.0"))
    nodes = [{"num_cpus": 1, "labels": {"region": region, "price": price}} for region, price in places]
    with open_cluster(nodes) as cluster:
        yield cluster.address
