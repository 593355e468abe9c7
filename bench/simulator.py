"""The simulator against the runtime as it is: step time and memory of real runs on lab networks, and what was foreseen.

    python -m bench.simulator [--quick] [--check]

Each case is a short real training over shaped links between hosts with a share of a core each (tests/lab, run by
itself: needs root, namespaces and TUN). The run probes, plans and trains; then its plan is simulated twice: from what
its own probe measured, and from how long its own forwards and backwards took, which leaves out what the probe got
wrong. Two cases only serve to fit the costs of frames, and are not judged. Real step time is the
median of the steps after the second; memory is each process's resident peak over what it held before its stage was
built (CPU tensors have no counter of their own).
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.fleet_spec import Fleet
from actors.spec import Plan
from bench.random_tokens import write_random_tokens
from bench.record import parse_arguments, save
from orchestrator.config import RunConfig, parse_config
from orchestrator.events import decode, read_history
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.problem import Problem
from orchestrator.records import StepRecord
from orchestrator.runfolder import RunFolder
from orchestrator.simulator.overheads import MEASURED_ON_CPU, Overheads
from orchestrator.simulator.step import StepSimulation, placement_of, simulate_step

# Of the cases that are judged: the median error of step time as replayed; memory foreseen over memory taken, at least.
BOUNDS = {"replayed_median_error": 0.05, "least_memory_ratio": 0.95}
VOCAB_SIZE, STEPS, WARMUP_STEPS = 2048, 12, 2
# What a run may take, the start of Ray on shares of a core included.
CASE_TIMEOUT_S = 560.0
# Of one frame at both its ends, on a whole core: what is tried when fitting.
FRAME_S = (0.0, 0.0006, 0.0012, 0.0024, 0.0036)
FRAME_BYTE_S = (0.0, 6e-9, 1.2e-8, 1.8e-8, 2.4e-8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One real run: equal hosts, equal paths, a chain of as many stages."""

    name: str
    hosts: int
    cpus: float
    rate_mbps: float
    delay_ms: float
    schedule: str
    codec: str
    calibrates: bool = False


CASES = (
    Case(name="fit-none", hosts=2, cpus=0.6, rate_mbps=200, delay_ms=5, schedule="1f1b", codec="none", calibrates=True),
    Case(name="fit-q8", hosts=2, cpus=0.6, rate_mbps=200, delay_ms=5, schedule="gpipe", codec="q8", calibrates=True),
    Case(name="2-near-q8", hosts=2, cpus=0.6, rate_mbps=50, delay_ms=20, schedule="1f1b", codec="q8"),
    Case(name="3-far-q8-gpipe", hosts=3, cpus=0.5, rate_mbps=20, delay_ms=50, schedule="gpipe", codec="q8"),
    Case(name="2-thin-none", hosts=2, cpus=0.6, rate_mbps=20, delay_ms=50, schedule="1f1b", codec="none"),
    Case(name="3-near-none", hosts=3, cpus=0.5, rate_mbps=50, delay_ms=20, schedule="1f1b", codec="none"),
    Case(name="3-far-none-gpipe", hosts=3, cpus=0.5, rate_mbps=20, delay_ms=50, schedule="gpipe", codec="none"),
    Case(name="3-farther-q8", hosts=3, cpus=0.5, rate_mbps=50, delay_ms=100, schedule="1f1b", codec="q8"),
    Case(name="3-farther-q8-bdp", hosts=3, cpus=0.5, rate_mbps=50, delay_ms=100, schedule="bdp", codec="q8"),
    Case(name="3-farther-q8-split", hosts=3, cpus=0.5, rate_mbps=50, delay_ms=100, schedule="bdp-split", codec="q8"),
)
QUICK = ("2-near-q8", "3-far-q8-gpipe")


@dataclass(frozen=True, kw_only=True)
class Real:
    """What a run left."""

    case: Case
    plan: Plan
    fleet: Fleet
    config: RunConfig
    steps: tuple[StepRecord, ...]

    @property
    def codecs(self) -> list[tuple[str, str]]:
        return [(link.forward_codec, link.backward_codec) for link in self.plan.links]

    @property
    def driver(self) -> int:
        """Beside which node the driver ran: the lab names the hosts by region."""
        return [card.region for card in self.fleet.nodes].index("host-0")

    @property
    def problem(self) -> Problem:
        work = Workload(
            model=self.config.model,
            batch=self.config.batch,
            schedule=self.plan.schedule,
            activation_checkpointing=self.config.train.activation_checkpointing,
        )
        return make_problem(self.fleet, work, self.config.wire, codecs=self.codecs)

    def simulated(self, problem: Problem, overheads: Overheads) -> StepSimulation:
        placement = placement_of(self.plan, self.fleet)
        return simulate_step(
            problem, placement, self.config.wire, overheads=overheads, codecs=self.codecs, driver=self.driver
        )


