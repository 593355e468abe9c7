"""One stage's arithmetic: what a step adds up to, and when weights change."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from actors.data import IGNORED_TARGET, Microbatch
from actors.engine import StageEngine
from actors.errors import StageError
from actors.model.decoder import DecoderStage, token_losses
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.spec import Commit

SPEC = ModelSpec(
    vocab_size=31, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, ffn_size=24, max_positions=16
)
ROWS, SEQ_LEN = 4, 6


def engine(start: int = 0, stop: int = SPEC.num_layers, *, lr: float = 0.01) -> StageEngine:
    model = DecoderStage(SPEC, start, stop)
    initialise(model, seed=1)
    return StageEngine(model, OptimConfig(lr=lr))


def batches(num_microbatches: int, *, seed: int = 0, documents: bool = True) -> list[Microbatch]:
    """The same four rows, cut into microbatches; some targets are left out, unevenly."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, SPEC.vocab_size, (ROWS, SEQ_LEN), generator=generator)
    targets_BT = torch.randint(0, SPEC.vocab_size, (ROWS, SEQ_LEN), generator=generator)
    targets_BT[0, 1:] = IGNORED_TARGET
    targets_BT[2, :2] = IGNORED_TARGET
    documents_BT = torch.tensor([0, 0, 1, 1, 1, 2], dtype=torch.int32).expand(ROWS, SEQ_LEN)
    size = ROWS // num_microbatches
    return [
        Microbatch(
            tokens_BT=tokens_BT[first : first + size],
            targets_BT=targets_BT[first : first + size],
            documents_BT=documents_BT[first : first + size] if documents else None,
            num_targets=int((targets_BT[first : first + size] != IGNORED_TARGET).sum()),
        )
        for first in range(0, ROWS, size)
    ]


def run(stages: Sequence[StageEngine], microbatches: Sequence[Microbatch], step: int = 0) -> None:
    """A step of all stages in this process: forwards, then backwards, in microbatch order."""
    num_targets = sum(batch.num_targets for batch in microbatches)
    for stage in stages:
        stage.begin(step, num_targets)
    for number, batch in enumerate(microbatches):
        hidden_BTD = None
        for stage in stages:
            hidden_BTD = stage.forward(number, hidden_BTD, batch)
        assert hidden_BTD is None
    for number in range(len(microbatches)):
        grad_BTD = None
        for stage in reversed(stages):
            grad_BTD = stage.backward(number, grad_BTD)
        assert grad_BTD is None


def weights(stage: StageEngine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stage.params.items()}


def grads(*stages: StageEngine) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.params.items():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()
    return found


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return list(these) == list(those) and all(torch.equal(these[name], those[name]) for name in these)


def commit_of(step: int, *, clip_scale: float = 1.0, skip: bool = False, lr: float = 0.01) -> Commit:
    return Commit(step=step, lr=lr, clip_scale=clip_scale, skip=skip)


def test_a_cut_model_computes_what_the_whole_one_does() -> None:
    whole, cut = engine(), [engine(0, 1), engine(1, 2), engine(2, 3)]
    run([whole], batches(2))
    run(cut, batches(2))
    assert same(grads(whole), grads(*cut))
    assert whole.loss_sum == cut[-1].loss_sum
    assert whole.num_targets == cut[-1].num_targets == sum(batch.num_targets for batch in batches(1))
    assert [stage.loss_sum for stage in cut[:-1]] == [0.0, 0.0]
    assert whole.grad_sq() == tuple(pair for stage in cut for pair in stage.grad_sq())


