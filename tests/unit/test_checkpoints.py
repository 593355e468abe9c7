"""Manifests make checkpoints whole: what is torn is passed over, what is old goes, what differs is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import CheckpointCorrupt, CheckpointError, CheckpointForeign, ConfigError, StoreError
from actors.model.spec import ModelSpec, RopeScaling
from actors.settings import BatchSpec
from actors.shards import file_name, unit_names
from actors.spec import SavedFile, SaveReport
from actors.store import BlobStore, LocalStore, open_store
from orchestrator.checkpoints import (
    MAX_MANIFEST_BYTES,
    CheckpointConfig,
    CheckpointLedger,
    Manifest,
    PendingSaves,
    checkpoint_name,
    parse_manifest,
    require_compatible,
)
from orchestrator.lifecycle import History

MODEL = ModelSpec(num_layers=2)
SHA256 = "0123456789abcdef" * 4


def manifest_of(step: int = 120, model: ModelSpec = MODEL) -> Manifest:
    names = [file_name(unit, "none") for unit in unit_names(model.num_layers)]
    return Manifest(
        run="demo",
        step=step,
        generation=1,
        files=tuple(SavedFile(name=name, size_bytes=4, sha256=SHA256) for name in names),
        model=model,
        batch=BatchSpec(),
        data_sha256=SHA256,
        document_mask=True,
        seed=7,
        tokens_trained=step * 1024,
        history=History(recent_losses=(2.5, 0.1), recent_norms=(1.0, 3.0), num_skipped=1, skips_in_a_row=0),
        dollars=0.25,
        config="run: demo\n",
        config_sha256=SHA256,
        wandb_id="abc123",
    )


def make_whole(ledger: CheckpointLedger, step: int) -> Manifest:
    manifest = manifest_of(step)
    write_files(ledger.store, step)
    ledger.commit(manifest)
    return manifest


def write_files(store: BlobStore, step: int) -> None:
    for file in manifest_of(step).files:
        store.put(f"{checkpoint_name(step)}/{file.name}", b"data")


@pytest.fixture
def ledger(tmp_path: Path) -> CheckpointLedger:
    return CheckpointLedger(LocalStore(tmp_path))


def ignore_bad(checkpoint: str, error: CheckpointError) -> None:
    raise AssertionError(f"{checkpoint} should be whole: {error}")


# The manifest itself.


@pytest.mark.parametrize(
    "model", [MODEL, ModelSpec(num_layers=3, rope_scaling=RopeScaling(factor=4.0), init_from="models/x", untie=True)]
)
def test_a_manifest_comes_back_as_it_was(model: ModelSpec):
    manifest = manifest_of(model=model)
    assert parse_manifest(manifest.to_json()) == manifest
    assert manifest.checkpoint == "step-00000120"
    assert manifest.files_by_name["head.safetensors"].size_bytes == 4


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(manifest_of().to_json())
    change(document)
    return json.dumps(document).encode()


def set_file_name(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["files"][0].update(name=name)


HOSTILE = {
    "traversal": (set_file_name("../../etc/passwd"), "files that are not those of a model of 2 layers"),
    "absolute name": (set_file_name("/etc/passwd"), "files that are not"),
    "a file twice": (set_file_name("head.safetensors"), "files that are not"),
    "too few files": (lambda d: d["files"].pop(), "names 3 files"),
    "endless layers": (lambda d: d["model"].update(num_layers=10**15), "files that are not"),
    "short hash": (lambda d: d["files"][0].update(sha256="00"), "not SHA-256"),
    "negative size": (lambda d: d["files"][0].update(size_bytes=-1), "negative"),
    "negative step": (lambda d: d.update(step=-1), "step -1"),
    "huge step": (lambda d: d.update(step=10**8), "step 100000000"),
    "a step as text": (lambda d: d.update(step="120"), r"a str as manifest\.step"),
    "true as a number": (lambda d: d.update(seed=True), r"a bool as manifest\.seed"),
    "half as a count": (lambda d: d["files"][0].update(size_bytes=0.5), r"a float as manifest\.files\[0\]\.size_bytes"),
    "files as a map": (lambda d: d.update(files={}), r"a dict as manifest\.files"),
    "null model": (lambda d: d.update(model=None), "a NoneType as manifest.model"),
    "impossible model": (lambda d: d["model"].update(num_heads=0), "num_heads is 0"),
    "a run that is a path": (lambda d: d.update(run="../other"), "not a plain name"),
    "a step-down to nothing": (
        lambda d: d["history"].update(step_downs=[{"source_stage": 0, "target_stage": 1, "codec": "zip"}]),
        r"step_downs\[0\] that cannot be: 'zip'",
    ),
    "half a character": (lambda d: d.update(config="\ud800"), r"manifest\.config"),
    "infinite dollars": (lambda d: d.update(dollars=float("inf")), "not JSON"),
    "more dollars than a float holds": (lambda d: d.update(dollars=10**400), r"manifest\.dollars"),
}


@pytest.mark.parametrize(("change", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_corrupt(change: Callable[[dict[str, Any]], object], words: str):
    with pytest.raises(CheckpointCorrupt, match=words):
        parse_manifest(changed(change))


FOREIGN = {
    "another version": (lambda d: d.update(version=2, novelty=1), "not of version 1"),
    "unknown key": (lambda d: d.update(extra=1), "extra"),
    "missing key": (lambda d: d.pop("seed"), "seed"),
    "unknown key of the model": (lambda d: d["model"].update(extra=1), "keys in manifest.model: 'extra'"),
}


@pytest.mark.parametrize(("change", "words"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_manifest_of_another_release_is_foreign_and_none_is_used_in_its_place(
    change: Callable[[dict[str, Any]], object], words: str, ledger: CheckpointLedger
):
    make_whole(ledger, 100)
    document = json.loads(manifest_of(120).to_json())
    change(document)
    ledger.store.put("step-00000120/manifest.json", json.dumps(document).encode())
    with pytest.raises(CheckpointForeign, match=rf"step-00000120.*{words}.*the Isthmus that wrote it"):
        ledger.newest_whole(ignore_bad)
    assert ledger.newest_whole(ignore_bad, below=120) == manifest_of(100)
    # It is not ours to judge, and a run that is under way must not end because of it.
    assert ledger.retain(2) == ()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b"1" * 5000, b" " * (MAX_MANIFEST_BYTES + 1)]
)
def test_what_is_no_manifest_is_corrupt(data: bytes):
    with pytest.raises(CheckpointCorrupt):
        parse_manifest(data)


@settings(deadline=None)
@given(data=st.data())
def test_no_harm_to_a_manifest_ends_in_anything_but_corrupt_or_foreign(data: st.DataObject):
    whole = manifest_of().to_json()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    harmed = whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:]
    try:
        parsed = parse_manifest(harmed)
    except (CheckpointCorrupt, CheckpointForeign):
        return
    assert {file.name for file in parsed.files} == {file.name for file in manifest_of().files}


@settings(deadline=None)
@given(cut=st.integers(0, len(manifest_of().to_json()) - 1))
def test_a_torn_manifest_is_corrupt(cut: int):
    with pytest.raises(CheckpointCorrupt):
        parse_manifest(manifest_of().to_json()[:cut])


# Which checkpoint is whole.


def test_an_empty_store_has_nothing_to_resume(ledger: CheckpointLedger):
    assert ledger.newest_whole(ignore_bad) is None
    assert ledger.steps_newest_first() == ()
    assert ledger.retain(1) == ()


def test_the_newest_whole_checkpoint_is_found(ledger: CheckpointLedger):
    for step in (90, 100, 1000):
        make_whole(ledger, step)
    assert ledger.steps_newest_first() == (1000, 100, 90)
    assert ledger.newest_whole(ignore_bad) == manifest_of(1000)
    assert ledger.newest_whole(ignore_bad, below=1000) == manifest_of(100)
    assert ledger.newest_whole(ignore_bad, below=90) is None


def test_files_without_a_manifest_are_no_checkpoint(ledger: CheckpointLedger):
    make_whole(ledger, 100)
    write_files(ledger.store, 200)
    assert ledger.newest_whole(ignore_bad) == manifest_of(100)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overgrow(path: Path) -> None:
    path.write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("manifest.json", truncate, "not JSON"),
        ("manifest.json", overgrow, "too many"),
        ("layer-00001.safetensors", truncate, r"layer-00001\.safetensors"),
        ("head.safetensors", Path.unlink, r"head\.safetensors"),
    ],
)
def test_a_harmed_checkpoint_is_reported_and_the_one_before_it_used(
    ledger: CheckpointLedger, tmp_path: Path, name: str, harm: Callable[[Path], None], words: str
):
    for step in (100, 200):
        make_whole(ledger, step)
    harm(tmp_path / "step-00000200" / name)
    bad: list[tuple[str, CheckpointError]] = []
    assert ledger.newest_whole(lambda *what: bad.append(what)) == manifest_of(100)
    ((checkpoint, error),) = bad
    assert checkpoint == "step-00000200"
    with pytest.raises(CheckpointCorrupt, match=rf"step-00000200.*{words}"):
        raise error


def test_a_manifest_moved_to_another_step_is_refused(ledger: CheckpointLedger):
    make_whole(ledger, 100)
    ledger.store.put("step-00000200/manifest.json", manifest_of(100).to_json())
    with pytest.raises(CheckpointCorrupt, match="is the manifest of step 100"):
        ledger.read(200)


def test_a_manifest_that_is_missing_is_said_to_be(ledger: CheckpointLedger):
    with pytest.raises(CheckpointCorrupt, match=r"step-00000005/manifest\.json in .* is missing"):
        ledger.read(5)


def test_a_checkpoint_whose_files_lie_elsewhere_is_not_committed(ledger: CheckpointLedger):
    with pytest.raises(CheckpointCorrupt, match=r"embedding\.safetensors.*set checkpoints\.url to a folder they share"):
        ledger.commit(manifest_of(100))
    assert ledger.store.list() == []


class AwayStore(LocalStore):
    def get(self, key: str) -> bytes:
        raise StoreError(f"could not read {key}", "try again")


def test_a_store_that_is_away_does_not_make_checkpoints_bad(ledger: CheckpointLedger, tmp_path: Path):
    make_whole(ledger, 100)
    with pytest.raises(StoreError, match="could not read"):
        CheckpointLedger(AwayStore(tmp_path)).newest_whole(ignore_bad)


def test_the_ledger_works_on_s3(s3_url: str):
    ledger = CheckpointLedger(open_store(s3_url))
    for step in (100, 200, 300):
        make_whole(ledger, step)
    ledger.store.delete("step-00000300/head.safetensors")
    bad: list[str] = []
    assert ledger.newest_whole(lambda checkpoint, _: bad.append(checkpoint)) == manifest_of(200)
    assert bad == ["step-00000300"]
    assert ledger.retain(1) == ("step-00000100",)
    assert ledger.steps_newest_first() == (300, 200)


# Retention.


def folders(ledger: CheckpointLedger) -> set[str]:
    return {key.partition("/")[0] for key in ledger.store.list()}


def test_only_the_newest_checkpoints_stay(ledger: CheckpointLedger, tmp_path: Path):
    for step in (100, 200, 300, 400):
        make_whole(ledger, step)
    assert ledger.retain(2) == ("step-00000100", "step-00000200")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000300", "step-00000400"}
    assert ledger.retain(2) == ()


def test_failed_saves_go_but_one_under_way_stays(ledger: CheckpointLedger):
    write_files(ledger.store, 50)
    ledger.store.put("step-00000060/head.safetensors.0a1b2c3d.partial", b"torn")
    make_whole(ledger, 100)
    write_files(ledger.store, 150)
    ledger.store.put("step-notes/todo", b"not ours")
    assert ledger.retain(3) == ("step-00000050", "step-00000060")
    assert folders(ledger) == {"step-00000100", "step-00000150", "step-notes"}


def test_a_bad_checkpoint_does_not_take_a_whole_ones_place(ledger: CheckpointLedger, tmp_path: Path):
    for step in (100, 200, 300, 400):
        make_whole(ledger, step)
    for step in (200, 400):
        (tmp_path / checkpoint_name(step) / "head.safetensors").unlink()
    assert ledger.retain(2) == ("step-00000200",)
    assert ledger.newest_whole(lambda *_: None) == manifest_of(300)
    assert folders(ledger) == {"step-00000100", "step-00000300", "step-00000400"}


def test_a_checkpoint_that_a_load_proved_corrupt_does_not_take_a_whole_ones_place(ledger: CheckpointLedger):
    for step in (100, 200):
        make_whole(ledger, step)
    # The same size: only a hash can tell.
    ledger.store.put("step-00000200/head.safetensors", b"atad")
    ledger.set_aside(200)
    assert ledger.newest_whole(ignore_bad) == manifest_of(100)
    assert ledger.retain(1) == ()
    assert folders(ledger) == {"step-00000100", "step-00000200"}
    make_whole(ledger, 300)
    assert ledger.retain(1) == ("step-00000100", "step-00000200")


class RecordingStore(LocalStore):
    deleted: tuple[str, ...] = ()

    def delete(self, key: str) -> None:
        self.deleted += (key,)
        super().delete(key)


def test_a_manifest_is_the_first_of_its_checkpoint_to_go(tmp_path: Path):
    ledger = CheckpointLedger(store := RecordingStore(tmp_path))
    for step in (100, 200, 300):
        make_whole(ledger, step)
    ledger.delete(300)
    ledger.retain(1)
    for first in (store.deleted[0], store.deleted[5]):
        assert first.endswith("/manifest.json")
    assert len(store.deleted) == 10


# The reports of a save.


def report_of(stage: int, *names: str, checkpoint: str = "step-00000120", error: str = "") -> SaveReport:
    files = tuple(SavedFile(name=name, size_bytes=4, sha256=SHA256) for name in names)
    return SaveReport(stage=stage, checkpoint=checkpoint, files=files, seconds=0.1, error=error)


def test_a_save_settles_when_every_stage_has_reported():
    pending = PendingSaves(checkpoint="step-00000120", num_stages=2)
    second = report_of(1, "layer-00001.safetensors", "head.safetensors")
    pending = pending.add(second).add(second).add(report_of(0, "x", checkpoint="step-00000100"))
    assert not pending.is_settled
    assert pending.missing_stages == (0,)
    pending = pending.add(report_of(0, "embedding.safetensors", "layer-00000.safetensors"))
    assert pending.is_settled
    assert pending.failure == ""
    assert replace(manifest_of(), files=pending.files).files == pending.files
    assert {file.name for file in pending.files} == {file.name for file in manifest_of().files}


def test_one_failure_settles_a_save():
    pending = PendingSaves(checkpoint="step-00000120", num_stages=3).add(report_of(1, error="stage 1: disk full"))
    assert pending.is_settled
    assert pending.failure == "stage 1: disk full"


# Resuming.


def now(**changes: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "batch": BatchSpec(),
        "data_sha256": SHA256,
        "document_mask": True,
        "seed": 7,
        **changes,
    }


def test_what_may_change_may_change():
    require_compatible(manifest_of(), **now())
    require_compatible(manifest_of(), **now(model=replace(MODEL, init_from="models/x", init_std=0.5, untie=True)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": replace(MODEL, hidden_size=512)}, r"model\.hidden_size: checkpoint 256, now 512"),
        ({"model": replace(MODEL, rope_theta=5e5)}, r"model\.rope_theta: checkpoint 10000\.0, now 500000\.0"),
        ({"batch": BatchSpec(seq_len=128)}, r"batch\.seq_len: checkpoint 256, now 128"),
        ({"batch": BatchSpec(microbatch_size=4)}, r"batch\.microbatch_size: checkpoint 8, now 4"),
        ({"batch": BatchSpec(num_microbatches=4)}, r"batch\.num_microbatches: checkpoint 8, now 4"),
        ({"data_sha256": "f" * 64}, "data "),
        ({"document_mask": False}, r"data\.document_mask: checkpoint True, now False"),
        ({"seed": 8}, "seed: checkpoint 7, now 8"),
    ],
)
def test_what_may_not_change_is_named_with_a_remedy(changes: dict[str, Any], words: str):
    with pytest.raises(CheckpointError, match=rf"step-00000120 of run demo .*{words}.*: set these back") as raised:
        require_compatible(manifest_of(), **now(**changes))
    assert not isinstance(raised.value, CheckpointCorrupt)


def test_every_difference_is_named_at_once():
    with pytest.raises(CheckpointError, match=r"batch\.seq_len.*seed"):
        require_compatible(manifest_of(), **now(seed=8, batch=BatchSpec(seq_len=128)))


@pytest.mark.parametrize(("key", "value"), [("every_steps", -1), ("keep", 0)])
def test_a_setting_that_cannot_be_names_its_key(key: str, value: int):
    with pytest.raises(ConfigError, match=rf"checkpoints\.{key} is {value}: set checkpoints\.{key}"):
        CheckpointConfig(**{key: value})
