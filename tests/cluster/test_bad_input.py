"""What goes wrong on a cluster: one line and a remedy for each, and doctor's word on the cluster itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import boto3
import pytest
import ray
from moto.server import ThreadedMotoServer
from rich.console import Console

from actors.errors import StoreError
from actors.node import NAMESPACE
from orchestrator.controller import train
from orchestrator.doctor import try_cluster, try_ray
from orchestrator.environment import RAY_SETTINGS
from orchestrator.events import read_history
from orchestrator.records import EventRecord
from orchestrator.whole import open_trained
from tests.complaint import complaint_of
from tests.lab.local_cluster import open_cluster
from tests.small_run import small_config, small_run

pytestmark = pytest.mark.cluster
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        os.environ.pop("ISTHMUS_TRACEBACK", None)
        yield


@pytest.fixture(scope="module")
def bare_address() -> Iterator[str]:
    """The address of a cluster that was started without Isthmus's settings; its one node has a GPU, so it says."""
    with open_cluster([{"num_cpus": 1, "num_gpus": 1}], without=list(RAY_SETTINGS)) as cluster:
        yield cluster.address


def events_of(folder: Path) -> list[EventRecord]:
    return list(read_history(folder / "runs" / "small" / "events.jsonl").events)


def words_for(folder: Path, address: str, *words: str) -> list[str]:
    """Return the arguments of a run in two stages on that cluster."""
    return [*small_run(folder, "plan.stages=2", "fleet.nodes=2", *words), "--address", address]


# Doctor.


def test_doctor_passes_a_cluster_node_by_node_and_link_by_link(ray_address: str) -> None:
    cluster, *nodes = try_cluster(ray_address)
    assert cluster.found == f"3 nodes alive at {ray_address}, 0 GPUs"
    assert all(finding.passed for finding in nodes), nodes
    assert sorted(finding.found.partition(",")[0] for finding in nodes[:3]) == ["region eu", "region eu", "region us"]
    assert len(nodes[3:]) == 2
    assert all("round trip" in finding.found for finding in nodes[3:])


def test_doctor_fails_a_node_that_lacks_the_settings(bare_address: str) -> None:
    cluster, node = try_cluster(bare_address)
    assert cluster.passed
    assert not node.passed
    assert "RAY_max_direct_call_object_size=unset" in node.found
    assert "RAY_max_direct_call_object_size=4194304" in node.remedy


def test_doctor_starts_ray_on_this_machine() -> None:
    (finding,) = try_ray()
    assert finding.passed, finding
    assert "a call of 200 kB in" in finding.found


# The fleet.


def test_ray_without_the_needed_settings_is_named(tmp_path: Path, bare_address: str, capsys: Capture) -> None:
    words = (*small_run(tmp_path), "plan.stages=1", "--address", bare_address)
    said = complaint_of(capsys, 2, "train", *words)
    assert "Ray on node-0 runs with RAY_max_direct_call_object_size=unset" in said
    assert "with RAY_max_direct_call_object_size=4194304" in said


