"""Starting weights, which depend on the seed and the parameter's name: not on split, order or device."""

from __future__ import annotations

import hashlib
import math

import torch

from actors.model.decoder import DecoderStage

# The matrices that write to the residual stream.
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialise(stage: DecoderStage, seed: int) -> None:
    """Fill a stage's parameters: norms with 1, matrices with normal(0, init_std).

    Matrices that write to the residual stream, two a layer, are scaled by 1 / sqrt(2 * num_layers), as in
    GPT-2 (Radford et al., 2019). Each parameter is drawn from its own generator, on the CPU in float32.
    """
    spec = stage.spec
    residual_std = spec.init_std / math.sqrt(2 * spec.num_layers)
    for name, parameter in stage.named_global_parameters().items():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(parameter_seed(seed, name))
        std = residual_std if name.endswith(RESIDUAL_OUTPUTS) else spec.init_std
        drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        parameter.copy_(drawn)


def parameter_seed(seed: int, name: str) -> int:
    """Return a 64-bit seed that is the same on every machine for the same run seed and parameter name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
