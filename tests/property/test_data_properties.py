"""What holds of every corpus, batch shape and seed: no window is lost, and position is all that a batch depends on."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.data import IGNORED_TARGET, TokenSource, permuted
from actors.settings import BatchSpec, DataConfig
from actors.token_shards import DataManifest, SplitTokens
from actors.tokenizer import cut_blocks
from tests.unit.prepared_data import EOS, VOCAB_SIZE, write_data

token_arrays = st.lists(st.integers(0, 5), min_size=20, max_size=120).map(np.array)
batches = st.builds(
    BatchSpec, seq_len=st.integers(1, 9), microbatch_size=st.integers(1, 4), num_microbatches=st.integers(1, 4)
)
seeds = st.integers(0, 2**40)

# Each example writes and syncs a few files, which takes as long as the disk likes.
on_disk = settings(max_examples=40, deadline=None)


@contextmanager
def prepared(tokens: np.ndarray, shard_tokens: int = 17) -> Iterator[tuple[str, DataManifest]]:
    with tempfile.TemporaryDirectory() as folder:
        yield folder, write_data(folder, tokens, tokens[:0], shard_tokens)


def open_source(folder: str, batch: BatchSpec, seed: int) -> TokenSource:
    return TokenSource(DataConfig(path=folder), "train", batch, seed=seed, vocab_size=VOCAB_SIZE)


def step_tokens(source: TokenSource, batch: BatchSpec, step: int) -> torch.Tensor:
    return torch.cat([source.microbatch(step, number).tokens_BT for number in range(batch.num_microbatches)])


@given(size=st.integers(1, 700), key=st.binary(min_size=32, max_size=32))
def test_the_permutation_is_a_bijection(size: int, key: bytes) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(1, 2**62), key=st.binary(min_size=32, max_size=32), data=st.data())
def test_the_permutation_stays_in_range_and_apart_at_any_size(size: int, key: bytes, data: st.DataObject) -> None:
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))
    places = {permuted(index, size, key) for index in indices}
    assert len(places) == len(indices)
    assert all(0 <= place < size for place in places)


@on_disk
@given(tokens=token_arrays, shard_tokens=st.integers(1, 50), data=st.data())
def test_a_read_spans_shards(tokens: np.ndarray, shard_tokens: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    with prepared(tokens, shard_tokens) as (folder, manifest):
        split = SplitTokens(folder, manifest, "train", cache=Path(folder), vocab_size=VOCAB_SIZE)
        assert split.read(start, stop).tolist() == tokens[start:stop].tolist()


@on_disk
@given(num_tokens=st.integers(20, 300), seq_len=st.integers(1, 9), seed=seeds, epoch=st.integers(0, 3))
def test_every_window_appears_exactly_once_an_epoch(num_tokens: int, seq_len: int, seed: int, epoch: int) -> None:
    batch = BatchSpec(seq_len=seq_len, microbatch_size=1, num_microbatches=1)
    with prepared(np.arange(1, num_tokens + 1)) as (folder, _):
        source = open_source(folder, batch, seed)
        num = source.num_sequences
        targets = torch.cat([source.microbatch(epoch * num + index, 0).targets_BT[0] for index in range(num)])
    assert sorted(targets.tolist()) == list(range(2, num * seq_len + 2))
    assert num_tokens - num * seq_len <= seq_len


@on_disk
@given(tokens=token_arrays, batch=batches, seed=seeds, step=st.integers(0, 50))
def test_a_microbatch_depends_on_its_position_alone(tokens: np.ndarray, batch: BatchSpec, seed: int, step: int) -> None:
    with prepared(tokens) as (folder, _):
        sequential = open_source(folder, batch, seed)
        for earlier in range(step):
            sequential.microbatch(earlier, 0)
        seeking = open_source(folder, batch, seed)
        for number in reversed(range(batch.num_microbatches)):
            ours, theirs = sequential.microbatch(step, number), seeking.microbatch(step, number)
            assert torch.equal(ours.tokens_BT, theirs.tokens_BT)
            assert torch.equal(ours.targets_BT, theirs.targets_BT)


@on_disk
@given(tokens=token_arrays, batch=batches, seed=seeds, step=st.integers(0, 50))
def test_a_step_holds_the_same_sequences_however_it_is_cut(
    tokens: np.ndarray, batch: BatchSpec, seed: int, step: int
) -> None:
    swapped = BatchSpec(
        seq_len=batch.seq_len, microbatch_size=batch.num_microbatches, num_microbatches=batch.microbatch_size
    )
    with prepared(tokens) as (folder, _):
        ours = step_tokens(open_source(folder, batch, seed), batch, step)
        theirs = step_tokens(open_source(folder, swapped, seed), swapped, step)
    assert torch.equal(ours, theirs)


@on_disk
@given(tokens=token_arrays, batch=batches, seed=seeds, step=st.integers(0, 50))
def test_targets_are_ignored_exactly_at_document_starts(
    tokens: np.ndarray, batch: BatchSpec, seed: int, step: int
) -> None:
    with prepared(tokens) as (folder, _):
        source = open_source(folder, batch, seed)
        num_targets = 0
        for number in range(batch.num_microbatches):
            microbatch = source.microbatch(step, number)
            assert microbatch.documents_BT is not None
            ignored_BT = microbatch.targets_BT == IGNORED_TARGET
            assert torch.equal(ignored_BT, microbatch.tokens_BT == EOS)
            starts_BT = microbatch.documents_BT.diff(dim=1) == 1
            assert torch.equal(starts_BT, ignored_BT[:, :-1])
            assert not microbatch.documents_BT[:, 0].any()
            assert microbatch.num_targets == int((~ignored_BT).sum())
            num_targets += microbatch.num_targets
        assert source.step_targets(step) == num_targets


@given(text=st.text(alphabet="ab\n", max_size=40).map(lambda text: text * 20_000))
def test_blocks_join_to_the_document_and_only_the_last_ends_it(text: str) -> None:
    blocks = list(cut_blocks(text))
    assert "".join(block.text for block in blocks) == text
    assert [block.ends_document for block in blocks] == [False] * (len(blocks) - 1) + [True]
