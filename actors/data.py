"""The seekable token source: (step, microbatch) -> tokens, the same on every node and after every resume.

A batch is a function of seed, step and microbatch alone; there is no position to save, lose or replay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.errors import DataError
from actors.model.decoder import IGNORED_TARGET
from actors.settings import BatchSpec, DataConfig
from actors.token_shards import DataManifest, Split, SplitTokens

# Four make a pseudo-random permutation of a large domain (Luby and Rackoff 1988); small domains want some more.
FEISTEL_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Some sequences of a step: inputs, and for each the token that follows it or IGNORED_TARGET."""

    # int64
    tokens_BT: Tensor
    targets_BT: Tensor
    # int32: which document of its row each token belongs to, from 0; None where attention crosses documents.
    documents_BT: Tensor | None
    num_targets: int


class TokenSource:
    """One split of prepared data as sequences of `batch.seq_len` tokens, addressed by step and microbatch.

    Sequences are windows that overlap by one token, so each token but the first, and but the tail that fills no window,
    is a target once an epoch. The train split is shuffled anew each epoch; the val split is read in order and wraps
    around. Raises DataError where the data
    are missing, too small for one sequence, or of a larger vocabulary than the model's; later, from any method, where
    a shard proves bad when first touched.
    """

    def __init__(self, data: DataConfig, split: Split, batch: BatchSpec, *, seed: int, vocab_size: int) -> None:
        self.manifest = DataManifest.load(data.path)
        if self.manifest.vocab_size > vocab_size:
            raise DataError(
                f"{data.path} has a vocabulary of {self.manifest.vocab_size} tokens, the model of {vocab_size}",
                f"set model.vocab_size={self.manifest.vocab_size}",
            )
        cache = Path(data.cache).expanduser()
        self._tokens = SplitTokens(data.path, self.manifest, split, cache=cache, vocab_size=vocab_size)
        self.num_sequences = max(0, len(self._tokens) - 1) // batch.seq_len
        if self.num_sequences == 0:
            more = "more text" if split == "train" else "more text, or more of it with --val-fraction"
            raise DataError(
                f"the {split} split of {data.path} has {len(self._tokens)} tokens, one sequence needs "
                f"{batch.seq_len + 1}",
                f"prepare {more}, or lower batch.seq_len",
            )
        self._batch = batch
        self._shuffled = split == "train"
        self._seed = seed
        self._document_mask = data.document_mask

    def microbatch(self, step: int, microbatch: int) -> Microbatch:
        """Return one microbatch of a step, from the start or anywhere, in any order."""
        size = self._batch.microbatch_size
        first = (step * self._batch.num_microbatches + microbatch) * size
        windows = self._windows(range(first, first + size))
        tokens_BT = torch.from_numpy(windows[:, :-1].copy())
        targets_BT = torch.from_numpy(windows[:, 1:].copy())
        if not self._document_mask:
            return Microbatch(
                tokens_BT=tokens_BT, targets_BT=targets_BT, documents_BT=None, num_targets=targets_BT.numel()
            )
        ends_BT = tokens_BT == self.manifest.eos_id
        return Microbatch(
            tokens_BT=tokens_BT,
            # What follows the end of a document cannot be foretold from it.
            targets_BT=targets_BT.masked_fill(ends_BT, IGNORED_TARGET),
            # An end still belongs to its own document, hence the difference.
            documents_BT=(ends_BT.cumsum(1) - ends_BT.long()).int(),
            num_targets=int((~ends_BT).sum()),
        )

    def step_targets(self, step: int) -> int:
        """Return how many targets all microbatches of a step have: what its summed loss is divided by."""
        if not self._document_mask:
            return self._batch.step_tokens
        num_rows = self._batch.microbatch_size * self._batch.num_microbatches
        windows = self._windows(range(step * num_rows, (step + 1) * num_rows))
        return int(np.count_nonzero(windows[:, :-1] != self.manifest.eos_id))

    def _windows(self, indices: Iterable[int]) -> NDArray[np.int64]:
        """Return the windows at these places in the endless sequence of epochs, each of seq_len + 1 tokens."""
        seq_len = self._batch.seq_len
        starts = [self._window_at(index) * seq_len for index in indices]
        return np.stack([self._tokens.read(start, start + seq_len + 1) for start in starts])

    def _window_at(self, index: int) -> int:
        epoch, place = divmod(index, self.num_sequences)
        if not self._shuffled:
            return place
        return permuted(place, self.num_sequences, sha256(f"{self._seed} {epoch}".encode()).digest())


def permuted(index: int, size: int, key: bytes) -> int:
    """Return where a keyed pseudo-random permutation of range(size) sends `index`, without making a table.

    A balanced Feistel network permutes the next power of four; walking its cycle until it comes back into the range
    restricts it to the range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half_bits, key)
        if index < size:
            return index


def _feistel(index: int, half_bits: int, key: bytes) -> int:
    mask = (1 << half_bits) - 1
    left, right = index >> half_bits, index & mask
    for number in range(FEISTEL_ROUNDS):
        digest = blake2b(right.to_bytes(8, "little"), key=key, salt=bytes([number]), digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right
