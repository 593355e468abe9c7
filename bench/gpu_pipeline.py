"""Four stages in one process, their boundaries coded: what a step takes and learns with codecs and without.

No links and no Ray: what one stage encodes to the host the next decodes from there, as with a neighbour on a wire of no
length. Stages run one after another, so that a step's time is the sum of them all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from actors.codecs import CODECS
from actors.data import Microbatch
from actors.encoding import Decoder, Encoder, mark_ready
from actors.engine import StageEngine
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.spec import Commit

NUM_STAGES, LAYERS_PER_STAGE = 4, 2
NUM_MICROBATCHES, SEQ_LEN = 4, 512
SPEC = ModelSpec(
    vocab_size=512,
    hidden_size=1024,
    num_layers=NUM_STAGES * LAYERS_PER_STAGE,
    num_heads=8,
    num_kv_heads=8,
    ffn_size=2816,
    max_positions=SEQ_LEN,
)
LR = 3e-4
# Forward and backward.
PAIRS = (("none", "none"), ("q8", "q8"), ("hq4", "q8"))


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What carries one direction's tensors from stage to stage."""

    codec: str
    encoder: Encoder
    decoder: Decoder

    def carry(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        codec = CODECS[self.codec]
        payload = self.encoder.encode(codec, tensor, mark_ready(tensor), seed)
        return self.decoder.decode(codec, bytearray(payload), tuple(tensor.shape), tensor.dtype).use()


class CodedPipeline:
    """A model in four stages, trained step by step on the same random tokens."""

    def __init__(self, device: torch.device, forward: str, backward: str) -> None:
        self._engines: list[StageEngine] = []
        for stage in range(NUM_STAGES):
            start = stage * LAYERS_PER_STAGE
            model = DecoderStage(SPEC, start, start + LAYERS_PER_STAGE, device=device)
            initialise(model, seed=1)
            self._engines.append(StageEngine(model, OptimConfig(lr=LR, warmup_steps=0)))
        self._forward = Boundary(codec=forward, encoder=Encoder(), decoder=Decoder(device))
        self._backward = Boundary(codec=backward, encoder=Encoder(), decoder=Decoder(device))
        generator = torch.Generator().manual_seed(1)
        self._batches: list[Microbatch] = []
        for _ in range(NUM_MICROBATCHES):
            tokens_BT = torch.randint(SPEC.vocab_size, (1, SEQ_LEN), generator=generator)
            self._batches.append(
                Microbatch(
                    tokens_BT=tokens_BT, targets_BT=tokens_BT.roll(-1, 1), documents_BT=None, num_targets=SEQ_LEN
                )
            )

    def step(self, step: int) -> float:
        """Run a step, commit it, and return its loss a token."""
        for engine in self._engines:
            engine.begin(step, NUM_MICROBATCHES * SEQ_LEN)
        for index, batch in enumerate(self._batches):
            self._run(step, index, batch)
        loss = self._engines[-1].loss_sum / self._engines[-1].num_targets
        for engine in self._engines:
            engine.commit(Commit(step=step, lr=LR, clip_scale=1.0))
        return loss

    def _run(self, step: int, index: int, batch: Microbatch) -> None:
        hidden_BTD = None
        for stage, engine in enumerate(self._engines):
            output_BTD = engine.forward(index, hidden_BTD, batch)
            if output_BTD is not None:
                hidden_BTD = self._forward.carry(output_BTD, seed=(step * NUM_MICROBATCHES + index) * 8 + stage)
        grad_BTD = None
        for stage, engine in reversed(list(enumerate(self._engines))):
            input_grad_BTD = engine.backward(index, grad_BTD)
            if input_grad_BTD is not None:
                grad_BTD = self._backward.carry(input_grad_BTD, seed=(step * NUM_MICROBATCHES + index) * 8 + 4 + stage)


def compare_codecs(device: torch.device, num_steps: int) -> dict[str, dict[str, float]]:
    """Return the time of a step and the last loss, by codecs forward and backward."""
    compared: dict[str, dict[str, float]] = {}
    for forward, backward in PAIRS:
        pipeline = CodedPipeline(device, forward, backward)
        first_loss = pipeline.step(0)
        began_s = time.perf_counter()
        losses = [pipeline.step(step) for step in range(1, num_steps)]
        step_ms = (time.perf_counter() - began_s) / len(losses) * 1e3
        compared[f"{forward}/{backward}"] = {"step_ms": step_ms, "first_loss": first_loss, "loss": losses[-1]}
    return compared