def test_gradients_are_those_of_the_mean_over_the_steps_targets() -> None:
    stage = engine()
    run([stage], batches(4))
    reference = DecoderStage(SPEC, 0, SPEC.num_layers)
    initialise(reference, seed=1)
    (batch,) = batches(1)
    loss_sum = token_losses(reference(batch.tokens_BT, batch.documents_BT), batch.targets_BT)
    (loss_sum / batch.num_targets).backward()
    for name, parameter in reference.named_global_parameters().items():
        torch.testing.assert_close(grads(stage)[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert stage.loss_sum == pytest.approx(loss_sum.item(), rel=1e-6)


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_a_step_means_the_same_whatever_the_number_of_microbatches(num_microbatches: int) -> None:
    one, several = engine(), engine()
    run([one], batches(1))
    run([several], batches(num_microbatches))
    for name, grad in grads(one).items():
        torch.testing.assert_close(grads(several)[name], grad, rtol=1e-4, atol=1e-6)
    assert several.loss_sum == pytest.approx(one.loss_sum, rel=1e-6)


def test_squared_norms_come_by_name_in_the_models_order() -> None:
    stage = engine()
    assert stage.grad_sq() == ()
    run([stage], batches(2))
    assert [name for name, _ in stage.grad_sq()] == list(stage.params)
    for name, grad_sq in stage.grad_sq():
        assert grad_sq == pytest.approx(float(grads(stage)[name].double().square().sum()), rel=1e-5)


def test_commit_is_a_step_of_adamw_on_the_scaled_gradients() -> None:
    stage, reference = engine(lr=0.5), engine(lr=0.5)
    run([stage], batches(2))
    run([reference], batches(2))
    stage.commit(commit_of(0, clip_scale=0.25, lr=0.01))
    for parameter in reference.params.values():
        assert parameter.grad is not None
        parameter.grad *= 0.25
    for group in reference.optimizer.param_groups:
        group["lr"] = 0.01
    reference.optimizer.step()
    assert same(weights(stage), weights(reference))
    assert stage.version == 1


def test_commit_twice_is_once() -> None:
    stage = engine()
    run([stage], batches(2))
    stage.commit(commit_of(0))
    after = weights(stage)
    stage.commit(commit_of(0))
    assert same(weights(stage), after)
    assert stage.version == 1
    run([stage], batches(2, seed=1), step=1)
    # Late, while the next step's gradients wait for their own commit.
    stage.commit(commit_of(0))
    stage.commit(commit_of(1))
    assert stage.version == 2
    assert not same(weights(stage), after)


def test_a_skipped_step_leaves_every_bit_but_counts() -> None:
    stage = engine()
    run([stage], batches(2))
    stage.commit(commit_of(0))
    before, moments = weights(stage), stage.optimizer.state_dict()["state"]
    moments = {index: {key: value.clone() for key, value in state.items()} for index, state in moments.items()}
    run([stage], batches(2, seed=1), step=1)
    stage.commit(commit_of(1, skip=True))
    assert same(weights(stage), before)
    assert stage.version == 2
    for index, state in stage.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[index][key]) for key, value in state.items())
    assert stage.grad_sq() == ()


@pytest.mark.parametrize("step", [1, 5])
def test_a_commit_of_another_step_is_refused(step: int) -> None:
    stage = engine()
    run([stage], batches(2))
    before = weights(stage)
    with pytest.raises(StageError, match=f"commit of step {step} came to weights of version 0"):
        stage.commit(commit_of(step))
    assert same(weights(stage), before)
    assert stage.version == 0


def test_a_step_that_did_not_run_to_its_end_is_not_committed() -> None:
    stage = engine()
    with pytest.raises(StageError, match="has not run it to its end"):
        stage.commit(commit_of(0))
    first, second = batches(2)
    stage.begin(0, 10)
    stage.forward(0, None, first)
    stage.backward(0, None)
    stage.forward(1, None, second)
    with pytest.raises(StageError, match="has not run it to its end"):
        stage.commit(commit_of(0))
    assert stage.version == 0
    # To skip it is always possible.
    stage.commit(commit_of(0, skip=True))
    assert stage.version == 1


def test_a_step_of_another_version_is_refused() -> None:
    with pytest.raises(StageError, match="step 3 was ordered, but this stage's weights are at version 0"):
        engine().begin(3, 10)


def test_a_step_begun_again_has_nothing_of_the_aborted_one() -> None:
    clean, retried = engine(), engine()
    first, second = batches(2, seed=5)
    retried.begin(0, 10)
    retried.forward(0, None, first)
    retried.backward(0, None)
    retried.forward(1, None, second)
    run([retried], batches(2))
    run([clean], batches(2))
    assert same(grads(retried), grads(clean))
    assert (retried.loss_sum, retried.num_targets) == (clean.loss_sum, clean.num_targets)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_microbatch_that_is_not_finite_is_named(bad: float) -> None:
    stage = engine(1, 2)
    stage.begin(0, 10)
    hidden_BTD = torch.ones(1, SEQ_LEN, SPEC.hidden_size)
    assert stage.nonfinite_microbatch() == -1
    for number in range(4):
        stage.forward(number, hidden_BTD * (bad if number >= 2 else 1.0), None)
    assert stage.nonfinite_microbatch() == 2
    stage.begin(0, 10)
    assert stage.nonfinite_microbatch() == -1


