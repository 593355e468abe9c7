"""The verbs: what they print, and one line with a remedy for what a user may get wrong. Nothing here needs Ray."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from actors.fleet_spec import Fleet, NodeCard
from actors.prepare import prepare
from actors.shards import file_name, unit_names
from actors.spec import Plan, SavedFile
from actors.store import open_store
from actors.token_shards import DataManifest
from orchestrator import cli
from orchestrator.checkpoints import CheckpointLedger, Manifest, checkpoint_name
from orchestrator.config import RunConfig
from orchestrator.controller import checkpoint_url
from orchestrator.events import decode
from orchestrator.lifecycle import History
from orchestrator.machine import Finding
from orchestrator.runfolder import RunFolder
from tests.complaint import assert_one_complaint, complaint_of
from tests.part_times import part_times
from tests.small_run import small_config, small_run
from tests.unit.prepared_data import write_data
from tests.unit.synthetic_run import make_plan

VERBS = ("demo", "train", "plan", "baseline", "data prepare", "doctor", "status", "export", "generate", "report")
IDLE = part_times(4, layer_forward_s=0.0, layer_backward_s=0.0, embedding_s=0.0, head_s=0.0)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a verb sets for Ray, it sets for one test."""
    with mock.patch.dict(os.environ):
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.pop("ISTHMUS_TRACEBACK", None)
        yield


