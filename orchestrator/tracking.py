"""The one fan-out of a run's records: console, events.jsonl, status.json, W&B and Prometheus.

Every sink shows the same records (orchestrator.records); none of them decides anything. W&B may be slow or away, so it
lives in a thread of its own: training never waits for it, and where it fails the run says so once and goes on.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from rich.console import Console

from actors.errors import ConfigError
from actors.spec import Plan
from orchestrator.console import ConsoleSink
from orchestrator.events import EventsFile, is_due
from orchestrator.pictures import timeline_picture
from orchestrator.records import EvalRecord, EventRecord, StepRecord
from orchestrator.runfolder import RunFolder
from orchestrator.status import StatusFile

if TYPE_CHECKING:
    import wandb

WandbMode = Literal["offline", "online", "disabled"]

_WANDB_INIT_S = 60.0
_WANDB_FINISH_S = 60.0
# Some hours of records: what W&B may be behind before records are left out of it.
_WANDB_MAX_WAITING = 10_000


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is recorded where, and how often."""

    # None: online where WANDB_API_KEY is set, else offline; `wandb sync` uploads an offline run.
    wandb: WandbMode | None = None
    project: str = "isthmus"
    # Steps from one plain console line, and one point in W&B, to the next; events.jsonl has every step.
    log_every: int = 1
    # Steps from one timeline of all stages, as a picture in W&B and as times in events.jsonl, to the next.
    picture_every: int = 100

    def __post_init__(self) -> None:
        for key in ("log_every", "picture_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"tracking.{key} is {getattr(self, key)}", f"set tracking.{key} to 1 or more")

    def wandb_mode(self, environ: Mapping[str, str]) -> WandbMode:
        """Return the mode W&B runs in, given the environment."""
        return self.wandb or ("online" if environ.get("WANDB_API_KEY") else "offline")


class Sink(Protocol):
    """Where records go. `start` comes first; after `finish` only sinks that end later may cause an event."""

    def start(self, config: Mapping[str, object], plan: Plan) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: EvalRecord) -> None: ...
    def event(self, record: EventRecord) -> None: ...
    def finish(self, exit_code: int) -> None: ...


class Tracker:
    """Hands each record to each sink, in order, from the one thread that drives the run.

    Raises DiskFull where a file of the run folder cannot grow; `finish` ends every sink before it raises.
    """

    def __init__(self, sinks: Sequence[Sink], warnings: queue.SimpleQueue[EventRecord] | None = None) -> None:
        self._sinks = tuple(sinks)
        # What sinks with a thread of their own have to say; told here, so that no sink is called from two threads.
        self._warnings = warnings or queue.SimpleQueue()

    def start(self, config: Mapping[str, object], plan: Plan) -> None:
        """Open the run: `config` is the resolved configuration, as plain values."""
        for sink in self._sinks:
            sink.start(config, plan)

    def step(self, record: StepRecord) -> None:
        for sink in self._sinks:
            sink.step(record)
        self._pass_warnings_on()

    def evaluation(self, record: EvalRecord) -> None:
        for sink in self._sinks:
            sink.evaluation(record)

    def event(self, record: EventRecord) -> None:
        for sink in self._sinks:
            sink.event(record)

    def finish(self, exit_code: int) -> None:
        """Close the run; waits at most a minute, for W&B."""
        with ExitStack() as stack:
            # Last first, each whatever came of the others: what W&B has to say at its end, those before it still take.
            for sink in self._sinks:
                stack.callback(self._end, sink, exit_code)

    def _end(self, sink: Sink, exit_code: int) -> None:
        self._pass_warnings_on()
        sink.finish(exit_code)

    def _pass_warnings_on(self) -> None:
        while not self._warnings.empty():
            self.event(self._warnings.get())


def open_tracker(
    tracking: TrackingConfig,
    folder: RunFolder,
    *,
    run_id: str,
    console: Console,
    clock: Callable[[], float],
    group: str | None = None,
) -> Tracker:
    """Return the tracker of a run with every sink that its configuration asks for.

    `run_id` is the run's id in W&B, kept in the checkpoint's manifest; `group` the W&B group that it shares with its
    baseline, its own name where not given; `clock` returns Unix seconds.
    """
    warnings: queue.SimpleQueue[EventRecord] = queue.SimpleQueue()
    sinks: list[Sink] = [
        EventsFile(folder.events, timeline_every=tracking.picture_every),
        StatusFile(folder, clock),
        PrometheusSink(folder.name),
        ConsoleSink(console, tracking.log_every),
    ]
    mode = tracking.wandb_mode(os.environ)
    if mode != "disabled":
        sinks.append(WandbSink(tracking, mode, folder, run_id, warnings, group))
    return Tracker(sinks, warnings)


