"""One stage of a run on its node, from assignment to reports, in pieces that `actors.node_stages` puts together.

    load -> begin, act, act, ..., report -> begin ... (open_evaluation, evaluate between) -> flush

No Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from actors.codecs import Codec, codec_for
from actors.data import Microbatch, TokenSource
from actors.dispatch import Dispatch
from actors.engine import StageEngine
from actors.errors import DataError, GenerationStale, IsthmusError, StageError
from actors.frame_log import drain_times
from actors.kernels.dispatch import prepare_kernels
from actors.link import Carrier, Link, LinkSettings
from actors.mailbox import WIRE_DTYPES, Expectation, Mailbox, Receipt
from actors.model.decoder import DecoderStage
from actors.model.huggingface import load_weights
from actors.model.init import initialise
from actors.pipeline import (
    EVAL_WINDOW,
    Moment,
    Outlet,
    Ports,
    Timeline,
    arriving_actions,
    run_action,
    run_evaluation,
    total_s,
)
from actors.resident import ResidentMemory
from actors.schedule import FIXED, SPLIT, Action, num_in_flight, stage_actions
from actors.shards import AsyncSaver, read_units, restore, snapshot, unit_limits
from actors.spec import (
    COMPUTES,
    WAITS,
    Assignment,
    EvalOrder,
    Kind,
    LinkCodecs,
    LoadOrder,
    SaveReport,
    StepOrder,
    StepReport,
    TensorRole,
)
from actors.store import open_store
from actors.token_shards import Split


def pick_device() -> torch.device:
    """Return this process's training device: its first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Stage:
    """One stage of one run on this node."""

    def __init__(
        self,
        assignment: Assignment,
        carrier_to: Callable[[int], Carrier],
        resident: ResidentMemory,
        on_failure: Callable[[int, IsthmusError], None],
    ) -> None:
        """Build the stage's layers, mailbox and links; `carrier_to` gives the way to a neighbouring stage.

        What the process holds is counted by `resident`, whatever stage it is for; `on_failure` hears of the generation
        in which a link failed, from the link's thread.
        """
        self._assignment = assignment
        self._on_failure = on_failure
        own = assignment.own
        model = DecoderStage(
            assignment.model,
            own.layer_start,
            own.layer_stop,
            activation_checkpointing=assignment.activation_checkpointing,
            device=pick_device(),
        )
        self._engine = StageEngine(model, assignment.optim, resident)
        if assignment.plan.schedule in SPLIT:
            self._engine.split_backwards()
        # What each link carries now, in which pieces, and how much is in flight; a step's order may change them.
        self._codecs = assignment.plan.link_codecs
        self._sizes = assignment.plan.link_sizes
        self._depths = assignment.plan.in_flight
        self._train = self._source("train")
        self._held_out = self._source("val")
        self._mailbox = Mailbox(
            assignment.run,
            assignment.stage,
            assignment.batch.num_microbatches,
            self._expectations(),
            self._engine.device,
        )
        # Whoever still works for a placement before this one gets no hearing.
        self._mailbox.abort(assignment.generation - 1)
        self._ports = Ports(
            mailbox=self._mailbox,
            to_previous=None if assignment.is_first else self._outlet(assignment.stage - 1, carrier_to),
            to_next=None if assignment.is_last else self._outlet(assignment.stage + 1, carrier_to),
            frame_s=assignment.timeouts.frame_s,
        )
        # Compiled, where no run on this machine has done so, before the first frame waits for it.
        prepare_kernels(self._engine.device)
        self._saver = AsyncSaver()
        # Saves that ended, each with the step whose report told of it first.
        self._told_saves: list[tuple[int, SaveReport]] = []

    @property
    def assignment(self) -> Assignment:
        """What this stage was assigned."""
        return self._assignment

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This stage's parameters by their name in the whole model."""
        return self._engine.params

    def load(self, order: LoadOrder) -> None:
        """Take the weights that the order names, and frames of its step from now on."""
        self._mailbox.open(order.generation, order.step)
        model, assignment = self._engine.model, self._assignment
        if order.checkpoint is not None:
            files = {file.name: file for file in order.checkpoint.files}
            limits = unit_limits(self._engine.params)
            tensors = read_units(open_store(order.checkpoint.store_url), order.checkpoint.checkpoint, files, limits)
            restore(self._engine.params, self._engine.optimizer, tensors)
        elif assignment.model.init_from is not None:
            load_weights(model, Path(assignment.model.init_from))
        else:
            initialise(model, assignment.seed)
        self._engine.version = order.step

    def new_timeline(self) -> Timeline:
        """Start the clock of a step or an evaluation; the device must be idle."""
        return Timeline(time.monotonic, self._engine.device)

    def begin(self, order: StepOrder, timeline: Timeline) -> None:
        """Commit the step before, save if asked, and be ready for this step's frames and actions."""
        self._forget_heard_saves(order)
        self._tune(order)
        if order.commit is not None:
            with timeline.record("C"):
                self._engine.commit(order.commit)
        if order.save is not None:
            units = snapshot(self._engine.params, self._engine.optimizer)
            self._saver.start(order.save, units, self._assignment.stage)
        if order.run_step:
            self._mailbox.open(order.generation, order.step, self._incoming(), self._windows())
            targets = self._train.step_targets(order.step) if self._train and self._assignment.is_last else 1
            self._engine.begin(order.step, targets)

    def actions(self, timeline: Timeline) -> Iterable[Action]:
        """Return what this stage does in a step if it has its node for itself: in a fixed order, or as things arrive.

        What is next may be known only when it is asked for.
        """
        assignment = self._assignment
        schedule, num_microbatches = assignment.plan.schedule, assignment.batch.num_microbatches
        if schedule in FIXED:
            return stage_actions(schedule, assignment.stage, assignment.num_stages, num_microbatches)
        dispatch = Dispatch(schedule, num_microbatches, self._in_flight(assignment.stage))
        return arriving_actions(dispatch, self._ports, timeline)

    def act(self, action: Action, order: StepOrder, timeline: Timeline) -> None:
        """Run one action of the step that began."""
        moment = Moment(generation=order.generation, step=order.step)
        run_action(self._engine, self._ports, action, self._read_from(self._train), moment, timeline)

    def _tune(self, order: StepOrder) -> None:
        """Let links and depths be from now on as the order says; every stage does so at the same step."""
        self._codecs = order.codecs or self._codecs
        self._sizes = order.link_sizes or self._sizes
        self._depths = order.in_flight or self._depths
        self._ports = replace(
            self._ports,
            to_previous=self._tuned(self._ports.to_previous, self._assignment.stage - 1),
            to_next=self._tuned(self._ports.to_next, self._assignment.stage + 1),
        )

    def open_evaluation(self, order: EvalOrder) -> None:
        """Take the frames of an evaluation."""
        self._mailbox.open(order.generation, order.step, self._incoming())

    def evaluate(self, order: EvalOrder, microbatches: range, timeline: Timeline) -> tuple[float, int]:
        """Run some held-out microbatches forward; return the sum of losses and their number, 0 but on the last."""
        moment = Moment(generation=order.generation, step=order.step)
        read = self._read_from(self._held_out)
        return run_evaluation(self._engine, self._ports, microbatches, read, moment, timeline)

    def abort(self, generation: int) -> None:
        """End every generation up to this one; a step that waits for its frames fails at once."""
        self._mailbox.abort(generation)

    def fail(self, generation: int, error: IsthmusError) -> None:
        """Make the step fail that is open: a link of this node did."""
        self._mailbox.fail(generation, error)

    def receive(self, chunk: bytes) -> Receipt:
        """Take one chunk from a peer."""
        began_s = time.monotonic()
        receipt = self._mailbox.offer(chunk)
        return replace(receipt, held_s=time.monotonic() - began_s)

    def flush(self, timeout_s: float) -> tuple[SaveReport, ...]:
        """Wait for checkpoints that are being written, and report them."""
        self._saver.wait(timeout_s)
        return self._saves_to_tell(self._engine.version)

    def close(self) -> None:
        """Stop the threads of this stage; each has ack_s to end."""
        for outlet in (self._ports.to_previous, self._ports.to_next):
            if outlet is not None:
                outlet.link.close()
        self._saver.close(self._assignment.timeouts.ack_s)
        self._engine.close()

    def _in_flight(self, stage: int) -> int:
        """Return how many microbatches a stage keeps in flight at most."""
        assignment = self._assignment
        plan, num_microbatches = assignment.plan, assignment.batch.num_microbatches
        if plan.schedule in FIXED:
            return num_in_flight(plan.schedule, stage, assignment.num_stages, num_microbatches)
        return max(1, min(self._depths[stage], num_microbatches))

    def _windows(self) -> dict[Kind, int]:
        """Return how many frames of each kind may wait here: as many as whoever makes them keeps in flight."""
        stage = self._assignment.stage
        windows = {Kind.EVAL_ACTIVATION: EVAL_WINDOW, Kind.GRADIENT: self._in_flight(stage)}
        return windows if self._assignment.is_first else {**windows, Kind.ACTIVATION: self._in_flight(stage - 1)}

    def _saves_to_tell(self, step: int) -> tuple[SaveReport, ...]:
        self._told_saves += [(step, save) for save in self._saver.finished()]
        return tuple(save for _, save in self._told_saves)

    def _forget_heard_saves(self, order: StepOrder) -> None:
        """Drop reports of saves that the controller has: a step's commit says that it heard what the step reported.

        Until then they are told again, for a report is lost with its step where another stage fails.
        """
        heard = -1 if order.commit is None else order.commit.step
        again = None if order.save is None else order.save.checkpoint
        self._told_saves = [
            (step, save) for step, save in self._told_saves if step > heard and save.checkpoint != again
        ]

    def report(self, order: StepOrder, timeline: Timeline) -> StepReport:
        """Return what this stage did and saw since the report before."""
        engine = self._engine
        outlets = (self._ports.to_previous, self._ports.to_next)
        actions = timeline.actions()
        frame_s = self._ports.frame_s
        report = StepReport(
            run=order.run,
            generation=order.generation,
            step=order.step,
            stage=self._assignment.stage,
            ran_step=order.run_step,
            loss_sum=engine.loss_sum,
            num_targets=engine.num_targets,
            grad_sq=engine.grad_sq(),
            nonfinite_microbatch=engine.nonfinite_microbatch(),
            compute_s=total_s(actions, *COMPUTES),
            wait_s=total_s(actions, *WAITS),
            step_s=timeline.elapsed_s,
            actions=actions,
            links=tuple(count for outlet in outlets if outlet for count in outlet.link.drain_counts()),
            readings=tuple(reading for outlet in outlets if outlet for reading in outlet.link.drain_readings()),
            canaries=tuple(reading for outlet in outlets if outlet for reading in outlet.link.drain_canaries(frame_s)),
            saves=self._saves_to_tell(order.step),
            peak_memory_bytes=engine.peak_memory_bytes(),
            held_bytes=engine.held_bytes(),
        )
        logs = [outlet.link.log for outlet in outlets if outlet]
        frames, late = drain_times(self._mailbox.log, logs, (order.generation, order.step), timeline.start_s)
        return replace(report, frames=frames, late_frames=late)

    def require_current(self, run: str, generation: int) -> None:
        """Raise StageError or GenerationStale where an order is for another run, or for a placement that is over."""
        if run != self._assignment.run:
            raise StageError(f"an order of run {run} came to a node that works for run {self._assignment.run}")
        if generation < self._mailbox.generation:
            raise GenerationStale(f"an order of generation {generation} came after {self._mailbox.generation}")

    def _source(self, split: Split) -> TokenSource | None:
        """Return the token source of a split; None on a stage that reads no tokens, DataError where they are others."""
        assignment = self._assignment
        if not (assignment.is_first or assignment.is_last or assignment.data.document_mask):
            return None
        source = TokenSource(
            assignment.data,
            split,
            assignment.batch,
            seed=assignment.seed,
            vocab_size=assignment.model.vocab_size,
        )
        if source.manifest.sha256 != assignment.data_sha256:
            raise DataError(
                f"{assignment.data.path} on {assignment.own.node} holds other data than the driver's",
                "run isthmus data prepare once and copy its folder to every node, or set data.path=s3://bucket/prefix",
            )
        return source

    @staticmethod
    def _read_from(source: TokenSource | None) -> Callable[[int, int], Microbatch | None]:
        return source.microbatch if source is not None else lambda step, microbatch: None

    def _expectations(self) -> tuple[Expectation, ...]:
        """Return what may come: activations from the stage before, gradients from the stage after."""
        assignment = self._assignment
        batch = assignment.batch
        shape = (batch.microbatch_size, batch.seq_len, assignment.model.hidden_size)
        dtype = WIRE_DTYPES[self._engine.boundary_dtype]
        windows = self._windows()
        return tuple(
            Expectation(
                kind=kind,
                source=assignment.stage + (1 if kind is Kind.GRADIENT else -1),
                codec=codec,
                dtype=dtype,
                shape=shape,
                window=windows[kind],
            )
            for kind, codec in self._incoming().items()
        )

    def _outlet(self, neighbour: int, carrier_to: Callable[[int], Carrier]) -> Outlet:
        assignment = self._assignment
        settings = LinkSettings(
            run=assignment.run,
            source=assignment.stage,
            target=neighbour,
            sizes=self._sizes[min(neighbour, assignment.stage)],
            ack_s=assignment.timeouts.ack_s,
            give_up_s=assignment.timeouts.frame_s,
            canary_every=assignment.canary_every,
        )
        link = Link(settings, carrier_to(neighbour), self._on_failure)
        return Outlet(link=link, codec=self._outgoing(neighbour))

    def _tuned(self, outlet: Outlet | None, neighbour: int) -> Outlet | None:
        if outlet is None:
            return None
        outlet.link.resize(self._sizes[min(neighbour, self._assignment.stage)])
        return replace(outlet, codec=self._outgoing(neighbour))

    def _link_codecs(self, neighbour: int) -> LinkCodecs:
        return self._codecs[min(neighbour, self._assignment.stage)]

    def _outgoing(self, neighbour: int) -> Codec:
        """Return what frames to a neighbour are encoded with: activations go forward, gradients back."""
        codecs = self._link_codecs(neighbour)
        if neighbour > self._assignment.stage:
            return codec_for(codecs.forward, TensorRole.ACTIVATION, "wire.forward")
        return codec_for(codecs.backward, TensorRole.GRADIENT, "wire.backward")

    def _incoming(self) -> dict[Kind, str]:
        """Return what frames of each kind that comes here are encoded with."""
        stage = self._assignment.stage
        incoming: dict[Kind, str] = {}
        if not self._assignment.is_first:
            forward = self._link_codecs(stage - 1).forward
            incoming |= {Kind.ACTIVATION: forward, Kind.EVAL_ACTIVATION: forward}
        if not self._assignment.is_last:
            incoming[Kind.GRADIENT] = self._link_codecs(stage + 1).backward
        return incoming
