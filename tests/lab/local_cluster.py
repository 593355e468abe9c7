"""A Ray cluster of small nodes on this machine alone, with a folder and ports of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


@contextmanager
def open_cluster(nodes: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> Iterator[Cluster]:
    """Start a node for each mapping of `Cluster.add_node` arguments; `without` names variables they shall not have."""
    from ray.cluster_utils import Cluster

    # A short path: the names of Unix sockets have a limit.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    cluster = Cluster()
    try:
        with mock.patch.dict(os.environ, RAY_TMPDIR=folder):
            for name in without:
                os.environ.pop(name, None)
            for node in nodes:
                cluster.add_node(include_dashboard=False, **node)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
