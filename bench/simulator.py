"""The simulator against the runtime as it is: steps and tensors of real runs on lab networks, and what was foreseen.

    python -m bench.simulator [--quick] [--check] [--only {runs,choice}] [--runs FOLDER]

Groups of hosts with shares of a core each (tests/lab; root, elsewhere a skip with the reason) train over shaped links,
as bench.wan does: shares bind compute alone. A run probes, plans and trains; then its plan is simulated twice: from
what its own probe measured, and from how long its own forwards and backwards took, which leaves out what the probe got
wrong. Two runs only serve to fit costs, and are not judged. The real step time is the median of the steps after the
first. A stage's tensors are counted by torch's profiler as it does once more, by itself, what it did in the run's last
step, action by action; what its process held besides is reported. At the end the planner's own choice is held against
other cuts and orders on the same hosts: once all of them, then the choice and the fastest others in turns.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.schedule import Action, Op
from actors.spec import Plan
from bench.record import bench_parser, result_path, save
from bench.simulator_cases import GROUPS, QUICK, RIVALRY, Group, rivals
from bench.simulator_runs import NUM_MICROBATCHES, Real, open_runs
from bench.simulator_table import simulator_tables
from orchestrator.records import StepRecord
from orchestrator.simulator.overheads import MEASURED_ON_CPU, Overheads
from orchestrator.simulator.step import StepSimulation, placement_of
from tests.lab.wanlab import missing, missing_for_cpus
from tests.tensor_peak import stage_peak_bytes

# Runs held against what was foreseen of them, and a choice held against its rivals.
PARTS = ("runs", "choice")
CHOSEN, TURNS, NUM_AGAIN = "chosen", 2, 3
# Of the runs that are judged: errors of the step time foreseen from the probe, memory foreseen over memory taken, and
# the chosen plan's step over that of the best rival, which has as many turns as the chosen one beside it.
BOUNDS = {"median_error": 0.05, "p90_error": 0.10, "least_memory": 1.0, "most_memory": 1.10, "of_best": 1.03}
# Of one frame at both its ends, on a whole core: what is tried when fitting.
FRAME_S = (0.0, 0.0006, 0.0012, 0.0024, 0.0036)
FRAME_BYTE_S = (0.0, 6e-9, 1.2e-8, 1.8e-8, 2.4e-8)
# Hosts of the lab keep TCP's window through pauses, as `isthmus doctor` advises.
LAB = replace(MEASURED_ON_CPU, initial_window_bytes=0.0)


def replayed(real: Real, step: StepRecord, overheads: Overheads) -> StepSimulation:
    """Simulate one real step with the mean times of its own forwards and backwards.

    These hold already what frames and codecs took of the processor meanwhile, so here those only make frames later.
    """
    problem, plan = real.problem, real.run.plan
    forward_s_N, backward_s_N, weight_s_N = (np.zeros(problem.num_nodes) for _ in range(3))
    placement = placement_of(plan, real.run.fleet)
    for stage in step.stages:
        node, own = placement.nodes[stage.stage][0], plan.stages[stage.stage]
        for name, seconds_N in (("F", forward_s_N), ("B", backward_s_N), ("W", weight_s_N)):
            taken_s = [a.end_s - a.start_s for a in stage.actions if a.name == name]
            # Only where backwards come in halves is there a W.
            seconds_N[node] = statistics.mean(taken_s or [0.0]) / (own.layer_stop - own.layer_start)
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
    return real.simulated(problem, replace(overheads, codec_computes=False, probe_share=1.0))


def replay_errors(real: Real, overheads: Overheads) -> list[float]:
    return [replayed(real, step, overheads).step_s / step.step_s - 1 for step in real.steps]


def compute_shares(real: Real) -> list[float]:
    """Return, for each stage, how long its forwards and backwards took, of what its node's probe said."""
    shares: list[float] = []
    for own in real.run.plan.stages:
        actions = [a for step in real.steps for a in step.stages[own.stage].actions if a.name in ("F", "B", "W")]
        taken_s = sum(a.end_s - a.start_s for a in actions) / (NUM_MICROBATCHES * len(real.steps))
        shares.append(taken_s / own.compute_s)
    return shares


def tensor_bytes(real: Real, stage: int) -> int:
    """Return the most bytes of tensors that a stage takes where it does what it did in the last step."""
    plan, config = real.run.plan, real.run.config
    own, recorded = plan.stages[stage], real.steps[-1].stages[stage].actions
    backward = Op.INPUT_BACKWARD if any(action.name == "W" for action in recorded) else Op.BACKWARD
    ops = {"F": Op.FORWARD, "B": backward, "W": Op.WEIGHT_BACKWARD}
    return stage_peak_bytes(
        config.model,
        (own.layer_start, own.layer_stop),
        [Action(ops[action.name], action.microbatch) for action in recorded if action.name in ops],
        config.batch,
        document_mask=config.data.document_mask,
        activation_checkpointing=config.train.activation_checkpointing,
    )


