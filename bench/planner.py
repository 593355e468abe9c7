"""All of the planner's figures in one run: how near to the optimum, to the bound, to others' results, and how fast.

    python -m bench.planner [--quick] [--check] [--cases DIR]

Each part is a bench of its own (`python -m bench.planner_small` and so on) and runs by itself, one after another, so
that none disturbs another's clock. `--cases` is a folder of published inputs: `helix/` with the programs that Helix
(Mei et al. 2025) stored, `dtfm/` with the five cases of DT-FM (Yuan et al. 2022). Without it those parts are left out,
and the result says so. The table goes to docs/planner-figures.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import bench_parser, save

PAGE = Path(__file__).parents[1] / "docs" / "planner-figures.md"
_PART_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One bench: its module, the folder of inputs that it needs, and how its figures are told."""

    module: str
    cases: str | None
    tell: Callable[[Mapping[str, Any]], list[str]]


def main() -> int:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--cases", type=Path, help="a folder of published inputs")
    arguments = parser.parse_args()
    measured: dict[str, Any] = {}
    lines: list[str] = []
    missed: list[str] = []
    for part in PARTS:
        extra = ["--quick"] if arguments.quick else []
        if part.cases is not None:
            if arguments.cases is None:
                lines += [f"## {part.module}", "", "Not run: no inputs were given.", ""]
                continue
            extra += ["--cases", str(arguments.cases / part.cases)]
        document, met = _run(part.module, extra)
        measured[part.module] = document
        lines += [f"## {part.module}", "", *part.tell(document), ""]
        if not met:
            missed.append(part.module)
    print(save("planner", arguments, {"parts": measured, "missed": missed}))
    if not arguments.quick:
        PAGE.write_text("\n".join([_HEAD, *lines]).rstrip() + "\n")
    print("bounds missed: " + (", ".join(missed) or "none"))
    return 1 if arguments.check and missed else 0


def _run(module: str, extra: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Run a part with `--check` and return what it saved, and whether all its bounds were met."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", f"bench.{module}", "--check", "--out", str(out), *extra]
        done = subprocess.run(command, timeout=_PART_S)
        return json.loads(out.read_text()), done.returncode == 0


def _small(document: Mapping[str, Any]) -> list[str]:
    found = document["summary"]
    count = found["num_chains"] + found["num_replicated"]
    return [
        f"{count} random fleets, uneven in nodes, links and memory: {found['num_chains']} chains of up to 12 nodes, "
        f"{found['num_replicated']} with replicas of up to 6 nodes and 8 layers; on {found['num_infeasible']} of them "
        f"nothing fits. Against the optimum by enumeration or by subsets: {found['num_optimal']} optimal, mean gap "
        f"{found['mean_gap']:.4%} (bound 0.5%), worst {found['worst_gap']:.2%} (bound 5%); feasibility mistaken in "
        f"{found['num_mistaken']}.",
    ]


def _scale(document: Mapping[str, Any]) -> list[str]:
    lines = [
        "| nodes | regions | stages | used | rate, microbatches/s | bound | gap | plan, s (processor) | binds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['nodes']:,} | {row['regions']} | {row['stages']} | {row['nodes_used']:,} | {row['rate']:.2f} | "
        f"{row['bound']:.2f} | {row['gap']:.2%} | {row['plan_wall_s']:.1f} ({row['plan_cpu_s']:.1f}) | {row['binds']} |"
        for row in document["fleets"]
    ]
    lines += [
        "",
        "What a step takes besides its steady pace, in seconds, and that of a plan made for the shortest step:",
        "",
        "| nodes | step | fill | exchange among replicas | commit | shortest step | its gap |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['nodes']:,} | {_number(row['step_s'])} | {_number(row['fill_s'])} | {_number(row['sync_s'])} | "
        f"{_number(row['commit_s'])} | {_number(row['short_step_s'])} | {row['short_gap']:.2%} |"
        for row in document["fleets"]
    ]
    lines.append("")
    lines += [
        f"One {row['change']} at {row['nodes']:,} nodes: bound {row['bound_wall_ms']:.0f} ms, replan "
        f"{row['replan_wall_ms']:.0f} ms (processor {row['bound_cpu_ms']:.0f} and {row['replan_cpu_ms']:.0f}), worst "
        f"gap afterwards {row['worst_gap']:.2%}.  "
        for row in document["replans"]
    ]
    return [*lines, *(f"Missed: {line}  " for line in document["missed"])]


def _schedule(document: Mapping[str, Any]) -> list[str]:
    lines = [
        "| one-way delay | schedule | share of the stages used | ceiling | most in flight |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {1e3 * row['delay_s']:.0f} ms | {row['schedule']} | {row['utilisation']:.3f} | {row['ceiling']:.3f} | "
        f"{max(row['in_flight_S'])} |"
        for row in document["rows"]
    ]


def _helix(document: Mapping[str, Any]) -> list[str]:
    lines = ["| program | nodes | Gurobi, stored | ours | bound | gap | seconds |", "|---|---|---|---|---|---|---|"]
    return lines + [
        f"| {row['program']} | {row['num_nodes']} | {row['gurobi_rate']:.2f} | {row['rate']:.2f} | "
        f"{row['bound']:.2f} | {row['gap']:.2%} | {row['search_wall_s']:.1f} |"
        for row in document["rows"]
    ]


def _dtfm(document: Mapping[str, Any]) -> list[str]:
    lines = [
        "| fleet | grid | published code, s | compared with | ours, s | gap | other seeds, s | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if row["kind"] == "small":
            continue
        others = row["other_seeds_cost_s"]
        lines.append(
            f"| {row['kind']} {row['name']} | {row['num_stages']} x {row['num_replicas']} of {row['num_nodes']} | "
            f"{_number(row['published_s'])} | {row['reference']} {row['reference_s']:.4f} | {row['cost_s']:.4f} | "
            f"{row['gap']:.2%} | {min(others):.2f} to {max(others):.2f} | {row['search_wall_s']:.1f} |"
        )
    small = [row["gap"] for row in document["rows"] if row["kind"] == "small"]
    return [
        *lines,
        "",
        f"Of {len(small)} fleets small enough for enumeration {sum(gap <= 1e-6 for gap in small)} are at the optimum, "
        f"worst {max(small):.2%}.",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


PARTS = (
    Part(module="planner_small", cases=None, tell=_small),
    Part(module="planner_scale", cases=None, tell=_scale),
    Part(module="planner_schedule", cases=None, tell=_schedule),
    Part(module="planner_helix", cases="helix", tell=_helix),
    Part(module="planner_dtfm", cases="dtfm", tell=_dtfm),
)
_HEAD = """# The planner's figures

Made by `python -m bench.planner --cases DIR`; raw numbers, machine and versions are in `bench/results/planner.json`.
Everything here is the cost model's or a simulation's: no node computed anything. How the model compares with real runs
is in [simulator.md](simulator.md). Times are on the machine of that file, compilation not counted.

Rates at scale are steady ones, of fleets whose links and windows are drawn so that in-flight windows do not bind
(`bench/planner_fleets.py`): where they do, the bound, which knows no windows, is further away.
"""


if __name__ == "__main__":
    sys.exit(main())
