"""`isthmus baseline`: the same recipe, tokens and evaluations as a run, centralised, for its curves to be put beside.

    train_baseline -> Ray Train's workers -> a message after each act -> records, as a run's

One worker, or `fleet.baseline_workers` equal ones that sum their gradients. Each computes with all cores of its node,
shared by the workers there, or with `fleet.threads`; it costs what one node costs. A baseline keeps no checkpoints: it
is run in one go, and run again it starts afresh and replaces what the last one recorded.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray
import ray.exceptions
from ray.util.queue import Empty, Queue
from rich.console import Console

from actors.errors import FleetError, IsthmusError, NonFinite, PeerLost, PeerTimeout, StageError
from actors.fleet_spec import Fleet, NodeCard
from actors.spec import EvalReport, Plan, StepReport
from orchestrator.baseline_job import Act, CoreShare, Message, TrainJob, fit, program, share_cores
from orchestrator.config import RunConfig
from orchestrator.events import encode
from orchestrator.fleet import answer_of, first_line, open_ray
from orchestrator.lifecycle import RunState, Stop, on_step_done, summarise
from orchestrator.planner.build import Workload
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.plan import make_plan
from orchestrator.progress import Progress
from orchestrator.recipe import require_data, resolve, save_plan
from orchestrator.records import EvalRecord, EventRecord
from orchestrator.runfolder import BASELINE_SUFFIX, RunFolder, disk_errors, write_atomic
from orchestrator.tracking import Tracker, open_tracker

# How often a driver that waits for a message looks whether the job has failed.
_POLL_S = 1.0


def train_baseline(config: RunConfig, *, address: str | None, console: Console) -> Path:
    """Train the recipe centralised and return the run folder, `<name>-baseline`; its records are as a run's.

    Starts afresh each time and replaces the events of an earlier baseline: no checkpoint is kept to go on from.
    Raises RunBusy where one of that name is running, FleetError where the workers find no place, and what a worker
    raises.
    """
    config = resolve(config)
    require_data(config)
    folder = RunFolder.open(Path(config.runs_dir), config.name + BASELINE_SUFFIX)
    with folder.lock():
        write_atomic(folder.config, config.yaml)
        with disk_errors(folder.events):
            folder.events.unlink(missing_ok=True)
        with open_ray(address):
            tracker = open_tracker(
                config.tracking,
                folder,
                run_id=secrets.token_hex(4),
                console=console,
                clock=time.time,
                group=config.name,
            )
            _Baseline(config, folder, tracker).run()
    return folder.path


def plan_baseline(cards: Sequence[NodeCard], config: RunConfig) -> Plan:
    """Return what the workers hold and are expected to do, as a plan with a stage for each; sums are not in its time.

    Raises PlanError where the whole model does not fit a worker.
    """
    batch = replace(config.batch, num_microbatches=config.batch.num_microbatches // len(cards))
    work = Workload(
        model=config.model,
        batch=batch,
        # Backward follows forward, microbatch by microbatch.
        schedule="1f1b",
        activation_checkpointing=config.train.activation_checkpointing,
        document_mask=config.data.document_mask,
    )
    plans = [make_plan(Fleet(nodes=(card,), links=()), work, config.wire, PlanConfig(stages=1)) for card in cards]
    slowest = max(plans, key=lambda plan: plan.step_s)
    worker = plans.index(slowest)
    tokens_per_s = config.batch.step_tokens / slowest.step_s
    dollars_per_hour = sum(plan.dollars_per_hour for plan in plans)
    return replace(
        slowest,
        stages=tuple(replace(plan.stages[0], stage=i) for i, plan in enumerate(plans)),
        tokens_per_s=tokens_per_s,
        dollars_per_hour=dollars_per_hour,
        dollars_per_mtoken=dollars_per_hour / 3600 / tokens_per_s * 1e6,
        binds=f"stage {worker} ({cards[worker].node})",
    )


class _Baseline:
    """One baseline from the driver's side: follows the program, act by act, and records it."""

    def __init__(self, config: RunConfig, folder: RunFolder, tracker: Tracker) -> None:
        self._config = config
        self._folder = folder
        self._tracker = tracker
        self._num_workers = config.fleet.baseline_workers
        self._state = RunState(step=0, generation=0)
        self._progress = Progress(num_steps=config.train.steps)
        self._dollars_per_hour = 0.0
        # Messages that came before their act's turn, with those of the act that is waited for.
        self._arrived: dict[tuple[Act, int], list[Message]] = defaultdict(list)

    def run(self) -> None:
        """Run the program to its end; whatever ends it before is recorded."""
        try:
            self._share = _share_of_cluster(self._config)
            self._start_job()
            self._gather(Act.PLACE, 0)
            self._plan(self._gather(Act.PROBE, 0))
            self._gather(Act.LOAD, 0)
            for act, step in program(self._config.train):
                messages = self._gather(act, step)
                if act is Act.EVALUATE:
                    self._evaluated(step, messages)
                else:
                    self._judge(messages)
            self._end_job()
        except IsthmusError as error:
            self._tell("failed", str(error))
            self._tracker.finish(error.exit_code)
            raise
        # Ctrl-C; SIGTERM, as Ray passes it on.
        except (KeyboardInterrupt, SystemExit):
            self._tell("stopped", "interrupted; a baseline keeps no checkpoints and starts afresh")
            self._tracker.finish(1)
            raise
        self._tell("finished", f"{self._state.step} of {self._config.train.steps} steps are committed")
        self._tracker.finish(0)

    def _start_job(self) -> None:
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._messages = Queue(actor_options={"num_cpus": 0, "label_selector": here})
        job = TrainJob(
            name=self._folder.name,
            config=self._config,
            share=self._share,
            storage=self._folder.path.resolve() / "ray-train",
        )
        task = ray.remote(num_cpus=0, max_retries=0)(fit).options(label_selector=here)
        self._job = task.remote(job, self._messages)

    def _plan(self, messages: Sequence[Message]) -> None:
        cards = tuple(message.body for message in messages if isinstance(message.body, NodeCard))
        plan = plan_baseline(cards, self._config)
        self._dollars_per_hour = plan.dollars_per_hour
        save_plan(self._folder, plan, Fleet(nodes=cards, links=()))
        self._tracker.start(encode(self._config), plan)
        who = ", ".join(f"{card.node} ({card.device})" for card in cards)
        self._tell("started", f"{self._config.model.num_params:,} parameters, whole on {who}, through Ray Train")

    def _judge(self, messages: Sequence[Message]) -> None:
        """Record a step with the decision that every worker has made of it, from the same sums."""
        reports = tuple(message.body for message in messages if isinstance(message.body, StepReport))
        # The sums in a report are of all workers: one is enough.
        outcome = summarise(reports[:1])
        config = self._config
        self._state, decision = on_step_done(self._state, outcome, config.guard, config.optim, config.train.steps)
        if isinstance(decision, Stop):
            raise NonFinite(
                decision.error.message, "lower optim.lr, raise optim.warmup_steps, or check the data near that step"
            )
        if decision.skip_reason:
            self._tell("skipped", decision.skip_reason)
        self._progress, record = self._progress.timed(max(report.step_s for report in reports)).after(
            reports,
            outcome,
            decision,
            num_skipped=self._state.history.num_skipped,
            dollars_per_hour=self._dollars_per_hour,
        )
        self._tracker.step(record)

    def _evaluated(self, step: int, messages: Sequence[Message]) -> None:
        reports = [message.body for message in messages if isinstance(message.body, EvalReport)]
        num_targets = sum(report.num_targets for report in reports)
        loss = sum(report.loss_sum for report in reports) / max(1, num_targets)
        seconds = max(message.seconds for message in messages)
        self._tracker.evaluation(EvalRecord(step=step, loss=loss, num_targets=num_targets, seconds=seconds))

    def _end_job(self) -> None:
        """Wait until Ray Train has ended by itself."""
        timeout_s = self._config.timeouts.place_s
        if not ray.wait([self._job], timeout=timeout_s)[0]:
            raise PeerTimeout(
                f"Ray Train did not end within {timeout_s:.0f} s of the last step",
                "the records are whole; raise timeouts.place_s where the cluster is slow",
            )
        answer_of(self._job, "Ray Train")

    def _gather(self, act: Act, step: int) -> list[Message]:
        """Return every worker's message about an act, in the workers' order, within the act's deadline."""
        timeout_s = self._timeout_s(act)
        deadline_s = time.monotonic() + timeout_s
        found = self._arrived[act, step]
        while len(found) < self._num_workers:
            message = self._next_message()
            if message is not None:
                self._arrived[message.act, message.step].append(message)
            elif time.monotonic() > deadline_s:
                raise self._too_late(act, step, timeout_s)
        return sorted(self._arrived.pop((act, step)), key=lambda message: message.worker)

    def _next_message(self) -> Message | None:
        """Return a message, or None where none came for a while; raise what the job failed with."""
        try:
            return self._messages.get(timeout=_POLL_S)
        except Empty:
            pass
        except ray.exceptions.RayActorError as error:
            raise PeerLost(f"the baseline's queue is gone: {first_line(error)}", "start the baseline again") from error
        # A job that has ended sent all its messages before.
        if ray.wait([self._job], timeout=0)[0] and self._messages.empty():
            answer_of(self._job, "Ray Train")
            raise StageError("the baseline's workers ended before their last step", "start the baseline again")
        return None

    def _timeout_s(self, act: Act) -> float:
        timeouts = self._config.timeouts
        return {Act.PLACE: timeouts.place_s, Act.LOAD: timeouts.transfer_s}.get(act, timeouts.step_s)

    def _too_late(self, act: Act, step: int, timeout_s: float) -> IsthmusError:
        arrived = {message.worker for message in self._arrived[act, step]}
        late = ", ".join(f"worker-{worker}" for worker in range(self._num_workers) if worker not in arrived)
        if act is Act.PLACE:
            share = self._share
            return FleetError(
                f"{late} did not start within {timeout_s:.0f} s; each asks for {share.num_cpus:g} CPUs and "
                f"{share.num_gpus} GPUs of a node",
                "free them (`ray status` shows who holds what), set fleet.baseline_workers lower, or raise "
                "timeouts.place_s where starting is slow",
            )
        return PeerTimeout(
            f"{late} did not {act.value} within {timeout_s:.0f} s, at step {step}",
            "raise that deadline under timeouts, or make the model or batch smaller",
        )

    def _tell(self, name: str, text: str) -> None:
        self._tracker.event(EventRecord(step=self._state.step, name=name, text=text))


def _share_of_cluster(config: RunConfig) -> CoreShare:
    nodes = [
        (node["Resources"].get("CPU", 0.0), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return share_cores(nodes, config.fleet.baseline_workers, config.fleet.threads)
