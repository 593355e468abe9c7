"""Isthmus on thin links, beside what people would use instead: torch.distributed.pipelining over gloo.

    python -m bench.wan [--only CASE ...] [--fresh]

Each case has a lab of its own (root; elsewhere a skip with the reason), in which Isthmus, Isthmus with raw links and
torch take turns on the same hosts, with the same model and microbatches, on shaped and on unshaped links. A case that
is in the result file with the same settings is not run again. The bounds are shares of what the schedule allows when
everything overlaps (bench.wan_limit), of the unshaped rate, and multiples of torch's.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.random_tokens import write_random_tokens
from bench.record import RESULTS, bench_parser, save
from bench.wan_cases import BATCH, CASES, MODEL, NONE, QUICK, QUICK_MICROBATCHES, Case
from bench.wan_field import Field, even_split, open_field
from bench.wan_judge import certified_step_s, judge, median_s, run_figures
from bench.wan_plot import draw
from tests.lab.wanlab import missing, missing_for_cpus

ROUNDS, NUM_WARMUP, NUM_TIMED = 2, 1, 2
# A step this long is timed once, whatever the rounds.
LONG_S = 100.0
WARMUP_MICROBATCHES = 4
TIMEOUT_S = 1800.0
SCHEDULES = ("gpipe", "1f1b")


def measure(case: Case, num_microbatches: int, num_rounds: int, folder: Path) -> dict[str, Any]:
    """Run a case, and return what every system did, by system and kind of links."""
    measured: dict[str, Any] = {}

    def keep(system: str, how: str, result: dict[str, Any]) -> None:
        measured.setdefault(system, {}).setdefault(how, []).append(result)
        print(f"  {case.name} {system} {how}: {median_s([result]):.2f} s", flush=True)

    with open_field(case, num_microbatches, folder) as field:
        for number in range(num_rounds):

            def isthmus(system: str, how: str, words: Sequence[str], number: int = number) -> None:
                if number and median_s(measured[system][how]) > LONG_S:
                    return
                name = f"{system.replace('/', '-')}-{how}-{number}"
                num_steps = NUM_WARMUP + NUM_TIMED
                run = field.run(name, words, num_steps=num_steps, timeout_s=TIMEOUT_S)
                keep(system, how, run_figures(run, NUM_WARMUP))
                if system == "isthmus" and "of_certified" in case.bounds:
                    measured["certified_s"] = certified_step_s(run)

            take_turns(case, field, isthmus, lambda *a: torch_steps(field, measured, keep, *a), number)
    return measured


def take_turns(case: Case, field: Field, isthmus: Callable[..., None], torch: Callable[..., None], number: int) -> None:
    """Let every system have its turn once, on shaped links, then on unshaped ones."""
    main, *others = case.codecs
    cut = [f"plan.split=[{','.join(map(str, case.split))}]"] if case.split else []
    is_shaped = case.route.rate_mbps > 0
    field.route(case.route)
    isthmus("isthmus", "shaped", [*codec_words(main), *cut])
    for codecs in others:
        isthmus(f"isthmus-{'/'.join(codecs)}", "shaped", [*codec_words(codecs), *cut])
    if case.has_torch:
        torch("shaped", number)
    if case.has_none:
        isthmus("isthmus-none", "shaped", [*codec_words(NONE), *cut])
    if case.has_even:
        even = even_split(case.num_layers, case.num_stages)
        isthmus("isthmus-even", "shaped", [*codec_words(main), f"plan.split=[{','.join(map(str, even))}]"])
    if case.route.loss:
        field.route(replace(case.route, loss=0.0))
        isthmus("lossless", "shaped", [*codec_words(main), *cut])
    elif is_shaped:
        field.route(None)
        # As it would be planned for such links: without a codec where that is fastest.
        isthmus("isthmus", "unshaped", ["plan.quality_budget=0.0005", *cut])
        if case.has_torch:
            torch("unshaped", number)


def torch_steps(field: Field, measured: dict[str, Any], keep: Callable[..., None], how: str, number: int) -> None:
    """Time a step of each of torch's schedules."""
    for schedule in SCHEDULES:
        system = f"torch-{schedule}"
        if number and median_s(measured[system][how]) > LONG_S:
            continue
        # Its connections are made, and what it allocates is there, before a step is timed.
        field.torch_step(schedule, 0, min(WARMUP_MICROBATCHES, field.num_microbatches), TIMEOUT_S)
        keep(system, how, field.torch_step(schedule, number, field.num_microbatches, TIMEOUT_S))


def codec_words(codecs: tuple[str, str]) -> list[str]:
    """Return what makes every link carry these."""
    return [f"wire.forward={codecs[0]}", f"wire.backward={codecs[1]}"]


def settings_of(case: Case, num_microbatches: int) -> str:
    """Return a hash of what a result depends on."""
    settings = {**case.settings(), "batch": BATCH | {"num_microbatches": num_microbatches}}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def known_cases(path: Path) -> dict[str, Any]:
    """Return the cases of an earlier run; none where there was no such run."""
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def main() -> int:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases, and the others as they are on file")
    parser.add_argument("--fresh", action="store_true", help="run again what is on file")
    parser.add_argument("--rounds", type=int, help=f"turns of every system in a case (default: {ROUNDS}, quick 1)")
    arguments = parser.parse_args()
    if lacking := missing() or missing_for_cpus():
        print(f"skipped: no WAN lab here: {lacking}")
        return 0
    num_microbatches = QUICK_MICROBATCHES if arguments.quick else BATCH["num_microbatches"]
    num_rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
    path: Path = arguments.out or RESULTS / f"wan{'-quick' if arguments.quick else ''}.json"
    names = arguments.only or (QUICK if arguments.quick else [case.name for case in CASES])
    results = known_cases(path)
    with tempfile.TemporaryDirectory() as scratch:
        write_random_tokens(Path(scratch) / "data", MODEL.vocab_size)
        for case in CASES:
            settings = settings_of(case, num_microbatches)
            is_known = results.get(case.name, {}).get("settings") == settings and not arguments.fresh
            if case.name not in names or is_known:
                continue
            measured = measure(case, num_microbatches, num_rounds, Path(scratch))
            verdict = judge(case, measured, num_microbatches)
            results[case.name] = {
                "settings": settings,
                "case": case.settings(),
                "num_microbatches": num_microbatches,
                **verdict,
                "measured": measured,
            }
            save("wan", arguments, {"cases": results})
            print(case_text(case.name, results[case.name]), flush=True)
    draw(results, path.with_suffix(".png"))
    missed = [f"{name}: {', '.join(r['missed'])}" for name, r in results.items() if r["missed"]]
    print("missed: " + ("; ".join(missed) or "nothing"))
    return 1 if arguments.check and missed else 0


def case_text(name: str, result: dict[str, Any]) -> str:
    """Return a case in one line."""
    figures = ", ".join(f"{key} {value:.3g}" for key, value in result["figures"].items())
    return f"{name}: {figures}; missed: {', '.join(result['missed']) or 'nothing'}"


if __name__ == "__main__":
    sys.exit(main())
