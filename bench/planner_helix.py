"""Placements of overlapping intervals: Helix's eight stored programs, against what Gurobi found for them.

    python -m bench.planner_helix --cases DIR [--quick] [--check]

DIR holds programs (`*.hx`: a line "layers nodes links 0", a line per node with how many layers it may hold and its rate
at each count, a line "from to capacity" per link, where node N is the source and N + 1 the sink) and `anchors.json`,
which says what Gurobi found, by program. One seed and one bound of evaluations for all; without --quick two more seeds
show the spread. Each placement is checked by a linear program of its flow that shares no code with the search; a bound
that no placement exceeds stands beside it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import highspy
import numpy as np

from actors.errors import UserError
from bench.record import bench_parser, save
from orchestrator.planner.highs import QuietHighs
from orchestrator.planner.interval_bound import cover_bound
from orchestrator.planner.interval_problem import IntervalProblem
from orchestrator.planner.intervals import Placement, interval_problem, search_intervals

SEED = 1
# What other seeds find says how much is luck; they count for no bound.
OTHER_SEEDS = (2, 3)
MAX_EVALUATIONS, QUICK_EVALUATIONS = 4_000_000, 500_000
# The bounds: of Gurobi's rate, and of the search's time on one core.
LEAST_RATIO, MOST_S = 1.0, 30.0
# Between two solvers in floating point.
TOLERANCE = 1e-6
# What a file may hold at most.
MOST_BYTES, MOST_LAYERS, MOST_NODES, MOST_PROGRAMS, MOST_RATE = 2**20, 1_000, 500, 100, 1e15


class CasesError(UserError):
    """A folder of cases lacks something, or a file in it is none of its format."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program as its file has it: node n with k layers passes rates[n][k - 1]; links are (from, to, capacity)."""

    name: str
    num_layers: int
    rates: tuple[tuple[float, ...], ...]
    links: tuple[tuple[int, int, float], ...]
    gurobi_rate: float


@dataclass(frozen=True, kw_only=True)
class HelixRow:
    """One program's result; rates in tokens a second."""

    program: str
    num_nodes: int
    num_layers: int
    rate: float
    gurobi_rate: float
    ratio: float
    # Of the same placement, by a linear program.
    checked_rate: float
    bound: float
    # How much of the bound is missing; 0 is proved the best.
    gap: float
    seed: int
    other_seeds_rates: tuple[float, ...]
    num_evaluations: int
    search_wall_s: float
    search_cpu_s: float
    bound_cpu_s: float
    starts: tuple[int, ...]
    stops: tuple[int, ...]


def main() -> int:
    parser = bench_parser(str(__doc__))
    parser.add_argument("--cases", type=Path, required=True, help="the folder of programs and anchors.json")
    arguments = parser.parse_args()
    try:
        rows = run(arguments.cases, arguments.quick)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"{'program':16} {'nodes':>5} {'Gurobi':>9} {'ours':>9} {'ratio':>6} {'bound':>9} {'gap':>6} {'CPU s':>6} other"
    )
    for row in rows:
        print(
            f"{row.program:16} {row.num_nodes:5} {row.gurobi_rate:9.2f} {row.rate:9.2f} {row.ratio:6.3f} "
            f"{row.bound:9.2f} {row.gap:6.2%} {row.search_cpu_s:6.2f} "
            + " ".join(f"{rate:.2f}" for rate in row.other_seeds_rates)
        )
    missed = misses(rows)
    measured = {
        "command": f"python -m bench.planner_helix --cases DIR{' --quick' if arguments.quick else ''}",
        "rows": [asdict(row) for row in rows],
        "missed": missed,
    }
    print(save("planner_helix", arguments, measured))
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if arguments.check and missed else 0


def run(cases_dir: Path, quick: bool) -> list[HelixRow]:
    """Return a row for each program in `cases_dir`, by name; raises CasesError."""
    programs = read_programs(cases_dir)
    # Compile before anything is timed.
    first = problem_of(programs[0])
    search_intervals(first, seed=SEED, max_evaluations=1)
    cover_bound(first, tolerance=0.5)
    if quick:
        return [_measure(program, QUICK_EVALUATIONS, ()) for program in programs]
    return [_measure(program, MAX_EVALUATIONS, OTHER_SEEDS) for program in programs]


