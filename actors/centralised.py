"""The same training without a pipeline: a whole model on each of some equal workers, which share out the microbatches.

What the pipeline is compared with, so the arithmetic is the pipeline's own (`actors.engine`), and so is the order: with
one worker and lossless codecs both give the same bits. No Ray, no process group: the sum over workers comes in as a
function.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.data import TokenSource
from actors.engine import StageEngine
from actors.errors import OutOfDeviceMemory
from actors.model.decoder import DecoderStage
from actors.model.huggingface import load_weights
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.pipeline import Timeline, total_s
from actors.settings import BatchSpec, DataConfig
from actors.spec import COMPUTES, WAITS, Commit, EvalReport, Kind, LinkCount, StepReport

# Sums a tensor over all workers, in place; every worker then holds the same bits.
AllReduce = Callable[[torch.Tensor], object]


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything that one of `num_workers` equal workers is made from."""

    run: str
    worker: int
    num_workers: int
    model: ModelSpec
    batch: BatchSpec
    optim: OptimConfig
    data: DataConfig
    seed: int
    activation_checkpointing: bool

    def share(self, num_microbatches: int) -> range:
        """Return which of so many microbatches this worker runs."""
        return range(self.worker, num_microbatches, self.num_workers)


class CentralisedWorker:
    """One worker's copy of the model, and its share of every step and evaluation."""

    def __init__(self, spec: WorkerSpec, device: torch.device, all_reduce: AllReduce) -> None:
        """Build the model on `device`; `load` gives it weights."""
        self._spec = spec
        self._all_reduce = all_reduce
        model = DecoderStage(
            spec.model,
            0,
            spec.model.num_layers,
            activation_checkpointing=spec.activation_checkpointing,
            device=device,
        )
        self.engine = StageEngine(model, spec.optim)
        vocab_size = spec.model.vocab_size
        self._train = TokenSource(spec.data, "train", spec.batch, seed=spec.seed, vocab_size=vocab_size)
        self._held_out = TokenSource(spec.data, "val", spec.batch, seed=spec.seed, vocab_size=vocab_size)

    def load(self) -> None:
        """Take the weights that training starts from: of model.init_from, else drawn from the seed."""
        if self._spec.model.init_from is not None:
            load_weights(self.engine.model, Path(self._spec.model.init_from))
        else:
            initialise(self.engine.model, self._spec.seed)

    def step(self, step: int, commit: Commit | None) -> StepReport:
        """Commit the step before, run this worker's share of this one, sum over all workers, report.

        Loss, targets, gradient norms and the first bad microbatch in the report are of the whole step, the same on
        every worker; times and bytes are this worker's own. Raises OutOfDeviceMemory.
        """
        timeline = Timeline(time.monotonic, self.engine.device)
        if commit is not None:
            with timeline.record("C"):
                self.engine.commit(commit)
        self.engine.begin(step, self._train.step_targets(step))
        try:
            self._run_share(step, timeline)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"worker {self._spec.worker} of the baseline ran out of device memory in step {step}",
                "set a smaller batch.microbatch_size, or train.activation_checkpointing=true",
            ) from error
        totals = self._own_totals()
        links: tuple[LinkCount, ...] = ()
        if self._spec.num_workers > 1:
            with timeline.record("wB"):
                links = (self._sum_gradients(),)
                self._all_reduce(totals)
        return self._report(step, totals.tolist(), links, timeline)

    def evaluate(self, step: int, commit: Commit | None, num_microbatches: int) -> EvalReport:
        """Commit the step before, and return the held-out loss of this worker's share of the microbatches."""
        if commit is not None:
            self.engine.commit(commit)
        loss_sum, num_targets = 0.0, 0
        for microbatch in self._spec.share(num_microbatches):
            batch = self._held_out.microbatch(0, microbatch)
            loss_sum += float(self.engine.evaluate(None, batch))
            num_targets += batch.num_targets
        return EvalReport(
            run=self._spec.run,
            generation=0,
            step=step,
            stage=self._spec.worker,
            loss_sum=loss_sum,
            num_targets=num_targets,
        )

    def _run_share(self, step: int, timeline: Timeline) -> None:
        for microbatch in self._spec.share(self._spec.batch.num_microbatches):
            with timeline.record("F", microbatch):
                self.engine.forward(microbatch, None, self._train.microbatch(step, microbatch))
            with timeline.record("B", microbatch):
                self.engine.backward(microbatch, None)

    def _own_totals(self) -> torch.Tensor:
        """Return this worker's loss sum, number of targets, and a flag for each microbatch of the step, float64.

        A flag is 1 where the microbatch is this worker's first one that was not finite.
        """
        engine, num_microbatches = self.engine, self._spec.batch.num_microbatches
        flags = [0.0] * num_microbatches
        bad = engine.nonfinite_microbatch()
        if bad >= 0:
            flags[self._spec.share(num_microbatches)[bad]] = 1.0
        return torch.tensor([engine.loss_sum, engine.num_targets, *flags], dtype=torch.float64, device=engine.device)

    def _sum_gradients(self) -> LinkCount:
        """Sum all gradients over the workers, as one flat float32 buffer; return what that sends."""
        grads = [param.grad for param in self.engine.params.values() if param.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        self._all_reduce(flat)
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
        num_workers = self._spec.num_workers
        size_bytes = ring_bytes(flat.numel() * flat.element_size(), num_workers)
        return LinkCount(
            source_stage=self._spec.worker,
            target_stage=(self._spec.worker + 1) % num_workers,
            kind=Kind.GRADIENT,
            num_frames=1,
            raw_bytes=size_bytes,
            wire_bytes=size_bytes,
        )

    def _report(self, step: int, totals: list[float], links: tuple[LinkCount, ...], timeline: Timeline) -> StepReport:
        loss_sum, num_targets, *flags = totals
        actions = timeline.actions()
        return StepReport(
            run=self._spec.run,
            generation=0,
            step=step,
            stage=self._spec.worker,
            ran_step=True,
            loss_sum=loss_sum,
            num_targets=int(num_targets),
            grad_sq=self.engine.grad_sq(),
            nonfinite_microbatch=next((i for i, flag in enumerate(flags) if flag), -1),
            compute_s=total_s(actions, *COMPUTES),
            wait_s=total_s(actions, *WAITS),
            step_s=timeline.elapsed_s,
            actions=actions,
            links=links,
            canaries=(),
            saves=(),
            peak_memory_bytes=self.engine.peak_memory_bytes(),
        )


def ring_bytes(size_bytes: int, num_workers: int) -> int:
    """Return what each worker sends to the next when `size_bytes` are summed over all of them in a ring.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms": 2 (W - 1) / W of the buffer.
    """
    return 2 * (num_workers - 1) * size_bytes // num_workers
