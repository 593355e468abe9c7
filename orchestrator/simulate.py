"""Plays a saved plan, or a fleet with a trace of its nodes, and leaves a folder that `isthmus report` shows.

Needs no hardware: what nodes and links are comes from fleet.json, what is trained from the configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import PlanError, UserError
from actors.fleet_spec import Fleet
from actors.model.huggingface import read_spec
from actors.spec import Plan
from orchestrator.config import RunConfig, load_config, parse_config
from orchestrator.events import EventsFile, decode, encode
from orchestrator.fleetfile import load_fleet
from orchestrator.pictures import churn_picture, timeline_picture
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.plan import make_chain
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.validate import require_sound
from orchestrator.recipe import with_batch_of, workload
from orchestrator.records import EventRecord, StepRecord
from orchestrator.runfolder import RunFolder, disk_errors, write_atomic
from orchestrator.simulator.outcome import RunRules, RunSimulation
from orchestrator.simulator.overheads import MEASURED_ON_CPU, MEASURED_ON_CUDA, Overheads
from orchestrator.simulator.record import step_record
from orchestrator.simulator.run import simulate_run
from orchestrator.simulator.step import StepSimulation, placement_of, simulate_plan, simulate_step
from orchestrator.simulator.trace import Trace, drawn_trace, lay_on, read_trace

_MAX_INPUT_BYTES = 67_108_864
# Of a long run, at most so many steps are written down one by one.
_MAX_STEP_RECORDS = 20_000
# A picture of more rows than this cannot be read.
_MAX_PICTURE_ROWS = 48
# Where a run is saved only at its end.
_NEVER_STEPS = 1_000_000_000
# A long run plans anew a hundred times.
_REPLAN_EVALUATIONS = 20_000
# How long a lost node stays away where no trace says it.
_AWAY_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is simulated: a plan on its fleet, and what it trains."""

    plan: Plan
    fleet: Fleet
    config: RunConfig
    work: Workload

    @property
    def node_names(self) -> list[str]:
        return [card.node for card in self.fleet.nodes]

    @property
    def replanning(self) -> PlanConfig:
        """How a run plans anew: with the microbatches and the schedule that it began with, and a small search."""
        plan = self.config.plan
        evaluations = min(_REPLAN_EVALUATIONS, plan.evaluations or _REPLAN_EVALUATIONS)
        return replace(plan.searched, microbatch_sizes=None, schedule=self.plan.schedule, evaluations=evaluations)

    @property
    def overheads(self) -> Overheads:
        """What the runtime was measured to take beside compute, on such nodes."""
        on_cpu = any(card.boundary_bytes == 4 for card in self.fleet.nodes)
        return MEASURED_ON_CPU if on_cpu else MEASURED_ON_CUDA


def open_scene(source: Path, words: Sequence[str]) -> Scene:
    """Return what a plan.json or fleet.json says, with the configuration in `words`, else in config.yaml beside it.

    A fleet is planned for first. Raises UserError for what cannot be read, PlanError where the model fits nowhere.
    """
    config = _config(source, words)
    content = _read_json(source) if source.suffix == ".json" else {}
    if "stages" in content:
        fleet = _decoded(Fleet, _read_json(source.with_name("fleet.json")), source.with_name("fleet.json"))
        require_sound(fleet)
        plan = _decoded(Plan, content, source)
    else:
        fleet = load_fleet(source, workload(config), config.plan.batches(config.batch))
        plan = make_chain(fleet, workload(config), config.wire, config.plan)
    if plan.num_nodes < len(plan.stages) or config.plan.schedule == "interleaved":
        raise PlanError(
            f"{source} is of an interleaved plan; a simulated node holds one stage",
            "isthmus plan shows what an interleaved step takes; to simulate, set another plan.schedule",
        )
    config = with_batch_of(config, plan)
    work = replace(workload(config), schedule=plan.schedule)
    return Scene(plan=plan, fleet=fleet, config=config, work=work)


def play_steps(scene: Scene, num_steps: int, seed: int, spread: float, out: Path) -> StepSimulation:
    """Play so many steps of the plan, each with its own spread of compute times; return the first."""
    problem, first = simulate_plan(
        scene.plan, scene.fleet, scene.work, scene.config.wire, overheads=scene.overheads, sigma=spread, seed=seed
    )
    codecs = [(link.forward_codec, link.backward_codec) for link in scene.plan.links]
    placement = placement_of(scene.plan, scene.fleet)
    dollars, simulation = 0.0, first

    def records() -> Iterator[StepRecord]:
        nonlocal dollars, simulation
        for step in range(num_steps):
            if step and spread:
                simulation = simulate_step(
                    problem,
                    placement,
                    scene.config.wire,
                    overheads=scene.overheads,
                    codecs=codecs,
                    sigma=spread,
                    seed=seed + step,
                )
            dollars += simulation.dollars
            yield _record(scene, simulation, step, num_steps, dollars)

    folder = _write(scene, out, records(), ())
    _draw(scene, first, folder)
    return first


