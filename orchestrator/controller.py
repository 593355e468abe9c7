"""The story of a run: open, probe, plan, place, load; then step by step until done; commit, save, close.

    train -> start -> steps: [evaluate] -> run step -> judge -> (the commit rides on the next order) ... -> close
                                            |-> failed: retry, or rebuild from the newest checkpoint, or stop

Decisions are `lifecycle`'s; this module acts on them. It never touches a tensor.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from actors.errors import CheckpointCorrupt, DiskFull, IsthmusError, PeerError, PeerLost, StageError, StoreError
from actors.spec import Commit, EvalOrder, Plan, SaveOrder, StepOrder, StepReport
from actors.store import check_store, open_store
from orchestrator.canary import judge, readings_of, with_step_downs
from orchestrator.checkpoints import CheckpointLedger, Manifest
from orchestrator.config import RunConfig
from orchestrator.events import encode
from orchestrator.fleet import Crew, open_fleet
from orchestrator.lifecycle import (
    CommitStep,
    History,
    Rebuild,
    RunState,
    StepFailed,
    StepOutcome,
    Stop,
    on_checkpoint,
    on_step_done,
    on_step_downs,
    on_step_failed,
    summarise,
)
from orchestrator.past import Past, require_shared_store
from orchestrator.progress import Progress
from orchestrator.recipe import checkpoint_url, plan_run, require_data, resolve, save_plan, saved_plan, tuning_of
from orchestrator.records import EvalRecord, EventRecord
from orchestrator.retune import judge_links, link_readings, watch_of
from orchestrator.runfolder import RunFolder, write_atomic
from orchestrator.saving import Saving
from orchestrator.stages import Stages
from orchestrator.tracking import Tracker, open_tracker


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int
    finished: bool
    val_loss: float | None


def train(config: RunConfig, *, address: str | None, console: Console, interrupted: Callable[[], bool]) -> RunResult:
    """Train, or go on with, the run that `config` names, until its last step or until `interrupted` says so."""
    config = resolve(config)
    data = require_data(config)
    folder = RunFolder.open(Path(config.runs_dir), config.name)
    with folder.lock():
        ledger = CheckpointLedger(open_store(checkpoint_url(config)))
        check_store(ledger.store)
        past = Past(config, ledger, data.sha256)
        past.find_newest()
        # Only now: a configuration that does not fit the checkpoints leaves the run as it was.
        write_atomic(folder.config, config.yaml)
        with open_fleet(config.fleet, address, config.name, config.timeouts) as crew:
            run = _Run(config, folder, crew, past, console)
            exit_code = 1
            try:
                run.start()
                result = run.steps(interrupted)
                exit_code = 0
            except IsthmusError as error:
                exit_code = error.exit_code
                run.fail(error)
            finally:
                # A full disk must not hide the error that ends the run.
                with suppress(DiskFull):
                    run.tracker.finish(exit_code)
            return result


class _Run:
    """One attempt at a run: from placing its stages to its last commit."""

    def __init__(self, config: RunConfig, folder: RunFolder, crew: Crew, past: Past, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._crew = crew
        self._past = past
        self._wandb_id = past.newest.wandb_id if past.newest else secrets.token_hex(4)
        self.tracker: Tracker = open_tracker(
            config.tracking, folder, run_id=self._wandb_id, console=console, clock=time.time
        )
        checkpoints = config.checkpoints
        self._saving = Saving(past.ledger, checkpoints.keep, checkpoints.codec, self._tell)
        self._state = RunState(step=0, generation=0)
        self._progress = Progress(num_steps=config.train.steps)
        self._commit: Commit | None = None
        # False until the stages hold weights, and while they are to be placed anew.
        self._is_placed = False
        self._last_val_loss: float | None = None

    def start(self) -> None:
        """Plan, place the stages, and give them their weights."""
        require_shared_store(self._past.ledger.store, self._crew, self._config.timeouts.place_s)
        self._plan()
        self.tracker.start(encode(self._config), self._stages.plan)
        self._place()

    def steps(self, interrupted: Callable[[], bool]) -> RunResult:
        """Run steps until the last one is done or someone wants to stop; leave a whole checkpoint behind."""
        while True:
            try:
                if not self._is_placed:
                    # A node was lost in the step before.
                    self._rebuild()
                if self._is_done or interrupted():
                    self._close()
                    break
                if self._evaluation_is_due():
                    self._commit_alone()
                    self._evaluate()
                reports = self._run_step()
            except (PeerError, StageError) as error:
                self._recover(error)
            else:
                self._judge(reports)
        self._require_saved()
        word = "finished" if self._is_done else "stopped"
        self._tell(self._state.step, word, f"{self._state.step} of {self._config.train.steps} steps are committed")
        return RunResult(
            folder=self._folder.path, step=self._state.step, finished=self._is_done, val_loss=self._last_val_loss
        )

    def fail(self, error: IsthmusError) -> NoReturn:
        """Keep what was committed, record why the run ends, and pass the error on."""
        # Another failure on the way out must not hide the first.
        if not isinstance(error, StoreError):
            with suppress(IsthmusError):
                self._save_what_was_committed()
        with suppress(DiskFull):
            self._tell(self._state.step, "failed", str(error))
        raise error

    @property
    def _is_done(self) -> bool:
        return self._state.step >= self._config.train.steps

    def _close(self) -> None:
        """Commit the last step, save it, and look at the held-out loss where the run is complete."""
        save = self._save_order() if self._saving.newest_step != self._state.step else None
        self._commit_alone(save)
        if self._is_done:
            self._evaluate()
        self._saving.collect(self._stages.flush())

    def _require_saved(self) -> None:
        """Raise StoreError where the last step's checkpoint could not be written."""
        if self._saving.newest_step != self._state.step:
            raise StoreError(
                f"the last checkpoint, of step {self._state.step}, could not be written: {self._saving.last_failure}",
                f"mend the store, then start the run again: it goes on from step {max(0, self._saving.newest_step)}",
            )

    def _run_step(self) -> tuple[StepReport, ...]:
        """Order the next step, with the commit of the one before and perhaps a checkpoint of it; return the reports."""
        every = self._config.checkpoints.every_steps
        step = self._state.step
        is_due = every > 0 and step > 0 and step % every == 0 and self._saving.newest_step != step
        order = self._step_order(self._save_order() if is_due else None, run_step=True)
        began_s = time.monotonic()
        reports = self._stages.run(order)
        self._progress = self._progress.timed(time.monotonic() - began_s)
        return reports

    def _judge(self, reports: tuple[StepReport, ...]) -> None:
        """Decide what becomes of a finished step; the commit goes out with the next order."""
        if self._saving.collect([save for report in reports for save in report.saves]):
            self._state = on_checkpoint(self._state)
        outcome = summarise(reports)
        config, step = self._config, self._state.step
        self._state, decision = on_step_done(self._state, outcome, config.guard, config.optim, config.train.steps)
        if isinstance(decision, Stop):
            raise decision.error
        self._commit = decision.commit
        if decision.skip_reason:
            self._tell(step, "skipped", decision.skip_reason)
        self._track(reports, outcome, decision)
        self._judge_codecs(reports, step)
        self._judge_links(reports, step)

    def _judge_codecs(self, reports: tuple[StepReport, ...], step: int) -> None:
        """Replace, from the next step on, the codecs whose canaries are bad."""
        plan = self._stages.plan
        verdicts = judge(readings_of(reports), plan, self._config.wire.canary_min_cosine)
        if not verdicts:
            return
        step_downs = tuple(step_down for step_down, _ in verdicts)
        self._state = on_step_downs(self._state, step_downs)
        self._adopt(with_step_downs(plan, step_downs))
        for _, reason in verdicts:
            self._tell(step, "stepped_down", reason)

    def _judge_links(self, reports: tuple[StepReport, ...], step: int) -> None:
        """Plan anew, from the next step on, for links that are no longer what they were taken for."""
        tuning = tuning_of(self._config, self._state.history.step_downs)
        readings = link_readings(reports)
        self._watch, retuned = judge_links(self._watch, step, readings, self._stages.plan, self._fleet, tuning)
        if retuned is not None:
            self._fleet = retuned.fleet
            self._adopt(retuned.plan)
            self._tell(step, "retuned", retuned.reason)

    def _adopt(self, plan: Plan) -> None:
        """Go by this plan, of the same stages on the same nodes, from the next order on."""
        self._stages = replace(self._stages, plan=plan)
        save_plan(self._folder, plan, self._fleet)

    def _recover(self, error: IsthmusError) -> None:
        """Do what lifecycle says after a step that did not end well."""
        failed = StepFailed(error=error, lost=isinstance(error, PeerLost | StageError))
        ended = self._state.generation
        self._state, decision = on_step_failed(self._state, failed, self._config.guard)
        if isinstance(decision, Stop):
            raise decision.error
        self._stages.abort(ended)
        if isinstance(decision, Rebuild):
            self._tell(self._state.step, "node_lost", decision.reason)
            self._is_placed = False
        else:
            self._tell(self._state.step, "retried", decision.reason)

    def _rebuild(self) -> None:
        """Place the stages anew on the nodes that live, and roll all of them back to the newest checkpoint."""
        self._saving.forget()
        self._crew.revive()
        self._past.find_newest()
        self._plan()
        self._place()

    def _plan(self) -> None:
        """Measure the fleet and plan for it; a codec that did a link harm before the newest checkpoint stays away."""
        newest = self._past.newest
        before = saved_plan(self._folder) if newest else None
        planned = plan_run(self._config, self._crew, newest.batch if newest else None, before)
        self._config, self._fleet, plan = planned.config, planned.fleet, planned.plan
        history = newest.history if newest else History()
        plan = with_step_downs(plan, history.step_downs)
        save_plan(self._folder, plan, self._fleet)
        # Links were just measured: what was seen of them before is in the plan, or no longer so.
        self._watch = watch_of(plan, self._fleet)
        self._stages = Stages(self._crew, plan, self._config, self._past.data_sha256)

    def _place(self) -> None:
        """Assign and load the stages: from the newest checkpoint that proves whole, else from the start."""
        newest_generation = self._past.newest.generation if self._past.newest else 0
        generation = max(self._state.generation, newest_generation) + 1
        self._stages.assign(generation)
        step = self._load(generation)
        manifest = self._past.newest
        history = manifest.history if manifest else History()
        self._state = replace(self._state, step=step, generation=generation, history=history)
        self._is_placed = True
        self._commit = None
        self._saving.newest_step = step if manifest else -1
        self._progress = self._progress.rewound(
            tokens=manifest.tokens_trained if manifest else 0, dollars=manifest.dollars if manifest else 0.0
        )
        self._tell_origin()

    def _load(self, generation: int) -> int:
        """Load the newest checkpoint that proves whole into the stages, and return the step that it is of."""
        while True:
            order = self._past.load_order(generation)
            try:
                self._stages.load(order)
                return order.step
            except CheckpointCorrupt as error:
                # A hash showed what sizes could not.
                self._past.bad.append(str(error))
                self._past.find_newest(below=order.step)
                # Only once another is found: without its manifest the last one could be taken for none, and the run
                # for a new one.
                self._past.ledger.set_aside(order.step)

    def _tell_origin(self) -> None:
        """Say where the run begins or goes on from, and which checkpoints could not be used."""
        for bad in self._past.bad:
            self._tell(self._state.step, "checkpoint_bad", bad)
        self._past.bad.clear()
        nodes = ", ".join(self._stages.nodes)
        if self._past.newest is not None:
            self._tell(self._state.step, "resumed", f"from {self._past.newest.checkpoint} on {nodes}")
        else:
            self._tell(0, "started", f"{self._config.model.num_params:,} parameters on {nodes}")

    def _commit_alone(self, save: SaveOrder | None = None) -> None:
        """Commit the step before without running another, where its commit still waits for an order to ride on."""
        if self._commit is None and save is None:
            return
        reports = self._stages.run(self._step_order(save, run_step=False))
        self._commit = None
        self._saving.collect([saved for report in reports for saved in report.saves])

    def _step_order(self, save: SaveOrder | None, *, run_step: bool) -> StepOrder:
        """Order the commit that waits, a checkpoint of what it makes, and perhaps a step from there."""
        plan = self._stages.plan
        return StepOrder(
            run=self._config.name,
            generation=self._state.generation,
            step=self._state.step,
            commit=self._commit,
            save=save,
            codecs=plan.link_codecs,
            link_sizes=plan.link_sizes,
            in_flight=plan.in_flight,
            run_step=run_step,
        )

    def _evaluation_is_due(self) -> bool:
        every, step = self._config.train.eval_every, self._state.step
        return every > 0 and step > 0 and step % every == 0 and self._progress.evaluated_step != step

    def _evaluate(self) -> None:
        order = EvalOrder(
            run=self._config.name,
            generation=self._state.generation,
            step=self._state.step,
            num_microbatches=self._config.train.eval_microbatches,
        )
        began_s = time.monotonic()
        reports = self._stages.evaluate(order)
        num_targets = sum(report.num_targets for report in reports)
        self._last_val_loss = sum(report.loss_sum for report in reports) / max(1, num_targets)
        self._progress = replace(self._progress, evaluated_step=self._state.step)
        self.tracker.evaluation(
            EvalRecord(
                step=self._state.step,
                loss=self._last_val_loss,
                num_targets=num_targets,
                seconds=time.monotonic() - began_s,
            )
        )

    def _save_what_was_committed(self) -> None:
        """Write a checkpoint of the weights as they are, if stages hold some that are newer than the newest one."""
        if not self._is_placed or self._saving.newest_step >= self._state.step:
            return
        # Stages that still wait for frames of the failed step give it up.
        self._stages.abort(self._state.generation)
        self._state = replace(self._state, generation=self._state.generation + 1)
        self._commit_alone(self._save_order())
        self._saving.collect(self._stages.flush())

    def _save_order(self) -> SaveOrder | None:
        """Order a checkpoint of the weights as they are after the commit that goes out with it."""
        draft = partial(
            Manifest,
            run=self._config.name,
            step=self._state.step,
            generation=self._state.generation,
            model=self._config.model,
            batch=self._config.batch,
            data_sha256=self._past.data_sha256,
            document_mask=self._config.data.document_mask,
            seed=self._config.seed,
            tokens_trained=self._progress.total_tokens,
            history=self._state.history,
            dollars=self._progress.dollars,
            config=self._config.yaml,
            config_sha256=self._config.sha256,
            wandb_id=self._wandb_id,
        )
        return self._saving.order(self._state.step, draft, len(self._stages.plan.stages))

    def _track(self, reports: tuple[StepReport, ...], outcome: StepOutcome, decision: CommitStep) -> None:
        self._progress, record = self._progress.after(
            reports,
            outcome,
            decision,
            num_skipped=self._state.history.num_skipped,
            dollars_per_hour=self._stages.plan.dollars_per_hour,
            num_nodes=self._stages.plan.num_nodes,
        )
        self.tracker.step(record)

    def _tell(self, step: int, name: str, text: str) -> None:
        self.tracker.event(EventRecord(step=step, name=name, text=text))
