"""What only a CUDA device can show of the stage: encoding on a side stream, bfloat16 boundaries, fused AdamW."""

from __future__ import annotations

import time

import pytest
import torch

from actors.codecs import CODECS
from actors.data import Microbatch
from actors.encoding import Encoder, mark_ready
from actors.engine import StageEngine
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.pipeline import Timeline
from actors.spec import Commit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPEC = ModelSpec(
    vocab_size=128, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=96, max_positions=32
)


@pytest.mark.parametrize("name", ["none", "bf16", "q8", "hq4", "hq4-stochastic"])
def test_encoding_waits_for_the_compute_that_makes_the_tensor(name: str) -> None:
    factor = torch.randn(2048, 2048, device="cuda")
    encoder = Encoder()
    for _ in range(5):
        tensor = factor
        for _ in range(20):
            tensor = tensor @ factor / 45.0
        ready = mark_ready(tensor)
        payload = bytes(encoder.encode(CODECS[name], tensor, ready, seed=9))
        assert payload == CODECS[name].encode(tensor.cpu(), seed=9).numpy().tobytes()


def stage_engine(start: int, stop: int) -> StageEngine:
    model = DecoderStage(SPEC, start, stop, device="cuda")
    initialise(model, seed=1)
    return StageEngine(model, OptimConfig(lr=3e-3, warmup_steps=0))


def test_training_steps_lower_the_loss_on_cuda() -> None:
    engine = stage_engine(0, 2)
    assert engine.boundary_dtype is torch.bfloat16
    tokens_BT = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = Microbatch(tokens_BT=tokens_BT, targets_BT=tokens_BT.roll(-1, 1), documents_BT=None, num_targets=128)
    losses = []
    for step in range(10):
        engine.begin(step, 128)
        engine.forward(0, None, batch)
        engine.backward(0, None)
        losses.append(engine.loss_sum / engine.num_targets)
        assert engine.nonfinite_microbatch() == -1
        engine.commit(Commit(step=step, lr=3e-3, clip_scale=1.0))
    assert losses[-1] < losses[0] - 0.5
    assert engine.peak_memory_bytes() > 0


def test_the_residual_stream_is_float32_wherever_the_model_is_cut() -> None:
    whole, cut = stage_engine(0, 2), [stage_engine(0, 1), stage_engine(1, 2)]
    tokens_BT = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = Microbatch(tokens_BT=tokens_BT, targets_BT=tokens_BT.roll(-1, 1), documents_BT=None, num_targets=128)
    for engine in (whole, *cut):
        engine.begin(0, 128)
    whole.forward(0, None, batch)
    boundary_BTD = cut[0].forward(0, None, batch)
    assert boundary_BTD is not None
    assert boundary_BTD.dtype is torch.bfloat16
    seen: list[torch.dtype] = []
    cut[1].model.layers["1"].register_forward_hook(lambda block, given, output: seen.append(output.dtype))
    cut[1].forward(0, boundary_BTD, batch)
    cut[1].evaluate(boundary_BTD, batch)
    assert seen == [torch.float32, torch.float32]
    # What is left is the rounding of the boundary itself.
    assert cut[1].loss_sum == pytest.approx(whole.loss_sum, rel=1e-3)
    grad_BTD = cut[1].backward(0, None)
    assert grad_BTD is not None
    assert grad_BTD.dtype is torch.bfloat16
    cut[0].backward(0, grad_BTD)


def test_compute_is_timed_on_the_device() -> None:
    factor = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    timeline = Timeline(time.monotonic, factor.device)
    with timeline.record("F", 0):
        tensor = factor
        for _ in range(50):
            tensor = tensor @ factor / 64.0
        launched_s = timeline.elapsed_s
    (action,) = timeline.actions()
    # 50 products of 137 GFLOP take far longer than to launch them.
    assert action.end_s > launched_s
    assert 0 <= action.start_s < action.end_s <= timeline.elapsed_s + 0.01