def test_a_loss_that_is_not_finite_is_named_on_the_last_stage() -> None:
    stage = engine(2, 3)
    stage.begin(0, 10)
    first, second = batches(2, documents=False)
    stage.forward(0, torch.ones(2, SEQ_LEN, SPEC.hidden_size), first)
    stage.forward(1, torch.full((2, SEQ_LEN, SPEC.hidden_size), math.nan), second)
    assert stage.nonfinite_microbatch() == 1


def test_boundary_tensors_are_float32_on_the_cpu_and_keep_no_graph() -> None:
    first, last = engine(0, 2), engine(2, 3)
    (batch,) = batches(1)
    for stage in (first, last):
        stage.begin(0, batch.num_targets)
    hidden_BTD = first.forward(0, None, batch)
    assert hidden_BTD is not None
    assert hidden_BTD.dtype == torch.float32 == first.boundary_dtype
    assert not hidden_BTD.requires_grad
    last.forward(0, hidden_BTD, batch)
    grad_BTD = last.backward(0, None)
    assert grad_BTD is not None
    assert grad_BTD.shape == hidden_BTD.shape
    assert grad_BTD.dtype == torch.float32


def test_a_bf16_boundary_is_gone_on_from_in_float32() -> None:
    (batch,) = batches(1)
    hidden_BTD = torch.randn(ROWS, SEQ_LEN, SPEC.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    outputs = []
    for given in (hidden_BTD, hidden_BTD.float()):
        stage = engine(1, 2)
        stage.begin(0, batch.num_targets)
        forward_BTD = stage.forward(0, given, batch)
        assert forward_BTD is not None
        assert torch.equal(stage.evaluate(given, batch), forward_BTD)
        outputs.append((forward_BTD, stage.backward(0, torch.ones_like(forward_BTD))))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))


def test_an_evaluation_changes_nothing_and_sums_the_losses() -> None:
    stages = [engine(0, 2), engine(2, 3)]
    before = [weights(stage) for stage in stages]
    (batch,) = batches(1)
    loss_sum = stages[1].evaluate(stages[0].evaluate(None, batch), batch)
    run([whole := engine()], [batch])
    assert float(loss_sum) == pytest.approx(whole.loss_sum, rel=1e-6)
    assert all(same(weights(stage), was) for stage, was in zip(stages, before, strict=True))
    assert all(stage.grad_sq() == () and stage.version == 0 for stage in stages)


def test_in_mixed_precision_weights_are_cast_once_a_step_and_anew_after_a_commit() -> None:
    """As on a GPU, by the CPU's autocast: no microbatch in flight holds a copy of the weights of its own."""

    def casts_of(stage: StageEngine, microbatches: Sequence[Microbatch], step: int) -> list[int]:
        stage.begin(step, 1)
        outputs: list[torch.Tensor | None] = []
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for microbatch, batch in enumerate(microbatches):
                outputs.append(stage.forward(microbatch, None, batch))
        made.append([None if output is None else output.clone() for output in outputs])
        shapes = [e.input_shapes[0] for e in profiler.events() if e.name == "aten::_to_copy" and e.input_shapes]
        return [shapes.count(list(p.shape)) for name, p in stage.params.items() if "mlp" in name]

    made: list[list[torch.Tensor | None]] = []
    first = engine(0, 2)
    first._is_mixed = True
    microbatches = batches(3)
    mlp_sizes = [tuple(p.shape) for name, p in first.params.items() if "mlp" in name]
    # Weights of one shape are counted together.
    expected = [mlp_sizes.count(size) for size in mlp_sizes]
    assert casts_of(first, microbatches, 0) == expected
    for microbatch, output in enumerate(made[0]):
        assert output is not None
        first.backward(microbatch, torch.ones_like(output))
    first.commit(commit_of(0, lr=0.5))
    assert casts_of(first, microbatches, 1) == expected
    # Of the new weights, not of the old ones.
    assert not any(torch.equal(old, new) for old, new in zip(*made, strict=True))
    # A step that is begun again after it was given up casts anew, too.
    assert casts_of(first, microbatches, 1) == expected
    first.close()
    # Nothing is held: the next context that closes finds itself the outermost.
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()
