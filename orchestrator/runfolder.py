"""The folder of one run: its paths, the lock that keeps a second driver out, and writes that are whole or not there.

runs/<name>/
  config.yaml  plan.json  plan-preview.json  fleet.json  events.jsonl  status.json  timeline.png  lock
  checkpoints/  wandb/
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.disk import whole_file
from actors.errors import ConfigError, DiskFull, RunBusy, UserError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
# The centralised twin of a run lies beside it, under its name and this.
BASELINE_SUFFIX = "-baseline"
_MAX_LOCK_BYTES = 4096
# `is_live` holds the lock for an instant; a driver that starts at that instant tries for this long.
_LOCK_WAIT_S = 0.5
_LOCK_POLL_S = 0.01


def check_run_name(name: str) -> str:
    """Return `name` where it can name a folder, a metric tag and a W&B run; else raise ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the run's name is {name!r}",
            "set name= to at most 100 letters, digits, '-', '_' and '.', with no '.' in front",
        )
    return name


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's error on `path` into DiskFull or UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space there, then run the same command again: it resumes"
            raise DiskFull(f"{path} could not be written: {error.strerror}", remedy) from error
        raise UserError(f"{path} cannot be used: {error.strerror}", "check its owner and its mode") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part of it."""
    with disk_errors(path), whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; reading needs only this, driving needs `open` and `lock`."""

    path: Path

    @classmethod
    def open(cls, root: Path, name: str) -> RunFolder:
        """Create what is missing of `root/name`; raises ConfigError for a name that cannot be one."""
        folder = cls(root / check_run_name(name))
        with disk_errors(folder.path):
            for directory in (folder.checkpoints, folder.wandb):
                directory.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def plan_preview(self) -> Path:
        """What `isthmus plan` says once the run has begun, whose own plan stays."""
        return self.path / "plan-preview.json"

    @property
    def fleet(self) -> Path:
        """The nodes and links that the plan was made for, as measured."""
        return self.path / "fleet.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def timeline(self) -> Path:
        """The latest picture of a step."""
        return self.path / "timeline.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def _lock(self) -> Path:
        return self.path / "lock"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against other drivers; the system frees it when this process dies, however it dies.

        Raises RunBusy, naming the holder's pid and host, where another process drives this run.
        """
        with disk_errors(self._lock):
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with disk_errors(self._lock):
                is_ours = _acquire(handle, time.monotonic() + _LOCK_WAIT_S)
            if not is_ours:
                raise RunBusy(
                    f"run {self.name} is driven by {_holder(handle)}",
                    f"see it with `isthmus status {self.name}`, stop it, or pick another name=",
                )
            with disk_errors(self._lock):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            yield
        finally:
            # The file stays: who deleted it could delete the next holder's.
            os.close(handle)

    def is_live(self) -> bool:
        """Return whether a process holds the lock."""
        try:
            handle = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def holder(self) -> str:
        """Return "pid 123 on host" as the last holder wrote it, or "an unknown process"."""
        try:
            handle = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return "an unknown process"
        try:
            return _holder(handle)
        finally:
            os.close(handle)


def _acquire(handle: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL_S)
        else:
            return True


def _holder(handle: int) -> str:
    try:
        content = json.loads(os.pread(handle, _MAX_LOCK_BYTES, 0))
        return f"pid {int(content['pid'])} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        # The holder may not have written its name yet.
        return "an unknown process"
