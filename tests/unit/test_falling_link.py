"""A whole run without a cluster, over links whose rate falls from 100 to 4 Mbit/s in the middle of it."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from actors.fleet_spec import Fleet, LinkCard, NodeCard
from actors.spec import Plan
from orchestrator import controller
from orchestrator.config import RunConfig
from orchestrator.events import History, decode, read_history
from orchestrator.runfolder import RunFolder
from tests.lab.local_crew import LocalCrew, local_fleet
from tests.part_times import part_times
from tests.reference import train_plainly
from tests.small_run import small_config

FAT, THIN, DELAY_S = 100.0, 4.0, 0.02
# A frame of 65 kB takes 5 ms, and then 131.
SHAPE = ("model.hidden_size=64", "batch.seq_len=64", "batch.microbatch_size=4", "batch.num_microbatches=6")
FALLS_AT, STEPS = 3, 14


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def fleet_at(rate_mbps: float) -> Fleet:
    """Two nodes that take about what this model takes on any machine, and a link as a probe would find it."""
    times = part_times(4, layer_forward_s=0.003, layer_backward_s=0.006, embedding_s=0.001, head_s=0.003)
    nodes = tuple(
        NodeCard(
            node=name,
            host=name,
            region="local",
            device="CPU",
            boundary_bytes=4,
            memory_bytes=10**12,
            times=(times,),
        )
        for name in ("node-0", "node-1")
    )
    ends = (("node-0", "node-1"), ("node-1", "node-0"))
    return Fleet(
        nodes=nodes,
        links=tuple(LinkCard(source=a, target=b, delay_s=DELAY_S, rate_mbps=rate_mbps) for a, b in ends),
    )


def config_in(folder: Path, *words: str) -> RunConfig:
    return small_config(
        folder, *SHAPE, f"train.steps={STEPS}", "plan.split=[2,2]", "plan.schedule=bdp", "timeouts.ack_s=0.6", *words
    )


def run(
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    rate_mbps: float,
    on_step: Callable[[LocalCrew, int], None] = lambda crew, step: None,
) -> tuple[LocalCrew, History]:
    crew = LocalCrew(fleet=fleet_at(rate_mbps), rate_mbps=rate_mbps, delay_s=DELAY_S, on_step=on_step)
    with monkeypatch.context() as patch:
        patch.setattr(controller, "open_fleet", lambda *_: local_fleet(crew))
        controller.train(config, address=None, console=Console(file=io.StringIO()), interrupted=lambda: False)
    return crew, history_of(config)


def history_of(config: RunConfig) -> History:
    return read_history(RunFolder(Path(config.runs_dir) / config.name).events)


def plan_of(config: RunConfig) -> Plan:
    return decode(Plan, json.loads(RunFolder(Path(config.runs_dir) / config.name).plan.read_text()))


def fall(crew: LocalCrew, step: int) -> None:
    if step == FALLS_AT:
        crew.set_rate(THIN)


def step_s(history: History, first: int, last: int) -> float:
    return statistics.median(step.step_s for step in history.steps[first:last])


@pytest.mark.parametrize("thin", ["", "wire.thin=[q8/q8]"])
def test_a_run_over_a_link_that_falls_is_soon_as_fast_as_one_planned_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thin: str
) -> None:
    words = [thin] if thin else []
    config = config_in(tmp_path, *words)
    crew, history = run(config, monkeypatch, FAT, fall)
    events = {event.name for event in history.events}
    assert events.isdisjoint({"retried", "node_lost", "failed", "warned", "skipped"})
    told = [event for event in history.events if event.name == "retuned"]
    assert 1 <= len(told) <= 2
    assert FALLS_AT < told[0].step <= FALLS_AT + 4
    assert "100 were planned" in told[0].text
    # Both ends have it from the next order on.
    before, after = crew.orders[told[0].step], crew.orders[told[0].step + 1]
    assert before == replace(crew.orders[told[0].step - 1], step=before.step, commit=before.commit, save=before.save), (
        "nothing changed before"
    )
    assert after.link_sizes != before.link_sizes
    assert (after.codecs != before.codecs) == bool(thin)
    saved = plan_of(config)
    assert saved.links[0].rate_mbps == pytest.approx(THIN, rel=0.15)
    assert saved.link_codecs == crew.orders[-1].codecs

    alone, planned = run(config_in(tmp_path, "name=planned", "train.steps=4", *words), monkeypatch, THIN)
    assert alone.orders[0].codecs == crew.orders[-1].codecs
    assert step_s(history, -4, STEPS) <= 1.2 * step_s(planned, 1, 4)

    # A frame is one chunk here; some find no room while the other end has yet to open its step.
    frames = sum(link.num_frames for record in history.steps for link in record.links)
    sent = sum(throttle.num_pushed for throttle in crew.throttles)
    assert frames <= sent <= 1.05 * frames + config.train.eval_microbatches
    if not thin:
        assert [record.loss for record in history.steps] == train_plainly(config).losses, "not a bit is another one"


def test_a_link_that_comes_back_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rise(crew: LocalCrew, step: int) -> None:
        if step == 2:
            crew.set_rate(FAT)

    config = config_in(tmp_path, "name=back", "train.steps=24")
    _, history = run(config, monkeypatch, THIN, rise)
    told = [event for event in history.events if event.name == "retuned"]
    assert told
    assert "4 were planned" in told[0].text
    assert plan_of(config).links[0].rate_mbps > 2 * THIN
    assert step_s(history, -5, 24) < 0.5 * history.steps[1].step_s


def test_a_link_that_stays_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, history = run(config_in(tmp_path, "name=same", "train.steps=8"), monkeypatch, 20.0)
    assert [event.name for event in history.events] == ["started", "saved", "finished"]


def test_without_a_watch_the_plan_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path, "name=never", "train.steps=8", "retune.factor=0")
    crew, history = run(config, monkeypatch, FAT, fall)
    assert "retuned" not in {event.name for event in history.events}
    assert len({(order.in_flight, order.link_sizes) for order in crew.orders}) == 1
    seen = [link for link in history.steps[-1].links if link.source_stage == 0]
    assert seen[0].is_measured
    assert seen[0].rate_mbps == pytest.approx(THIN, rel=0.15)
