"""The story of a run: open, probe, plan, place, load; then step by step until done; commit, save, close.

    train -> _Run.start -> _Run.steps: [evaluate] -> run step -> judge -> (commit rides on the next order) ...
                                            |-> failed: retry, or rebuild from the newest checkpoint, or stop

Decisions are `lifecycle`'s; this module acts on them. It never touches a tensor.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from actors.errors import CheckpointCorrupt, CheckpointError, DataError, IsthmusError, PeerError, PeerLost, StageError
from actors.model.huggingface import read_spec
from actors.spec import (
    CheckpointRef,
    Commit,
    EvalOrder,
    Fleet,
    LoadOrder,
    Plan,
    ProbeOrder,
    SaveOrder,
    StepOrder,
    StepReport,
)
from actors.store import check_store, open_store
from actors.token_shards import DataManifest
from orchestrator.checkpoints import CheckpointLedger, Manifest, require_compatible
from orchestrator.config import RunConfig
from orchestrator.events import encode
from orchestrator.fleet import Crew, open_fleet
from orchestrator.lifecycle import (
    CommitStep,
    Rebuild,
    RunState,
    StepFailed,
    StepOutcome,
    Stop,
    on_checkpoint,
    on_step_done,
    on_step_failed,
    summarise,
)
from orchestrator.planner.cost import Workload
from orchestrator.planner.plan import make_plan
from orchestrator.progress import Progress
from orchestrator.records import EvalRecord, EventRecord
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


def resolve_model(config: RunConfig) -> RunConfig:
    """Return the configuration with the shape of the model that training starts from, where it names one."""
    if config.model.init_from is None:
        return config
    spec = read_spec(Path(config.model.init_from), untie=config.model.untie)
    return replace(config, model=spec)


def require_data(config: RunConfig) -> DataManifest:
    """Return the manifest of the data; DataError where its vocabulary is not the model's."""
    data = DataManifest.load(config.data.path)
    if data.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{config.data.path} has a vocabulary of {data.vocab_size} tokens, the model of {config.model.vocab_size}",
            f"set model.vocab_size={data.vocab_size}",
        )
    return data


