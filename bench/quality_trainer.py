"""A pipeline's stages in one process, one after another: the real layers, optimizer and codecs, without links.

What crosses a boundary is encoded to a frame's payload and decoded from it, with the seed that the link would use, so
that a step has the same bits as the pipeline's own (tests/unit/test_quality.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from actors.canary import compare
from actors.codecs import Codec
from actors.data import Microbatch
from actors.engine import StageEngine
from actors.frame import rounding_seed, run_id
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.spec import Kind
from orchestrator.lifecycle import GuardConfig, RunState, StepOutcome, Stop, on_step_done

# (step, microbatch) -> its tokens
ReadMicrobatch = Callable[[int, int], Microbatch]


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What boundary tensors are encoded with."""

    forward: Codec
    backward: Codec
    # The run's name, which the seeds of stochastic rounding depend on.
    run: str
    # Steps from one comparison of coded with raw tensors to the next.
    canary_every: int


@dataclass(frozen=True, kw_only=True)
class CodecError:
    """How far decoded tensors were from raw ones: means over the boundaries and steps that were compared."""

    relative_error: float
    cosine: float


class Trainer:
    """The stages of one model, trained on the microbatches that `read` gives."""

    def __init__(
        self,
        model: ModelSpec,
        split: Sequence[int],
        optim: OptimConfig,
        *,
        seed: int,
        num_steps: int,
        num_microbatches: int,
        read: ReadMicrobatch,
        wire: Wire,
    ) -> None:
        """Cut the model as `split` says, layers a stage; `seed` draws the weights."""
        self.engines: list[StageEngine] = []
        start = 0
        for num_layers in split:
            stage = DecoderStage(model, start, start + num_layers)
            initialise(stage, seed)
            self.engines.append(StageEngine(stage, optim))
            start += num_layers
        self._optim = optim
        self._num_steps = num_steps
        self._num_microbatches = num_microbatches
        self._read = read
        self._wire = wire
        self._guard = GuardConfig()
        self._state = RunState(step=0, generation=1)
        self._readings: dict[Kind, list[tuple[float, float]]] = {}

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All parameters by name, in the model's order."""
        return {name: param for engine in self.engines for name, param in engine.params.items()}

    @property
    def num_skipped(self) -> int:
        """How many steps' gradients were dropped, as a run drops them."""
        return self._state.history.num_skipped

    def step(self) -> StepOutcome:
        """Run and commit one step; raises NonFinite where too many in a row cannot be used."""
        step = self._state.step
        batches = [self._read(step, microbatch) for microbatch in range(self._num_microbatches)]
        for engine in self.engines:
            engine.begin(step, sum(batch.num_targets for batch in batches))
        for microbatch, batch in enumerate(batches):
            self._forward(microbatch, batch)
            self._backward(microbatch)
        outcome = self._outcome()
        self._state, decision = on_step_done(self._state, outcome, self._guard, self._optim, self._num_steps)
        if isinstance(decision, Stop):
            raise decision.error
        for engine in self.engines:
            engine.commit(decision.commit)
        return outcome

    def evaluate(self, batches: Sequence[Microbatch]) -> float:
        """Return the loss of held-out microbatches in nats a target, through the forward codec too."""
        loss_sum = sum(self._held_out_loss_sum(microbatch, batch) for microbatch, batch in enumerate(batches))
        return loss_sum / sum(batch.num_targets for batch in batches)

    def codec_error(self, kind: Kind) -> CodecError:
        """Return how far frames of this kind were from their tensors."""
        errors, cosines = zip(*self._readings[kind], strict=True)
        return CodecError(relative_error=fmean(errors), cosine=fmean(cosines))

    def _forward(self, microbatch: int, batch: Microbatch) -> None:
        hidden_BTD = None
        for stage, engine in enumerate(self.engines):
            hidden_BTD = engine.forward(microbatch, hidden_BTD, batch)
            if hidden_BTD is not None:
                hidden_BTD = self._cross(hidden_BTD, Kind.ACTIVATION, microbatch, stage)

    def _backward(self, microbatch: int) -> None:
        grad_BTD = None
        for stage, engine in reversed(list(enumerate(self.engines))):
            grad_BTD = engine.backward(microbatch, grad_BTD)
            if grad_BTD is not None:
                grad_BTD = self._cross(grad_BTD, Kind.GRADIENT, microbatch, stage)

    def _held_out_loss_sum(self, microbatch: int, batch: Microbatch) -> float:
        *inner, last = self.engines
        hidden_BTD = None
        for stage, engine in enumerate(inner):
            output_BTD = engine.evaluate(hidden_BTD, batch)
            hidden_BTD = self._cross(output_BTD, Kind.EVAL_ACTIVATION, microbatch, stage)
        return float(last.evaluate(hidden_BTD, batch))

    def _cross(self, tensor: torch.Tensor, kind: Kind, microbatch: int, source: int) -> torch.Tensor:
        """Return what the stage beyond the boundary makes of the payload that `source` sends."""
        codec = self._wire.backward if kind is Kind.GRADIENT else self._wire.forward
        step = self._state.step
        seed = rounding_seed(run_id(self._wire.run), step, microbatch, kind, source)
        payload = memoryview(bytearray(codec.encode(tensor, seed).numpy()))
        if microbatch == 0 and step % self._wire.canary_every == 0:
            self._readings.setdefault(kind, []).append(compare(codec, payload, tensor))
        return codec.decode(payload, tuple(tensor.shape), tensor.dtype, tensor.device)

    def _outcome(self) -> StepOutcome:
        last = self.engines[-1]
        total_sq = 0.0
        for engine in self.engines:
            for _, grad_sq in engine.grad_sq():
                # Not sum(), which from Python 3.12 on rounds otherwise.
                total_sq += grad_sq
        return StepOutcome(
            loss=last.loss_sum / last.num_targets,
            grad_norm=math.sqrt(total_sq),
            num_targets=last.num_targets,
            nonfinite=None,
        )
