"""The run folder: names, paths, whole writes, and the lock that the system frees."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.errors import ConfigError, DiskFull, RunBusy, UserError
from orchestrator import runfolder
from orchestrator.runfolder import RunFolder, check_run_name, write_atomic

_HOLD = """
import sys, time
from pathlib import Path
from orchestrator.runfolder import RunFolder
with RunFolder.open(Path(sys.argv[1]), "demo").lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds run `demo` in tmp_path."""
    repository = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("name", ["demo", "a.b-c_1", "2026-01-01"])
def test_good_names_pass(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", ".hidden", "x" * 101, "a\n", "na\u00efve"])
def test_names_that_leave_the_root_or_confuse_it_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name="):
        RunFolder.open(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_a_second_driver_is_refused_with_the_pid_of_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    folder = RunFolder.open(tmp_path, "demo")
    assert folder.is_live()
    with pytest.raises(RunBusy, match=rf"pid {holder.pid} on .*isthmus status demo"), folder.lock():
        pytest.fail("two drivers hold one run")


def test_the_lock_is_free_once_its_holder_is_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    folder = RunFolder.open(tmp_path, "demo")
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=10)
    assert not folder.is_live()
    with folder.lock():
        assert folder.is_live()
        assert str(os.getpid()) in folder.holder()
    assert not folder.is_live()


def test_who_only_looks_does_not_keep_a_driver_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.open(tmp_path, "demo")
    with open(folder.path / "lock", "w") as look:
        # What `is_live` of another process does, but for longer.
        fcntl.flock(look, fcntl.LOCK_SH)
        with pytest.raises(RunBusy), folder.lock():
            pytest.fail("the lock was taken while another held it")
        monkeypatch.setattr(runfolder, "_LOCK_WAIT_S", 60.0)
        release = threading.Timer(0.05, fcntl.flock, (look, fcntl.LOCK_UN))
        release.start()
        with folder.lock():
            assert folder.is_live()
        release.join()


def test_a_run_that_was_never_driven_is_not_live(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "none")
    assert not folder.is_live()
    assert folder.holder() == "an unknown process"


def test_a_lock_file_of_rubbish_names_nobody(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "demo")
    (folder.path / "lock").write_bytes(b"\xff[1,")
    assert folder.holder() == "an unknown process"
    with folder.lock():
        assert f"pid {os.getpid()} on " in folder.holder()


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"plan\.json"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomic(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the root should be")
    with pytest.raises(UserError, match="runs"):
        RunFolder.open(tmp_path / "runs", "demo")