def test_a_gpu_that_is_taken_is_no_free_place(tmp_path: Path, bare_address: str, capsys: Capture) -> None:
    ray.init(address=bare_address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    holder = ray.remote(num_gpus=1)(dict).options(name="holder", lifetime="detached").remote()
    ray.get(holder.__ray_ready__.remote(), timeout=60)
    ray.shutdown()
    try:
        said = complaint_of(
            capsys, 2, "train", *small_run(tmp_path, "timeouts.place_s=3"), "plan.stages=1", "--address", bare_address
        )
    finally:
        ray.init(address=bare_address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        ray.kill(ray.get_actor("holder"))
        ray.shutdown()
    assert "no free place for a node actor: node-0 did not come up within 3 s" in said


def test_more_nodes_than_the_cluster_has_are_refused(tmp_path: Path, ray_address: str, capsys: Capture) -> None:
    said = complaint_of(capsys, 2, "train", *words_for(tmp_path, ray_address), "fleet.nodes=4")
    assert "fleet.nodes is 4; the cluster has 3 places" in said


def test_a_model_that_fits_no_plan_names_the_stage_and_the_shortage(
    tmp_path: Path, ray_address: str, capsys: Capture
) -> None:
    # 1.7e11 parameters in layers of 1.7e7, so that one of them is no trouble to probe.
    words = ("model.hidden_size=1024", "model.ffn_size=4096", "model.num_layers=10000", "fleet.probe_bytes=0")
    said = complaint_of(capsys, 2, "plan", *words_for(tmp_path, ray_address, *words))
    assert "stage " in said
    assert " GB short" in said
    assert "activation_checkpointing=true" in said


# Data.


def change_shard(folder: Path, *, mend_manifest: bool) -> str:
    """Put a token beyond the vocabulary into the first training shard; return its name."""
    name = "train-00000.tok"
    shard = folder / "data" / name
    content = b"\xff\xff" + shard.read_bytes()[2:]
    shard.write_bytes(content)
    if mend_manifest:
        manifest = folder / "data" / "manifest.json"
        text = json.loads(manifest.read_text())
        (row,) = [row for row in text["shards"] if row["name"] == name]
        row["sha256"] = hashlib.sha256(content).hexdigest()
        manifest.write_text(json.dumps(text))
    return name


@pytest.mark.parametrize(
    ("mend_manifest", "what"),
    [(False, "is damaged: its SHA-256"), (True, "holds token 65535, but the model knows 1000 tokens")],
)
def test_a_bad_shard_is_named_when_it_is_read(
    mend_manifest: bool, what: str, tmp_path: Path, ray_address: str, capsys: Capture
) -> None:
    words = words_for(tmp_path, ray_address, "train.steps=60", "fleet.probe_bytes=0")
    name = change_shard(tmp_path, mend_manifest=mend_manifest)
    said = complaint_of(capsys, 2, "train", *words)
    assert f"{name} {what}" in said
    assert [event.name for event in events_of(tmp_path)][-1] == "failed"


# The training itself.


def test_a_loss_that_is_no_number_stops_at_the_last_good_commit(
    tmp_path: Path, ray_address: str, capsys: Capture
) -> None:
    words = ("train.steps=20", "optim.lr=1e38", "optim.warmup_steps=0", "guard.max_skips=2", "fleet.probe_bytes=0")
    said = complaint_of(capsys, 1, "train", *words_for(tmp_path, ray_address, *words))
    assert "3 steps in a row could not be used, up to step " in said
    assert "stage " in said
    assert "lower optim.lr" in said
    events = events_of(tmp_path)
    assert [event.name for event in events if event.name != "saved"] == ["started", "skipped", "skipped", "failed"]
    trained = open_trained(tmp_path / "runs" / "small")
    assert trained.manifest.step == events[-1].step


def test_a_bucket_that_goes_away_is_told_and_training_goes_on(
    tmp_path: Path, s3_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    boto3.session.Session().client("s3").create_bucket(Bucket="away")
    words = ("checkpoints.url=s3://away/runs", "checkpoints.every_steps=60", "train.steps=150", "fleet.nodes=2")
    config = small_config(tmp_path, *words, "fleet.probe_bytes=0")
    is_up = True

    def stop_server_after_first_save() -> bool:
        nonlocal is_up
        if is_up and any(event.name == "saved" for event in events_of(tmp_path)):
            server.stop()
            is_up = False
        return False

    # Not on the shared cluster: its nodes do not have this test's credentials.
    with open(os.devnull, "w") as nowhere, pytest.raises(StoreError) as raised:
        train(config, address=None, console=Console(file=nowhere), interrupted=stop_server_after_first_save)
    assert not is_up
    assert raised.value.exit_code == 1
    assert "the last checkpoint, of step 150, could not be written: " in raised.value.message
    assert f"http://{host}:{port} cannot be reached" in raised.value.message
    assert "it goes on from step 60" in raised.value.remedy
    steps = read_history(tmp_path / "runs" / "small" / "events.jsonl").steps
    assert [step.step for step in steps] == list(range(150))
    assert [event.step for event in events_of(tmp_path) if event.name == "save_failed"] == [120, 150]


MOUNT_TIMEOUT_S = 10.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB: enough for some steps' records, for no checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, timeout=MOUNT_TIMEOUT_S).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=MOUNT_TIMEOUT_S)


def test_a_disk_with_no_room_for_a_checkpoint_is_told_and_training_goes_on(
    tmp_path: Path, ray_address: str, small_disk: Path, capsys: Capture
) -> None:
    words = (f"checkpoints.url={small_disk}", "checkpoints.every_steps=2", "train.steps=6", "fleet.probe_bytes=0")
    said = complaint_of(capsys, 1, "train", *words_for(tmp_path, ray_address, *words))
    assert "the last checkpoint, of step 6, could not be written: " in said
    assert "the disk is full" in said
    history = read_history(tmp_path / "runs" / "small" / "events.jsonl")
    assert [step.step for step in history.steps] == list(range(6))
    assert "save_failed" in [event.name for event in history.events]


def test_a_disk_with_no_room_for_the_records_stops_the_run(
    tmp_path: Path, ray_address: str, small_disk: Path, capsys: Capture
) -> None:
    words = (f"runs_dir={small_disk}", "checkpoints.every_steps=0", "train.steps=200", "fleet.probe_bytes=0")
    said = complaint_of(capsys, 1, "train", *words_for(tmp_path, ray_address, *words))
    assert f"isthmus: {small_disk}/small/" in said
    assert "could not be written: No space left on device" in said
    assert 0 < len(read_history(small_disk / "small" / "events.jsonl").steps) < 200
