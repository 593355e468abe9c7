"""Checkpoints of a running job: when one becomes whole, and what becomes of those that do not."""

from functools import partial
from pathlib import Path

import pytest

from actors.errors import DiskFull, StoreError
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec
from actors.shards import file_name, unit_names
from actors.spec import SavedFile, SaveReport
from actors.store import LocalStore
from orchestrator.checkpoints import CheckpointLedger, Manifest, checkpoint_name
from orchestrator.lifecycle import History
from orchestrator.saving import Saving

MODEL = ModelSpec(num_layers=2)
NUM_STAGES = 2
FILES = sorted(file_name(unit, "none") for unit in unit_names(MODEL.num_layers))


class FullStore(LocalStore):
    """A local store that refuses as told."""

    refusal: Exception | None = None
    refused = ""

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._refuse("put")
        super().put(key, data)

    def delete(self, key: str) -> None:
        self._refuse("delete")
        super().delete(key)

    def list(self, prefix: str = "") -> list[str]:
        self._refuse("list")
        return super().list(prefix)

    def _refuse(self, method: str) -> None:
        if self.refusal is not None and method == self.refused:
            raise self.refusal


class Job:
    """A saving, its store, and what it told."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.store = FullStore(folder)
        self.ledger = CheckpointLedger(self.store)
        self.told: list[tuple[int, str, str]] = []
        self.saving = Saving(self.ledger, keep, "none", lambda step, name, text: self.told.append((step, name, text)))

    def order(self, step: int) -> bool:
        draft = partial(
            Manifest,
            run="demo",
            step=step,
            generation=1,
            model=MODEL,
            batch=BatchSpec(),
            data_sha256="a" * 64,
            document_mask=True,
            seed=1,
            tokens_trained=100,
            history=History(),
            dollars=0.0,
            config="",
            config_sha256="b" * 64,
            wandb_id="abc",
        )
        order = self.saving.order(step, draft, NUM_STAGES)
        assert order is None or (order.store_url, order.checkpoint) == (self.store.url, checkpoint_name(step))
        return order is not None

    def write(self, step: int, stage: int, *, seconds: float = 1.0) -> SaveReport:
        """What a stage does: half of the files each."""
        files = FILES[stage * 2 : stage * 2 + 2]
        for name in files:
            LocalStore(self.store.root).put(f"{checkpoint_name(step)}/{name}", name.encode())
        saved = tuple(SavedFile(name=name, size_bytes=len(name), sha256="c" * 64) for name in files)
        return SaveReport(stage=stage, checkpoint=checkpoint_name(step), files=saved, seconds=seconds)

    def save(self, step: int) -> bool:
        assert self.order(step)
        return self.saving.collect([self.write(step, stage) for stage in range(NUM_STAGES)])

    def names(self, step: int) -> list[str]:
        return [name for told_step, name, _ in self.told if told_step == step]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "checkpoints")


def failed(step: int, stage: int) -> SaveReport:
    return SaveReport(
        stage=stage, checkpoint=checkpoint_name(step), files=(), seconds=1.0, error=f"stage {stage}: disk full"
    )


def test_a_checkpoint_is_whole_once_every_stage_has_reported(job: Job) -> None:
    job.order(10)
    assert not job.saving.collect([])
    assert not job.saving.collect([job.write(10, 1)])
    assert job.ledger.steps_newest_first() == ()
    assert job.saving.collect([job.write(10, 0)])
    assert job.saving.newest_step == 10
    assert job.names(10) == ["saved"]
    assert [file.name for file in job.ledger.read(10).files] == FILES
    assert not job.saving.collect([job.write(10, 0)])


def test_saves_under_way_do_not_get_in_each_others_way(job: Job) -> None:
    job.order(10)
    job.order(20)
    assert not job.saving.collect([job.write(10, 0), job.write(20, 0)])
    assert job.saving.collect([job.write(10, 1)])
    assert job.saving.newest_step == 10
    assert job.saving.collect([job.write(20, 1)])
    assert job.ledger.steps_newest_first() == (20, 10)


def test_only_the_newest_stay(job: Job) -> None:
    for step in (10, 20, 30, 40):
        assert job.save(step)
    assert job.ledger.steps_newest_first() == (40, 30)


def test_a_stage_that_cannot_write_is_told_of_and_the_older_checkpoint_stays(job: Job) -> None:
    job.save(10)
    job.order(20)
    assert not job.saving.collect([job.write(20, 0), failed(20, 1)])
    assert job.told[-1] == (20, "save_failed", "stage 1: disk full")
    assert job.saving.newest_step == 10
    assert job.ledger.steps_newest_first() == (10,)
    assert job.save(30)


def test_a_step_that_is_run_again_orders_its_checkpoint_again(job: Job) -> None:
    """The first try was aborted: one stage wrote its part, reports it late, and writes it again."""
    job.order(10)
    job.order(10)
    reports = [job.write(10, 0, seconds=1.0), job.write(10, 0, seconds=2.0), job.write(10, 1)]
    assert job.saving.collect(reports)
    assert job.names(10) == ["saved"]
    assert [file.name for file in job.ledger.read(10).files] == FILES


def test_a_checkpoint_that_is_ordered_again_does_not_look_whole_meanwhile(job: Job) -> None:
    job.save(10)
    job.order(10)
    assert job.ledger.steps_newest_first() == ()


def test_forgotten_saves_never_become_whole(job: Job) -> None:
    job.order(10)
    job.saving.collect([job.write(10, 0)])
    job.saving.forget()
    assert not job.saving.collect([job.write(10, 1)])
    assert job.told == []


def test_a_store_that_is_away_costs_a_checkpoint_and_not_the_run(job: Job) -> None:
    job.store.refusal, job.store.refused = StoreError("the store\nis away", "mend it"), "list"
    assert not job.order(10)
    assert job.told == [(10, "save_failed", "the store is away: mend it")]
    job.store.refusal = None
    assert job.save(20)


@pytest.mark.parametrize("refusal", [StoreError("the store is away"), DiskFull("the disk is full")])
def test_a_manifest_that_cannot_be_written_costs_a_checkpoint_and_not_the_run(job: Job, refusal: Exception) -> None:
    job.save(10)
    job.store.refusal, job.store.refused = refusal, "put"
    assert not job.save(20)
    assert job.told[-1] == (20, "save_failed", str(refusal))
    assert (job.saving.newest_step, job.ledger.steps_newest_first()) == (10, (10,))


def test_files_that_are_not_in_this_store_make_no_checkpoint(job: Job) -> None:
    job.order(10)
    reports = [job.write(10, stage) for stage in range(NUM_STAGES)]
    job.store.delete(f"{checkpoint_name(10)}/{FILES[0]}")
    assert not job.saving.collect(reports)
    (step, name, text) = job.told[-1]
    assert (step, name) == (10, "save_failed")
    assert FILES[0] in text
    assert "checkpoints.url" in text


def test_a_checkpoint_is_whole_though_older_ones_cannot_be_deleted(job: Job) -> None:
    for step in (10, 20):
        job.save(step)
    job.store.refusal, job.store.refused = StoreError("deleting is forbidden"), "delete"
    assert job.save(30)
    assert job.saving.newest_step == 30
    assert job.names(30) == ["saved", "warned"]