def misses(rows: list[HelixRow]) -> list[str]:
    """Return one line for each bound that a row misses."""
    missed: list[str] = []
    for row in rows:
        if row.ratio < LEAST_RATIO - TOLERANCE:
            missed.append(f"{row.program}: {row.rate:.4f} is less than Gurobi's {row.gurobi_rate:.4f}")
        if abs(row.checked_rate - row.rate) > TOLERANCE * max(1.0, row.rate):
            missed.append(f"{row.program}: the search says {row.rate:.4f}, the linear program {row.checked_rate:.4f}")
        if row.rate > row.bound * (1.0 + TOLERANCE):
            missed.append(f"{row.program}: {row.rate:.4f} is more than the bound {row.bound:.4f}")
        if row.search_wall_s > MOST_S:
            missed.append(f"{row.program}: searched {row.search_wall_s:.1f} s, more than {MOST_S:.0f}")
    return missed


def _measure(program: Program, max_evaluations: int, other_seeds: tuple[int, ...]) -> HelixRow:
    problem = problem_of(program)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    placement = search_intervals(problem, seed=SEED, max_evaluations=max_evaluations)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    others = tuple(search_intervals(problem, seed=seed, max_evaluations=max_evaluations).rate for seed in other_seeds)
    bound_cpu_s = time.process_time()
    bound = cover_bound(problem)
    bound_cpu_s = time.process_time() - bound_cpu_s
    return HelixRow(
        program=program.name,
        num_nodes=len(program.rates),
        num_layers=program.num_layers,
        rate=placement.rate,
        gurobi_rate=program.gurobi_rate,
        ratio=placement.rate / program.gurobi_rate,
        checked_rate=checked_rate(program, placement),
        bound=bound,
        gap=max(0.0, 1.0 - placement.rate / bound),
        seed=SEED,
        other_seeds_rates=others,
        num_evaluations=placement.num_evaluations,
        search_wall_s=round(wall_s, 3),
        search_cpu_s=round(cpu_s, 3),
        bound_cpu_s=round(bound_cpu_s, 3),
        starts=placement.starts,
        stops=placement.stops,
    )


def problem_of(program: Program) -> IntervalProblem:
    """Return the program as the search takes it."""
    num_nodes = len(program.rates)
    rates_NK = np.zeros((num_nodes, 1 + max(len(rates) for rates in program.rates)))
    for node, rates in enumerate(program.rates):
        rates_NK[node, 1 : 1 + len(rates)] = rates
    links_PP = np.zeros((num_nodes + 2, num_nodes + 2))
    for tail, head, capacity in program.links:
        links_PP[tail, head] = capacity
    return interval_problem(program.num_layers, rates_NK, links_PP)


def checked_rate(program: Program, placement: Placement) -> float:
    """Return the rate of this placement by Helix's own constraints, with what each node holds fixed: a link carries
    frames only where its head starts at the layer where its tail ends, a node passes what comes in, up to its rate.

    Raises ValueError where a node holds what it cannot.
    """
    num_nodes = len(program.rates)
    lengths = [stop - start for start, stop in zip(placement.starts, placement.stops, strict=True)]
    for node, length in enumerate(lengths):
        if not (1 <= length <= len(program.rates[node]) and placement.starts[node] >= 0):
            raise ValueError(f"node {node} cannot hold {length} layers from {placement.starts[node]}")
    # The source ends before the first layer, the sink starts after the last.
    ends = [*placement.stops, 0, -1]
    begins = [*placement.starts, -1, program.num_layers]
    model = QuietHighs()
    for _ in range(num_nodes):
        model.addRow(0.0, 0.0, 0, np.empty(0, np.int32), np.empty(0))
    for node in range(num_nodes):
        model.addRow(0.0, program.rates[node][lengths[node] - 1], 0, np.empty(0, np.int32), np.empty(0))
    for tail, head, capacity in program.links:
        rows: dict[int, float] = {}
        if head < num_nodes:
            rows |= {head: 1.0, num_nodes + head: 1.0}
        if tail < num_nodes:
            rows[tail] = -1.0
        gain = 1.0 if tail == num_nodes else 0.0
        most = capacity if ends[tail] == begins[head] else 0.0
        model.addCol(gain, 0.0, most, len(rows), np.array(list(rows), np.int32), np.array(list(rows.values())))
    model.changeObjectiveSense(highspy.ObjSense.kMaximize)
    model.run()
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise ValueError(f"HiGHS gives no rate for {program.name}: {model.getModelStatus()}")
    return float(model.getInfo().objective_function_value)


