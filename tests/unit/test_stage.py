"""A stage's part in a run, without Ray: what it answers to orders that come twice, late, or from a failed step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.errors import DataError, GenerationStale, OutOfDeviceMemory
from actors.spec import Commit, EvalOrder, LoadOrder, SaveOrder, StepOrder
from orchestrator.config import RunConfig
from tests.lab.inprocess import Pipeline, open_pipeline
from tests.small_run import small_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(tmp_path_factory.mktemp("run"), "train.steps=4")


@pytest.fixture
def pipeline(config: RunConfig) -> Iterator[Pipeline]:
    """A run of one stage, loaded."""
    with open_pipeline(config, (config.model.num_layers,)) as made:
        made.load()
        yield made


def step_order(config: RunConfig, step: int, *, generation: int = 1, save: SaveOrder | None = None) -> StepOrder:
    commit = None if step == 0 else Commit(step=step - 1, lr=0.01, clip_scale=1.0)
    return StepOrder(run=config.name, generation=generation, step=step, commit=commit, save=save)


def eval_order(config: RunConfig, num_microbatches: int = 2) -> EvalOrder:
    return EvalOrder(run=config.name, generation=1, step=0, num_microbatches=num_microbatches)


def test_the_same_order_gets_the_same_report(config: RunConfig, pipeline: Pipeline) -> None:
    (node,) = pipeline.nodes
    assert node.step(step_order(config, 0)) is node.step(step_order(config, 0))
    assert node.evaluate(eval_order(config)) is node.evaluate(eval_order(config))
    (few,), (many,) = node.evaluate(eval_order(config, 1)), node.evaluate(eval_order(config))
    assert few.num_targets < many.num_targets


def test_a_save_is_told_until_the_commit_of_the_step_that_told_of_it(
    config: RunConfig, pipeline: Pipeline, tmp_path: Path
) -> None:
    (node,) = pipeline.nodes
    save = SaveOrder(store_url=str(tmp_path), checkpoint="step-0", codec="none")
    node.step(step_order(config, 0, save=save))
    (told,) = node.flush(20)
    assert (told.checkpoint, told.error) == ("step-0", "")
    # Another stage fails: the controller hears nothing, and orders the step again.
    for generation in (2, 3):
        (report,) = node.step(step_order(config, 0, generation=generation))
        assert report.saves == (told,)
    (report,) = node.step(step_order(config, 1, generation=3))
    assert report.saves == ()


def test_out_of_memory_is_named_wherever_it_happens(
    config: RunConfig, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError

    (node,) = pipeline.nodes
    node.step(step_order(config, 0))
    with monkeypatch.context() as patch:
        patch.setattr("actors.engine.StageEngine.evaluate", no_memory)
        with pytest.raises(OutOfDeviceMemory, match="in the evaluation at step 0: set a smaller"):
            node.evaluate(eval_order(config))
    monkeypatch.setattr("actors.engine.StageEngine.commit", no_memory)
    with pytest.raises(OutOfDeviceMemory, match=r"stage 0 on .* in step 1: set a smaller"):
        node.step(step_order(config, 1))


def test_an_evaluation_longer_than_its_windows_ends(config: RunConfig) -> None:
    with open_pipeline(config, (1, 1, config.model.num_layers - 2)) as pipeline:
        pipeline.load()
        reports = pipeline.evaluate(20)
    assert [report.num_targets > 0 for report in reports] == [False, False, True]


def test_orders_before_the_newest_are_stale(config: RunConfig, pipeline: Pipeline) -> None:
    (node,) = pipeline.nodes
    node.load(LoadOrder(run=config.name, generation=5, step=0))
    with pytest.raises(GenerationStale):
        node.step(step_order(config, 0, generation=4))


def test_other_data_than_the_drivers_are_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["a" * 64, "b" * 64])
    monkeypatch.setattr("actors.token_shards.DataManifest.sha256", property(lambda manifest: next(hashes)))
    whole = (config.model.num_layers,)
    with pytest.raises(DataError, match="holds other data than the driver's") as caught, open_pipeline(config, whole):
        pass
    assert "s3://" in caught.value.remedy
