"""Isthmus on thin links, beside what people would use instead: torch.distributed.pipelining over gloo.

    python -m bench.wan [--only CASE ...] [--fresh]

Each case has a lab of its own (root; elsewhere a skip with the reason), in which Isthmus, Isthmus with raw links and
torch take turns on the same hosts, with the same model and microbatches; Isthmus on unshaped links too, and torch where
its fall is shown. A case that is in the result file with the same settings is not run again. The bounds are shares of
what the schedule allows when everything overlaps (bench.wan_limit), of the unshaped rate, and multiples of torch's.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.random_tokens import write_random_tokens
from bench.record import bench_parser, moment, result_path, save
from bench.wan_cases import BATCH, CASES, MODEL, NONE, QUICK_BOUNDS, QUICK_MICROBATCHES, Case, quick
from bench.wan_field import Field, open_field
from bench.wan_judge import certified_step_s, judge, judge_fall, median_s, run_figures
from bench.wan_plot import draw
from bench.wan_table import wan_table
from orchestrator.planner.problem import even_sizes
from tests.lab.wanlab import missing, missing_for_cpus

ROUNDS, NUM_WARMUP, NUM_TIMED = 2, 1, 2
# A step this long is timed once, whatever the rounds.
LONG_S = 100.0
WARMUP_MICROBATCHES = 4
TIMEOUT_S = 1800.0
SCHEDULES = ("gpipe", "1f1b")
# Steps before links become thin, and after.
NUM_BEFORE, NUM_AFTER = 3, 13
# Within which a run must have found its pace, of those after.
NUM_TO_ADAPT = 10
# What lets the planner choose the codecs that a link as thin as that needs.
BUDGET_WORDS = ("plan.quality_budget=0.04",)


class Turns:
    """The systems of one case, which take turns; what each did is in `measured`, by system and kind of links."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._case = field.case
        self.measured: dict[str, Any] = {}

    def round(self, number: int) -> None:
        """Let every system have its turn, what is held against Isthmus' own turn right after it."""
        case, field = self._case, self._field
        main, *others = case.codecs
        field.route(case.route)
        self._isthmus("isthmus", "shaped", codec_words(main), number)
        if case.route.loss:
            field.route(replace(case.route, loss=0.0))
            self._isthmus("lossless", "shaped", codec_words(main), number)
        elif case.route.rate_mbps:
            field.route(None)
            # As it would be planned for such links.
            self._isthmus("isthmus", "unshaped", ["plan.quality_budget=0.0005"], number)
        field.route(case.route)
        for codecs in others:
            self._isthmus(f"isthmus-{'-'.join(codecs)}", "shaped", codec_words(codecs), number)
        if case.has_torch:
            self._torch("shaped", number)
        if case.has_none:
            # Its steps are long: one is timed.
            self._isthmus("isthmus-none", "shaped", codec_words(NONE), number, num_timed=1)
        if case.has_even:
            even = ",".join(map(str, even_sizes(case.num_layers, case.num_stages)))
            self._isthmus("isthmus-even", "shaped", [*codec_words(main), f"plan.split=[{even}]"], number)
        if case.has_torch_unshaped:
            field.route(None)
            self._torch("unshaped", number)

    def quick(self) -> None:
        """Run Isthmus once, on links that become unshaped in its middle, and torch's better known schedule."""
        case, field = self._case, self._field
        field.route(case.route)
        run = field.run("quick", codec_words(case.codecs[0]), num_steps=4, timeout_s=TIMEOUT_S, reroute=(2, None))
        self._keep("isthmus", "shaped", run_figures(run, slice(1, 2)))
        self._keep("isthmus", "unshaped", run_figures(run, slice(3, 4)))
        field.route(case.route)
        if case.has_torch:
            self._keep("torch-1f1b", "shaped", field.torch_step("1f1b", 0, field.num_microbatches, TIMEOUT_S))

    def fall(self) -> None:
        """Run Isthmus on links that become thin, and beside it on links that were thin when it was planned."""
        case, field = self._case, self._field
        field.route(case.route)
        num_steps = NUM_BEFORE + NUM_AFTER
        run = field.run(
            "falls", BUDGET_WORDS, num_steps=num_steps, timeout_s=2 * TIMEOUT_S, reroute=(NUM_BEFORE, case.then)
        )
        steps = run.history.steps
        figures = run_figures(run, slice(NUM_BEFORE + NUM_TO_ADAPT, None))
        # In its middle the route changes, so the step after the last whole fast one is not counted.
        figures["fallen_step_s"] = [step.step_s for step in steps[NUM_BEFORE + 1 :]]
        figures["all_step_s"] = [step.step_s for step in steps]
        events = [event for event in run.history.events if event.name != "saved"]
        figures["events"] = [f"{event.step} {event.name}: {event.text}" for event in events]
        self._keep("isthmus", "shaped", figures)
        self._isthmus("planned", "shaped", BUDGET_WORDS, 0)

    def _isthmus(self, system: str, how: str, words: Sequence[str], number: int, num_timed: int = NUM_TIMED) -> None:
        if number and median_s(self.measured[system][how]) > LONG_S:
            return
        name = f"{system}-{how}-{number}"
        run = self._field.run(name, words, num_steps=NUM_WARMUP + num_timed, timeout_s=TIMEOUT_S)
        self._keep(system, how, run_figures(run, slice(NUM_WARMUP, None)))
        if system == "isthmus" and how == "shaped" and "of_certified" in self._case.bounds:
            self.measured["certified_s"] = certified_step_s(run)

    def _torch(self, how: str, number: int) -> None:
        field = self._field
        for schedule in SCHEDULES:
            system = f"torch-{schedule}"
            if number and median_s(self.measured[system][how]) > LONG_S:
                continue
            # Its connections are made, and what it allocates is there, before a step is timed.
            field.torch_step(schedule, 0, min(WARMUP_MICROBATCHES, field.num_microbatches), TIMEOUT_S)
            self._keep(system, how, field.torch_step(schedule, number, field.num_microbatches, TIMEOUT_S))

    def _keep(self, system: str, how: str, result: dict[str, Any]) -> None:
        self.measured.setdefault(system, {}).setdefault(how, []).append(result)
        print(f"  {self._case.name} {system} {how}: {median_s([result]):.2f} s", flush=True)


