"""The optimizer's settings and the learning rate as a function of the step.

PURE but for `build_optimizer`, which makes torch's AdamW with weight-decay groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from actors.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3
    # The rate at the end of the run, as a share of `lr`.
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    schedule: Literal["cosine", "wsd"] = "cosine"
    # With `wsd`: the last share of the run over which the rate falls.
    decay_ratio: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    # Applied to matrices only; norms are not decayed.
    weight_decay: float = 0.1
    # Gradients are scaled down to this global norm; 0 turns clipping off.
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr is {self.lr}", "set optim.lr above 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"optim.min_lr_ratio is {self.min_lr_ratio}", "set it between 0 and 1")
        if not 0 < self.decay_ratio <= 1:
            raise ConfigError(f"optim.decay_ratio is {self.decay_ratio}", "set it above 0, up to 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1) or self.eps < 0:
            raise ConfigError(
                f"optim has beta1={self.beta1}, beta2={self.beta2}, eps={self.eps}",
                "set optim.beta1 and optim.beta2 to 0 or more and below 1, optim.eps to 0 or more",
            )
        if self.warmup_steps < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise ConfigError(
                "one of optim.warmup_steps, optim.clip_norm, optim.weight_decay is negative",
                "set it to 0 or more",
            )


def lr_at(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, in a run of `num_steps`.

    Cosine: Loshchilov and Hutter, arXiv 1608.03983. Warm-up, stable, decay: Hu et al., arXiv 2404.06395.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.lr * optim.min_lr_ratio
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = max(1, round(num_steps * optim.decay_ratio))
    done = (step - (num_steps - decay_steps)) / decay_steps
    return floor + (optim.lr - floor) * (1 - min(1.0, max(0.0, done)))


def build_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, arXiv 1711.05101), fused, with decay on matrices only."""
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
