"""Training as one would write it on one machine, with nothing of the pipeline: what every exact comparison is against.

A whole model, a loop over microbatches, AdamW, clipping by the global norm. The norm is the root of the sum of squares
of each parameter's norm, in the model's order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from actors.data import TokenSource
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.optim import lr_at
from orchestrator.config import RunConfig


@dataclass
class Trained:
    """What the loop saw and made."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train_plainly(config: RunConfig) -> Trained:
    """Train `config`'s model for its steps in this process, on the calling thread's number of threads."""
    optim, batch = config.optim, config.batch
    model = DecoderStage(config.model, 0, config.model.num_layers)
    initialise(model, config.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    source = TokenSource(config.data, "train", batch, seed=config.seed, vocab_size=config.model.vocab_size)
    result = Trained()
    for step in range(config.train.steps):
        microbatches = [source.microbatch(step, m) for m in range(batch.num_microbatches)]
        num_targets = sum(int((m.targets_BT != -100).sum()) for m in microbatches)
        step_loss = 0.0
        for microbatch in microbatches:
            logits = model(microbatch.tokens_BT, microbatch.documents_BT)
            loss_sum = functional.cross_entropy(
                logits.flatten(0, 1), microbatch.targets_BT.flatten(), ignore_index=-100, reduction="sum"
            )
            (loss_sum / num_targets).backward()
            step_loss += loss_sum.item()
        norm = math.sqrt(sum(p.grad.norm().item() ** 2 for p in model.named_global_parameters().values()))
        if 0 < optim.clip_norm < norm:
            for parameter in model.parameters():
                parameter.grad *= optim.clip_norm / norm
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, step, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        result.losses.append(step_loss / num_targets)
        result.grad_norms.append(norm)
    result.weights = {name: p.detach().clone() for name, p in model.named_global_parameters().items()}
    return result