def run_case(case: Case, num_microbatches: int, num_rounds: int, folder: Path) -> dict[str, Any]:
    """Run a case, and return what it came to; `num_rounds` 0: the quick way."""
    with open_field(case, num_microbatches, folder) as field:
        turns = Turns(field)
        if case.then is not None:
            turns.fall()
        elif not num_rounds:
            turns.quick()
        else:
            for number in range(num_rounds):
                turns.round(number)
    return judged(case, turns.measured, num_microbatches)


def judged(case: Case, measured: dict[str, Any], num_microbatches: int) -> dict[str, Any]:
    """Return what was measured with what it comes to."""
    is_fall = case.then is not None
    verdict = judge_fall(case, measured) if is_fall else judge(case, measured, num_microbatches)
    return {**verdict, "measured": measured}


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
    named = [case.name for case in CASES]
    words = "these cases, and the others as they are on file"
    parser.add_argument("--only", nargs="+", choices=named, metavar="CASE", help=words)
    parser.add_argument("--fresh", action="store_true", help="run again what is on file")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of every system in a case")
    arguments = parser.parse_args()
    if lacking := missing() or missing_for_cpus():
        print(f"skipped: no WAN lab here: {lacking}")
        return 0
    num_microbatches = QUICK_MICROBATCHES if arguments.quick else BATCH["num_microbatches"]
    num_rounds = 0 if arguments.quick else arguments.rounds
    path = result_path("wan", arguments)
    cases = [quick(case) for case in CASES if case.name in QUICK_BOUNDS] if arguments.quick else CASES
    names = arguments.only or [case.name for case in cases]
    results = known_cases(path)
    with tempfile.TemporaryDirectory() as scratch:
        write_random_tokens(Path(scratch) / "data", MODEL.vocab_size)
        for case in cases:
            settings = settings_of(case, num_microbatches)
            known = results.get(case.name, {})
            is_known = known.get("settings") == settings and not arguments.fresh
            if is_known:
                # By the bounds of today. Cases of older versions do not say when they were measured.
                result = judged(case, known["measured"], num_microbatches)
                result |= {key: known[key] for key in ("measured_at", "rounds") if key in known}
            elif case.name in names:
                result = run_case(case, num_microbatches, num_rounds, Path(scratch))
                result |= {"measured_at": moment(), "rounds": num_rounds}
            else:
                continue
            results[case.name] = {
                "settings": settings,
                "case": case.settings(),
                "num_microbatches": num_microbatches,
                **result,
            }
            save("wan", arguments, {"cases": results})
            print(case_text(case.name, results[case.name]), flush=True)
    draw(results, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(wan_table(results))
    missed = [f"{name}: {', '.join(r['missed'])}" for name, r in results.items() if r["missed"]]
    print("missed: " + ("; ".join(missed) or "nothing"))
    return 1 if arguments.check and missed else 0


def case_text(name: str, result: dict[str, Any]) -> str:
    """Return a case in one line."""
    figures = ", ".join(f"{key} {value:.3g}" for key, value in result["figures"].items())
    return f"{name}: {figures}; missed: {', '.join(result['missed']) or 'nothing'}"


if __name__ == "__main__":
    sys.exit(main())
