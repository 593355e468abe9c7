"""Prepared data made of given tokens, for tests of what reads them."""

import numpy as np

from actors.store import open_store
from actors.token_shards import DataManifest, ShardWriter

EOS = 0
VOCAB_SIZE = 1000


def write_data(
    location: str, train: np.ndarray, val: np.ndarray, shard_tokens: int = 100, vocab_size: int = VOCAB_SIZE
) -> DataManifest:
    """Write both splits and their manifest to a folder or s3:// prefix."""
    store = open_store(location)
    shards = []
    for split, tokens in (("train", train), ("val", val)):
        writer = ShardWriter(store, split, "uint16", shard_tokens)
        writer.append(tokens)
        shards += writer.close()
    manifest = DataManifest(
        version=1,
        dtype="uint16",
        vocab_size=vocab_size,
        eos_id=EOS,
        tokenizer_sha256="0" * 64,
        options_sha256="0" * 64,
        source="test",
        num_documents=1,
        unigram_loss=1.0,
        shards=tuple(shards),
    )
    store.put("manifest.json", manifest.to_json())
    return manifest
