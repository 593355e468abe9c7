"""Depths, chunks, windows and codecs that change between two steps of a pipeline in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.spec import Kind, LinkCodecs, LinkSizes
from orchestrator.config import RunConfig
from tests.lab.inprocess import Pipeline, open_pipeline
from tests.reference import train_plainly
from tests.small_run import small_config

STEPS = 6
SPLIT = (1, 2, 1)
SMALL, LARGE = LinkSizes(chunk_bytes=1024, window_bytes=2048), LinkSizes(chunk_bytes=65_536, window_bytes=1 << 20)
# One tuning a step: deeper, shallower, in smaller pieces, as much as there is.
DEPTHS = ((1, 1, 1), (6, 6, 6), (2, 1, 1), (3, 2, 1), (6, 1, 6), (1, 6, 1))
SIZES = ((LARGE, SMALL), (SMALL, SMALL), (LARGE, LARGE), (SMALL, LARGE), (LARGE, LARGE), (SMALL, SMALL))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(tmp_path_factory.mktemp("run"), f"train.steps={STEPS}")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def most_in_flight(pipeline: Pipeline, stage: int) -> int:
    """How many microbatches a stage held at most in its last step, by its own account."""
    held = most = 0
    for action in pipeline.reports[stage].actions:
        held += (action.name == "F") - (action.name == "B")
        most = max(most, held)
    return most


def bound_bytes(pipeline: Pipeline, kind: Kind) -> list[int]:
    return [count.wire_bytes for counts in pipeline.counts for count in counts if count.kind is kind]


@pytest.mark.parametrize("schedule", ["bdp", "bdp-split"])
def test_depths_and_sizes_change_between_steps_and_no_bit_does(config: RunConfig, schedule: str) -> None:
    expected = train_plainly(config)
    config = replace(config, plan=replace(config.plan, schedule=schedule))
    sent: set[tuple[int, ...]] = set()
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        for depths, sizes in zip(DEPTHS, SIZES, strict=True):
            pipeline.in_flight, pipeline.link_sizes = depths, sizes
            pipeline.run(1)
            if schedule == "bdp":
                assert all(most_in_flight(pipeline, stage) <= depth for stage, depth in enumerate(depths))
            sent.add(tuple(bound_bytes(pipeline, Kind.ACTIVATION)))
        assert pipeline.losses == expected.losses
        weights = pipeline.weights()
    assert len(sent) == 4, "a frame in smaller chunks has more headers"
    for name, weight in expected.weights.items():
        assert torch.equal(weights[name], weight), name


def test_the_first_stage_goes_ahead_as_far_as_it_may(config: RunConfig) -> None:
    config = replace(config, plan=replace(config.plan, schedule="bdp"))
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        seen: list[int] = []
        for depth in (1, 4, 2):
            pipeline.in_flight = (depth, depth, depth)
            pipeline.run(1)
            seen.append(most_in_flight(pipeline, 0))
    assert seen[0] == 1
    assert seen[2] <= 2


def test_codec_and_depth_change_in_the_same_step(config: RunConfig) -> None:
    """The same codecs at the same steps give the same run, whatever the depths."""
    config = replace(config, plan=replace(config.plan, schedule="bdp"))
    harsh = (LinkCodecs(forward="q8", backward="hq4-stochastic"), LinkCodecs(forward="q8", backward="q8"))
    plain = (LinkCodecs(forward="none", backward="none"),) * 2

    def losses(first: tuple[int, ...], second: tuple[int, ...]) -> list[float]:
        with open_pipeline(config, SPLIT) as pipeline:
            pipeline.load()
            for codecs, depths, count in ((plain, first, 2), (harsh, second, 2), (plain, first, 2)):
                pipeline.codecs, pipeline.in_flight = codecs, depths
                pipeline.link_sizes = (LARGE, LARGE) if codecs is plain else (SMALL, LARGE)
                pipeline.run(count)
            return pipeline.losses

    tuned = losses((1, 1, 1), (6, 4, 2))
    assert tuned == losses((6, 6, 6), (1, 1, 1))
    exact = train_plainly(config).losses
    assert tuned[:3] != exact[:3]
    assert tuned[:2] == exact[:2]


def test_what_a_link_does_is_in_the_report(config: RunConfig, tmp_path: Path) -> None:
    with open_pipeline(config, SPLIT) as pipeline:
        pipeline.load()
        pipeline.run(2)
        readings = [reading for report in pipeline.reports for reading in report.readings]
    assert {(reading.source_stage, reading.target_stage) for reading in readings} == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert all(reading.num_bytes > 0 and reading.rate_mbps > 0 and reading.delay_s >= 0 for reading in readings)
