"""The learning rate of every step, and which parameters decay."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from actors.errors import ConfigError
from actors.optim import OptimConfig, build_optimizer, lr_at

NUM_STEPS = 200
COSINE = OptimConfig(lr=0.4, warmup_steps=20, min_lr_ratio=0.25)
WSD = OptimConfig(lr=0.4, warmup_steps=20, min_lr_ratio=0.25, schedule="wsd", decay_ratio=0.3)
both = pytest.mark.parametrize("optim", [COSINE, WSD], ids=["cosine", "wsd"])


def rates(optim: OptimConfig, first: int = 0, last: int = NUM_STEPS) -> list[float]:
    return [lr_at(optim, step, NUM_STEPS) for step in range(first, last + 1)]


@both
def test_the_rate_warms_up_in_equal_parts_and_never_starts_at_zero(optim: OptimConfig) -> None:
    assert rates(optim, 0, 19) == pytest.approx([0.02 * (step + 1) for step in range(20)])
    assert lr_at(optim, 20, NUM_STEPS) == pytest.approx(0.4)


@both
def test_the_rate_falls_without_a_jump_to_its_floor_and_stays_there(optim: OptimConfig) -> None:
    after = rates(optim, 20)
    assert all(0 <= a - b < 0.01 for a, b in pairwise(after))
    assert after[-1] == pytest.approx(0.1)
    assert lr_at(optim, NUM_STEPS - 1, NUM_STEPS) == pytest.approx(0.1, abs=0.01)
    assert lr_at(optim, 3 * NUM_STEPS, NUM_STEPS) == pytest.approx(0.1)


def test_cosine_is_half_way_down_at_half_the_time() -> None:
    assert lr_at(COSINE, 110, NUM_STEPS) == pytest.approx((0.4 + 0.1) / 2)
    assert lr_at(COSINE, 65, NUM_STEPS) == pytest.approx(0.1 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)


def test_wsd_is_stable_then_falls_in_a_line() -> None:
    assert set(rates(WSD, 20, 140)) == {0.4}
    assert rates(WSD, 140) == pytest.approx([0.4 - 0.3 * step / 60 for step in range(61)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_short_runs_and_no_warm_up_have_a_rate_too(schedule) -> None:
    for warmup_steps, num_steps in ((0, 1), (0, 2), (5, 3), (5, 5), (1, 1)):
        optim = OptimConfig(lr=0.4, warmup_steps=warmup_steps, schedule=schedule)
        assert all(0.04 - 1e-12 <= lr_at(optim, step, num_steps) <= 0.4 for step in range(num_steps))
    assert lr_at(OptimConfig(lr=0.4, warmup_steps=0, schedule=schedule), 0, 100) == 0.4


def test_matrices_decay_and_norms_do_not() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5, bias=False), nn.RMSNorm(5))
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6, lr=0.5))
    decayed, kept = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4), (5, 4)]
    assert [tuple(p.shape) for p in kept["params"]] == [(5,)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert all((g["betas"], g["eps"], g["lr"]) == ((0.8, 0.9), 1e-6, 0.5) for g in optimizer.param_groups)


def test_a_module_without_norms_and_frozen_parameters_are_taken() -> None:
    module = nn.Linear(4, 4, bias=True)
    module.bias.requires_grad_(False)
    (group,) = build_optimizer(module, OptimConfig()).param_groups
    assert isinstance(group["params"][0], torch.Tensor)
    assert len(group["params"]) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0.0},
        {"min_lr_ratio": 1.1},
        {"decay_ratio": 0.0},
        {"warmup_steps": -1},
        {"clip_norm": -1.0},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": -1e-8},
    ],
)
def test_settings_that_make_no_sense_name_their_key(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        OptimConfig(**fields)  # pyright: ignore[reportArgumentType]
