"""A Ray cluster over the hosts of a lab: a node of Ray in each namespace, joined by the lab's paths alone.

    with WanLab([Host()] * 3, Path(rate_mbps=100, delay_ms=25)) as lab, RayCluster(lab) as cluster:
        done = cluster.run_driver(["driver.py"], timeout_s=60)

Nobody but the lab's hosts can reach it, so Ray's own authentication is off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path as File
from types import TracebackType
from typing import Any

from tests.lab.wanlab import LabError, WanLab

REPOSITORY = File(__file__).resolve().parents[2]
HEAD_PORT = 6379
# Every host is a namespace of its own, so the same pinned ports serve them all.
PORTS = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "dashboard-agent-grpc-port": 6382,
    "dashboard-agent-listen-port": 6383,
    "runtime-env-agent-port": 6384,
    "metrics-export-port": 6385,
    "min-worker-port": 10002,
    "max-worker-port": 10999,
}
OBJECT_STORE_BYTES = 100_000_000  # near Ray's minimum: frames are to stay out of the store
IMPORT_TIMEOUT_S = 30.0  # what a driver may need on a loaded machine before its own clock starts
LISTENING = "0A"  # the state's code in /proc/net/tcp
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class _Node:
    host: int
    process: subprocess.Popen[bytes]
    folder: File

    def last_words(self) -> str:
        return f"host {self.host}: {(self.folder / 'start.log').read_text(errors='replace')[-500:].strip()}"


class RayCluster:
    """A Ray head on the first of `hosts` (default: the whole lab) and a worker node on each other.

    `labels` are Ray's node labels, by host; `env` goes to every node and driver. Drivers and workers find
    the repository's packages. Raises `LabError` where not all nodes are alive within `start_timeout_s`.
    """

    def __init__(
        self,
        lab: WanLab,
        *,
        hosts: Sequence[int] | None = None,
        labels: Mapping[int, Mapping[str, str]] | None = None,
        num_cpus: int = 1,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 90.0,
    ) -> None:
        self.lab = lab
        self.hosts = tuple(range(len(lab.hosts)) if hosts is None else hosts)
        self.address = f"{lab.address(self.hosts[0])}:{HEAD_PORT}"
        self._labels = labels or {}
        self._num_cpus = num_cpus
        self._env = _base_env() | dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._nodes: list[_Node] = []
        self._stack = ExitStack()

    def __enter__(self) -> RayCluster:
        deadline_s = time.monotonic() + self._start_timeout_s
        with ExitStack() as stack:
            stack.callback(self._end)
            head = self._start(self.hosts[0], ["--head", f"--port={HEAD_PORT}", "--include-dashboard=false"])
            self._await_head(head, deadline_s)
            for host in self.hosts[1:]:
                self.start_node(host)
            self.await_nodes(len(self.hosts), timeout_s=deadline_s - time.monotonic())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start_node(self, host: int) -> None:
        """Start a worker node on a host, be it new or back after a power-off, and return at once.

        `await_nodes` tells when it is there; a node that was powered off counts as alive until Ray notices.
        """
        self._start(host, [f"--address={self.address}"])

    def await_nodes(self, count: int, *, timeout_s: float) -> None:
        """Wait until so many nodes are alive; raises `LabError` at the deadline, with what the nodes said."""
        driver = ["-m", "tests.lab.await_nodes", str(count), str(timeout_s)]
        done = self.run_driver(driver, timeout_s=timeout_s + IMPORT_TIMEOUT_S)
        if done.returncode:
            raise LabError(f"Ray did not get its nodes: {done.stderr[-500:].strip()}", self._last_words())

    def run_driver(
        self, arguments: Sequence[str | File], *, timeout_s: float, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` on the head's host with RAY_ADDRESS set; its output is kept as text.

        Raises `LabError` at the deadline; the exit code is for the caller to judge.
        """
        try:
            return self.lab.run(
                self.hosts[0], _python(arguments), timeout_s=timeout_s, capture_output=True, **self._on_head(env)
            )
        except subprocess.TimeoutExpired as expired:
            said = (expired.stderr or b"").decode(errors="replace")[-500:].strip()
            raise LabError(
                f"driver {arguments} did not end in {timeout_s:.0f} s: {said}", self._last_words()
            ) from expired

    def start_driver(
        self, arguments: Sequence[str | File], *, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a driver as `run_driver` does and return at once, to meddle with the lab while it runs."""
        pipe = subprocess.PIPE
        return self.lab.popen(self.hosts[0], _python(arguments), stdout=pipe, stderr=pipe, **self._on_head(env))

    def _on_head(self, env: Mapping[str, str] | None) -> dict[str, Any]:
        """How a driver runs: as one does on the head's machine, from the repository."""
        head_env = {"RAY_ADDRESS": self.address, "RAY_TMPDIR": str(self._nodes[0].folder)}
        return {"env": self._env | head_env | dict(env or {}), "cwd": REPOSITORY, "text": True}

    def _start(self, host: int, role: Sequence[str]) -> _Node:
        # In the lab's folder, which is near the root: unix sockets lie here, and end at 107 characters.
        folder = self.lab.folder / f"n{len(self._nodes)}"
        folder.mkdir()
        labels = ",".join(f"{key}={value}" for key, value in self._labels.get(host, {}).items())
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role),
            f"--node-ip-address={self.lab.address(host)}",
            f"--num-cpus={self._num_cpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={folder}",
            *(f"--{port}={number}" for port, number in PORTS.items()),
            *([f"--labels={labels}"] if labels else []),
        ]
        with open(folder / "start.log", "wb") as log:
            env = self._env | {"RAY_TMPDIR": str(folder)}
            options = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            # As on machines of their own, no worker shares the driver's working directory.
            process = self.lab.popen(host, command, env=env, cwd=folder, **options)
        node = _Node(host=host, process=process, folder=folder)
        self._nodes.append(node)
        return node

    def _await_head(self, head: _Node, deadline_s: float) -> None:
        """Waits until the head listens: a worker node that starts before that may give up on it."""
        while not _listens(head.process.pid, HEAD_PORT):
            if head.process.poll() is not None or time.monotonic() > deadline_s:
                raise LabError("the Ray head is not listening", self._last_words())
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        return "see what its nodes said last: " + "; ".join(node.last_words() for node in self._nodes)

    def _end(self) -> None:
        # Never `ray stop`: it would end every Ray on this machine.
        for node in reversed(self._nodes):
            self.lab.end(node.host, node.process)


def _python(arguments: Sequence[str | File]) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _base_env() -> dict[str, str]:
    """This process's environment without any Ray of its own, for nodes that only the lab can reach."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return outer | {
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _listens(pid: int, port: int) -> bool:
    """Whether any process on this process's network listens on a TCP port."""
    for table in ("tcp", "tcp6"):
        try:
            lines = File(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:  # the process has ended
            return False
        for _, local, _, state, *_ in map(str.split, lines):
            if local.endswith(f":{port:04X}") and state == LISTENING:
                return True
    return False
