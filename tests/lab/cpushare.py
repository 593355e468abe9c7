"""A share of this machine's cores for some processes: a cgroup of their own, version 1 or 2."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROCESSES = "cgroup.procs"
# A short period, so that a share is a slower processor and not one that stops now and then.
PERIOD_US = 20_000
TIMEOUT_S = 10.0
POLL_S = 0.02


def cgroup(name: str) -> Path:
    """Return where a group of this name lies."""
    root, v1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu")
    return (v1 if v1.is_dir() else root) / name


@contextmanager
def cpu_share(group: Path, cpus: float) -> Iterator[None]:
    """A group that may use so many cores, and gets them before those outside of any such group.

    Its processes must have ended before it does.
    """
    group.mkdir()
    try:
        quota_us = int(cpus * PERIOD_US)
        v1 = {"cpu.cfs_period_us": f"{PERIOD_US}", "cpu.cfs_quota_us": f"{quota_us}", "cpu.shares": "262144"}
        v2 = {"cpu.max": f"{quota_us} {PERIOD_US}", "cpu.weight": "10000"}
        for name, value in (v2 if (group / "cpu.max").exists() else v1).items():
            with open(group / name, "r+") as setting:  # never creates: without a controller, no file
                setting.write(value)
        yield
    finally:
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            try:
                group.rmdir()
                break
            except OSError:  # busy until the kernel has buried its last process
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(POLL_S)


def join(group: Path, pid: int) -> None:
    """Put a process, with all its threads, into a group; what it starts later is in it too."""
    (group / PROCESSES).write_text(str(pid))


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process and its threads have taken so far; ProcessLookupError where it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    # The second field is the name in brackets and may hold anything.
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
