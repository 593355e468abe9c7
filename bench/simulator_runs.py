"""The real runs that bench.simulator judges by: made on their hosts, or read where they are kept already."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.random_tokens import write_random_tokens
from bench.simulator_cases import Group, Trial
from bench.wan_cases import MODEL
from bench.wan_field import Field, Run, open_field, read_run, run_folder
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.problem import Problem
from orchestrator.records import StepRecord
from orchestrator.simulator.overheads import Overheads
from orchestrator.simulator.step import StepSimulation, placement_of, simulate_step

NUM_MICROBATCHES, STEPS, WARMUP_STEPS = 8, 6, 1
RUN_TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Real:
    """What a run left, and on which hosts."""

    group: Group
    trial: Trial
    run: Run

    @property
    def codecs(self) -> list[tuple[str, str]]:
        return [(link.forward_codec, link.backward_codec) for link in self.run.plan.links]

    @property
    def steps(self) -> list[StepRecord]:
        return list(self.run.history.steps[WARMUP_STEPS:])

    @property
    def step_s(self) -> float:
        return statistics.median(step.step_s for step in self.steps)

    @property
    def driver(self) -> int:
        """Beside which node the driver ran: regions name the hosts."""
        return [card.region for card in self.run.fleet.nodes].index("region-0")

    @property
    def problem(self) -> Problem:
        config = self.run.config
        work = Workload(
            model=config.model,
            batch=config.batch,
            schedule=self.run.plan.schedule,
            activation_checkpointing=config.train.activation_checkpointing,
            document_mask=config.data.document_mask,
        )
        return make_problem(self.run.fleet, work, config.wire, codecs=self.codecs)

    def simulated(self, problem: Problem, overheads: Overheads) -> StepSimulation:
        slowness = statistics.mean(1 / share for share in self.group.cpus)
        return simulate_step(
            problem,
            placement_of(self.run.plan, self.run.fleet),
            self.run.config.wire,
            overheads=overheads.scaled(slowness),
            codecs=self.codecs,
            in_flight_S=self.run.plan.in_flight,
            driver=self.driver,
        )


class Runs:
    """The runs on a group's hosts, which are started for the first run that is not kept."""

    def __init__(self, group: Group, folder: Path, lent: ExitStack) -> None:
        self._group = group
        self._folder = folder
        self._lent = lent
        self._field: Field | None = None

    def real(self, trial: Trial, name: str, words: Sequence[str] = ()) -> Real:
        """Return the kept run of that name, else run the trial; LabError where it fails."""
        kept = run_folder(self._folder, self._group.case, name)
        if kept.plan.exists() and len((run := read_run(kept)).history.steps) >= STEPS:
            return Real(group=self._group, trial=trial, run=run)
        # What was cut off would be gone on with.
        shutil.rmtree(kept.path, ignore_errors=True)
        if self._field is None:
            write_random_tokens(self._folder / "data", MODEL.vocab_size)
            opened = open_field(self._group.case, NUM_MICROBATCHES, self._folder)
            self._field = self._lent.enter_context(opened)
        self._field.route(trial.route)
        run = self._field.run(name, [*trial.words, *words], num_steps=STEPS, timeout_s=RUN_TIMEOUT_S)
        return Real(group=self._group, trial=trial, run=run)


@contextmanager
def open_runs(group: Group, folder: Path) -> Iterator[Runs]:
    """Lend the runs of a group; what they leave is kept in `folder`."""
    with ExitStack() as lent:
        yield Runs(group, folder, lent)
