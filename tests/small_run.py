"""A run small enough for any test: four narrow layers on random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from orchestrator.config import RunConfig, load_config
from tests.unit.prepared_data import VOCAB_SIZE, write_data


def small_run(folder: Path, *words: str) -> list[str]:
    """Make data in `folder` and return the words of a configuration that trains on them, `words` last."""
    tokens = np.random.default_rng(3).integers(0, 99, size=4400)
    data = folder / "data"
    if not data.exists():
        write_data(str(data), tokens[:4000], tokens[4000:])
    return [
        "name=small",
        f"runs_dir={folder / 'runs'}",
        f"data.path={data}",
        f"model.vocab_size={VOCAB_SIZE}",
        "model.hidden_size=32",
        "model.num_layers=4",
        "model.num_kv_heads=2",
        "model.ffn_size=48",
        "batch.seq_len=16",
        "batch.microbatch_size=2",
        "batch.num_microbatches=6",
        "train.eval_every=0",
        "train.eval_microbatches=2",
        "optim.warmup_steps=3",
        "optim.clip_norm=0.75",
        "wire.forward=none",
        "wire.backward=none",
        "fleet.threads=1",
        "fleet.probe_bytes=1000",
        "tracking.wandb=disabled",
        *words,
    ]


def small_config(folder: Path, *words: str) -> RunConfig:
    """Return that configuration, loaded."""
    return load_config(small_run(folder, *words))
