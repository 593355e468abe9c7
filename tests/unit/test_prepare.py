"""Inputs to documents, and documents to token shards."""

import errno
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models

from actors import prepare as prepare_module
from actors.corpus import STDLIB, list_files, read_documents
from actors.errors import DataError, DiskFull, IsthmusError
from actors.prepare import prepare, unigram_loss
from actors.store import open_store
from actors.token_shards import DataManifest, ShardWriter, parse_manifest

WORDS = ("isthmus", "strait", "harbour", "tide", "pilot", "lantern", "ferry", "channel")


def documents(num_documents: int = 40) -> list[str]:
    return [
        f"Document {number}.\n" + " ".join(WORDS[(number * 7 + place * place) % 8] for place in range(60))
        for number in range(num_documents)
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    return path


def texts_of(*inputs: Path | str, text_key: str = "text") -> list[str]:
    return list(read_documents(list_files([str(name) for name in inputs]), text_key))


def written_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens_of(folder: Path, split: str) -> np.ndarray:
    manifest = DataManifest.load(folder)
    parts = [np.fromfile(folder / shard.name, manifest.token_dtype) for shard in manifest.split_shards(split)]
    return np.concatenate(parts)


def test_a_folder_is_read_sorted_and_without_hidden_or_empty_files(tmp_path: Path) -> None:
    for name, text in (("b.txt", "two"), ("a/z.md", "three"), ("a.py", "one"), (".git/x", "no"), ("empty.txt", "")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert texts_of(tmp_path / "in") == ["one", "two", "three"]
    assert texts_of(tmp_path / "in" / "**" / "*.md") == ["three"]


def test_jsonl_plain_and_gzipped(tmp_path: Path) -> None:
    lines = '{"body": "first"}\n\n{"body": "second", "text": 3}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert texts_of(tmp_path, text_key="body") == ["first", "second"] * 2


def test_parquet_is_read_across_row_groups_and_nulls_are_left_out(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "b", "c"], "other": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts_of(tmp_path) == ["a", "b", "c"]


def test_an_s3_prefix_or_object_is_read(s3_url: str) -> None:
    store = open_store(s3_url)
    store.put("in/b.txt", b"two")
    store.put("in/a.jsonl", b'{"text": "one"}\n')
    assert texts_of(f"{s3_url}/in") == ["one", "two"]
    assert texts_of(f"{s3_url}/in/b.txt") == ["two"]
    with pytest.raises(DataError, match="names no file"):
        list_files([f"{s3_url}/nothing"])


def test_the_standard_library_is_a_corpus() -> None:
    files = list_files([STDLIB])
    names = [file.name for file in files]
    assert "json/decoder.py" in names
    assert not [name for name in names if "test" in name.split("/") or "site-packages" in name]
    assert sum(file.size_bytes for file in files) > 5_000_000


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl, line 2, is a list"),
        ("a.jsonl", b'{"words": "x"}\n', "line 1, is an object with the keys ['words']"),
        ("a.jsonl", b'{"text": "x"\n', "line 1, is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1, is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-6], "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.txt", b"caf\xe9 noir", "a.txt is not UTF-8 at byte 3"),
        ("a.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_bad_input_is_named_with_a_remedy(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        texts_of(tmp_path / name)
    assert complaint in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("table", [{"words": ["x"]}, {"text": [1]}])
def test_a_parquet_file_without_a_column_of_text_is_refused(tmp_path: Path, table: dict) -> None:
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'text'.*--text-key"):
        texts_of(tmp_path / "a.parquet")


def test_a_parquet_string_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        texts_of(tmp_path / "a.parquet")


def test_an_input_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*names no file"):
        list_files([str(tmp_path / "nowhere")])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="hold no text"):
        prepare([str(tmp_path / "empty.txt")], tmp_path / "out")


def test_shards_hold_every_document_once_and_decode_to_it(tmp_path: Path, corpus: Path) -> None:
    manifest = prepare([str(corpus)], tmp_path / "out", vocab_size=400, val_fraction=0.2, shard_tokens=500)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    decoded = []
    for split in ("train", "val"):
        tokens = tokens_of(tmp_path / "out", split)
        assert tokens[-1] == manifest.eos_id
        borders = np.flatnonzero(tokens == manifest.eos_id)
        decoded += [tokenizer.decode(part[part != manifest.eos_id]) for part in np.split(tokens, borders + 1)[:-1]]
    assert sorted(decoded) == sorted(documents())
    assert manifest.num_documents == 40
    assert manifest.vocab_size <= 400
    assert all(shard.num_tokens <= 500 for shard in manifest.shards)
    assert len(manifest.split_shards("train")) > 1
    assert 0 < manifest.num_tokens("val") < manifest.num_tokens("train")


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(prepare_module, "MIN_PROCESS_BYTES", 1)
    prepare([str(corpus)], tmp_path / "one", vocab_size=400, workers=1)
    prepare([str(corpus)], tmp_path / "two", vocab_size=400, workers=2)
    assert written_files(tmp_path / "one") == written_files(tmp_path / "two")


def test_a_tokenising_process_that_dies_is_reported(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(prepare_module, "MIN_PROCESS_BYTES", 1)
    monkeypatch.setattr(prepare_module, "_become_worker", os.abort)
    with pytest.raises(IsthmusError, match=r"died.*--workers"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=300, workers=2)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_long_documents_are_encoded_in_blocks_and_stay_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.tokenizer.BLOCK_CHARS", 50)
    texts = ["a line of text\n" * 40, "x" * 500]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = prepare([str(tmp_path / "in.jsonl")], tmp_path / "out", vocab_size=300)
    tokens = np.concatenate([tokens_of(tmp_path / "out", split) for split in ("train", "val")])
    assert np.count_nonzero(tokens == manifest.eos_id) == 2


def test_text_that_spells_the_separator_is_text(tmp_path: Path) -> None:
    texts = ["one <|endoftext|> two", "three <|endoftext|> four"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = prepare([str(tmp_path / "in.jsonl")], tmp_path / "out", vocab_size=300)
    tokens = np.concatenate([tokens_of(tmp_path / "out", split) for split in ("train", "val")])
    assert np.count_nonzero(tokens == manifest.eos_id) == 2


def test_the_end_of_a_lone_document_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(documents()))
    manifest = prepare([str(tmp_path / "book.txt")], tmp_path / "out", vocab_size=300, val_fraction=0.1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    train, val = (tokenizer.decode(tokens_of(tmp_path / "out", split)) for split in ("train", "val"))
    assert train + val == "\n".join(documents())
    assert 0.05 < manifest.num_tokens("val") / manifest.num_tokens("train") < 0.2


@pytest.mark.parametrize("val_fraction", [1e-9, 0.999999])
def test_each_split_gets_at_least_one_document(tmp_path: Path, corpus: Path, val_fraction: float) -> None:
    manifest = prepare([str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=val_fraction)
    assert manifest.num_tokens("train") > 0
    assert manifest.num_tokens("val") > 0


def test_documents_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "same"}\n' * 3)
    with pytest.raises(DataError, match="all 3 documents are the same"):
        prepare([str(tmp_path / "in.jsonl")], tmp_path / "out")


def test_the_sample_for_the_tokenizer_is_bounded_and_leaves_out_held_out_text() -> None:
    options = prepare_module.PrepareOptions(
        vocab_size=300,
        tokenizer_sha256=None,
        eos=None,
        text_key="text",
        val_fraction=0.3,
        shard_tokens=1000,
        train_bytes=3_000,
    )
    texts = documents(200)
    survey = prepare_module.survey_corpus(texts, options, lambda done_bytes, total_bytes: None)
    held_out = {
        text for split, text in prepare_module.split_documents(texts, survey, options.val_fraction) if split == "val"
    }
    assert 0.2 < len(held_out) / 200 < 0.4
    assert not held_out & set(survey.sample)
    assert 3_000 <= sum(map(len, survey.sample)) < 3_600
    backwards = prepare_module.survey_corpus(texts[::-1], options, lambda done_bytes, total_bytes: None)
    assert backwards == survey


def test_progress_ends_at_the_total(tmp_path: Path, corpus: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare([str(corpus)], tmp_path / "out", vocab_size=300, progress=lambda done, total: seen.append((done, total)))
    total_bytes = sum(len(text.encode()) for text in documents())
    assert seen[0][1] == 0
    assert seen[-1] == (total_bytes, total_bytes)


def test_prepared_data_are_reused_and_others_only_replaced_by_force(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    first = prepare([str(corpus)], out, vocab_size=300, shard_tokens=200)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare([str(corpus)], out, vocab_size=300, shard_tokens=200, workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before

    with pytest.raises(DataError, match="--force"):
        prepare([str(corpus)], out, vocab_size=400)
    second = prepare([str(corpus)], out, vocab_size=400, force=True)
    assert {path.name for path in out.glob("*.tok")} == {shard.name for shard in second.shards}
    assert DataManifest.load(out) == second


def test_a_missing_shard_is_made_again(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    prepare([str(corpus)], out, vocab_size=300)
    before = written_files(out)
    (out / "train-00000.tok").unlink()
    prepare([str(corpus)], out, vocab_size=300)
    assert written_files(out) == before


def test_a_given_tokenizer_is_kept_as_it_is(tmp_path: Path, corpus: Path) -> None:
    prepare([str(corpus)], tmp_path / "first", vocab_size=350)
    given = tmp_path / "first" / "tokenizer.json"
    manifest = prepare([str(corpus)], tmp_path / "second", tokenizer=given, eos="f")
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert manifest.eos_id == Tokenizer.from_file(str(given)).token_to_id("f")
    with pytest.raises(DataError, match="--eos"):
        prepare([str(corpus)], tmp_path / "third", tokenizer=given, eos="no such token")


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path, corpus: Path) -> None:
    vocabulary = {f"word{number}": number for number in range(70_000)} | {"</s>": 70_000, "?": 70_001}
    given = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(vocabulary, unk_token="?")).save(str(given))
    manifest = prepare([str(corpus)], tmp_path / "out", tokenizer=given)
    assert (manifest.dtype, manifest.vocab_size, manifest.eos_id) == ("uint32", 70_002, 70_000)
    assert set(tokens_of(tmp_path / "out", "train")) == {70_000, 70_001}


@pytest.mark.parametrize("data", [b"{}", b"not json", b"\xff\xff"])
def test_bytes_that_are_no_tokenizer_are_refused(tmp_path: Path, corpus: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError, match="is not a tokenizer"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "option",
    [{"vocab_size": 256}, {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"shard_tokens": 0}, {"workers": 0}],
)
def test_options_out_of_range_name_their_flag(tmp_path: Path, corpus: Path, option: dict) -> None:
    with pytest.raises(DataError) as caught:
        prepare([str(corpus)], tmp_path / "out", **option)
    assert "--" + next(iter(option)).replace("_", "-") in caught.value.remedy


def test_a_full_disk_is_named_and_leaves_no_manifest(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync = os.fsync

    def full_disk(descriptor: int) -> None:
        if ".tok" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DiskFull, match=r"-00000\.tok"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    with pytest.raises(DataError, match="no prepared data"):
        DataManifest.load(tmp_path / "out")


def test_unigram_loss_is_the_entropy_of_what_the_frequencies_predict() -> None:
    uniform = np.array([9, 9, 9, 9])
    assert unigram_loss(uniform, np.array([1, 2, 3, 4])) == pytest.approx(np.log(4), abs=1e-6)
    # With one added to each count: 3/4 and 1/4.
    skewed = unigram_loss(np.array([2, 0]), np.array([1, 1]))
    assert skewed == pytest.approx(-(np.log(3 / 4) + np.log(1 / 4)) / 2, abs=1e-6)


def test_a_writer_cuts_at_exactly_the_shard_size(tmp_path: Path) -> None:
    writer = ShardWriter(open_store(str(tmp_path)), "train", "uint16", 4)
    for part in np.split(np.arange(10, dtype=np.uint16), [1, 7]):
        writer.append(part)
    shards = writer.close()
    assert [shard.num_tokens for shard in shards] == [4, 4, 2]
    assert [shard.max_token for shard in shards] == [3, 7, 9]
    assert b"".join((tmp_path / shard.name).read_bytes() for shard in shards) == np.arange(10, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"dtype": "float64"},
        {"vocab_size": 10.0},
        {"eos_id": 10**6},
        {"tokenizer_sha256": "no"},
        {"shards": {}},
        {"surplus": 1},
    ],
)
def test_a_manifest_is_parsed_strictly(tmp_path: Path, corpus: Path, change: dict) -> None:
    manifest = prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    assert parse_manifest(manifest.to_json()) == manifest
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is not a manifest"):
        DataManifest.load(tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/passwd"},
        {"name": "train-00000.tok/.."},
        {"split": "test"},
        {"size_bytes": 1},
        {"num_tokens": -1},
        {"max_token": 300},
        {"sha256": ""},
    ],
)
def test_a_shards_line_is_parsed_strictly(tmp_path: Path, corpus: Path, change: dict) -> None:
    prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    path = tmp_path / "out" / "manifest.json"
    fields = json.loads(path.read_text())
    fields["shards"][0] |= change
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="is not a manifest"):
        DataManifest.load(tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 100_000, b'{"version": NaN}', b"\xff"])
def test_bytes_that_are_no_manifest_are_a_data_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(DataError, match="is not a manifest"):
        DataManifest.load(tmp_path)