def fit(reals: Sequence[Real]) -> dict[str, float]:
    """Return what a frame costs both its ends, of a whole core, that makes the replays of `reals` err least.

    And how long compute takes in a run, of what the probe said.
    """

    def loss(frame_s: float, byte_s: float) -> float:
        tried = replace(
            LAB,
            send_frame_s=frame_s / 2,
            receive_frame_s=frame_s / 2,
            send_byte_s=byte_s / 2,
            receive_byte_s=byte_s / 2,
        )
        return sum(e * e for real in reals for e in replay_errors(real, tried))

    frame_s, byte_s = min(itertools.product(FRAME_S, FRAME_BYTE_S), key=lambda pair: loss(*pair))
    probe_share = statistics.median(share for real in reals for share in compute_shares(real))
    return {"frame_s": frame_s, "frame_byte_s": byte_s, "probe_share": probe_share}


def judge(real: Real) -> dict[str, Any]:
    """Return what was foreseen of a run and what it did."""
    plan, steps = real.run.plan, real.steps
    simulation = real.simulated(real.problem, LAB)
    # Frames that wait are not among the tensors that are counted below.
    foreseen: list[float] = simulation.tensor_bytes_U.tolist()
    held = [max(step.stages[i].held_bytes for step in real.run.history.steps) for i in range(len(plan.stages))]
    taken = [tensor_bytes(real, stage.stage) for stage in plan.stages]
    return {
        "hosts": real.group.cpus,
        "trial": asdict(real.trial),
        "schedule": plan.schedule,
        "layers": sizes_of(plan),
        "in_flight": plan.in_flight,
        "link_mbps": [link.rate_mbps for link in plan.links],
        "link_delay_s": [link.delay_s for link in plan.links],
        "stolen_share": real.run.stolen_share,
        "real_step_s": [step.step_s for step in steps],
        "real_median_s": real.step_s,
        "simulated_s": simulation.step_s,
        "error": simulation.step_s / real.step_s - 1,
        "planned_s": plan.step_s,
        "planned_error": plan.step_s / real.step_s - 1,
        "replayed_errors": replay_errors(real, LAB),
        "compute_shares": compute_shares(real),
        "idle_shares": [statistics.mean(step.stages[i].idle_share for step in steps) for i in range(len(plan.stages))],
        "simulated_idle_shares": simulation.idle_share_U.tolist(),
        "held_bytes": held,
        "simulated_bytes": foreseen,
        "simulated_with_frames_bytes": simulation.memory_bytes_U.tolist(),
        "planned_bytes": [stage.memory_bytes for stage in plan.stages],
        "tensor_bytes": taken,
        "memory_ratios": [f / t for f, t in zip(foreseen, taken, strict=True)],
    }


def run_group(group: Group, folder: Path) -> list[tuple[Real, dict[str, Any]]]:
    """Run a group's trials, and return each with its judgement."""
    found: list[tuple[Real, dict[str, Any]]] = []
    with open_runs(group, folder) as runs:
        for trial in group.trials:
            real = runs.real(trial, trial.name)
            found.append((real, judge(real)))
            print(row_text(group.name, real, found[-1][1]), flush=True)
    return found


def run_rivalry(folder: Path) -> dict[str, Any]:
    """Run what the planner chooses and every rival; then, in turns, the choice and the fastest rivals again.

    Only what was run in turns is compared: the machine's pace changes by more than plans differ.
    """
    (trial,) = RIVALRY.trials
    with open_runs(RIVALRY, folder) as runs:
        plan = runs.real(trial, "chosen").run.plan
        words = {CHOSEN: plan_words(plan)}
        if plan.num_nodes < len(plan.stages):
            plain = runs.real(trial, "plain", ["plan.schedule=bdp", *pin_words(plan)]).run.plan
            words["bdp"] = plan_words(plain)
        else:
            plain = plan
            words["interleaved"] = ("plan.schedule=interleaved", "plan.chunks=2", *pin_words(plan))
        for name, own in rivals(sizes_of(plain), plain.schedule).items():
            words[name] = (*own, *pin_words(plain))
        measured: dict[str, float] = {}
        for number, name in enumerate(name for name in words if name != CHOSEN):
            measured[name] = runs.real(trial, f"rival-{number}", words[name]).step_s
            print(f"{name}: {measured[name]:.2f} s", flush=True)
        fastest = sorted(measured, key=lambda name: measured[name])[:NUM_AGAIN]
        turns: dict[str, list[float]] = {name: [] for name in (CHOSEN, *fastest)}
        for turn in range(TURNS):
            for number, name in enumerate(turns):
                real = runs.real(trial, f"turn-{turn}-{number}", words[name])
                turns[name] += [step.step_s for step in real.steps]
                print(f"turn {turn}, {name}: {real.step_s:.2f} s", flush=True)
    again_s = {name: statistics.median(steps_s) for name, steps_s in turns.items()}
    best = min(fastest, key=lambda name: again_s[name])
    return {
        "hosts": RIVALRY.cpus,
        "trial": asdict(trial),
        "chosen": {"schedule": plan.schedule, "layers": sizes_of(plan), "step_s": again_s[CHOSEN]},
        "rivals_s": measured,
        "turns_s": turns,
        "again_s": again_s,
        "best": best,
        "of_best": again_s[CHOSEN] / again_s[best],
    }


