"""`isthmus simulate`: a saved plan or a fleet in, tables, pictures and a folder that report shows out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.fleet_spec import Fleet, LinkCard, NodeCard, PartTimes, RegionLink
from orchestrator.cli import main
from orchestrator.config import load_config
from orchestrator.events import encode, read_history
from orchestrator.runfolder import RunFolder
from orchestrator.simulate import open_scene

WORDS = ["model.num_layers=4", "model.hidden_size=64", "model.ffn_size=128", "model.vocab_size=512"]


def card(number: int, **changes: object) -> NodeCard:
    times = PartTimes(
        microbatch_size=8,
        layer_forward_s=0.1,
        layer_backward_s=0.2,
        layer_weight_s=0.1,
        embedding_forward_s=0.01,
        embedding_backward_s=0.01,
        head_forward_s=0.02,
        head_backward_s=0.04,
    )
    values = {
        "node": f"node-{number}",
        "host": f"host-{number}",
        "region": "north",
        "device": "CPU x1",
        "boundary_bytes": 4,
        "memory_bytes": 10**9,
        "times": (times,),
        "price_per_hour": 0.5,
        "losses_per_hour": 1.0,
    }
    return NodeCard(**(values | changes))  # pyright: ignore[reportArgumentType]


def fleet_of(*cards: NodeCard) -> Fleet:
    return Fleet(
        nodes=cards, links=(), regions=(RegionLink(source="north", target="north", delay_s=0.01, rate_mbps=100),)
    )


def saved(folder: Path, fleet: Fleet) -> Path:
    path = folder / "fleet.json"
    path.write_text(json.dumps(encode(fleet)))
    return path


def test_a_fleet_is_planned_for_and_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = saved(tmp_path, fleet_of(card(0), card(1), card(2))), tmp_path / "out"
    assert main(["simulate", str(source), *WORDS, "--steps", "3", "--spread", "0.1", "--out", str(out)]) == 0
    assert "simulated:" in capsys.readouterr().out
    history = read_history(RunFolder(out).events)
    assert [step.step for step in history.steps] == [0, 1, 2]
    assert all(step.is_simulated for step in history.steps)
    assert len({step.step_s for step in history.steps}) == 3
    assert history.steps[-1].dollars == pytest.approx(sum(step.step_s for step in history.steps) * 1.5 / 3600)
    assert RunFolder(out).timeline.stat().st_size > 1000
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "a simulation: nothing was trained" in page
    # The folder is itself something to simulate, and may be written again.
    assert main(["simulate", str(out / "plan.json"), "--out", str(out)]) == 0


def test_nodes_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = saved(tmp_path, fleet_of(*(card(i) for i in range(4)))), tmp_path / "out"
    trace = tmp_path / "trace.csv"
    trace.write_text("0,add,a\n0,add,b\n600000,remove,a\n900000,add,c\n3600000,remove,b\n")
    words = [*WORDS, "checkpoints.every_steps=20", "--out", str(out)]
    assert main(["simulate", str(source), *words, "--trace", str(trace)]) == 0
    assert "goodput" in capsys.readouterr().out
    names = [event.name for event in read_history(RunFolder(out).events).events]
    assert names[:3] == ["simulated", "placed", "node_lost"]
    assert (out / "nodes.png").stat().st_size > 1000
    assert main(["report", str(out)]) == 0
    first = read_history(RunFolder(out).events)
    assert main(["simulate", str(source), *words, "--hours", "2", "--seed", "5"]) == 0
    assert read_history(RunFolder(out).events) != first


def test_a_run_goes_on_where_a_linked_node_or_the_last_of_a_region_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = RegionLink(source="north", target="north", delay_s=0.01, rate_mbps=100)
    far = RegionLink(source="north", target="south", delay_s=0.05, rate_mbps=100)
    cards = (card(0), card(1), card(2, region="south", losses_per_hour=20.0))
    link = LinkCard(source="node-1", target="node-2", delay_s=0.02, rate_mbps=50)
    for links in ((), (link,)):
        source = saved(tmp_path, Fleet(nodes=cards, links=links, regions=(near, far)))
        out = tmp_path / f"out-{len(links)}"
        words = [*WORDS, "plan.stages=2", "--hours", "2", "--out", str(out)]
        assert main(["simulate", str(source), *words]) == 0
        said = capsys.readouterr().out
        assert "planned anew" in said


@pytest.mark.parametrize(
    "fleet",
    [
        fleet_of(),
        fleet_of(card(0), card(0)),
        fleet_of(card(0, price_per_hour=-1.0)),
        fleet_of(card(0, losses_per_hour=float("nan"))),
        Fleet(nodes=(card(0),), links=(LinkCard(source="a", target="b", delay_s=0.1, rate_mbps=0.0),)),
    ],
)
def test_bad_fleets_get_one_line_and_a_remedy(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(saved(tmp_path, fleet)), *WORDS, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert said[1].startswith("  remedy: ")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"nodes": 3, "links": []}', '{"stages": []}'])
def test_what_is_neither_plan_nor_fleet_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "thing.json"
    source.write_text(content)
    assert main(["simulate", str(source), *WORDS, "--out", str(tmp_path / "out")]) == 2
    assert "remedy" in capsys.readouterr().err


def test_a_real_runs_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.open(tmp_path, "real")
    source = saved(tmp_path, fleet_of(card(0)))
    assert main(["simulate", str(source), *WORDS, "--out", str(folder.path)]) == 2
    assert "real run" in capsys.readouterr().err
    assert not folder.events.exists()


def test_what_is_trained_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path, fleet_of(card(0)))
    assert main(["simulate", str(source)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(load_config(WORDS).yaml)
    assert open_scene(source, []).config.model.num_layers == 4
