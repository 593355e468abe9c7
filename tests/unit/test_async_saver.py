"""Checkpoints saved in the background: training does not wait, and what fails is a report."""

from __future__ import annotations

import threading
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from actors.errors import DiskFull, StoreError
from actors.shards import (
    AsyncSaver,
)
from actors.spec import CheckpointCodec, SaveOrder, SaveReport
from actors.store import LocalStore
from tests.shard_stages import (
    Stage,
    assert_bit_equal,
    load,
    state,
    tensors_of,
    trained,
)


def save_order(checkpoint: str, url: str, codec: CheckpointCodec = "none") -> SaveOrder:
    return SaveOrder(store_url=url, checkpoint=checkpoint, codec=codec)


class GatedStore(LocalStore):
    """A store whose writes wait for a gate, so that a test decides when a save ends."""

    def __init__(self, root: Path, gate: threading.Event) -> None:
        super().__init__(root)
        self.gate = gate

    def put(self, key: str, data: bytes | memoryview) -> None:
        assert self.gate.wait(timeout=20), "the test never opened the gate"
        super().put(key, data)


@pytest.mark.parametrize(("codec", "suffix"), [("none", ".safetensors"), ("lx", ".lx")])
def test_a_save_is_reported_once_with_its_files(tmp_path, codec: CheckpointCodec, suffix: str):
    (stage,) = trained((0, 5))
    saver = AsyncSaver()
    saver.start(save_order("step-00000002", str(tmp_path), codec), tensors_of(stage), 3)
    saver.wait(20)
    (report,) = saver.finished()
    assert (report.stage, report.checkpoint, report.error) == (3, "step-00000002", "")
    assert {Path(file.name).suffix for file in report.files} == {suffix}
    reader = Stage(0, 5, seed=99)
    load(LocalStore(tmp_path), {file.name: file for file in report.files}, reader)
    assert_bit_equal(state([reader]), state([stage]))
    assert saver.finished() == ()
    saver.close(20)


def test_training_does_not_wait_and_the_newest_save_wins(tmp_path):
    gate = threading.Event()
    saver = AsyncSaver(open_url=lambda url: GatedStore(Path(url), gate))
    units = tensors_of(Stage(0, 5))
    for step in (1, 2, 3):
        saver.start(save_order(f"step-{step}", str(tmp_path)), units, 0)
    (dropped,) = saver.finished()
    assert dropped.checkpoint == "step-2"
    assert "dropped step-2: step-3 was due before its turn came" in dropped.error
    with pytest.raises(StoreError, match=r"stage 0 did not finish step-1 in .* within 0\.01 s"):
        saver.wait(0.01)
    gate.set()
    saver.wait(20)
    assert [(r.checkpoint, r.error) for r in saver.finished()] == [("step-1", ""), ("step-3", "")]
    saver.close(20)


def test_closing_drops_what_waits(tmp_path):
    gate = threading.Event()
    saver = AsyncSaver(open_url=lambda url: GatedStore(Path(url), gate))
    for step in (1, 2):
        saver.start(save_order(f"step-{step}", str(tmp_path)), tensors_of(Stage(0, 5)), 0)
    saver.close(0.01)
    gate.set()
    saver.wait(20)
    reports = saver.finished()
    assert {r.checkpoint: bool(r.error) for r in reports} == {"step-1": False, "step-2": True}


def test_closing_waits_for_the_save_that_runs(tmp_path):
    gate = threading.Event()
    saver = AsyncSaver(open_url=lambda url: GatedStore(Path(url), gate))
    saver.start(save_order("step-1", str(tmp_path)), tensors_of(Stage(0, 5)), 0)
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    saver.close(20)
    (report,) = saver.finished()
    assert (report.checkpoint, report.error) == ("step-1", "")
    opener.join()


class FullStore(LocalStore):
    def put(self, key: str, data: bytes | memoryview) -> None:
        raise DiskFull(f"could not write {key}: the disk is full", "free space")


def test_a_full_disk_is_a_report_and_not_an_exception(tmp_path):
    saver = AsyncSaver(open_url=lambda url: FullStore(Path(url)))
    saver.start(save_order("step-1", str(tmp_path)), tensors_of(Stage(0, 5)), 2)
    saver.wait(20)
    (report,) = saver.finished()
    assert report.files == ()
    assert report.error.startswith("stage 2 could not save step-1: could not write step-1/embedding.safetensors")
    saver.close(20)


def save_and_wait(saver: AsyncSaver, checkpoint: str, url: str) -> SaveReport:
    saver.start(save_order(checkpoint, url), tensors_of(Stage(0, 5)), 1)
    saver.wait(60)
    (report,) = saver.finished()
    return report


def test_a_bucket_that_does_not_exist_is_a_report(s3_url: str):
    report = save_and_wait(saver := AsyncSaver(), "step-1", "s3://no-such-bucket-here/x")
    assert "no such bucket" in report.error
    saver.close(20)


def test_a_bucket_that_goes_away_is_a_report_within_bounded_time(s3_environment, monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    boto3.session.Session().client("s3").create_bucket(Bucket="going-away")
    saver = AsyncSaver()
    assert save_and_wait(saver, "step-1", "s3://going-away/run").error == ""
    server.stop()
    report = save_and_wait(saver, "step-2", "s3://going-away/run")
    assert f"s3://going-away/run: could not write step-2/embedding.safetensors: http://{host}:{port}" in report.error
    assert "cannot be reached" in report.error
    saver.close(20)


def test_a_defect_is_not_mistaken_for_a_refusal(tmp_path):
    saver = AsyncSaver()
    saver.start(save_order("step-1", str(tmp_path)), {"head": {"x": "not a tensor"}}, 0)  # type: ignore[dict-item]
    with pytest.raises((TypeError, AttributeError, ValueError)):
        saver.wait(20)
    saver.close(20)
