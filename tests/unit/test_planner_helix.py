"""The bench of stored programs: what it reads, what it refuses, and that it checks what it reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.planner_helix import CasesError, checked_rate, misses, parse_program, read_programs, run
from orchestrator.planner.intervals import Placement

# Two layers, two nodes: as a chain they pass 3, as the link between them does.
CHAIN = """2 2 5 0
2 4.0 1.0
1 5.0
2 0 100
2 1 100
0 3 100
1 3 100
0 1 3.0
"""


def folder(tmp_path: Path, text: str, anchors: object) -> Path:
    (tmp_path / "chain.hx").write_text(text)
    (tmp_path / "anchors.json").write_text(json.dumps(anchors))
    return tmp_path


def test_a_row_has_the_best_placement_its_check_and_its_bound(tmp_path: Path) -> None:
    (row,) = run(folder(tmp_path, CHAIN, {"chain": {"gurobi_obj": 2.0}}), quick=True)
    assert (row.rate, row.checked_rate, row.starts, row.stops) == (3.0, 3.0, (0, 1), (1, 2))
    assert (row.ratio, row.bound) == (1.5, pytest.approx(4.0, rel=1e-3))
    assert misses([row]) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ratio": 0.99}, "less than Gurobi's"),
        ({"checked_rate": 2.9}, "the linear program"),
        ({"bound": 2.9}, "more than the bound"),
        ({"search_wall_s": 31.0}, "31.0 s"),
    ],
)
def test_each_bound_that_is_missed_is_said(tmp_path: Path, changed: dict[str, float], words: str) -> None:
    (row,) = run(folder(tmp_path, CHAIN, {"chain": {"gurobi_obj": 2.0}}), quick=True)
    (line,) = misses([replace(row, **changed)])
    assert words in line


@pytest.mark.parametrize(
    ("starts", "stops", "rate"), [((0, 1), (1, 2), 3.0), ((0, 0), (2, 1), 1.0), ((1, 0), (2, 1), 0.0)]
)
def test_the_check_follows_the_program(starts: tuple[int, ...], stops: tuple[int, ...], rate: float) -> None:
    placement = Placement(starts=starts, stops=stops, rate=0.0, num_evaluations=0)
    assert checked_rate(parse_program("chain", CHAIN, 2.0), placement) == pytest.approx(rate)


def test_the_check_refuses_what_a_node_cannot_hold() -> None:
    placement = Placement(starts=(0, 0), stops=(2, 2), rate=0.0, num_evaluations=0)
    with pytest.raises(ValueError, match="node 1 cannot hold 2 layers"):
        checked_rate(parse_program("chain", CHAIN, 2.0), placement)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (CHAIN, "", "line 1 is not"),
        ("2 2 5 0", "2 2 5", "line 1 is not"),
        ("2 2 5 0", "2 x 5 0", "line 1 has 'x'"),
        ("2 2 5 0", "9999 2 5 0", "line 1 has more than"),
        ("2 2 5 0", "2 0 7 0", "or none"),
        ("2 2 5 0", "2 2 5 1", "partial inference"),
        ("2 2 5 0", "2 2 6 0", "but 7 lines follow"),
        ("1 5.0", "1 5.0 1.0", "line 3 is not a count"),
        ("1 5.0", "1 nan", "line 3 has 'nan' for a rate"),
        ("1 5.0", "1 -5.0", "line 3 has '-5.0' for a rate"),
        ("1 5.0", "1 0.0", "line 3 is a node that passes nothing"),
        ("2 4.0 1.0", "3 4.0 1.0 1.0", "line 2 has '3'"),
        ("0 1 3.0", "0 1", "line 8 is not"),
        ("0 1 3.0", "0 4 3.0", "line 8 has '4'"),
        ("0 1 3.0", "0 3 3.0", "line 8 is a link that cannot be"),
        ("0 1 3.0", "0 0 3.0", "line 8 is a link that cannot be"),
        ("0 1 3.0", "3 1 3.0", "line 8 is a link that cannot be"),
        ("0 1 3.0", "0 1 inf", "line 8 has 'inf'"),
    ],
)
def test_a_file_that_is_no_program_is_refused_by_its_line(old: str, new: str, words: str) -> None:
    with pytest.raises(CasesError, match=words):
        parse_program("chain", CHAIN.replace(old, new), 2.0)


@pytest.mark.parametrize(
    ("anchors", "words"),
    [([], "no rates"), ({"chain": 2.0}, "no rates"), ({"other": {"gurobi_obj": 2.0}}, "says nothing of chain")],
)
def test_a_program_without_an_anchor_is_refused(tmp_path: Path, anchors: object, words: str) -> None:
    with pytest.raises(CasesError, match=words):
        read_programs(folder(tmp_path, CHAIN, anchors))


def test_a_folder_without_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CasesError, match=r"holds no \*\.hx"):
        read_programs(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("anchors.json", b"{", "no JSON"),
        ("anchors.json", b"[" * 100_000, "no JSON"),
        ("chain.hx", b"\xff", "cannot be read"),
        ("chain.hx", b"1 " * 2**20, "over 1048576 bytes"),
    ],
)
def test_a_file_that_is_not_text_of_its_kind_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    folder(tmp_path, CHAIN, {"chain": {"gurobi_obj": 2.0}})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CasesError, match=words):
        read_programs(tmp_path)