def read_programs(cases_dir: Path) -> list[Program]:
    """Return the programs of a folder, by name; raises CasesError where it holds none or a file is not as it should."""
    paths = sorted(cases_dir.glob("*.hx"))[: MOST_PROGRAMS + 1]
    if not 1 <= len(paths) <= MOST_PROGRAMS:
        raise CasesError(f"{cases_dir} holds no *.hx, or over {MOST_PROGRAMS}", "give the folder by --cases")
    anchors = _read_anchors(cases_dir / "anchors.json")
    missing = [path.stem for path in paths if path.stem not in anchors]
    if missing:
        raise CasesError(f"anchors.json says nothing of {missing[0]}", "add its gurobi_obj, or take the program away")
    return [parse_program(path.stem, _read_text(path), anchors[path.stem]) for path in paths]


def parse_program(name: str, text: str, gurobi_rate: float) -> Program:
    """Return the program that `text` holds; raises CasesError, with the line, where it is none."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or len(lines[0]) != 4:
        raise _wrong(name, 1, "is not 'layers nodes links 0'")
    num_layers, num_nodes, num_links, partial = (_count(name, 1, word, MOST_NODES**2) for word in lines[0])
    if not (1 <= num_layers <= MOST_LAYERS and 1 <= num_nodes <= MOST_NODES):
        raise _wrong(name, 1, f"has more than {MOST_LAYERS} layers or {MOST_NODES} nodes, or none")
    if partial != 0:
        raise _wrong(name, 1, "asks for partial inference, which is another problem")
    if len(lines) != 1 + num_nodes + num_links:
        raise _wrong(name, 1, f"announces {num_nodes} nodes and {num_links} links, but {len(lines) - 1} lines follow")
    rates: list[tuple[float, ...]] = []
    for number, words in enumerate(lines[1 : 1 + num_nodes], 2):
        count = _count(name, number, words[0], num_layers)
        if count < 1 or len(words) != 1 + count:
            raise _wrong(name, number, "is not a count of layers and as many rates")
        rates.append(tuple(_capacity(name, number, word) for word in words[1:]))
        if max(rates[-1]) == 0.0:
            raise _wrong(name, number, "is a node that passes nothing")
    links: dict[tuple[int, int], float] = {}
    for number, words in enumerate(lines[1 + num_nodes :], 2 + num_nodes):
        if len(words) != 3:
            raise _wrong(name, number, "is not 'from to capacity'")
        tail, head = (_count(name, number, word, num_nodes + 1) for word in words[:2])
        if tail == head or tail == num_nodes + 1 or head == num_nodes or (tail, head) in links:
            raise _wrong(name, number, "is a link that cannot be, or that another line has")
        links[tail, head] = _capacity(name, number, words[2])
    return Program(
        name=name,
        num_layers=num_layers,
        rates=tuple(rates),
        links=tuple((tail, head, capacity) for (tail, head), capacity in links.items()),
        gurobi_rate=gurobi_rate,
    )


def _read_anchors(path: Path) -> dict[str, float]:
    remedy = 'give {"program": {"gurobi_obj": rate}} for each program'
    try:
        document = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CasesError(f"{path} is no JSON", remedy) from error
    rates: dict[str, float] = {}
    for name, anchor in document.items() if isinstance(document, dict) else ():
        rate = anchor.get("gurobi_obj") if isinstance(anchor, dict) else None
        if isinstance(rate, int | float) and 0.0 < rate < MOST_RATE:
            rates[name] = float(rate)
    if not rates:
        raise CasesError(f"{path} has no rates", remedy)
    return rates


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise CasesError(f"{path} is over {MOST_BYTES} bytes", "give a smaller one")
        return content.decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise CasesError(f"{path} cannot be read: {error}", "give the folder of programs by --cases") from error


def _count(name: str, number: int, word: str, most: int) -> int:
    if not (word.isdecimal() and len(word) <= 9 and int(word) <= most):
        raise _wrong(name, number, f"has {word[:20]!r} for a whole number up to {most}")
    return int(word)


def _capacity(name: str, number: int, word: str) -> float:
    try:
        capacity = float(word)
    except ValueError:
        capacity = math.nan
    if not (0.0 <= capacity < MOST_RATE):
        raise _wrong(name, number, f"has {word[:20]!r} for a rate")
    return capacity


def _wrong(name: str, number: int, what: str) -> CasesError:
    return CasesError(f"{name}.hx line {number} {what}", "write it anew, or take the file away")


if __name__ == "__main__":
    sys.exit(main())
