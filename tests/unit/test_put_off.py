"""A backward in halves: the first leaves the blocks' weights without gradients, the second makes them the same bits."""

import pytest
import torch

from actors.data import Microbatch
from actors.engine import StageEngine
from actors.errors import StageError
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.put_off import PutOff
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.spec import Commit

SPEC = ModelSpec(
    vocab_size=97, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=48, max_positions=16
)


def engine(start: int, stop: int, *, checkpointing: bool = False) -> StageEngine:
    model = DecoderStage(SPEC, start, stop, activation_checkpointing=checkpointing)
    initialise(model, seed=3)
    made = StageEngine(model, OptimConfig())
    made.begin(0, 60)
    return made


def hidden(seed: int) -> torch.Tensor:
    return torch.randn(2, 15, SPEC.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_second_half_makes_what_the_first_put_off(checkpointing: bool) -> None:
    whole, halves = engine(1, 2), engine(1, 2, checkpointing=checkpointing)
    halves.split_backwards()
    for microbatch in range(3):
        for each in (whole, halves):
            each.forward(microbatch, hidden(microbatch), None)
    expected = [whole.backward(m, hidden(10 + m)) for m in range(3)]
    found = [halves.input_backward(m, hidden(10 + m)) for m in range(3)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    linear = [name for name in halves.params if "proj" in name]
    assert len(linear) == 7
    assert all(halves.params[name].grad is None for name in linear)
    assert all(param.grad is not None for name, param in halves.params.items() if "norm" in name)
    for microbatch in range(3):
        halves.weight_backward(microbatch)
    for name, param in whole.params.items():
        assert param.grad is not None
        assert torch.equal(halves.params[name].grad, param.grad), name


def test_the_head_is_not_put_off_and_a_step_is_not_committed_by_halves() -> None:
    last = engine(2, 3)
    last.split_backwards()
    tokens_BT = torch.zeros(2, 15, dtype=torch.int64)
    batch = Microbatch(tokens_BT=tokens_BT, targets_BT=tokens_BT, documents_BT=None, num_targets=30)
    last.forward(0, hidden(0), batch)
    assert last.input_backward(0, None) is not None
    # Its logits' gradient would be by far the largest thing to hold.
    assert last.params["lm_head.weight"].grad is not None
    commit = Commit(step=0, lr=0.1, clip_scale=1.0)
    with pytest.raises(StageError, match="has not run it to its end"):
        last.commit(commit)
    last.weight_backward(0)
    last.commit(commit)
    assert last.version == 1


def test_what_is_put_off_is_given_out_once() -> None:
    put_off = PutOff()
    put_off.open()
    assert put_off.close() == []
    with pytest.raises(AssertionError, match="not open"):
        put_off.close()
