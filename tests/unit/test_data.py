"""The token source on prepared shards: what it reads, and what it refuses."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.data import IGNORED_TARGET, TokenSource
from actors.errors import DataError
from actors.settings import BatchSpec, DataConfig
from actors.store import open_store
from tests.unit.prepared_data import EOS, write_data

BATCH = BatchSpec(seq_len=8, microbatch_size=2, num_microbatches=3)


def open_source(location: Path | str, split: str = "train", *, vocab_size: int = 1000, **data: object) -> TokenSource:
    config = replace(DataConfig(path=str(location)), **data)
    return TokenSource(config, split, BATCH, seed=3, vocab_size=vocab_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    location = tmp_path / "data"
    write_data(str(location), np.arange(1, 300), np.arange(1, 60))
    return location


def test_targets_are_the_tokens_that_follow(folder: Path) -> None:
    batch = open_source(folder).microbatch(2, 1)
    assert batch.tokens_BT.shape == batch.targets_BT.shape == (2, 8)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert torch.equal(batch.targets_BT, batch.tokens_BT + 1)
    assert batch.num_targets == 16


def test_val_is_read_in_order_and_wraps(folder: Path) -> None:
    source = open_source(folder, "val")
    assert source.num_sequences == 7
    starts = [int(source.microbatch(0, number).tokens_BT[row, 0]) for number in range(5) for row in range(2)]
    assert starts == [1 + 8 * (index % 7) for index in range(10)]


def test_the_order_of_train_follows_the_seed_and_the_epoch(folder: Path) -> None:
    def epoch(seed: int, number: int) -> list[int]:
        batch = BatchSpec(seq_len=8, microbatch_size=37, num_microbatches=1)
        source = TokenSource(DataConfig(path=str(folder)), "train", batch, seed=seed, vocab_size=1000)
        assert source.num_sequences == 37
        return source.microbatch(number, 0).tokens_BT[:, 0].tolist()

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == [1 + 8 * index for index in range(37)] for order in orders)
    assert epoch(0, 1) == orders[1]


def test_documents_are_numbered_within_the_row_and_their_first_token_is_no_target(tmp_path: Path) -> None:
    tokens = np.array([5, 6, EOS, 7, 8, 9, EOS, 4, 3, 2, 1, 5, 6, 7, 8, 9, 4])
    write_data(str(tmp_path), np.ones(50, dtype=int), tokens)
    batch = open_source(tmp_path, "val").microbatch(0, 0)
    assert batch.documents_BT is not None
    assert batch.documents_BT.dtype == torch.int32
    assert batch.tokens_BT[0].tolist() == [5, 6, 0, 7, 8, 9, 0, 4]
    assert batch.documents_BT[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert batch.targets_BT[0].tolist() == [6, 0, IGNORED_TARGET, 8, 9, 0, IGNORED_TARGET, 3]
    assert batch.documents_BT[1].tolist() == [0] * 8
    assert batch.num_targets == 14


def test_without_the_mask_documents_run_together(tmp_path: Path) -> None:
    write_data(str(tmp_path), np.ones(50, dtype=int), np.zeros(50, dtype=int))
    source = open_source(tmp_path, "val", document_mask=False)
    batch = source.microbatch(0, 0)
    assert batch.documents_BT is None
    assert batch.num_targets == 16
    assert source.step_targets(0) == BATCH.step_tokens


def test_a_vocabulary_larger_than_the_models_names_the_key_to_set(folder: Path) -> None:
    with pytest.raises(DataError, match=r"set model\.vocab_size=1000"):
        open_source(folder, vocab_size=999)


def test_missing_data_say_how_to_prepare_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="isthmus data prepare"):
        open_source(tmp_path / "nothing")


@pytest.mark.parametrize("num_tokens", [0, 1, 8])
def test_fewer_tokens_than_a_sequence_are_refused(tmp_path: Path, num_tokens: int) -> None:
    write_data(str(tmp_path), np.ones(50, dtype=int), np.ones(num_tokens, dtype=int))
    with pytest.raises(DataError, match=rf"val split.* {num_tokens} tokens.*needs 9"):
        open_source(tmp_path, "val")


def test_a_sequence_and_one_token_are_enough(tmp_path: Path) -> None:
    write_data(str(tmp_path), np.ones(9, dtype=int), np.ones(9, dtype=int))
    source = open_source(tmp_path)
    assert source.num_sequences == 1
    assert torch.equal(source.microbatch(9, 2).tokens_BT, torch.ones(2, 8, dtype=torch.int64))


def test_a_damaged_shard_is_named_with_its_remedy(folder: Path) -> None:
    path = folder / "train-00000.tok"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    source = open_source(folder, "val")
    assert source.microbatch(0, 0).num_targets == 16, "shards of the other split are not touched"
    with pytest.raises(DataError, match=r"train-00000\.tok is damaged.*delete .*isthmus data prepare"):
        read_epoch(open_source(folder))


def test_a_torn_or_missing_shard_is_named(folder: Path) -> None:
    path = folder / "train-00001.tok"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00001\.tok has 198 bytes, not 200"):
        read_epoch(open_source(folder))
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001\.tok cannot be read"):
        read_epoch(open_source(folder))


def test_a_token_that_the_model_does_not_know_is_found_whatever_the_manifest_says(tmp_path: Path) -> None:
    manifest = write_data(str(tmp_path), np.full(50, 70), np.full(50, 70))
    shards = tuple(replace(shard, max_token=9) for shard in manifest.shards)
    lying = replace(manifest, vocab_size=10, shards=shards)
    (tmp_path / "manifest.json").write_bytes(lying.to_json())
    with pytest.raises(DataError, match="holds token 70, but the model knows 10"):
        open_source(tmp_path, vocab_size=10).microbatch(0, 0)


def read_epoch(source: TokenSource) -> None:
    for step in range(source.num_sequences // 6 + 1):
        for microbatch in range(3):
            source.microbatch(step, microbatch)


def test_shards_in_s3_are_fetched_once_into_the_cache(tmp_path: Path, folder: Path, s3_url: str) -> None:
    manifest = write_data(s3_url, np.arange(1, 300), np.arange(1, 60))
    source = open_source(s3_url, cache=str(tmp_path / "cache"))
    expected = open_source(folder).microbatch(1, 2)
    assert torch.equal(source.microbatch(1, 2).tokens_BT, expected.tokens_BT)
    read_epoch(source)
    for shard in manifest.split_shards("train"):
        open_store(s3_url).delete(shard.name)
        cached = (tmp_path / "cache" / "tokens" / f"{shard.sha256}.tok").read_bytes()
        assert hashlib.sha256(cached).hexdigest() == shard.sha256
    again = open_source(s3_url, cache=str(tmp_path / "cache"))
    assert torch.equal(again.microbatch(1, 2).tokens_BT, expected.tokens_BT)


def test_a_cached_shard_gone_bad_says_what_to_delete(tmp_path: Path, s3_url: str) -> None:
    manifest = write_data(s3_url, np.arange(1, 60), np.arange(1, 60))
    cached = tmp_path / "tokens" / f"{manifest.shards[0].sha256}.tok"
    cached.parent.mkdir()
    cached.write_bytes(bytes(manifest.shards[0].size_bytes))
    with pytest.raises(DataError, match=rf"damaged.*delete {cached}"):
        open_source(s3_url, cache=str(tmp_path)).microbatch(0, 0)
