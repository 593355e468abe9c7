"""Token shards: raw token files, the manifest that makes them whole, and the reader that trusts neither.

A prepared folder (or s3:// prefix) holds `train-00000.tok`, `val-00000.tok` and so on, little-endian token ids end to
end; `tokenizer.json`; and `manifest.json`, written last. No torch here, so that processes which tokenise start fast.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, NoReturn, cast, get_args

import numpy as np
from numpy.typing import NDArray

from actors.errors import DataError
from actors.store import BlobStore, open_store

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VERSION = 1
SHARD_NAME = re.compile(r"(?:train|val)-[0-9]{5,9}\.tok")

# A shard's line takes 200 bytes: room for 80,000 shards.
MAX_MANIFEST_BYTES = 16 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A file's elements are little-endian on every machine.
TOKEN_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One token file of a split, with what a reader checks it against."""

    name: str
    split: Split
    num_tokens: int
    size_bytes: int
    sha256: str
    max_token: int

    def __post_init__(self) -> None:
        _require(SHARD_NAME.fullmatch(self.name) is not None, f"{self.name[:80]!r} is not a shard's name")
        _require(self.split in SPLITS, f"{self.name} is of no known split")
        _require(self.num_tokens >= 1 and self.max_token >= 0, f"{self.name} has a count out of range")
        _require(_SHA256.fullmatch(self.sha256) is not None, f"{self.name} has no SHA-256")


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """What a prepared folder holds: its tokenizer, its shards in order, and how they were made."""

    version: int
    dtype: str
    vocab_size: int
    # Ends each document.
    eos_id: int
    tokenizer_sha256: str
    # Inputs (names and sizes) and options that the shards follow from.
    options_sha256: str
    source: str
    num_documents: int
    # Nats a token of the held-out split, under the train split's token frequencies: what a model without context gets.
    unigram_loss: float
    shards: tuple[TokenShard, ...]

    def __post_init__(self) -> None:
        _require(self.version == VERSION, f"it is of version {self.version}, not {VERSION}")
        _require(self.dtype in TOKEN_DTYPES, f"its dtype is {self.dtype[:80]!r}")
        _require(1 <= self.vocab_size <= 2**31, "its vocab_size is out of range")
        _require(0 <= self.eos_id < self.vocab_size, "its eos_id is not in its vocabulary")
        _require(_SHA256.fullmatch(self.tokenizer_sha256) is not None, "its tokenizer has no SHA-256")
        _require(math.isfinite(self.unigram_loss), "its unigram_loss is not finite")
        names = [shard.name for shard in self.shards]
        _require(len(set(names)) == len(names), "it names a shard twice")
        for shard in self.shards:
            _require(
                shard.size_bytes == shard.num_tokens * self.token_dtype.itemsize and shard.max_token < self.vocab_size,
                f"size or max_token of {shard.name} contradicts the rest of it",
            )

    @property
    def token_dtype(self) -> np.dtype:
        return TOKEN_DTYPES[self.dtype]

    def split_shards(self, split: Split) -> tuple[TokenShard, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_tokens(self, split: Split) -> int:
        return sum(shard.num_tokens for shard in self.split_shards(split))

    @classmethod
    def load(cls, location: str | Path) -> DataManifest:
        """Read the manifest of a prepared folder or s3:// prefix; DataError where there is none or it is bad."""
        store = open_store(str(location))
        manifest = load_if_present(store)
        if manifest is None:
            raise DataError(
                f"{store.url} holds no prepared data",
                f"run isthmus data prepare INPUT... --out {location}, or set data.path to a prepared folder",
            )
        return manifest

    @property
    def sha256(self) -> str:
        """Which data these are: equal manifests name equal tokens, for each shard is named with its own hash."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"


def load_if_present(store: BlobStore) -> DataManifest | None:
    """Return the store's manifest, or None where it has none; DataError where it is not one."""
    size_bytes = store.size(MANIFEST)
    if size_bytes is None:
        return None
    try:
        _require(size_bytes <= MAX_MANIFEST_BYTES, f"it has {size_bytes:,} bytes")
        return parse_manifest(store.get(MANIFEST))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{store.url}/{MANIFEST} is not a manifest that this version reads: {error}",
            "delete it and run isthmus data prepare again",
        ) from error


def parse_manifest(data: bytes) -> DataManifest:
    """Parse a manifest strictly: exactly the known fields, each of its type; ValueError says what is wrong."""
    fields = _fields_of(json.loads(data, parse_constant=_refuse_constant), _MANIFEST_FIELDS, "it")
    shards = tuple(
        TokenShard(**_fields_of(row, _SHARD_FIELDS, f"shard {index}")) for index, row in enumerate(fields["shards"])
    )
    return DataManifest(**{**fields, "shards": shards})


