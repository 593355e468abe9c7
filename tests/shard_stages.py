"""Stages of a small model for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from actors.optim import OptimConfig, build_optimizer
from actors.shards import (
    Units,
    read_units,
    restore,
    snapshot,
    unit_limits,
    unit_names,
    unit_of,
    write_units,
)
from actors.spec import CheckpointCodec, SavedFile
from actors.store import LocalStore

NUM_LAYERS = 5
WIDTH = 4
VOCAB = 7


class Stage(nn.Module):
    """Layers [start, stop) with parameters named as Hugging Face does; the ends add embedding and head."""

    def __init__(self, start: int, stop: int, seed: int = 0, width: int = WIDTH) -> None:
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, width)} if start == 0 else {}
        for layer in range(start, stop):
            shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (width, width)
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
        if stop == NUM_LAYERS:
            shapes |= {"model.norm.weight": (width,), "lm_head.weight": (VOCAB, width)}
        self.names = list(shapes)
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes.values())
        self.optimizer = build_optimizer(self, OptimConfig())
        self.units = [unit for unit in unit_names(NUM_LAYERS) if unit in {unit_of(name) for name in shapes}]

    @property
    def named(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.names, self.weights, strict=True))

    def train_step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in self.weights:
            param.grad = torch.randn(param.shape, generator=generator)
        self.optimizer.step()


def trained(*bounds: tuple[int, int]) -> list[Stage]:
    """Stages of one model, two steps in, each seeded differently."""
    stages = [Stage(*bound, seed=bound[0] + 1) for bound in bounds]
    for stage in stages:
        stage.train_step(10)
        stage.train_step(11)
    return stages


def tensors_of(stage: Stage) -> Units:
    return snapshot(stage.named, stage.optimizer)


def saved(store: LocalStore, stages: Iterable[Stage], codec: CheckpointCodec = "none") -> dict[str, SavedFile]:
    written = [write_units(store, "step-00000002", tensors_of(s), codec) for s in stages]
    return {file.name: file for files in written for file in files}


def load(store: LocalStore, files: dict[str, SavedFile], stage: Stage) -> None:
    restore(stage.named, stage.optimizer, read_units(store, "step-00000002", files, unit_limits(stage.named)))


def state(stages: Iterable[Stage]) -> dict[str, Tensor]:
    """Every tensor of the weights and the optimizer, by global name."""
    units = [tensors_of(stage) for stage in stages]
    return {name: tensor for of_stage in units for tensors in of_stage.values() for name, tensor in tensors.items()}


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