class PrometheusSink:
    """The sink that sets metrics `isthmus_*` on this node's Ray metrics port, each with the run's name as a tag."""

    def __init__(self, run: str) -> None:
        # Here, not above: every verb reads TrackingConfig, and few of them need Ray.
        from ray.util.metrics import Counter, Gauge

        def gauge(name: str, description: str, *tags: str) -> Gauge:
            metric = Gauge(f"isthmus_{name}", description=description, tag_keys=("run", *tags))
            return metric.set_default_tags({"run": run})

        def counter(name: str, description: str, *tags: str) -> Counter:
            metric = Counter(f"isthmus_{name}", description=description, tag_keys=("run", *tags))
            return metric.set_default_tags({"run": run})

        self._step = gauge("step", "Steps done")
        self._loss = gauge("loss", "Training loss of the last step, in nats a token")
        self._val_loss = gauge("val_loss", "Held-out loss, in nats a token")
        self._tokens_per_s = gauge("tokens_per_s", "Tokens trained on a second")
        self._dollars = gauge("dollars", "Money spent since the run's first step")
        self._compute = gauge("stage_compute_seconds", "Time a stage computed in the last step", "stage")
        self._wait = gauge("stage_wait_seconds", "Time a stage waited for frames in the last step", "stage")
        self._idle = gauge("stage_idle_share", "Share of the last step in which a stage did not compute", "stage")
        self._raw = counter("link_raw_bytes_total", "Bytes of tensors sent, before the codec", "link")
        self._wire = counter("link_wire_bytes_total", "Bytes of frames sent", "link")
        self._canary = gauge("link_canary_cosine", "Cosine of a link's last canary, decoded against raw", "link")
        self._events = counter("events_total", "Events of a run", "event")

    def start(self, config: Mapping[str, object], plan: Plan) -> None:
        """Nothing: a metric has no beginning."""

    def step(self, record: StepRecord) -> None:
        self._step.set(record.step + 1)
        self._loss.set(record.loss)
        self._tokens_per_s.set(record.tokens_per_s)
        self._dollars.set(record.dollars)
        for stage in record.stages:
            tags = {"stage": str(stage.stage)}
            self._compute.set(stage.compute_s, tags)
            self._wait.set(stage.wait_s, tags)
            self._idle.set(stage.idle_share, tags)
        for link in record.links:
            tags = {"link": f"{link.source_stage}-{link.target_stage}"}
            # A counter takes nothing but a rise.
            if link.raw_bytes > 0 and link.wire_bytes > 0:
                self._raw.inc(link.raw_bytes, tags)
                self._wire.inc(link.wire_bytes, tags)
            if link.cosine is not None:
                self._canary.set(link.cosine, tags)

    def evaluation(self, record: EvalRecord) -> None:
        self._val_loss.set(record.loss)

    def event(self, record: EventRecord) -> None:
        self._events.inc(1, {"event": record.name})

    def finish(self, exit_code: int) -> None:
        """Nothing: the metrics go with this process."""


def step_scalars(record: StepRecord) -> dict[str, float]:
    """Return what W&B plots of a step, by name; `train/step` is the axis of all of them."""
    scalars: dict[str, float] = {
        "train/step": record.step,
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/clip_scale": record.clip_scale,
        "train/skipped": record.num_skipped,
        "train/tokens": record.total_tokens,
        "train/tokens_per_s": record.tokens_per_s,
        "train/step_s": record.step_s,
        "train/dollars": record.dollars,
    }
    for stage in record.stages:
        prefix = f"stage/{stage.stage}"
        scalars[f"{prefix}/compute_s"] = stage.compute_s
        scalars[f"{prefix}/wait_s"] = stage.wait_s
        scalars[f"{prefix}/idle_share"] = stage.idle_share
        scalars[f"{prefix}/peak_memory_bytes"] = stage.peak_memory_bytes
    for link in record.links:
        prefix = f"link/{link.source_stage}-{link.target_stage}"
        scalars[f"{prefix}/frames"] = link.num_frames
        scalars[f"{prefix}/raw_bytes"] = link.raw_bytes
        scalars[f"{prefix}/wire_bytes"] = link.wire_bytes
        if link.relative_error is not None and link.cosine is not None:
            scalars[f"{prefix}/canary_relative_error"] = link.relative_error
            scalars[f"{prefix}/canary_cosine"] = link.cosine
    return scalars


