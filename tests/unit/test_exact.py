"""With codec `none` a pipeline is a plain single-process loop: losses, norms and weights, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.model.decoder import DecoderStage
from actors.model.huggingface import export, read_spec
from actors.model.init import initialise
from actors.settings import DataConfig
from orchestrator.config import RunConfig
from tests.lab.inprocess import open_pipeline
from tests.reference import train_plainly
from tests.small_run import small_config

STEPS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(tmp_path_factory.mktemp("run"), f"train.steps={STEPS}")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference(config: RunConfig):
    return train_plainly(config)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"])
@pytest.mark.parametrize("split", [(4,), (2, 2), (1, 1, 1, 1), (3, 1), (1, 2, 1)], ids=str)
def test_pipeline_equals_plain_loop(config: RunConfig, reference, split: tuple[int, ...], schedule: str) -> None:
    config = replace(config, plan=replace(config.plan, schedule=schedule))
    with open_pipeline(config, split) as pipeline:
        pipeline.load()
        pipeline.run(STEPS)
        assert pipeline.losses == reference.losses
        assert pipeline.grad_norms == reference.grad_norms
        assert min(reference.grad_norms) < config.optim.clip_norm < max(reference.grad_norms), "clipping must matter"
        weights = pipeline.weights()
    assert list(weights) == list(reference.weights)
    for name, expected in reference.weights.items():
        assert torch.equal(weights[name], expected), name


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "bdp-split"])
def test_activation_checkpointing_changes_nothing(config: RunConfig, reference, schedule: str) -> None:
    config = replace(config, train=replace(config.train, activation_checkpointing=True))
    config = replace(config, plan=replace(config.plan, schedule=schedule))
    with open_pipeline(config, (2, 2)) as pipeline:
        pipeline.load()
        pipeline.run(3)
        assert pipeline.losses == reference.losses[:3]


def test_without_document_mask_also_equal(config: RunConfig) -> None:
    config = replace(config, data=DataConfig(path=config.data.path, document_mask=False))
    expected = train_plainly(config)
    with open_pipeline(config, (1, 3)) as pipeline:
        pipeline.load()
        pipeline.run(STEPS)
        assert pipeline.losses == expected.losses


def test_bf16_frames_change_the_losses_a_little(config: RunConfig, reference) -> None:
    config = replace(config, wire=replace(config.wire, forward="bf16", backward="bf16"))
    with open_pipeline(config, (2, 2)) as pipeline:
        pipeline.load()
        pipeline.run(5)
        assert pipeline.losses != reference.losses[:5]
        assert pipeline.losses == pytest.approx(reference.losses[:5], rel=1e-3)


def test_starts_from_a_hugging_face_folder_whatever_the_cut(config: RunConfig, tmp_path: Path) -> None:
    teacher = DecoderStage(config.model, 0, config.model.num_layers)
    initialise(teacher, seed=99)
    export(
        tmp_path / "hf",
        config.model,
        teacher.named_global_parameters().items(),
        dtype=torch.float32,
        tokenizer_path=None,
        eos=None,
    )
    config = replace(config, model=read_spec(tmp_path / "hf"))
    with open_pipeline(config, (1, 2, 1)) as pipeline:
        pipeline.load()
        weights = pipeline.weights()
    for name, expected in teacher.named_global_parameters().items():
        assert torch.equal(weights[name], expected), name