def sizes_of(plan: Plan) -> tuple[int, ...]:
    return tuple(stage.layer_stop - stage.layer_start for stage in plan.stages)


def plan_words(plan: Plan) -> tuple[str, ...]:
    """Return what makes a run have this plan's order and cut on its nodes."""
    words = [f"plan.schedule={plan.schedule}", f"plan.split=[{','.join(map(str, sizes_of(plan)))}]"]
    if plan.num_nodes < len(plan.stages):
        words.append(f"plan.chunks={len(plan.stages) // plan.num_nodes}")
    return (*words, *pin_words(plan))


def pin_words(plan: Plan) -> tuple[str, ...]:
    # Else a split goes to nodes in the fleet's order.
    return tuple(f"plan.pins.{stage.node}={stage.stage}" for stage in plan.stages[: plan.num_nodes])


def row_text(hosts: str, real: Real, row: dict[str, Any]) -> str:
    memory = ", ".join(
        f"{s / 1e6:.0f}/{t / 1e6:.0f}" for s, t in zip(row["simulated_bytes"], row["tensor_bytes"], strict=True)
    )
    return (
        f"{hosts:18} {real.trial.name:20} real {row['real_median_s']:6.2f} s, simulated {row['simulated_s']:6.2f} s "
        f"({row['error']:+.1%}), replayed {statistics.median(row['replayed_errors']):+.1%}, "
        f"planner {row['planned_error']:+.1%}; MB of tensors simulated/real {memory}"
    )


def run_groups(groups: Sequence[Group], folder: Path) -> dict[str, Any]:
    """Run these groups, and return what came of them."""
    judged: list[dict[str, Any]] = []
    calibrating: list[tuple[Real, dict[str, Any]]] = []
    for group in groups:
        for real, row in run_group(group, folder):
            if real.trial.calibrates:
                calibrating.append((real, row))
            else:
                judged.append(row)
    return {
        "cases": judged,
        "calibrating": [row for _, row in calibrating],
        "fitted": fit([real for real, _ in calibrating]) if calibrating else {},
        "used": asdict(LAB),
        "replayed_median_error": statistics.median(abs(e) for row in judged for e in row["replayed_errors"]),
        "planned_median_error": statistics.median(abs(row["planned_error"]) for row in judged),
    }


def with_figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured with what it comes to, by the bounds of today."""
    figures: dict[str, float] = {}
    if rows := measured.get("cases"):
        errors = [abs(row["error"]) for row in rows]
        ratios = [ratio for row in rows for ratio in row["memory_ratios"]]
        figures["median_error"] = statistics.median(errors)
        figures["p90_error"] = float(np.quantile(errors, 0.9))
        figures |= {"least_memory": min(ratios), "most_memory": max(ratios)}
    if "rivalry" in measured:
        figures["of_best"] = measured["rivalry"]["of_best"]
    missed = [name for name, figure in figures.items() if is_missed(name, figure)]
    return {**measured, "figures": figures, "bounds": BOUNDS, "missed": missed}


def known_parts(path: Path) -> dict[str, Any]:
    """Return what an earlier run measured, without when and where it did; nothing where there was no such run."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {key: value for key, value in known.items() if key not in ("command", "measured_at", "machine")}


def is_missed(name: str, figure: float) -> bool:
    """Return whether a figure is on the wrong side of its bound."""
    return figure < BOUNDS[name] if name == "least_memory" else figure > BOUNDS[name]


def main() -> int:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and judge again those that are here already")
    parser.add_argument("--only", choices=PARTS, help="this part alone, the other as it is on file")
    arguments = parser.parse_args()
    if lacking := missing() or missing_for_cpus():
        print(f"skipped: no WAN lab here: {lacking}")
        return 0
    parts = (arguments.only,) if arguments.only else ("runs",) if arguments.quick else PARTS
    path = result_path("simulator", arguments)
    measured = known_parts(path) if arguments.only else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = (arguments.runs or Path(scratch)).resolve()
        if "runs" in parts:
            measured |= run_groups((QUICK,) if arguments.quick else GROUPS, folder)
        if "choice" in parts:
            measured["rivalry"] = run_rivalry(folder)
    measured = with_figures(measured)
    save("simulator", arguments, measured)
    path.with_suffix(".md").write_text(simulator_tables(measured))
    print(f"saved {path}; fitted {measured.get('fitted')}")
    print(
        ", ".join(f"{name} {figure:.3f}" for name, figure in measured["figures"].items())
        + f"; missed: {', '.join(measured['missed']) or 'nothing'}"
    )
    return 1 if arguments.check and measured["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