class WandbSink:
    """The sink that keeps one W&B run, in a thread: starting takes a second offline, and may hang online.

    A run that is resumed under the same `run_id` goes on in W&B where it was. What W&B raises ends the thread with one
    warning; records it has not taken by then are in events.jsonl only.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        mode: WandbMode,
        folder: RunFolder,
        run_id: str,
        warnings: queue.SimpleQueue[EventRecord],
        group: str | None = None,
    ) -> None:
        self._tracking = tracking
        self._mode: WandbMode = mode
        self._folder = folder
        self._run_id = run_id
        self._group = group or folder.name
        self._warnings = warnings
        # Each entry is one thing to do with the run; None ends it.
        self._waiting: queue.SimpleQueue[Callable[[wandb.Run], None] | None] = queue.SimpleQueue()
        self._num_left_out = 0
        self._last_step: StepRecord | None = None
        self._exit_code = 0
        self._thread: threading.Thread | None = None

    def start(self, config: Mapping[str, object], plan: Plan) -> None:
        # A daemon: a W&B that hangs does not keep the process from its end.
        self._thread = threading.Thread(target=self._drive, args=(dict(config), plan), name="wandb", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        self._last_step = record
        if is_due(record, self._tracking.log_every):
            self._put(lambda run: run.log(step_scalars(record)))
        if is_due(record, self._tracking.picture_every):
            self._put(lambda run: self._log_timeline(run, record))

    def evaluation(self, record: EvalRecord) -> None:
        self._put(lambda run: run.log({"train/step": record.step, "val/loss": record.loss}))

    def event(self, record: EventRecord) -> None:
        """Nothing: W&B plots numbers; events are in events.jsonl and in the report."""

    def finish(self, exit_code: int) -> None:
        if self._thread is None:
            return
        last_step = self._last_step
        if last_step is not None and not is_due(last_step, self._tracking.picture_every):
            self._put(lambda run: self._log_timeline(run, last_step))
        self._exit_code = exit_code
        self._waiting.put(None)
        self._thread.join(_WANDB_FINISH_S)
        if self._thread.is_alive():
            self._warn(f"W&B did not end within {_WANDB_FINISH_S:.0f} s")
        if self._num_left_out:
            self._warn(f"W&B was too slow to take {self._num_left_out} records")

    def _put(self, act: Callable[[wandb.Run], None]) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        if self._waiting.qsize() < _WANDB_MAX_WAITING:
            self._waiting.put(act)
        else:
            self._num_left_out += 1

    def _drive(self, config: dict[str, object], plan: Plan) -> None:
        # Here, not above: the import alone takes most of a second.
        import wandb

        try:
            run = self._open(config, plan)
            while act := self._waiting.get():
                act(run)
            run.finish(exit_code=self._exit_code)
        # OSError: its service died. ValueError: a setting in the environment that it does not take.
        except (wandb.Error, OSError, ValueError) as error:
            self._warn(f"W&B stopped: {error}")

    def _open(self, config: dict[str, object], plan: Plan) -> wandb.Run:
        import wandb

        run = wandb.init(
            project=self._tracking.project,
            name=self._folder.name,
            group=self._group,
            id=self._run_id,
            resume="allow",
            dir=self._folder.path,
            config=config,
            settings=wandb.Settings(
                mode=self._mode,
                init_timeout=_WANDB_INIT_S,
                finish_timeout=_WANDB_FINISH_S,
                console="off",
                silent=True,
                # Nothing of this machine but what Isthmus records: quicker, and no one's code or files leave it.
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        run.log({"plan": _plan_table(plan)})
        return run

    def _log_timeline(self, run: wandb.Run, record: StepRecord) -> None:
        import wandb

        timeline_picture(record, self._folder.timeline)
        run.log({"train/step": record.step, "timeline": wandb.Image(str(self._folder.timeline))})

    def _warn(self, text: str) -> None:
        remedy = f"training goes on and {self._folder.events} has it all; or set tracking.wandb to offline or disabled"
        step = self._last_step.step if self._last_step else 0
        self._warnings.put(EventRecord(step=step, name="warned", text=f"{text}; {remedy}"))


def _plan_table(plan: Plan) -> wandb.Table:
    import wandb

    rows = [asdict(stage) for stage in plan.stages]
    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
