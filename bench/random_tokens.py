"""Random tokens as prepared data, for benches in which it does not matter what is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from actors.store import open_store
from actors.token_shards import SPLITS, DataManifest, ShardWriter

NUM_TOKENS = {"train": 280_000, "val": 20_000}


def write_random_tokens(folder: Path, vocab_size: int) -> None:
    """Write a train and a held-out split."""
    generator = np.random.default_rng(1)
    shards = []
    for split in SPLITS:
        tokens = generator.integers(1, vocab_size, size=NUM_TOKENS[split])
        writer = ShardWriter(open_store(str(folder)), split, "uint16", len(tokens))
        writer.append(tokens)
        shards += writer.close()
    manifest = DataManifest(
        version=1,
        dtype="uint16",
        vocab_size=vocab_size,
        eos_id=0,
        tokenizer_sha256="0" * 64,
        options_sha256="0" * 64,
        source="random tokens",
        num_documents=1,
        unigram_loss=0.0,
        shards=tuple(shards),
    )
    open_store(str(folder)).put("manifest.json", manifest.to_json())