def play_run(scene: Scene, trace: Trace, rules: RunRules, out: Path) -> RunSimulation:
    """Play a run of the fleet while nodes come and go, planning anew as it must; write folder and pictures.

    It is saved as often as the configuration says; where that says never, so that all steps since the start are lost.
    """
    config = scene.config
    every = config.checkpoints.every_steps
    rules = replace(rules, checkpoint_steps=every or _NEVER_STEPS)
    codecs = [(link.forward_codec, link.backward_codec) for link in scene.plan.links]
    problem = make_problem(scene.fleet, scene.work, config.wire, codecs=codecs or None)

    def replan(problem: Problem, here_N: NDArray[np.bool_], before: Placement | None) -> Placement | None:
        del problem, before
        here = tuple(card for card, is_here in zip(scene.fleet.nodes, here_N, strict=True) if is_here)
        try:
            plan = make_chain(scene.fleet.part(here), scene.work, config.wire, scene.replanning)
        except PlanError:
            return None
        return placement_of(plan, scene.fleet)

    run = simulate_run(
        problem,
        trace,
        replan,
        config.wire,
        step_tokens=config.batch.step_tokens,
        rules=rules,
        overheads=scene.overheads,
        codecs=codecs,
        guard=config.guard,
    )
    folder = _write(scene, out, _run_records(scene, run), _run_events(run))
    if run.last_step is not None:
        _draw(scene, run.last_step, folder)
    churn_picture(run.points, run.duration_s, folder.path / "nodes.png")
    return run


def trace_for(scene: Scene, path: Path | None, hours: float | None, seed: int) -> Trace:
    """Return when nodes come and go: as a file says, for at most so many hours; without one, drawn from the fleet."""
    num_nodes = len(scene.fleet.nodes)
    if hours is not None and not 0 < hours < math.inf:
        raise UserError(f"--hours is {hours}", "give the hours to be simulated, above 0")
    if path is not None:
        trace = lay_on(read_trace(path), num_nodes, seed=seed)
        return trace if hours is None else replace(trace, duration_s=min(trace.duration_s, hours * 3600))
    assert hours is not None
    rates = [card.losses_per_hour for card in scene.fleet.nodes]
    return drawn_trace(rates, duration_s=hours * 3600, away_s=_AWAY_S, seed=seed)


def _config(source: Path, words: Sequence[str]) -> RunConfig:
    beside = source.with_name("config.yaml")
    if words:
        config = load_config(words)
    elif beside.exists():
        with disk_errors(beside), open(beside, encoding="utf-8", errors="replace") as file:
            config = parse_config(file.read(_MAX_INPUT_BYTES))
    else:
        raise UserError(
            f"nothing says what is trained: there is no config.yaml beside {source}",
            f"name a configuration: isthmus simulate {source} conf/demo.yaml",
        )
    if config.model.init_from is None:
        return config
    return replace(config, model=read_spec(Path(config.model.init_from).expanduser(), untie=config.model.untie))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_MAX_INPUT_BYTES))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}",
            "give a plan.json with its fleet.json beside it, or a fleet.json",
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON: {error}", "give a plan.json or a fleet.json as Isthmus saves them"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is neither a plan nor a fleet", "give a plan.json, or a fleet file")
    return content


def _decoded(kind: type, content: dict[str, Any], path: Path) -> Any:
    try:
        return decode(kind, content)
    except ValueError as error:
        raise UserError(
            f"{path} is no {kind.__name__.lower()} of this release: {error}", "plan anew with it"
        ) from error


def _record(scene: Scene, simulation: StepSimulation, step: int, num_steps: int, dollars: float) -> StepRecord:
    return step_record(
        simulation,
        step=step,
        num_steps=num_steps,
        step_tokens=scene.config.batch.step_tokens,
        node_names=scene.node_names,
        dollars=dollars,
    )


def _run_records(scene: Scene, run: RunSimulation) -> Iterator[StepRecord]:
    """Yield the steps of a run in the order in which they were done; only the last one has its stages."""
    total = sum(stretch.num_steps for stretch in run.stretches)
    if run.last_step is None or total > _MAX_STEP_RECORDS:
        return
    whole = _record(scene, run.last_step, 0, run.steps, 0.0)
    step_tokens = scene.config.batch.step_tokens
    done = 0
    for stretch in run.stretches:
        for number in range(stretch.num_steps):
            done += 1
            step = stretch.first_step + number
            yield replace(
                whole,
                step=step,
                total_tokens=step_tokens * (step + 1),
                step_s=stretch.step_s,
                tokens_per_s=step_tokens / stretch.step_s,
                eta_s=(run.steps - step - 1) * stretch.step_s,
                dollars=stretch.dollars + stretch.dollars_per_s * stretch.step_s * (number + 1),
                stages=whole.stages if done == total else (),
                links=whole.links if done == total else (),
            )


def _run_events(run: RunSimulation) -> list[EventRecord]:
    return [
        EventRecord(step=event.step, name=event.name, text=f"{event.time_s / 3600:.2f} h: {event.text}")
        for event in run.events
    ]


def _write(scene: Scene, out: Path, records: Iterator[StepRecord], events: Sequence[EventRecord]) -> RunFolder:
    """Write a simulation as a run's folder; what was simulated there before is replaced, a real run never."""
    folder = RunFolder(out)
    if folder.checkpoints.exists() or folder.status.exists():
        raise UserError(f"{out} holds a real run", "give another folder with --out")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        folder.events.unlink(missing_ok=True)
    write_atomic(folder.config, scene.config.yaml)
    write_atomic(folder.plan, json.dumps(encode(scene.plan), indent=1))
    write_atomic(folder.fleet, json.dumps(encode(scene.fleet), indent=1))
    sink = EventsFile(folder.events, timeline_every=1)
    sink.event(EventRecord(step=0, name="simulated", text="nothing was trained: what a simulation foresees"))
    for event in events:
        sink.event(event)
    for record in records:
        sink.step(record)
    sink.finish(0)
    return folder


def _draw(scene: Scene, simulation: StepSimulation, folder: RunFolder) -> None:
    record = _record(scene, simulation, 0, 1, simulation.dollars)
    with disk_errors(folder.timeline):
        timeline_picture(replace(record, stages=record.stages[:_MAX_PICTURE_ROWS]), folder.timeline)
