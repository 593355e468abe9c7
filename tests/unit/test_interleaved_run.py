"""Interleaved stages as nodes run them: the same numbers as a chain of as many nodes, in fewer places."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.errors import FrameUnexpected, OutOfDeviceMemory
from actors.frame import HEADER_BYTES, target_of
from actors.mailbox import Verdict
from orchestrator.causes import Cause
from orchestrator.config import RunConfig
from orchestrator.records import stage_records
from orchestrator.where import where_time_went
from tests.lab.inprocess import DirectCarrier, open_pipeline
from tests.small_run import small_config
from tests.unit.synthetic_run import make_step

STAGES = (1, 1, 1, 1)
LOSSY = ("wire.forward=hq4", "wire.backward=hq4-stochastic")


def interleaved(folder: Path, chunks: int, *words: str) -> RunConfig:
    return small_config(folder, "plan.schedule=interleaved", f"plan.chunks={chunks}", "train.steps=4", *words)


@pytest.mark.parametrize("words", [(), LOSSY])
@pytest.mark.parametrize("num_microbatches", [1, 5, 6])
def test_two_nodes_of_two_stages_are_four_nodes_of_one(
    words: tuple[str, ...], num_microbatches: int, tmp_path: Path
) -> None:
    batch = f"batch.num_microbatches={num_microbatches}"
    found: list[tuple[list[float], dict[str, torch.Tensor]]] = []
    for config in (interleaved(tmp_path, 2, batch, *words), small_config(tmp_path, batch, "train.steps=4", *words)):
        with open_pipeline(config, STAGES) as pipeline:
            pipeline.load()
            pipeline.run(4)
            found.append((pipeline.losses, {name: weight.clone() for name, weight in pipeline.weights().items()}))
            num_nodes = len(pipeline.nodes)
        assert num_nodes == (2 if config.plan.chunks else 4)
    (losses, weights), (expected, expected_weights) = found
    assert losses == expected
    assert all(torch.equal(weights[name], weight) for name, weight in expected_weights.items())


@pytest.mark.parametrize(("num_nodes", "chunks"), [(3, 2), (2, 3)])
def test_six_stages_on_fewer_nodes_are_six_nodes_of_one(num_nodes: int, chunks: int, tmp_path: Path) -> None:
    losses: list[list[float]] = []
    for config in (interleaved(tmp_path, chunks, "model.num_layers=6"), small_config(tmp_path, "model.num_layers=6")):
        with open_pipeline(config, (1,) * 6) as pipeline:
            assert len(pipeline.nodes) == (num_nodes if config.plan.chunks else 6)
            pipeline.load()
            pipeline.run(2)
            losses.append(pipeline.losses)
    assert losses[0] == losses[1]


def test_a_link_that_fails_ends_the_step_whatever_stage_the_node_waits_in(tmp_path: Path) -> None:
    config = interleaved(tmp_path, 2, "timeouts.ack_s=5", "timeouts.frame_s=30")
    with open_pipeline(config, STAGES) as pipeline:
        pipeline.load()
        node = pipeline.nodes[0]
        # The other node takes no part: this one waits in its second stage for what never comes.
        calls = ThreadPoolExecutor(1).submit(node.step, pipeline._order(run_step=True))
        began_s = time.monotonic()
        node._stages[0]._on_failure(pipeline.state.generation, FrameUnexpected("stage 1 refused a frame"))
        with pytest.raises(FrameUnexpected, match="stage 1 refused"):
            calls.result(timeout=20)
        assert time.monotonic() - began_s < 20


def test_a_step_tried_again_is_the_same_step_and_an_order_twice_the_same_report(tmp_path: Path) -> None:
    config = interleaved(tmp_path, 2, *LOSSY)
    with open_pipeline(config, STAGES) as pipeline:
        pipeline.load()
        pipeline.run(4)
        expected = pipeline.losses
    with open_pipeline(config, STAGES) as pipeline:
        pipeline.load()
        pipeline.run(1)
        order = pipeline._order(run_step=True)
        reports = pipeline._all("step", order)
        assert [report.stage for report in reports] == [0, 1, 2, 3]
        assert all(a is b for a, b in zip(reports, pipeline._all("step", order), strict=True))
        for node in pipeline.nodes:
            node.abort(pipeline.state.generation)
        pipeline.state = replace(pipeline.state, generation=pipeline.state.generation + 1)
        pipeline.run(3)
        assert pipeline.losses == expected


@pytest.mark.parametrize("num_microbatches", [1, 4, 21])
def test_an_evaluation_is_that_of_a_chain_and_ends_whatever_its_length(num_microbatches: int, tmp_path: Path) -> None:
    sums: list[tuple[float, int]] = []
    for config in (interleaved(tmp_path, 2), small_config(tmp_path)):
        with open_pipeline(config, STAGES) as pipeline:
            pipeline.load()
            reports = pipeline.evaluate(num_microbatches)
            assert [report.num_targets > 0 for report in reports] == [False] * (len(reports) - 1) + [True]
            sums.append((reports[-1].loss_sum, reports[-1].num_targets))
    assert sums[0] == sums[1]


def test_a_chunk_for_a_stage_of_another_node_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[bytes] = []

    class Noting(DirectCarrier):
        def push(self, chunk: bytes):
            chunks.append(chunk)
            return super().push(chunk)

    monkeypatch.setattr("tests.lab.inprocess.DirectCarrier", Noting)
    with open_pipeline(interleaved(tmp_path, 2), STAGES) as pipeline:
        pipeline.load()
        pipeline.run(1)
        assert {target_of(chunk) for chunk in chunks} == {0, 1, 2, 3}
        for chunk in chunks[:20]:
            others = pipeline.nodes[1 - (target_of(chunk) or 0) % 2]
            receipt = others.receive(chunk)
            assert receipt.verdict is Verdict.REFUSED
        assert pipeline.nodes[0].receive(b"short").verdict is Verdict.CORRUPT
        assert pipeline.nodes[0].receive(bytes(HEADER_BYTES)).verdict is Verdict.CORRUPT
    assert target_of(b"short") is None


def test_out_of_memory_names_all_stages_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError

    with open_pipeline(interleaved(tmp_path, 2), STAGES) as pipeline:
        pipeline.load()
        monkeypatch.setattr("actors.engine.StageEngine.begin", no_memory)
        with pytest.raises(OutOfDeviceMemory, match=r"stage 0 and 2 on .* in step 0"):
            pipeline.nodes[0].step(pipeline._order(run_step=True))


def test_a_nodes_stages_share_its_time(tmp_path: Path) -> None:
    with open_pipeline(interleaved(tmp_path, 2), STAGES) as pipeline:
        pipeline.load()
        pipeline.run(1)
        reports = pipeline.reports
    step_s = max(report.step_s for report in reports) + 0.01
    stages = stage_records(reports, step_s, num_nodes=2)
    assert [stage.seat for stage in stages] == [0, 1, 0, 1]
    for one, other in ((0, 2), (1, 3)):
        assert stages[one].idle_share == stages[other].idle_share
        busy_s = reports[one].compute_s + reports[other].compute_s
        assert stages[one].idle_share == pytest.approx(1 - busy_s / step_s)
    lost = where_time_went([replace(make_step(0), step_s=step_s, stages=stages)], {})
    assert len(lost) == 4
    for own in lost:
        assert sum(own.share(cause) for cause in Cause) == pytest.approx(1.0)
        # What its node did for the other stage is neither this one's waiting nor unknown.
        other = reports[(own.stage + 2) % 4]
        assert own.seconds(Cause.TURN) >= 0.99 * other.compute_s
        assert own.num_on_node == 2