_SHARD_FIELDS: Mapping[str, type] = {
    "name": str,
    "split": str,
    "num_tokens": int,
    "size_bytes": int,
    "sha256": str,
    "max_token": int,
}
_MANIFEST_FIELDS: Mapping[str, type] = {
    "version": int,
    "dtype": str,
    "vocab_size": int,
    "eos_id": int,
    "tokenizer_sha256": str,
    "options_sha256": str,
    "source": str,
    "num_documents": int,
    "unigram_loss": float,
    "shards": list,
}


def _fields_of(row: object, kinds: Mapping[str, type], what: str) -> dict:
    _require(isinstance(row, dict), f"{what} is not an object")
    fields = cast(dict, row)
    _require(fields.keys() == kinds.keys(), f"{what} lacks a field or has one too many")
    for name, kind in kinds.items():
        # Not isinstance: true is an int.
        _require(type(fields[name]) is kind, f"{name} of {what} is not of type {kind.__name__}")
    return fields


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise ValueError(complaint)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


class ShardWriter:
    """Cuts one split's tokens into shards and stores each with its hash; holds one shard in memory."""

    def __init__(self, store: BlobStore, split: Split, dtype: str, shard_tokens: int) -> None:
        self._store = store
        self._split: Split = split
        self._dtype = TOKEN_DTYPES[dtype]
        self._shard_tokens = shard_tokens
        self._pending: list[NDArray] = []
        self._num_pending = 0
        self._shards: list[TokenShard] = []

    def append(self, tokens: NDArray) -> None:
        while len(tokens):
            taken = tokens[: self._shard_tokens - self._num_pending]
            self._pending.append(taken)
            self._num_pending += len(taken)
            tokens = tokens[len(taken) :]
            if self._num_pending == self._shard_tokens:
                self._write_shard()

    def close(self) -> tuple[TokenShard, ...]:
        """Write what is left and return the split's shards in order."""
        if self._num_pending:
            self._write_shard()
        return tuple(self._shards)

    def _write_shard(self) -> None:
        tokens = np.concatenate(self._pending).astype(self._dtype, copy=False)
        self._pending, self._num_pending = [], 0
        data = tokens.tobytes()
        shard = TokenShard(
            name=f"{self._split}-{len(self._shards):05d}.tok",
            split=self._split,
            num_tokens=len(tokens),
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            max_token=int(tokens.max()),
        )
        self._store.put(shard.name, data)
        self._shards.append(shard)


class SplitTokens:
    """One split as one long array of tokens; each shard is memory-mapped, and checked, when it is first read.

    Shards of an s3:// location are fetched, on first read, into `cache`, named by their hash.
    """

    def __init__(self, location: str, manifest: DataManifest, split: Split, *, cache: Path, vocab_size: int) -> None:
        self._store = open_store(location)
        self._shards = manifest.split_shards(split)
        self._dtype = manifest.token_dtype
        self._cache = cache
        self._vocab_size = vocab_size
        # Where each shard ends in the split.
        self._stops = tuple(accumulate(shard.num_tokens for shard in self._shards))
        self._mapped: dict[int, NDArray] = {}

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens [start, stop) of the split, across shards, as int64.

        Raises DataError for a shard that is missing or not what the manifest says, StoreError if it cannot be fetched.
        """
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of {len(self)}")
        parts: list[NDArray] = []
        index = bisect_right(self._stops, start)
        while start < stop:
            shard_start = self._stops[index] - self._shards[index].num_tokens
            parts.append(self._tokens_of(index)[start - shard_start : stop - shard_start])
            start = self._stops[index]
            index += 1
        return np.concatenate(parts).astype(np.int64)

    def _tokens_of(self, index: int) -> NDArray:
        if index not in self._mapped:
            self._mapped[index] = self._checked(self._shards[index])
        return self._mapped[index]

    def _checked(self, shard: TokenShard) -> NDArray:
        path, remedy = self._local_file(shard)
        try:
            size_bytes = path.stat().st_size
            if size_bytes != shard.size_bytes:
                raise DataError(f"{path} has {size_bytes:,} bytes, not {shard.size_bytes:,}", remedy)
            tokens = np.memmap(path, dtype=self._dtype, mode="r")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})", remedy) from error
        if hashlib.sha256(tokens.data).hexdigest() != shard.sha256:
            raise DataError(f"{path} is damaged: its SHA-256 is not the manifest's", remedy)
        max_token = int(tokens.max())
        if max_token >= self._vocab_size:
            raise DataError(f"{path} holds token {max_token}, but the model knows {self._vocab_size} tokens", remedy)
        return tokens

    def _local_file(self, shard: TokenShard) -> tuple[Path, str]:
        """Return where the shard lies on this machine, fetched if need be, and what to do should it be bad."""
        store = self._store
        if not store.url.startswith("s3://"):
            path = Path(store.url, shard.name)
            return path, f"delete {path} and run the same isthmus data prepare again"
        path = self._cache / "tokens" / f"{shard.sha256}.tok"
        if not path.exists():
            store.get_file(shard.name, path)
        return path, f"delete {path}; if it happens again, upload {shard.name} to {store.url} again"
