"""One stage's arithmetic, in plain torch: forward, backward, commit, evaluate.

No Ray, no links, no threads: `actors.pipeline` feeds it boundary tensors in schedule order. Gradients are those of the
sum of token losses over the step's targets, so the number of microbatches does not change what a step means. Weights
change only in `commit`, which applied twice is applied once.
"""

from __future__ import annotations

import resource
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import _foreach_mul_, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

from actors.casts import keeping_casts
from actors.data import Microbatch
from actors.errors import StageError
from actors.model.decoder import DecoderStage, token_losses
from actors.model.put_off import Product, PutOff, add_gradients
from actors.optim import OptimConfig, build_optimizer
from actors.resident import ResidentMemory
from actors.spec import Commit


@dataclass
class _InFlight:
    """A microbatch between its forward and its backward."""

    input_BTD: torch.Tensor | None
    # hidden_BTD that goes on to the next stage; on the last stage the scaled loss.
    output: torch.Tensor


class StageEngine:
    """The layers of one stage with their optimizer, and the microbatches in flight."""

    def __init__(self, model: DecoderStage, optim: OptimConfig, resident: ResidentMemory | None = None) -> None:
        """`resident` began before the model was built; without it, on CPU, what is built counts as idle."""
        self.model = model
        self.device = next(model.parameters()).device
        self._is_mixed = self.device.type == "cuda"
        self._resident = None if self.device.type == "cuda" else resident or ResidentMemory()
        self.params = model.named_global_parameters()
        self.optimizer = build_optimizer(model, optim)
        # How many steps have been committed into the weights.
        self.version = 0
        self._in_flight: dict[int, _InFlight] = {}
        # Where backwards put weight gradients off, once a first half was asked for, and what they did.
        self._put_off: PutOff | None = None
        self._halved: dict[int, list[Product]] = {}
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._num_targets = 0
        self._step_targets = 1
        self._nonfinite: list[torch.Tensor] = []
        # What a step's first microbatch made of the weights in bfloat16, for the others.
        self._casts = ExitStack()

    @property
    def boundary_dtype(self) -> torch.dtype:
        """The element type of hidden_BTD between stages: float32 on CPU, bfloat16 on CUDA."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def begin(self, step: int, step_targets: int) -> None:
        """Start a step from the weights of that version; what an aborted one left is dropped."""
        if step != self.version:
            raise StageError(
                f"step {step} was ordered, but this stage's weights are at version {self.version}",
                "load every stage from one checkpoint",
            )
        self._forget_step()
        if self._is_mixed:
            # Else each microbatch would cast all weights anew, and hold its own copy until its backward.
            self._casts.enter_context(keeping_casts())
        self._step_targets = max(1, step_targets)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def forward(
        self, microbatch: int, hidden_BTD: torch.Tensor | None, batch: Microbatch | None
    ) -> torch.Tensor | None:
        """Run one microbatch forward; return hidden_BTD for the next stage, or None on the last.

        `hidden_BTD` comes from the stage before, None on the first; `batch` is needed on the first and the last
        stage, and on every stage where attention keeps to documents.
        """
        input_BTD = None if hidden_BTD is None else self._residual(hidden_BTD).requires_grad_()
        output = self._run_model(input_BTD, batch)
        if batch is not None and self.model.is_last:
            loss_sum = token_losses(output, self._to_device(batch.targets_BT))
            self._loss_sum += loss_sum.detach()
            self._num_targets += batch.num_targets
            output = loss_sum / self._step_targets
        self._nonfinite.append(~torch.isfinite(output.detach()).all())
        self._in_flight[microbatch] = _InFlight(input_BTD, output)
        return None if self.model.is_last else output.detach().to(self.boundary_dtype)

    def backward(self, microbatch: int, grad_BTD: torch.Tensor | None) -> torch.Tensor | None:
        """Run one microbatch backward; return the gradient for the stage before, or None on the first."""
        flight = self._in_flight.pop(microbatch)
        grad = None if grad_BTD is None else grad_BTD.to(self.device, flight.output.dtype)
        torch.autograd.backward(flight.output, grad)
        if flight.input_BTD is None:
            return None
        assert flight.input_BTD.grad is not None
        return flight.input_BTD.grad.to(self.boundary_dtype)

    def split_backwards(self) -> None:
        """From now on backwards come in halves."""
        self._put_off = self.model.put_off_weight_gradients()

    def input_backward(self, microbatch: int, grad_BTD: torch.Tensor | None) -> torch.Tensor | None:
        """Run the first half of one microbatch's backward: as `backward`, but for the blocks' weight gradients."""
        assert self._put_off is not None, "backwards come whole"
        self._put_off.open()
        try:
            return self.backward(microbatch, grad_BTD)
        finally:
            self._halved[microbatch] = self._put_off.close()

    def weight_backward(self, microbatch: int) -> None:
        """Run the second half of one microbatch's backward: the weight gradients that the first put off."""
        add_gradients(self._halved.pop(microbatch))

    def grad_sq(self) -> tuple[tuple[str, float], ...]:
        """Return the squared gradient norm of each parameter, in the model's own order."""
        named = [(name, param.grad) for name, param in self.params.items() if param.grad is not None]
        if not named:
            return ()
        # One launch for all parameters, and one transfer.
        norms = torch.stack(_foreach_norm([grad for _, grad in named])).tolist()
        return tuple((name, norm * norm) for (name, _), norm in zip(named, norms, strict=True))

    @property
    def loss_sum(self) -> float:
        return float(self._loss_sum)

    @property
    def num_targets(self) -> int:
        return self._num_targets

    def nonfinite_microbatch(self) -> int:
        """Return the first microbatch whose output held an infinity or NaN, or -1."""
        flags = torch.stack(self._nonfinite).tolist() if self._nonfinite else []
        return flags.index(True) if True in flags else -1

    def peak_memory_bytes(self) -> int:
        """Return the device's peak since the step began; on CPU the process's own peak."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def held_bytes(self) -> int:
        """Return the peak over the idle process: on CUDA as `peak_memory_bytes`, on CPU since this stage was built."""
        return self.peak_memory_bytes() if self._resident is None else self._resident.peak_bytes()

    def commit(self, commit: Commit) -> None:
        """Apply the step's gradients, scaled, or drop them; the weights are then version step + 1."""
        if commit.step == self.version - 1:
            return
        if commit.step != self.version:
            raise StageError(
                f"the commit of step {commit.step} came to weights of version {self.version}",
                "load every stage from one checkpoint",
            )
        if not commit.skip:
            grads = [param.grad for param in self.params.values() if param.grad is not None]
            if not grads or self._in_flight or self._halved:
                raise StageError(
                    f"the commit of step {commit.step} came to a stage that has not run it to its end",
                    "load every stage from one checkpoint",
                )
            if commit.clip_scale != 1.0:
                _foreach_mul_(grads, commit.clip_scale)
            for group in self.optimizer.param_groups:
                group["lr"] = commit.lr
            self.optimizer.step()
        self._forget_step()
        self.version = commit.step + 1

    def close(self) -> None:
        """Let go of the step, on the thread that began it."""
        self._forget_step()

    @torch.no_grad()
    def evaluate(self, hidden_BTD: torch.Tensor | None, batch: Microbatch | None) -> torch.Tensor:
        """Run one held-out microbatch forward; return hidden_BTD, or on the last stage the sum of its losses."""
        output = self._run_model(None if hidden_BTD is None else self._residual(hidden_BTD), batch)
        if batch is None or not self.model.is_last:
            return output.to(self.boundary_dtype)
        return token_losses(output, self._to_device(batch.targets_BT))

    def _run_model(self, input_BTD: torch.Tensor | None, batch: Microbatch | None) -> torch.Tensor:
        documents_BT = None if batch is None or batch.documents_BT is None else self._to_device(batch.documents_BT)
        if input_BTD is None:
            assert batch is not None
            input_BTD = self._to_device(batch.tokens_BT)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_mixed):
            return self.model(input_BTD, documents_BT)

    def _residual(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return a boundary's hidden_BTD as this stage goes on with it: in float32, wherever the model was cut."""
        return hidden_BTD.to(self.device, torch.float32)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _forget_step(self) -> None:
        self._casts.close()
        if self._put_off is not None:
            self._put_off.forget_casts()
        self.optimizer.zero_grad(set_to_none=True)
        self._in_flight.clear()
        self._halved.clear()
        self._loss_sum.zero_()
        self._num_targets = 0
        self._nonfinite.clear()