def plan_fleet(config: RunConfig, crew: Crew) -> tuple[Fleet, Plan]:
    """Probe the fleet on this model and plan for it."""
    fleet = crew.probe(ProbeOrder(model=config.model, batch=config.batch), config.fleet.probe_bytes)
    work = Workload(
        model=config.model,
        batch=config.batch,
        schedule=config.plan.schedule,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    return fleet, make_plan(fleet, work, config.wire, config.plan)


def save_plan(folder: RunFolder, plan: Plan, fleet: Fleet) -> None:
    """Write the plan, and the fleet that it was made for, into the run's folder."""
    write_atomic(folder.plan, json.dumps(encode(plan), indent=1))
    write_atomic(folder.fleet, json.dumps(encode(fleet), indent=1))


def checkpoint_url(config: RunConfig) -> str:
    """Return where the run's checkpoints lie: its own folder, or its own place under checkpoints.url."""
    if config.checkpoints.url is None:
        return str(RunFolder(Path(config.runs_dir) / config.name).checkpoints.resolve())
    return f"{config.checkpoints.url.rstrip('/')}/{config.name}"


def train(config: RunConfig, *, address: str | None, console: Console, interrupted: Callable[[], bool]) -> RunResult:
    """Train, or go on with, the run that `config` names, until its last step or until `interrupted` says so."""
    config = resolve_model(config)
    data = require_data(config)
    folder = RunFolder.open(Path(config.runs_dir), config.name)
    with folder.lock():
        ledger = CheckpointLedger(open_store(checkpoint_url(config)))
        check_store(ledger.store)
        write_atomic(folder.config, config.yaml)
        with open_fleet(config.fleet, address, config.name, config.timeouts) as crew:
            run = _Run(config, folder, crew, ledger, sha256(data.to_json()).hexdigest(), console)
            try:
                run.start()
                run.steps(interrupted)
                result = run.finish()
            except IsthmusError as error:
                run.fail(error)
            run.tracker.finish(0)
            return result


class _Run:
    """One attempt at a run: from placing its stages to its last commit."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        crew: Crew,
        ledger: CheckpointLedger,
        data_sha256: str,
        console: Console,
    ) -> None:
        self._config = config
        self._folder = folder
        self._crew = crew
        self._data_sha256 = data_sha256
        self._ledger = ledger
        # Told once there is someone to tell.
        self._bad_checkpoints: list[str] = []
        self._resumed = self._newest_compatible()
        self._wandb_id = self._resumed.wandb_id if self._resumed else secrets.token_hex(4)
        self.tracker: Tracker = open_tracker(
            config.tracking, folder, run_id=self._wandb_id, console=console, clock=time.time
        )
        self._saving = Saving(ledger, config.checkpoints.keep, self._tell)
        self._state = RunState(step=0, generation=0)
        self._progress = Progress(num_steps=config.train.steps)
        self._commit: Commit | None = None
        self._last_val_loss: float | None = None

    def start(self) -> None:
        """Plan, place the stages, and give them their weights."""
        fleet, plan = plan_fleet(self._config, self._crew)
        save_plan(self._folder, plan, fleet)
        self._stages = Stages(self._crew, plan, self._config)
        self.tracker.start(encode(self._config), plan)
        self._place()

    def steps(self, interrupted: Callable[[], bool]) -> None:
        """Run steps until the last one is done or someone wants to stop."""
        while self._state.step < self._config.train.steps and not interrupted():
            try:
                if self._evaluation_is_due():
                    self._settle()
                    self._evaluate()
                reports = self._run_step()
            except (PeerError, StageError) as error:
                self._recover(error)
            else:
                self._judge(reports)

    def finish(self) -> RunResult:
        """Commit the last step, evaluate if the run is complete, and leave a whole checkpoint behind."""
        done = self._state.step >= self._config.train.steps
        save = self._save_order() if self._saving.newest_step != self._state.step else None
        self._settle(save)
        if done:
            self._evaluate()
        self._saving.collect(self._stages.flush())
        if self._saving.newest_step != self._state.step:
            raise CheckpointError(
                f"the last checkpoint, of step {self._state.step}, could not be written",
                f"mend the store, then start the run again: it goes on from step {max(0, self._saving.newest_step)}",
            )
        word = "finished" if done else "stopped"
        self._tell(self._state.step, word, f"{self._state.step} of {self._config.train.steps} steps are committed")
        return RunResult(folder=self._folder.path, step=self._state.step, finished=done, val_loss=self._last_val_loss)

    def fail(self, error: IsthmusError) -> NoReturn:
        """Record why the run ends, and pass the error on."""
        self._tell(self._state.step, "failed", str(error))
        self.tracker.finish(error.exit_code)
        raise error

    def _run_step(self) -> tuple[StepReport, ...]:
        every = self._config.checkpoints.every_steps
        step = self._state.step
        is_due = every > 0 and step > 0 and step % every == 0 and self._saving.newest_step != step
        order = StepOrder(
            run=self._config.name,
            generation=self._state.generation,
            step=step,
            commit=self._commit,
            save=self._save_order() if is_due else None,
        )
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
            self._stop_at_last_commit(decision)
        self._commit = decision.commit
        if decision.skip_reason:
            self._tell(step, "skipped", decision.skip_reason)
        self._track(reports, outcome, decision)

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
            self._rebuild()
        else:
            self._tell(self._state.step, "retried", decision.reason)

    def _rebuild(self) -> None:
        """Place the stages anew on the nodes that live, and roll all of them back to the newest checkpoint."""
        self._saving.forget()
        self._crew.revive()
        fleet, plan = plan_fleet(self._config, self._crew)
        save_plan(self._folder, plan, fleet)
        self._stages = Stages(self._crew, plan, self._config)
        self._resumed = self._newest_compatible()
        self._place()

    def _place(self) -> None:
        """Assign and load the stages: from the newest checkpoint that proves whole, else from the start."""
        generation = self._state.generation + 1
        if self._resumed is not None:
            generation = max(generation, self._resumed.generation + 1)
        self._stages.assign(generation)
        while True:
            manifest = self._resumed
            self._state = replace(
                self._state,
                step=manifest.step if manifest else 0,
                generation=generation,
                history=manifest.history if manifest else RunState(step=0, generation=0).history,
            )
            order = LoadOrder(
                run=self._config.name,
                generation=generation,
                step=self._state.step,
                checkpoint=self._ref(manifest) if manifest else None,
            )
            try:
                self._stages.load(order)
                break
            except CheckpointCorrupt as error:
                assert manifest is not None
                self._bad_checkpoints.append(str(error))
                self._resumed = self._newest_compatible(below=manifest.step)
        self._commit = None
        self._saving.newest_step = manifest.step if manifest else -1
        self._progress = self._progress.rewound(
            tokens=manifest.tokens_trained if manifest else 0, dollars=manifest.dollars if manifest else 0.0
        )
        for bad in self._bad_checkpoints:
            self._tell(self._state.step, "checkpoint_bad", bad)
        self._bad_checkpoints.clear()
        nodes = ", ".join(self._stages.nodes)
        if manifest is not None:
            self._tell(manifest.step, "resumed", f"from {manifest.checkpoint} on {nodes}")
        else:
            self._tell(0, "started", f"{self._config.model.num_params:,} parameters on {nodes}")

    def _settle(self, save: SaveOrder | None = None) -> None:
        """Commit the step before without running another."""
        if self._commit is None and save is None:
            return
        order = StepOrder(
            run=self._config.name,
            generation=self._state.generation,
            step=self._state.step,
            commit=self._commit,
            save=save,
            run_step=False,
        )
        reports = self._stages.run(order)
        self._commit = None
        self._saving.collect([saved for report in reports for saved in report.saves])

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

    def _stop_at_last_commit(self, decision: Stop) -> NoReturn:
        """Keep the weights as they are, then end the run with the decision's error."""
        if self._saving.newest_step != self._state.step:
            self._settle(self._save_order())
            self._saving.collect(self._stages.flush())
        raise decision.error

    def _save_order(self) -> SaveOrder:
        """Order a checkpoint of the weights as they are after the commit that goes out with it."""
        draft = partial(
            Manifest,
            run=self._config.name,
            step=self._state.step,
            generation=self._state.generation,
            model=self._config.model,
            batch=self._config.batch,
            data_sha256=self._data_sha256,
            seed=self._config.seed,
            tokens_trained=self._progress.total_tokens,
            history=self._state.history,
            dollars=self._progress.dollars,
            config=self._config.yaml,
            config_sha256=self._config.sha256,
            wandb_id=self._wandb_id,
        )
        return self._saving.order(self._state.step, draft, len(self._stages.nodes))

    def _newest_compatible(self, below: int | None = None) -> Manifest | None:
        """Return the newest whole checkpoint; CheckpointError where it cannot be continued as configured."""
        manifest = self._ledger.newest_whole(
            lambda checkpoint, error: self._bad_checkpoints.append(f"{checkpoint}: {error}"), below
        )
        if manifest is not None:
            config = self._config
            require_compatible(
                manifest, model=config.model, batch=config.batch, data_sha256=self._data_sha256, seed=config.seed
            )
        return manifest

    def _ref(self, manifest: Manifest) -> CheckpointRef:
        return CheckpointRef(store_url=self._ledger.store.url, checkpoint=manifest.checkpoint, files=manifest.files)

    def _track(self, reports: tuple[StepReport, ...], outcome: StepOutcome, decision: CommitStep) -> None:
        self._progress, record = self._progress.after(
            reports,
            outcome,
            decision,
            num_skipped=self._state.history.num_skipped,
            dollars_per_hour=self._stages.plan.dollars_per_hour,
        )
        self.tracker.step(record)

    def _tell(self, step: int, name: str, text: str) -> None:
        self.tracker.event(EventRecord(step=step, name=name, text=text))
