"""A whole model out of a checkpoint's files, however each was written."""

from pathlib import Path

import pytest
import torch

from actors.errors import CheckpointCorrupt
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec
from actors.shards import Units, unit_of, write_units
from actors.spec import CheckpointCodec
from actors.store import LocalStore
from orchestrator.checkpoints import CheckpointLedger, Manifest
from orchestrator.config import RunConfig
from orchestrator.lifecycle import History
from orchestrator.whole import TrainedRun, load_model

SPEC = ModelSpec(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=2, ffn_size=48, vocab_size=64)


def trained_model() -> DecoderStage:
    model = DecoderStage(SPEC, 0, SPEC.num_layers)
    initialise(model, seed=1)
    return model


def saved_run(folder: Path, model: DecoderStage, codec: CheckpointCodec, spec: ModelSpec = SPEC) -> TrainedRun:
    store = LocalStore(folder)
    units: Units = {}
    for name, param in model.named_global_parameters().items():
        units.setdefault(unit_of(name), {})[f"weight/{name}"] = param.detach()
    files = write_units(store, "step-00000003", units, codec)
    manifest = Manifest(
        run="demo",
        step=3,
        generation=1,
        files=files,
        model=spec,
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
    CheckpointLedger(store).commit(manifest)
    return TrainedRun(RunConfig(), store, CheckpointLedger(store).read(3))


@pytest.mark.parametrize("codec", ["none", "lx"])
def test_a_model_is_loaded_from_either_kind_of_file(tmp_path: Path, codec: CheckpointCodec) -> None:
    model = trained_model()
    loaded = load_model(saved_run(tmp_path, model, codec))
    for name, param in loaded.named_global_parameters().items():
        assert torch.equal(param, model.named_global_parameters()[name]), name


def test_a_file_larger_than_its_manifests_model_is_not_unpacked(tmp_path: Path) -> None:
    smaller = ModelSpec(num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=2, ffn_size=8, vocab_size=64)
    with pytest.raises(CheckpointCorrupt, match=r"embedding\.lx .* more than the \d+ of this model"):
        load_model(saved_run(tmp_path, trained_model(), "lx", smaller))
