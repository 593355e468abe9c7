"""Sampling: a function of the seed, and of the settings as named."""

from typing import Any

import pytest
import torch
from torch import Tensor

from actors.errors import ConfigError
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.sample import generate, next_token
from actors.model.spec import ModelSpec

PROMPT_T = torch.tensor([5, 3, 11])
LOGITS_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.fixture(scope="module")
def model() -> DecoderStage:
    spec = ModelSpec(
        vocab_size=31,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_size=24,
        max_positions=8,
        init_std=0.3,
    )
    stage = DecoderStage(spec, 0, 2)
    initialise(stage, seed=1)
    return stage


def sample(model: DecoderStage, *, seed: int = 0, temperature: float = 1.0, eos: int | None = None) -> Tensor:
    return generate(model, PROMPT_T, max_new_tokens=12, temperature=temperature, top_k=0, top_p=1.0, seed=seed, eos=eos)


def drawn(*, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {next_token(LOGITS_V, temperature, top_k, top_p, generator) for _ in range(200)}


def test_a_seed_decides_the_text(model: DecoderStage) -> None:
    first = sample(model, seed=4)
    torch.manual_seed(99)
    assert torch.equal(first, sample(model, seed=4))
    assert not torch.equal(first, sample(model, seed=5))
    assert torch.equal(first[:3], PROMPT_T)
    assert len(first) == 15


def test_greedy_takes_the_likeliest_token_of_the_last_window(model: DecoderStage) -> None:
    tokens_T = PROMPT_T
    with torch.no_grad():
        for _ in range(12):
            tokens_T = torch.cat((tokens_T, model(tokens_T[None, -8:])[0, -1].argmax()[None]))
    assert torch.equal(sample(model, temperature=0.0), tokens_T)


def test_text_ends_with_the_end_token(model: DecoderStage) -> None:
    unended = sample(model, temperature=0.0)
    eos = int(unended[4])
    ended = sample(model, temperature=0.0, eos=eos)
    end = 3 + unended[3:].tolist().index(eos)
    assert ended.tolist() == unended[: end + 1].tolist()


def test_top_k_and_top_p_leave_only_the_likeliest() -> None:
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=99) == {0, 1, 2, 3}
    assert drawn(top_p=0.3) == {1}
    assert drawn(top_p=0.65) == {1, 3}
    assert drawn(top_p=0.75) == {1, 2, 3}
    assert drawn(top_k=3, top_p=0.4) == {1}
    assert drawn(temperature=0.01) == {1}


def test_draws_follow_the_distribution() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.tensor([next_token(LOGITS_V, 1.0, 0, 1.0, generator) for _ in range(4000)])
    shares_V = tokens.bincount(minlength=4) / 4000
    # Four standard deviations of a share of 4000 draws are 0.031 at most.
    torch.testing.assert_close(shares_V, LOGITS_V.exp(), atol=0.031, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": -1}]
)
def test_a_wrong_setting_is_named(model: DecoderStage, wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 1,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "eos": None,
    } | wrong
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate(model, PROMPT_T, **settings)


def test_an_empty_prompt_is_refused(model: DecoderStage) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        generate(model, PROMPT_T[:0], max_new_tokens=1, temperature=1.0, top_k=0, top_p=1.0, seed=0, eos=None)
