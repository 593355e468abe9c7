"""Random tokens as prepared data, for benches in which it does not matter what is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.unit.prepared_data import write_data

NUM_TRAIN, NUM_VAL = 280_000, 20_000


def write_random_tokens(folder: Path, vocab_size: int) -> None:
    """Write a train and a held-out split, each in one shard."""
    generator = np.random.default_rng(1)
    train, val = (generator.integers(1, vocab_size, size=size) for size in (NUM_TRAIN, NUM_VAL))
    write_data(str(folder), train, val, shard_tokens=NUM_TRAIN, vocab_size=vocab_size)
