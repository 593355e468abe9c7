"""The bench of learning quality: its loop is the pipeline's own, and its conclusions follow from its figures."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.codecs import CODECS
from actors.data import TokenSource
from actors.kernels.layout import CHUNK
from bench.quality_cases import (
    DENSE_MEAN,
    FEEDBACK_BETA,
    Case,
    Measured,
    PipelineCase,
    full_cases,
    quick_cases,
    replica_microbatch,
)
from bench.quality_outer import OuterLoop, OuterMethod
from bench.quality_report import markdown, picture
from bench.quality_runs import keep, read_kept
from bench.quality_statistics import differences, verdict
from bench.quality_summary import summarise
from bench.quality_trainer import ReadMicrobatch, Trainer, Wire
from orchestrator.config import RunConfig
from tests.lab.inprocess import open_pipeline
from tests.small_run import small_config
from tests.unit.prepared_data import write_data

NUM_REPLICAS = 2


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def train_source(config: RunConfig) -> TokenSource:
    return TokenSource(config.data, "train", config.batch, seed=config.seed, vocab_size=config.model.vocab_size)


def trainer_of(config: RunConfig, split: tuple[int, ...], read: ReadMicrobatch) -> Trainer:
    return Trainer(
        config.model,
        split,
        config.optim,
        seed=config.seed,
        num_steps=config.train.steps,
        num_microbatches=config.batch.num_microbatches,
        read=read,
        wire=Wire(
            forward=CODECS[config.wire.forward], backward=CODECS[config.wire.backward], run=config.name, canary_every=1
        ),
    )


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


# The pipeline


@pytest.mark.parametrize(("forward", "backward"), [("hq4", "q8"), ("q8", "hq4-stochastic")])
def test_a_step_of_the_bench_has_the_bits_of_the_pipelines(tmp_path: Path, forward: str, backward: str) -> None:
    config = small_config(tmp_path, f"wire.forward={forward}", f"wire.backward={backward}", "train.steps=2")
    split = (1, 1, 1, 1)
    trainer = trainer_of(config, split, train_source(config).microbatch)
    outcomes = [trainer.step() for _ in range(2)]
    held_out = TokenSource(config.data, "val", config.batch, seed=config.seed, vocab_size=config.model.vocab_size)
    loss = trainer.evaluate([held_out.microbatch(0, microbatch) for microbatch in range(2)])
    with open_pipeline(config, split) as pipeline:
        pipeline.load()
        pipeline.run(2)
        assert pipeline.losses == [outcome.loss for outcome in outcomes]
        assert pipeline.grad_norms == [outcome.grad_norm for outcome in outcomes]
        for name, expected in pipeline.weights().items():
            assert torch.equal(trainer.parameters[name], expected), name
        report = pipeline.evaluate(2)[-1]
    assert loss == report.loss_sum / report.num_targets


# The outer loop


def two_replicas(folder: Path) -> list[Trainer]:
    config = small_config(folder, "batch.num_microbatches=1", "train.steps=4")
    source = train_source(config)
    return [
        trainer_of(config, (4,), partial(replica_microbatch, source, NUM_REPLICAS, replica))
        for replica in range(NUM_REPLICAS)
    ]


def test_dense_without_momentum_is_the_mean_of_the_replicas(tmp_path: Path) -> None:
    alone = two_replicas(tmp_path)
    for trainer in alone:
        trainer.step()
        trainer.step()
    first, second = (weights_of(trainer) for trainer in alone)
    assert any(not torch.equal(first[name], second[name]) for name in first), "each trains on tokens of its own"

    together = two_replicas(tmp_path)
    OuterLoop(DENSE_MEAN, together).round(num_local_steps=2)
    for trainer in together:
        for name, weight in weights_of(trainer).items():
            torch.testing.assert_close(weight, (first[name] + second[name]) / 2)


def test_what_a_sparse_round_does_not_send_comes_later(tmp_path: Path) -> None:
    replicas = two_replicas(tmp_path)
    sparse = OuterMethod(name="tk2", codec="tk2", lr=1.0, momentum=0.0, beta=FEEDBACK_BETA)
    outer = OuterLoop(sparse, replicas)
    before = weights_of(replicas[0])
    outer.round(num_local_steps=1)
    after = weights_of(replicas[0])
    for name, weight in after.items():
        num_chunks = -(-weight.numel() // CHUNK)
        assert 0 < int((weight != before[name]).sum()) <= NUM_REPLICAS * 64 * num_chunks, name
    # Nothing is learned in a round without local steps: what changes then is what was held back.
    outer.round(num_local_steps=0)
    assert any(not torch.equal(weight, after[name]) for name, weight in weights_of(replicas[1]).items())


# What is kept


def a_measurement(loss: float) -> Measured:
    return Measured(final_loss=loss, curve=[(16, loss), (32, loss)], num_skipped=0, codec_errors={})


def test_a_result_is_kept_for_the_same_settings_and_data_only(tmp_path: Path) -> None:
    case, other, *_ = quick_cases()
    keep(case, a_measurement(5.25), "sha of the data", tmp_path)
    kept = read_kept(case, "sha of the data", tmp_path)
    assert kept is not None
    assert kept.final_loss == 5.25
    assert read_kept(other, "sha of the data", tmp_path) is None
    assert read_kept(case, "sha of other data", tmp_path) is None
    longer = replace(case, recipe=replace(case.recipe, num_steps=case.recipe.num_steps + 1))
    assert longer.key == case.key
    assert read_kept(longer, "sha of the data", tmp_path) is None


# What is concluded


def test_differences_are_taken_seed_by_seed() -> None:
    # The seeds differ by far more than the methods.
    losses = {"none": [4.0, 5.0, 6.0], "a": [4.1, 5.1, 6.1], "b": [4.0, 5.0, 6.3]}
    found = differences(losses, "none")
    assert found["a"].mean == pytest.approx(0.1)
    assert found["a"].share == pytest.approx(0.02)
    assert found["a"].half_width == pytest.approx(0.0, abs=1e-9)
    # Three values with standard deviation 0.1732: 4.303 * 0.1732 / sqrt(3).
    assert found["b"].half_width == pytest.approx(0.4303, abs=1e-3)
    # Four degrees of freedom and half of that variance: 2.776 * 0.1225 / sqrt(3).
    assert found["a"].pooled_half_width == pytest.approx(0.1963, abs=1e-3)


def test_many_seeds_have_an_interval_too() -> None:
    seeds = [float(seed % 3) for seed in range(40)]
    losses = {"none": [1.0] * 40, "a": seeds, "b": seeds}
    # 1.96 for as many as there are, 2.042 for 31.
    assert 1.96 < (differences(losses, "none")["a"].half_width or 0) / (statistics.stdev(seeds) / 40**0.5) < 2.05


@pytest.mark.parametrize(
    ("mean", "half_width", "expected"),
    [
        (0.001, 0.01, "level"),
        (0.05, 0.01, "worse by 0.050"),
        (-0.05, 0.01, "better by 0.050"),
        (0.05, 0.06, "not shown"),
        (0.001, 0.03, "not shown"),
        (0.05, None, "not shown (one seed)"),
    ],
)
def test_verdicts_go_by_the_interval(mean: float, half_width: float | None, expected: str) -> None:
    assert verdict(mean, half_width, level=0.02) == expected


def made_up(case: Case) -> Measured:
    """Return what a case might show: hq4/hq4 loses 2%, all others next to nothing."""
    loss = 4.0 + 0.1 * case.seed
    errors = {}
    if isinstance(case, PipelineCase):
        loss *= 1.02 if (case.forward, case.backward) == ("hq4", "hq4") else 1.0
        figures = {"relative_error": 0.1, "cosine": 0.99}
        errors = {"activations": figures, "gradients": figures}
        marks = range(case.recipe.curve_every, case.recipe.num_steps + 1, case.recipe.curve_every)
    else:
        marks = range(case.recipe.curve_every, case.num_rounds + 1, case.recipe.curve_every)
    return Measured(
        final_loss=loss,
        curve=[(mark, loss) for mark in marks],
        num_skipped=int(case.name == "tk2"),
        codec_errors=errors,
    )


def test_the_report_marks_the_pair_that_loses_more_than_a_percent(tmp_path: Path) -> None:
    manifest = write_data(str(tmp_path / "data"), np.arange(200), np.arange(100))
    summary = summarise({case: made_up(case) for case in full_cases()}, manifest)
    page = markdown(summary).splitlines()
    rows = {line.split("`")[1]: line for line in reversed(page) if line.startswith("| `")}
    assert "**(!)**" in rows["hq4/hq4"]
    assert "+2.00%" in rows["hq4/hq4"]
    assert [name for name, row in rows.items() if "(!)" in row] == ["hq4/hq4"]
    assert "level" in rows["q8/q8"]
    # Whoever sends every byte spares a thin link nothing.
    assert all(rows[name].endswith("| near links |") for name in ("none/none", "dense", "dense-mean"))
    behind = [line for line in page if line.startswith("| `hq4/hq4` | ")][-1]
    assert behind == "| `hq4/hq4` | +0.0840 | +0.0840 | +0.0840 | +0.0840 |"
    assert "by seed: `tk2` 1, 1, 1." in "\n".join(page)
    # 8.125 bits against 16, the trailer aside.
    assert "50.8%, 50.8%" in rows["q8/q8"]
    picture(summary, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
