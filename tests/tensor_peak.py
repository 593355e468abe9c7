"""What tensors of a stage take at most while it runs a step, counted by torch's own profiler, to the byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from actors.data import Microbatch
from actors.engine import StageEngine
from actors.model.decoder import DecoderStage
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.schedule import Action, Op
from actors.settings import BatchSpec
from actors.spec import Commit

# The second finds the optimizer's moments there.
NUM_STEPS = 2


def stage_peak_bytes(
    model: ModelSpec,
    layers: tuple[int, int],
    actions: Sequence[Action],
    batch: BatchSpec,
    *,
    document_mask: bool,
    activation_checkpointing: bool = False,
) -> int:
    """Return the most bytes of tensors at any moment on a CPU, from the weights on; frames that wait are not there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stage = DecoderStage(
            model, *layers, activation_checkpointing=activation_checkpointing, device=torch.device("cpu")
        )
        engine = StageEngine(stage, OptimConfig())
        initialise(stage, 1)
        if any(action.op is Op.WEIGHT_BACKWARD for action in actions):
            engine.split_backwards()
        for step in range(NUM_STEPS):
            engine.begin(step, batch.step_tokens)
            for action in actions:
                _run(engine, action, model, batch, document_mask)
            engine.commit(Commit(step=step, lr=1e-3, clip_scale=1.0))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most


def _run(engine: StageEngine, action: Action, model: ModelSpec, batch: BatchSpec, document_mask: bool) -> None:
    shape = (batch.microbatch_size, batch.seq_len)
    if action.op is Op.FORWARD:
        tokens_BT = torch.randint(model.vocab_size, shape)
        documents_BT = torch.zeros(shape, dtype=torch.int32) if document_mask else None
        hidden_BTD = None if engine.model.is_first else torch.randn(*shape, model.hidden_size)
        tokens = Microbatch(
            tokens_BT=tokens_BT, targets_BT=tokens_BT, documents_BT=documents_BT, num_targets=batch.microbatch_tokens
        )
        engine.forward(action.microbatch, hidden_BTD, tokens)
    elif action.op is Op.WEIGHT_BACKWARD:
        engine.weight_backward(action.microbatch)
    else:
        grad_BTD = None if engine.model.is_last else torch.randn(*shape, model.hidden_size)
        run = engine.backward if action.op is Op.BACKWARD else engine.input_backward
        run(action.microbatch, grad_BTD)