def train_really(case: Case, folder: Path) -> Real:
    """Run a case on a lab of its own, and read what it left."""
    words = [
        f"name={case.name}",
        f"runs_dir={folder / 'runs'}",
        f"data.path={folder / 'data'}",
        "data.document_mask=false",
        f"model.vocab_size={VOCAB_SIZE}",
        *("model.hidden_size=384", "model.num_layers=6", "model.ffn_size=1024"),
        *("model.num_heads=6", "model.num_kv_heads=6"),
        *("batch.seq_len=128", "batch.microbatch_size=2", "batch.num_microbatches=8"),
        *(f"train.steps={STEPS}", "train.eval_every=0", "train.eval_microbatches=1", "checkpoints.every_steps=0"),
        *("fleet.threads=1", "fleet.probe_bytes=2000000", "wire.canary_every=0"),
        *("tracking.wandb=disabled", "tracking.picture_every=2"),
        *(f"plan.stages={case.hosts}", f"plan.schedule={case.schedule}"),
        *(f"wire.forward={case.codec}", f"wire.backward={case.codec}"),
    ]
    command = [
        *(sys.executable, "-m", "tests.lab.trial"),
        *(f"--hosts={case.hosts}", f"--cpus={case.cpus}"),
        *(f"--rate-mbps={case.rate_mbps}", f"--delay-ms={case.delay_ms}"),
        *("--", "train", *words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{case.name} did not run: {done.stderr.strip()[-500:]}")
    run = RunFolder(folder / "runs" / case.name)
    return Real(
        case=case,
        plan=decode(Plan, json.loads(run.plan.read_text())),
        fleet=decode(Fleet, json.loads(run.fleet.read_text())),
        config=parse_config(run.config.read_text()),
        steps=read_history(run.events).steps,
    )


def timed_steps(real: Real) -> list[StepRecord]:
    """Return the steps after the first ones whose actions are on record."""
    return [s for s in real.steps[WARMUP_STEPS:] if all(stage.actions for stage in s.stages)]


def replayed(real: Real, step: StepRecord, overheads: Overheads) -> StepSimulation:
    """Simulate one real step with the mean times of its own forwards and backwards.

    These hold already what frames and codecs took of the processor meanwhile, so here those only make frames later.
    """
    problem = real.problem
    forward_s_N, backward_s_N, weight_s_N = (np.zeros(problem.num_nodes) for _ in range(3))
    placement = placement_of(real.plan, real.fleet)
    for stage in step.stages:
        node, plan = placement.nodes[stage.stage][0], real.plan.stages[stage.stage]
        for name, seconds_N in (("F", forward_s_N), ("B", backward_s_N), ("W", weight_s_N)):
            taken_s = [a.end_s - a.start_s for a in stage.actions if a.name == name]
            # Only where backwards come in halves is there a W.
            seconds_N[node] = statistics.mean(taken_s or [0.0]) / (plan.layer_stop - plan.layer_start)
    none_N = np.zeros(problem.num_nodes)
    problem = replace(
        problem,
        layer_forward_s_N=forward_s_N,
        layer_backward_s_N=backward_s_N + weight_s_N,
        layer_weight_s_N=weight_s_N,
        first_forward_s_N=none_N,
        first_backward_s_N=none_N,
        last_forward_s_N=none_N,
        last_backward_s_N=none_N,
    )
    return real.simulated(problem, replace(overheads, codec_computes=False))


def replay_errors(real: Real, overheads: Overheads) -> list[float]:
    return [replayed(real, s, overheads).step_s / s.step_s - 1 for s in timed_steps(real)]


def fit(reals: Sequence[Real]) -> dict[str, float]:
    """Return what a frame costs both its ends, of a whole core, that makes the replays of `reals` err least."""

    def loss(frame_s: float, byte_s: float) -> float:
        tried = replace(
            MEASURED_ON_CPU,
            send_frame_s=frame_s / 2,
            receive_frame_s=frame_s / 2,
            send_byte_s=byte_s / 2,
            receive_byte_s=byte_s / 2,
        )
        return sum(e * e for real in reals for e in replay_errors(real, tried.scaled(1 / real.case.cpus)))

    frame_s, byte_s = min(itertools.product(FRAME_S, FRAME_BYTE_S), key=lambda pair: loss(*pair))
    return {"frame_s": frame_s, "frame_byte_s": byte_s}


def judge(real: Real) -> dict[str, Any]:
    """Return what was foreseen of a run and what it did."""
    overheads = MEASURED_ON_CPU.scaled(1 / real.case.cpus)
    steps = real.steps[WARMUP_STEPS:]
    real_s = statistics.median(step.step_s for step in steps)
    simulation = real.simulated(real.problem, overheads)
    errors = replay_errors(real, overheads)
    held = [max(step.stages[i].held_bytes for step in real.steps) for i in range(len(real.plan.stages))]
    # A slow start, or none, is what links have that the planner's closed form does not.
    without = real.simulated(real.problem, replace(overheads, initial_window_bytes=0.0))
    return {
        "case": asdict(real.case),
        "layers": [stage.layer_stop - stage.layer_start for stage in real.plan.stages],
        "link_mbps": [link.rate_mbps for link in real.plan.links],
        "link_delay_s": [link.delay_s for link in real.plan.links],
        "real_step_s": [step.step_s for step in steps],
        "real_median_s": real_s,
        "probed_s": simulation.step_s,
        "probed_error": simulation.step_s / real_s - 1,
        "probed_without_slow_start_s": without.step_s,
        "planned_s": real.plan.step_s,
        "planned_error": real.plan.step_s / real_s - 1,
        "replayed_errors": errors,
        "replayed_error": statistics.median(errors),
        "real_wait_s": [statistics.median(s.stages[i].wait_s for s in steps) for i in range(len(real.plan.stages))],
        "held_bytes": held,
        "simulated_bytes": simulation.memory_bytes_U.tolist(),
        "planned_bytes": [stage.memory_bytes for stage in real.plan.stages],
        "memory_ratios": [float(s) / h for s, h in zip(simulation.memory_bytes_U, held, strict=True)],
    }


def run(quick: bool) -> dict[str, Any]:
    """Run all cases, or two, and return what came of them."""
    rows: list[dict[str, Any]] = []
    calibrating: list[Real] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_random_tokens(Path(scratch) / "data", VOCAB_SIZE)
        for case in CASES:
            if quick and case.name not in QUICK:
                continue
            real = train_really(case, Path(scratch))
            if case.calibrates:
                calibrating.append(real)
            rows.append(judge(real))
            print(row_text(rows[-1]), flush=True)
        fitted = fit(calibrating) if calibrating else {}
    judged = [row for row in rows if not row["case"]["calibrates"]]
    return {
        "cases": rows,
        "fitted": fitted,
        "used": asdict(MEASURED_ON_CPU),
        "replayed_median_error": statistics.median(abs(row["replayed_error"]) for row in judged),
        "replayed_worst_error": max(abs(row["replayed_error"]) for row in judged),
        "probed_median_error": statistics.median(abs(row["probed_error"]) for row in judged),
        "probed_worst_error": max(abs(row["probed_error"]) for row in judged),
        "planned_median_error": statistics.median(abs(row["planned_error"]) for row in judged),
        "least_memory_ratio": min(min(row["memory_ratios"]) for row in judged),
        "most_memory_ratio": max(max(row["memory_ratios"]) for row in judged),
        "bounds": BOUNDS,
    }


def row_text(row: dict[str, Any]) -> str:
    memory = ", ".join(
        f"{s / 1e6:.0f}/{h / 1e6:.0f}" for s, h in zip(row["simulated_bytes"], row["held_bytes"], strict=True)
    )
    return (
        f"{row['case']['name']:18} real {row['real_median_s']:6.2f} s, simulated {row['probed_s']:6.2f} s "
        f"({row['probed_error']:+.1%}), replayed {row['replayed_error']:+.1%}, planner {row['planned_error']:+.1%}; "
        f"MB simulated/real {memory}"
    )


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    measured = run(arguments.quick)
    path = save("simulator", arguments, measured)
    print(f"saved {path}")
    print(
        f"step time: replayed {measured['replayed_median_error']:.1%} median, {measured['replayed_worst_error']:.1%} "
        f"worst; from the probe {measured['probed_median_error']:.1%} median, {measured['probed_worst_error']:.1%} "
        f"worst; memory {measured['least_memory_ratio']:.2f} to {measured['most_memory_ratio']:.2f} of what was taken"
    )
    missed = measured["replayed_median_error"] > BOUNDS["replayed_median_error"]
    missed = missed or measured["least_memory_ratio"] < BOUNDS["least_memory_ratio"]
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
