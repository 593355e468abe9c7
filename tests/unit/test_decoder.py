"""The decoder: the same function however it is split, masked, checkpointed or initialised."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from actors.errors import ConfigError
from actors.model.decoder import IGNORED_TARGET, DecoderStage, document_mask, token_losses
from actors.model.init import initialise, parameter_seed
from actors.model.spec import ModelSpec, RopeScaling

SPEC = ModelSpec(
    vocab_size=61,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=48,
    max_positions=64,
    # Large enough that logits and gradients are far from rounding.
    init_std=0.2,
)
SPLITS = [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4)]


def stages_of(borders: tuple[int, ...], *, checkpointing: bool = False) -> list[DecoderStage]:
    stages = []
    for start, stop in pairwise(borders):
        stage = DecoderStage(SPEC, start, stop, activation_checkpointing=checkpointing)
        initialise(stage, seed=7)
        stages.append(stage)
    return stages


def some_tokens(num_sequences: int, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(SPEC.vocab_size, (num_sequences, seq_len), generator=generator)


def loss_and_gradients(
    stages: list[DecoderStage], tokens_BT: Tensor, documents_BT: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run stages as a pipeline does: each boundary is cut, and its gradient handed back."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    received = tokens_BT
    for stage in stages:
        inputs.append(received)
        outputs.append(stage(received, documents_BT))
        received = outputs[-1].detach().requires_grad_()
    loss_sum = token_losses(outputs[-1], tokens_BT.roll(-1, dims=1))
    loss_sum.backward()
    for k in reversed(range(len(stages) - 1)):
        outputs[k].backward(inputs[k + 1].grad)
    gradients = {}
    for stage in stages:
        for name, parameter in stage.named_global_parameters().items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad
    return loss_sum.detach(), gradients


@pytest.mark.parametrize("borders", SPLITS)
def test_initial_weights_do_not_depend_on_the_split(borders: tuple[int, ...]) -> None:
    (whole,) = stages_of((0, 4))
    parts = {name: value for stage in stages_of(borders) for name, value in stage.named_global_parameters().items()}
    expected = whole.named_global_parameters()
    assert list(parts) == list(expected)
    assert all(torch.equal(parts[name], expected[name]) for name in expected)


def test_initial_weights_follow_the_seed_and_the_scheme() -> None:
    (stage,) = stages_of((0, 4))
    weights = stage.named_global_parameters()
    other = DecoderStage(SPEC, 0, 4)
    initialise(other, seed=8)
    assert not torch.equal(weights["lm_head.weight"], other.named_global_parameters()["lm_head.weight"])
    assert torch.equal(weights["model.norm.weight"], torch.ones(32))
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.2, rel=0.1)
    residual = weights["model.layers.1.self_attn.o_proj.weight"]
    assert residual.std().item() == pytest.approx(0.2 / 8**0.5, rel=0.1)


def test_parameter_seed_is_stable_across_versions() -> None:
    # A checkpoint's run must start from the same weights on every machine, now and later.
    assert parameter_seed(0, "lm_head.weight") == 7056594518676094917


def test_building_and_initialising_leave_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    stages_of((0, 2, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("borders", SPLITS)
@pytest.mark.parametrize("masked", [False, True])
def test_stages_compose_to_the_whole_bit_for_bit(borders: tuple[int, ...], masked: bool) -> None:
    tokens_BT = some_tokens(2, 12)
    documents_BT = (torch.arange(12) // 5).expand(2, 12) if masked else None
    loss, gradients = loss_and_gradients(stages_of(borders), tokens_BT, documents_BT)
    expected_loss, expected_gradients = loss_and_gradients(stages_of((0, 4)), tokens_BT, documents_BT)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in expected_gradients)


def test_activation_checkpointing_changes_no_bit() -> None:
    tokens_BT = some_tokens(2, 12)
    documents_BT = (torch.arange(12) // 7).expand(2, 12)
    loss, gradients = loss_and_gradients(stages_of((0, 2, 4), checkpointing=True), tokens_BT, documents_BT)
    expected_loss, expected_gradients = loss_and_gradients(stages_of((0, 2, 4)), tokens_BT, documents_BT)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in expected_gradients)


def test_masked_documents_equal_documents_alone() -> None:
    (model,) = stages_of((0, 4))
    tokens_BT = some_tokens(1, 17)
    documents_BT = torch.tensor([[0] * 5 + [1] * 9 + [2] * 3], dtype=torch.int32)
    with torch.no_grad():
        packed_BTV = model(tokens_BT, documents_BT)
        alone = [model(part_BT) for part_BT in tokens_BT.split((5, 9, 3), dim=1)]
        unmasked_BTV = model(tokens_BT)
    torch.testing.assert_close(packed_BTV, torch.cat(alone, dim=1), atol=1e-5, rtol=0)
    assert (packed_BTV - unmasked_BTV)[:, 5:].abs().max() > 1e-2


def test_a_later_token_changes_no_earlier_logit() -> None:
    (model,) = stages_of((0, 4))
    tokens_BT = some_tokens(1, 10)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 6] = (changed_BT[0, 6] + 1) % SPEC.vocab_size
    with torch.no_grad():
        difference_BTV = model(tokens_BT) - model(changed_BT)
    assert difference_BTV[:, :6].abs().max() < 1e-6
    assert difference_BTV[:, 6:].abs().amax(dim=-1).min() > 1e-4


def test_document_mask_sees_earlier_tokens_of_the_same_document() -> None:
    mask_B1TT = document_mask(torch.tensor([[4, 4, 9]]), torch.float32)
    far = -math.inf
    assert mask_B1TT.tolist() == [[[[0.0, far, far], [0.0, 0.0, far], [far, far, 0.0]]]]


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_stays_near_float32(masked: bool) -> None:
    (model,) = stages_of((0, 4))
    tokens_BT = some_tokens(2, 12)
    documents_BT = (torch.arange(12) // 5).expand(2, 12) if masked else None
    with torch.no_grad():
        expected_BTV = model(tokens_BT, documents_BT)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(tokens_BT, documents_BT)
    assert logits_BTV.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; the logits are of order 1, after 4 layers.
    assert (logits_BTV - expected_BTV).square().mean().sqrt() < 0.03 * expected_BTV.std()


@pytest.mark.parametrize("borders", SPLITS)
def test_parameter_counts_equal_the_specification(borders: tuple[int, ...]) -> None:
    counts = [sum(p.numel() for p in stage.parameters()) for stage in stages_of(borders)]
    expected = [SPEC.stage_params(a, b) for a, b in pairwise(borders)]
    assert counts == expected
    assert sum(counts) == SPEC.num_params


def test_token_losses_sum_over_targets_and_leave_out_ignored_ones() -> None:
    logits_BTV = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]]))
    targets_BT = torch.tensor([[0, IGNORED_TARGET, 2]])
    loss_sum = token_losses(logits_BTV, targets_BT)
    assert loss_sum.item() == pytest.approx(-torch.tensor([0.5, 0.6]).log().sum().item(), rel=1e-6)
    assert token_losses(logits_BTV.bfloat16(), targets_BT).dtype == torch.float32


def test_a_microbatch_without_targets_has_no_loss() -> None:
    assert token_losses(torch.randn(1, 3, 5), torch.full((1, 3), IGNORED_TARGET)).item() == 0.0


def test_rope_scaling_refuses_bands_that_cross() -> None:
    with pytest.raises(ConfigError, match="low_freq_factor"):
        RopeScaling(low_freq_factor=4.0, high_freq_factor=4.0)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 6.8), ("160m", 160.4), ("1b", 1498.5), ("8b", 8030.3)])
def test_recipes_have_the_size_that_they_name(name: str, millions: float) -> None:
    path = Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml"
    spec = ModelSpec(**yaml.safe_load(path.read_text())["model"])
    assert spec.num_params / 1e6 == pytest.approx(millions, rel=0.005)
    stage = DecoderStage(spec, 0, spec.num_layers, device="meta")
    assert sum(p.numel() for p in stage.parameters()) == spec.num_params
