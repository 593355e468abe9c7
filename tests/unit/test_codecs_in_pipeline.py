"""Codecs where they work: whole pipelines in one process, with lossy links, canaries, and codecs that change."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.codecs import CODECS
from actors.frame import wire_bytes
from actors.link import Link
from actors.spec import Kind, LinkCodecs
from orchestrator.config import RunConfig
from tests.lab.inprocess import Pipeline, open_pipeline
from tests.small_run import small_config

SPLIT = (1, 2, 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(tmp_path_factory.mktemp("run"), "train.steps=20", "wire.canary_every=2")


def with_codecs(config: RunConfig, forward: str, backward: str) -> RunConfig:
    return replace(config, wire=replace(config.wire, forward=forward, backward=backward))


def losses_of(config: RunConfig, num_steps: int) -> list[float]:
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        pipeline.run(num_steps)
        return pipeline.losses


@pytest.mark.parametrize(
    ("forward", "backward", "tolerance"),
    [("q8", "q8", 2e-3), ("hq4", "q8", 3e-2), ("q8", "hq4-stochastic", 3e-2), ("q4-stochastic", "q4", 3e-2)],
)
def test_a_lossy_pipeline_learns_nearly_the_same_and_always_the_same(
    config: RunConfig, forward: str, backward: str, tolerance: float
) -> None:
    exact = losses_of(config, 6)
    lossy = losses_of(with_codecs(config, forward, backward), 6)
    assert lossy != exact
    assert lossy == pytest.approx(exact, rel=tolerance)
    # Stochastic rounding too is a function of run, step, microbatch and boundary.
    assert losses_of(with_codecs(config, forward, backward), 6) == lossy


def test_a_step_tried_again_under_a_new_generation_is_the_same_step(config: RunConfig) -> None:
    config = with_codecs(config, "hq4-stochastic", "hq4-stochastic")
    expected = losses_of(config, 4)
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        pipeline.run(2)
        for stage in pipeline.stages:
            stage.abort(pipeline.state.generation)
        pipeline.state = replace(pipeline.state, generation=pipeline.state.generation + 1)
        pipeline.run(2)
        assert pipeline.losses == expected


def test_an_evaluation_goes_through_the_forward_codec(config: RunConfig) -> None:
    def held_out(forward: str) -> float:
        with open_pipeline(with_codecs(config, forward, "none"), SPLIT) as pipeline:
            pipeline.load()
            return sum(report.loss_sum for report in pipeline.evaluate(3))

    assert held_out("hq4") != held_out("none")
    assert held_out("hq4") == pytest.approx(held_out("none"), rel=2e-2)


def test_canaries_say_how_far_decoded_is_from_raw(config: RunConfig) -> None:
    with open_pipeline(with_codecs(config, "hq4", "q8"), SPLIT) as pipeline:
        pipeline.load()
        pipeline.run(4)
        canaries = pipeline.canaries
    # Steps 0 and 2, two links, both ways.
    assert [reading.step for reading in canaries] == 4 * [0] + 4 * [2]
    assert {(r.source_stage, r.target_stage, r.kind, r.codec) for r in canaries} == {
        (0, 1, Kind.ACTIVATION, "hq4"),
        (1, 2, Kind.ACTIVATION, "hq4"),
        (1, 0, Kind.GRADIENT, "q8"),
        (2, 1, Kind.GRADIENT, "q8"),
    }
    for reading in canaries:
        most_error = 0.2 if reading.codec == "hq4" else 0.02
        assert 0 < reading.relative_error < most_error
        assert reading.cosine == pytest.approx(1.0, abs=most_error**2)


def test_a_step_has_its_canaries_however_long_they_take(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Link._read_canary

    def read_late(link: Link, *arguments: Any) -> None:
        time.sleep(0.05)
        read(link, *arguments)

    monkeypatch.setattr(Link, "_read_canary", read_late)
    # With one microbatch, the frame that is compared is the last one, too.
    config = replace(with_codecs(config, "hq4", "q8"), batch=replace(config.batch, num_microbatches=1))
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        for step, num_canaries in ((0, 4), (1, 0), (2, 4)):
            pipeline.canaries.clear()
            pipeline.run(1)
            assert [reading.step for reading in pipeline.canaries] == num_canaries * [step]


def test_codecs_change_with_a_step_and_links_have_their_own(config: RunConfig) -> None:
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        pipeline.run(2)
        exact = list(pipeline.losses)
        pipeline.codecs = (LinkCodecs(forward="hq4", backward="q8"), LinkCodecs(forward="none", backward="bf16"))
        pipeline.run(4)
        used = {(r.source_stage, r.target_stage): r.codec for r in pipeline.canaries if r.step >= 2}
        assert used == {(0, 1): "hq4", (1, 0): "q8", (2, 1): "bf16", (1, 2): "none"}
        assert pipeline.losses[:2] == exact == losses_of(config, 2)
        assert pipeline.losses[2:] != losses_of(config, 6)[2:]


def test_links_of_their_own_come_from_the_configuration(config: RunConfig) -> None:
    own = replace(config, wire=replace(config.wire, links={"1-2": "hq4/q8"}))
    with open_pipeline(own, SPLIT) as pipeline:
        codecs = pipeline.stages[0]._assignment.plan.link_codecs
    assert codecs == (LinkCodecs(forward="none", backward="none"), LinkCodecs(forward="hq4", backward="q8"))


def test_a_frame_takes_the_bytes_that_the_plan_announces(config: RunConfig) -> None:
    with open_pipeline(with_codecs(config, "hq4", "q8"), (2, 2)) as pipeline:
        pipeline.load()
        pipeline.run(1)
        (link,) = pipeline.stages[0]._assignment.plan.links
        forward = CODECS["hq4"].size_bytes(link.frame_elements, torch.float32)
        assert (link.frame_bytes_forward, link.raw_frame_bytes) == (forward, 4 * link.frame_elements)
        (count,) = pipeline.counts[0]
        assert count.wire_bytes == config.batch.num_microbatches * wire_bytes(forward, link.chunk_bytes)
        assert count.raw_bytes == config.batch.num_microbatches * link.raw_frame_bytes


def poisoned(pipeline: Pipeline) -> None:
    """Make stage 0 give infinities from now on."""
    name = next(iter(pipeline.stages[0].parameters))
    with torch.no_grad():
        pipeline.stages[0].parameters[name].fill_(math.inf)


@pytest.mark.parametrize("codec", ["none", "q8", "hq4-stochastic"])
def test_values_that_are_not_finite_skip_the_step_with_any_codec(config: RunConfig, codec: str) -> None:
    with open_pipeline(with_codecs(config, codec, codec), SPLIT) as pipeline:
        pipeline.load()
        poisoned(pipeline)
        pipeline.run(1)
        assert pipeline.state.history.num_skipped == 1


def test_a_resumed_run_rounds_as_one_that_was_not_cut(config: RunConfig, tmp_path: Path) -> None:
    config = with_codecs(config, "hq4-stochastic", "q8")
    expected = losses_of(config, 5)
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        pipeline.run(3)
        weights = {name: weight.clone() for name, weight in pipeline.weights().items()}
        states = [stage._engine.optimizer.state_dict() for stage in pipeline.stages]
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        with torch.no_grad():
            for name, weight in pipeline.weights().items():
                weight.copy_(weights[name])
        for stage, state in zip(pipeline.stages, states, strict=True):
            stage._engine.optimizer.load_state_dict(state)
            stage._engine.version = 3
        pipeline.state = replace(pipeline.state, step=3)
        pipeline.run(2)
        assert pipeline.losses == expected[3:]
