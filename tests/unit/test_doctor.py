"""What `isthmus doctor` finds on this machine, in a store and in data; Ray's part is tested with clusters."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from actors.errors import StoreError
from orchestrator import doctor, machine
from orchestrator.doctor import in_child, render, try_data, try_store
from orchestrator.environment import RAY_SETTINGS
from orchestrator.machine import Finding
from tests.unit.prepared_data import write_data

Usage = namedtuple("Usage", "total used free")


def text_of(findings: tuple[Finding, ...]) -> str:
    out = io.StringIO()
    Console(file=out, width=500).print(render(findings))
    return out.getvalue()


def only(findings: tuple[Finding, ...]) -> Finding:
    (finding,) = findings
    return finding


def settled(finding: Finding) -> Finding:
    """A failure comes with its remedy."""
    assert finding.passed or finding.remedy
    return finding


# This machine.


def test_versions_other_than_the_pinned_ones_fail_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cu130", "ray": "2.9.0"}
    monkeypatch.setattr(machine, "installed", installed.__getitem__)
    python, torch, ray = map(settled, machine.versions())
    assert (python.passed, torch.passed, ray.passed) == (True, True, False)
    assert ray.found == "2.9.0"
    assert "pip install ray==2.60.0" in ray.remedy


def test_a_package_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.installed("no-such-package-here") == ""
    monkeypatch.setattr(machine, "installed", lambda package: "")
    assert [finding.found for finding in machine.versions()[1:]] == ["not installed", "not installed"]


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_a_machine_without_a_gpu_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch)
    monkeypatch.setattr(machine, "_NVIDIA_DRIVER", tmp_path / "absent")
    assert only(machine.device()) == Finding(name="device", passed=True, found="CPU only")


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 07:42:04 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root)",
    ],
)
def test_a_driver_that_torch_cannot_use_fails(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch)
    (tmp_path / "version").write_text(f"{line}\nGCC version: 12.3.0\n")
    monkeypatch.setattr(machine, "_NVIDIA_DRIVER", tmp_path / "version")
    finding = settled(only(machine.device()))
    assert not finding.passed
    assert "NVIDIA driver 570.86.15 is loaded" in finding.found


@pytest.mark.parametrize(("free_bytes", "passed"), [(10**9, False), (10**10, True)])
def test_little_memory_fails(free_bytes: int, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.probe.free_memory_bytes", lambda device: free_bytes)
    assert settled(only(machine.memory())).passed is passed


def test_full_disks_fail_and_a_small_shared_memory_is_only_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    here, tmp, shared = map(settled, machine.disks())
    assert (here.passed, tmp.passed, shared.passed) == (False, False, True)
    assert "runs_dir=" in here.remedy
    assert "--shm-size" in shared.remedy


@pytest.mark.parametrize(("content", "advised"), [("bbr\n", False), ("cubic\n", True), (None, False)])
def test_the_congestion_control_is_told_and_bbr_advised(
    content: str | None, advised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "cc").write_text(content)
    monkeypatch.setattr(machine, "_CONGESTION", tmp_path / "cc")
    finding = only(machine.tcp())
    assert finding.passed
    assert (content or "unknown").strip() in finding.found
    assert ("bbr" in finding.remedy) is advised


@pytest.mark.parametrize(("content", "advised"), [("1\n", True), ("0\n", False), (None, False)])
def test_a_tcp_that_starts_slowly_after_every_pause_is_told(
    content: str | None, advised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "idle").write_text(content)
    monkeypatch.setattr(machine, "_IDLE_RESTART", tmp_path / "idle")
    finding = only(machine.tcp())
    assert finding.passed
    assert ("slowly" in finding.found) is advised
    assert ("tcp_slow_start_after_idle=0" in finding.remedy) is advised


def test_the_settings_come_as_lines_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RAY_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    finding = only(machine.settings())
    assert finding.passed
    assert [f"export {name}={value}" for name, value in RAY_SETTINGS.items()] == finding.remedy.splitlines()[1:]


def test_a_required_setting_that_is_too_low_fails_and_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_max_direct_call_object_size", "100")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    finding = settled(only(machine.settings()))
    assert not finding.passed
    assert "RAY_max_direct_call_object_size=100, RAY_health_check_failure_threshold=3" in finding.found
    assert finding.remedy.startswith("unset RAY_max_direct_call_object_size here")


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hush-hush")
    findings = (*machine.settings(), *machine.tracking())
    assert "online" in findings[-1].found
    assert "hush" not in text_of(findings)


# What may hang.


def hang() -> tuple[Finding, ...]:
    time.sleep(60)
    return ()


def die() -> tuple[Finding, ...]:
    os._exit(3)


def refuse(name: str) -> tuple[Finding, ...]:
    raise StoreError(f"{name} refused", "ask again")


def break_down() -> tuple[Finding, ...]:
    raise OSError("it broke\nin two")


@pytest.mark.timeout(60)
def test_a_check_that_hangs_is_ended_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TRIAL_S", 0.2)
    began_s = time.monotonic()
    finding = settled(only(in_child("store", hang)))
    assert time.monotonic() - began_s < 30
    assert (finding.name, finding.passed, finding.found) == ("store", False, "no answer within 0 s")


@pytest.mark.parametrize(
    ("check", "arguments", "found"),
    [(die, (), "exit code 3"), (refuse, ("s3://x",), "s3://x refused"), (break_down, (), "OSError: it broke")],
)
def test_a_check_that_fails_any_how_is_a_finding(check, arguments: tuple[str, ...], found: str) -> None:
    finding = settled(only(in_child("store", check, *arguments)))
    assert not finding.passed
    assert found in finding.found
    assert "\n" not in finding.found


def test_one_failure_keeps_no_other_check_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_is_here = Finding(name="Ray on this machine", passed=True, found="quick")
    monkeypatch.setattr(machine, "device", break_down)
    monkeypatch.setattr(doctor, "in_child", lambda name, check, *a: doctor._examined(name, check, *a))
    monkeypatch.setattr(doctor, "try_ray", lambda: (ray_is_here,))
    monkeypatch.setattr(doctor, "try_codecs", lambda: ())
    findings = doctor.examine(address=None, store_url=str(tmp_path), data_path=str(tmp_path / "nothing"))
    by_name = {finding.name: settled(finding) for finding in findings}
    assert [name for name, finding in by_name.items() if not finding.passed] == ["device", "data"]
    assert {"Python", "memory", "cores", "TCP", "W&B", "Ray on this machine", "store"} <= set(by_name)


# A store, and data.


def test_a_store_that_works_passes_and_is_left_as_it_was(s3_url: str) -> None:
    assert only(try_store(s3_url)).passed
    assert only(try_store(s3_url)).found.startswith(f"{s3_url}: written, read and deleted in ")


def test_a_wrong_bucket_fails_with_its_name(s3_url: str) -> None:
    finding = settled(only(doctor._examined("store", try_store, "s3://no-such-bucket-here/x")))
    assert not finding.passed
    assert "s3://no-such-bucket-here/x" in finding.found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, 1000, size=450)
    write_data(str(tmp_path / "data"), tokens[:350], tokens[350:])
    return tmp_path / "data"


def test_sound_data_pass_shard_by_shard(data: Path) -> None:
    finding = only(try_data(str(data)))
    assert finding.passed
    assert "350 training and 100 held-out tokens, vocabulary 1,000; all 5 shards are sound" in finding.found


@pytest.mark.parametrize("name", ["train-00002.tok", "val-00000.tok"])
def test_a_corrupt_shard_fails_with_its_name(data: Path, name: str) -> None:
    content = bytearray((data / name).read_bytes())
    content[5] ^= 1
    (data / name).write_bytes(content)
    finding = settled(only(doctor._examined("data", try_data, str(data))))
    assert not finding.passed
    assert f"{name} is damaged" in finding.found


def test_shards_beyond_the_time_there_is_are_said_to_be_unchecked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_HASHING_S", -1.0)
    finding = only(try_data(str(data)))
    assert "0 of 5 shards are sound" in finding.found
    assert "want of time" in finding.remedy


def test_findings_are_lines_that_say_pass_or_fail_and_what_to_do() -> None:
    printed = text_of(
        (
            Finding(name="a", passed=True, found="fine"),
            Finding(name="store", passed=False, found="[away]", remedy="first\nsecond"),
            Finding(name="TCP", passed=True, found="cubic", remedy="set bbr"),
        )
    )
    assert printed.splitlines() == [
        "pass  a      fine",
        "FAIL  store  [away]",
        "        remedy: first",
        "          second",
        "pass  TCP    cubic",
        "        note: set bbr",
        "1 of 3 checks failed",
    ]
    assert text_of((Finding(name="a", passed=True, found="fine"),)).endswith("all 1 checks passed\n")


# Codecs.


def test_codecs_are_tried_against_their_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = settled(only(doctor.try_codecs()))
    assert finding.passed
    assert "GB/s" in finding.found
    with monkeypatch.context() as patch:
        # A backend that makes other bytes than it should.
        wrong = type("Wrong", (), {"name": "wrong", "encode_blocks": lambda *_: torch.zeros(3, dtype=torch.uint8)})
        patch.setattr("actors.kernels.dispatch.kernels_for", lambda device: wrong())
        finding = settled(only(doctor.try_codecs()))
    assert not finding.passed
    assert "wire.forward=bf16" in finding.remedy