# Parsing.


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_text_with_an_example_that_parses(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    assert ended.value.code == 0
    (example,) = re.findall(r"example:\n  isthmus (.+)", capsys.readouterr().out)
    assert cli._parse(example.replace("'", "").split()).run is not None
    assert example.startswith(verb)


def test_the_version_is_printed_without_a_verb(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"isthmus (\d+\.\d+.*|\(not installed.*\))\n", capsys.readouterr().out)


@pytest.mark.parametrize("argv", [[], ["fly"], ["train"], ["train", "a.yaml", "--adress", "x"], ["status", "a", "b"]])
def test_what_cannot_be_parsed_is_the_users_error(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert "isthmus" in capsys.readouterr().err


def test_words_may_stand_on_both_sides_of_an_option() -> None:
    arguments = cli._parse(["train", "a.yaml", "--address", "auto", "b.c=1", "d.e=-2"])
    assert arguments.words == ["a.yaml", "b.c=1", "d.e=-2"]
    assert arguments.address == "auto"


def test_every_option_of_prepare_is_a_parameter_of_it_and_has_its_default_there() -> None:
    parsed = vars(cli._parse(["data", "prepare", "x", "--out", "y"]))
    assert set(parsed) == {"run", "inputs", "out", "workers", "force"}
    flags = ["--vocab-size=9", "--tokenizer=t", "--eos=e", "--text-key=k", "--val-fraction=0.5", "--shard-tokens=7"]
    parsed = vars(cli._parse(["data", "prepare", "x", "--out", "y", "--train-bytes=5", *flags]))
    assert {*parsed, "progress"} - {"run"} == set(inspect.signature(prepare).parameters)


def test_the_module_loads_nothing_heavy() -> None:
    # A tokenising process that is spawned imports it again.
    code = "import sys, orchestrator.cli; print(*{'torch', 'ray', 'numpy', 'omegaconf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "\n"


# Bad input.


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, capsys: Capture) -> None:
    said = complaint_of(capsys, 2, "train", *small_run(tmp_path), "train.stesp=3")
    assert "train.stesp: Key 'stesp' not in 'TrainConfig'. Did you mean: 'steps'?" in said


def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert "train.steps: Value 'many'" in complaint_of(capsys, 2, "plan", *small_run(tmp_path), "train.steps=many")


def test_missing_data_are_named_with_how_to_make_them(tmp_path: Path, capsys: Capture) -> None:
    said = complaint_of(capsys, 2, "train", *small_run(tmp_path), f"data.path={tmp_path}/nowhere")
    assert f"{tmp_path}/nowhere holds no prepared data" in said
    assert f"isthmus data prepare INPUT... --out {tmp_path}/nowhere" in said


def test_an_unreadable_manifest_of_data_is_named(tmp_path: Path, capsys: Capture) -> None:
    words = small_run(tmp_path)
    (tmp_path / "data" / "manifest.json").write_bytes(b'{"version": 1')
    assert f"{tmp_path}/data/manifest.json is not a manifest" in complaint_of(capsys, 2, "train", *words)


def test_a_vocabulary_beyond_the_models_is_named(tmp_path: Path, capsys: Capture) -> None:
    said = complaint_of(capsys, 2, "train", *small_run(tmp_path), "model.vocab_size=300")
    assert "vocabulary of 1000 tokens, the model of 300" in said
    assert "set model.vocab_size=1000" in said


def test_a_wrong_bucket_is_named_before_anything_runs(tmp_path: Path, s3_url: str, capsys: Capture) -> None:
    words = (*small_run(tmp_path), "checkpoints.url=s3://no-such-bucket-here/x")
    assert "s3://no-such-bucket-here/x/small: could not " in complaint_of(capsys, 2, "train", *words)


def test_a_store_that_is_away_is_the_systems_error(
    tmp_path: Path, s3_environment: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    said = complaint_of(capsys, 1, "train", *small_run(tmp_path), "checkpoints.url=s3://bucket/x")
    assert "http://127.0.0.1:9 cannot be reached" in said


def test_an_address_where_no_cluster_is_is_named_at_once(tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    said = complaint_of(capsys, 2, "train", *small_run(tmp_path), "--address", address)
    assert f"no Ray cluster can be joined at {address}: " in said


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    words = small_run(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert "the disk is full" in complaint_of(capsys, 1, "train", *words)


def test_a_second_train_of_a_live_run_names_who_drives_it(tmp_path: Path, capsys: Capture) -> None:
    words = small_run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from orchestrator.runfolder import RunFolder\n"
        "with RunFolder.open(Path(sys.argv[1]), 'small').lock(): print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = complaint_of(capsys, 2, "train", *words)
    assert f"run small is driven by pid {holder.pid} on " in said


def save_checkpoint(config: RunConfig) -> None:
    """Leave what a run of that configuration leaves after 7 steps, with no weights in it."""
    store = open_store(checkpoint_url(config))
    files = tuple(
        SavedFile(name=file_name(unit, "none"), size_bytes=1, sha256="0" * 64)
        for unit in unit_names(config.model.num_layers)
    )
    for file in files:
        store.put(f"{checkpoint_name(7)}/{file.name}", b"x")
    data = DataManifest.load(config.data.path)
    manifest = Manifest(
        run=config.name,
        step=7,
        generation=1,
        files=files,
        model=config.model,
        batch=config.batch,
        data_sha256=sha256(data.to_json()).hexdigest(),
        document_mask=config.data.document_mask,
        seed=config.seed,
        tokens_trained=1,
        history=History(),
        dollars=0.0,
        config=config.yaml,
        config_sha256=config.sha256,
        wandb_id="abc",
    )
    CheckpointLedger(store).commit(manifest)


def test_a_resume_that_does_not_fit_names_the_difference_and_changes_nothing(tmp_path: Path, capsys: Capture) -> None:
    config = small_config(tmp_path)
    folder = RunFolder.open(Path(config.runs_dir), config.name)
    folder.config.write_text(config.yaml)
    save_checkpoint(config)
    said = complaint_of(capsys, 2, "train", *small_run(tmp_path), "model.ffn_size=64", "seed=2")
    assert "step-00000007 of run small cannot be continued" in said
    assert "model.ffn_size: checkpoint 48, now 64; seed: checkpoint 1, now 2" in said
    assert folder.config.read_text() == config.yaml


def test_other_data_under_the_same_name_are_an_incompatible_resume(tmp_path: Path, capsys: Capture) -> None:
    save_checkpoint(small_config(tmp_path))
    tokens = np.arange(600) % 90
    write_data(str(tmp_path / "data"), tokens[:500], tokens[500:])
    assert "data (SHA-256): checkpoint " in complaint_of(capsys, 2, "train", *small_run(tmp_path))


@pytest.mark.parametrize("argv", [["generate"], ["export", "out"], ["report"]])
def test_verbs_on_a_run_that_is_not_there_say_so(argv: list[str], tmp_path: Path, capsys: Capture) -> None:
    verb, *rest = argv
    assert "there is no run in" in complaint_of(capsys, 2, verb, str(tmp_path / "nowhere"), *rest)


def test_status_of_a_run_that_is_not_there_says_so(tmp_path: Path, capsys: Capture) -> None:
    assert "there is no run in" in complaint_of(capsys, 2, "status", "nothing", "--runs-dir", str(tmp_path))
    assert cli.main(["status", "--runs-dir", str(tmp_path)]) == 0
    assert "no runs here" in capsys.readouterr().out


def test_status_takes_a_runs_folder_as_well_as_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    RunFolder.open(tmp_path / "runs", "demo")
    monkeypatch.chdir(tmp_path)
    for named in ("demo", "runs/demo", str(tmp_path / "runs" / "demo")):
        assert cli.main(["status", named]) == 0
        assert "run demo: not running" in capsys.readouterr().out


@pytest.mark.parametrize("has_begun", [False, True])
def test_plan_shows_the_plan_and_leaves_that_of_a_run_alone(
    has_begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = RunFolder.open(tmp_path / "runs", "small")
    if has_begun:
        folder.events.touch()
        folder.plan.write_text("its own")
    plan = make_plan()
    cards = [
        NodeCard(node=f"node-{i}", host="h", region="r", device="cpu", boundary_bytes=4, memory_bytes=1, times=(IDLE,))
        for i in range(2)
    ]
    monkeypatch.setattr("orchestrator.fleet.open_fleet", lambda *_: nullcontext())
    monkeypatch.setattr("orchestrator.recipe.probe_fleet", lambda *_: Fleet(nodes=tuple(cards), links=()))
    monkeypatch.setattr("orchestrator.recipe.explained_plan", lambda *_: plan)
    with folder.lock() if has_begun else nullcontext():
        assert cli.main(["plan", *small_run(tmp_path)]) == 0
    assert "what binds: link 0 -> 1" in capsys.readouterr().out
    saved = folder.plan_preview if has_begun else folder.plan
    assert decode(Plan, json.loads(saved.read_text())) == plan
    assert folder.plan_preview.exists() == has_begun
    assert not has_begun or folder.plan.read_text() == "its own"


def test_text_that_is_not_there_is_named(tmp_path: Path, capsys: Capture) -> None:
    said = complaint_of(capsys, 2, "data", "prepare", f"{tmp_path}/nowhere.txt", "--out", str(tmp_path / "out"))
    assert "nowhere.txt' names no file" in said


def test_data_are_prepared_with_the_options_that_are_given(tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"body": f"ferry {i} of the strait"}) + "\n" for i in range(50)))
    out = tmp_path / "out"
    argv = ["data", "prepare", str(text), "--out", str(out), "--vocab-size=280", "--text-key=body", "--shard-tokens=64"]
    assert cli.main([*argv, "--workers=1"]) == 0
    manifest = DataManifest.load(out)
    assert {shard.num_tokens for shard in manifest.split_shards("train")[:-1]} == {64}
    printed = capsys.readouterr().out
    assert f"train on them with data.path={out} model.vocab_size={manifest.vocab_size}" in printed
    assert len(printed.splitlines()) == 2


# The system's errors, and the output itself.


def test_an_error_of_the_system_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(runs_dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(runs_dir))

    monkeypatch.setattr("orchestrator.status.list_status", fail)
    said = complaint_of(capsys, 1, "status", "--runs-dir", str(tmp_path))
    assert f"{tmp_path}: Permission denied" in said
    monkeypatch.setenv("ISTHMUS_TRACEBACK", "1")
    with pytest.raises(PermissionError):
        cli.main(["status", "--runs-dir", str(tmp_path)])


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(runs_dir: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.status.list_status", interrupt)
    assert cli.main(["status"]) == 130
    assert capsys.readouterr().err == ""


def test_output_that_nobody_reads_any_more_ends_the_verb_in_silence(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "orchestrator.cli", "status", "--runs-dir", str(tmp_path)]
    with open(writer, "wb") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_has_no_room_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "status", "--runs-dir", str(tmp_path)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert_one_complaint(done.stderr)


@pytest.mark.parametrize("passed", [True, False])
def test_doctor_fails_where_a_check_does(passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    asked: dict[str, str | None] = {}

    def examine(**what: str | None) -> tuple[Finding, ...]:
        asked.update(what)
        return (Finding(name="store", passed=passed, found="[there]", remedy="" if passed else "make it"),)

    monkeypatch.setattr("orchestrator.doctor.examine", examine)
    argv = ["doctor", "--address", "h:1", "--store", "s3://b/x", "--data", "d"]
    assert cli.main(argv) == (0 if passed else 1)
    assert asked == {"address": "h:1", "store_url": "s3://b/x", "data_path": "d"}
    assert "[there]" in capsys.readouterr().out
