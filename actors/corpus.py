"""Inputs to documents: text, JSONL and Parquet files, from a file, folder, glob, S3 prefix or Python itself.

Reading is streamed and in a fixed order, so that two passes over the same files see the same documents.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from actors.errors import DataError
from actors.store import BlobStore, open_store

# The input word for the source of Python's own standard library: text that every machine has.
STDLIB = "python-stdlib"

# A document is held in memory while it is tokenised.
MAX_DOCUMENT_BYTES = 256 * 2**20
PARQUET_BATCH_ROWS = 256

# Folders of the standard library that hold test data, other projects, or programs rather than the library.
_STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip", "__pycache__"}
)


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One input file: `name` is its path below the input that it came from, the same on every machine."""

    name: str
    # A path on this machine, or a key of `store`.
    key: str
    size_bytes: int
    store: BlobStore | None = None

    @property
    def location(self) -> str:
        return self.key if self.store is None else f"{self.store.url.rstrip('/')}/{self.key}"


def list_files(inputs: Sequence[str]) -> tuple[CorpusFile, ...]:
    """Return the files that `inputs` name, input by input, each input's in sorted order.

    An input is a file, a folder (all files below it but hidden ones), a glob, s3://bucket/prefix, or `python-stdlib`.
    Raises DataError for an input that names no file.
    """
    files: list[CorpusFile] = []
    for name in inputs:
        found = list(_input_files(name))
        if not found:
            raise DataError(
                f"input {name!r} names no file",
                f"give a file, a folder, a glob in quotes, s3://bucket/prefix, or the word {STDLIB}",
            )
        files.extend(found)
    if not files:
        raise DataError("no input was given", f"name files or folders with text, or the word {STDLIB}")
    return tuple(files)


def read_documents(files: Sequence[CorpusFile], text_key: str) -> Iterator[str]:
    """Yield the text of each document, file by file; empty documents and Parquet nulls are left out.

    `text_key` names the field of JSONL objects and the column of Parquet files; any other file is one document.
    Raises DataError, with file and line, for what cannot be read as text.
    """
    for file in files:
        try:
            with _local_copy(file) as path:
                yield from filter(None, _texts(path, file.location, text_key))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException) as error:
            raise DataError(
                f"{file.location} cannot be read ({error})",
                "check that it is whole and readable, or leave it out of the inputs",
            ) from error


def _input_files(name: str) -> Iterator[CorpusFile]:
    if name == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from (file for file in _folder_files(root, _STDLIB_LEFT_OUT) if file.key.endswith(".py"))
    elif name.startswith("s3://"):
        yield from _store_files(name)
    elif os.path.isdir(name):
        yield from _folder_files(Path(name))
    elif os.path.isfile(name):
        yield _local_file(Path(name), Path(name).name)
    else:
        found = (Path(path) for path in sorted(glob.glob(name, recursive=True)))
        yield from (_local_file(path, path.as_posix()) for path in found if path.is_file())


def _local_file(path: Path, name: str) -> CorpusFile:
    return CorpusFile(name=name, key=str(path), size_bytes=path.stat().st_size)


def _folder_files(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[CorpusFile]:
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        # os.walk visits what is left in the list, in its order.
        subfolders[:] = sorted(name for name in subfolders if name not in left_out and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield _local_file(path, path.relative_to(root).as_posix())


def _refuse_folder(error: OSError) -> None:
    # os.walk would pass over it in silence.
    raise DataError(f"folder {error.filename} cannot be read ({error.strerror})", "give this user access to it")


def _store_files(url: str) -> Iterator[CorpusFile]:
    store = open_store(url)
    sizes = store.sizes()
    parent, _, name = url.rpartition("/")
    if not sizes and name and not parent.endswith("/"):
        # The URL names one object rather than a prefix.
        store = open_store(parent)
        size_bytes = store.size(name)
        sizes = {} if size_bytes is None else {name: size_bytes}
    for key, size_bytes in sizes.items():
        # A key that ends so is the mark that some programs leave for a folder.
        if not key.endswith("/"):
            yield CorpusFile(name=key, key=key, size_bytes=size_bytes, store=store)


@contextmanager
def _local_copy(file: CorpusFile) -> Iterator[Path]:
    """The file on this machine: itself, or fetched from its store for as long as it is read."""
    if file.store is None:
        yield Path(file.key)
        return
    with tempfile.TemporaryDirectory(prefix="isthmus-corpus-") as folder:
        path = Path(folder, "input")
        file.store.get_file(file.key, path)
        yield path


def _texts(path: Path, location: str, text_key: str) -> Iterator[str]:
    if location.endswith(".jsonl"):
        with open(path, "rb") as lines:
            yield from _jsonl_texts(lines, location, text_key)
    elif location.endswith(".jsonl.gz"):
        with gzip.GzipFile(path, "rb") as lines:
            yield from _jsonl_texts(lines, location, text_key)
    elif location.endswith(".parquet"):
        yield from _parquet_texts(path, location, text_key)
    else:
        with open(path, "rb") as file:
            yield _decode(file.read(MAX_DOCUMENT_BYTES + 1), location)


def _jsonl_texts(lines: io.BufferedIOBase, location: str, text_key: str) -> Iterator[str]:
    for number in count(1):
        line = lines.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            return
        if not line.isspace():
            yield _jsonl_text(line, f"{location}, line {number},", text_key)


def _jsonl_text(line: bytes, location: str, text_key: str) -> str:
    try:
        row: Any = json.loads(_decode(line, location))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not JSON ({error})", "write one JSON object a line") from error
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        held = f"an object with the keys {sorted(row)[:8]}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(
            f"{location} is {held}, not an object whose {text_key!r} is a string",
            "name the field that holds the text with --text-key",
        )
    return _encodable(text, location)


def _parquet_texts(path: Path, location: str, text_key: str) -> Iterator[str]:
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if text_key not in schema.names:
            raise DataError(
                f"{location} has no column {text_key!r} (it has {', '.join(schema.names[:8])})",
                "name the column that holds the text with --text-key",
            )
        kind = schema.field(text_key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{location}: column {text_key!r} holds {kind}, not strings",
                "name the column that holds the text with --text-key",
            )
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                yield text or ""


def _decode(data: bytes, location: str) -> str:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{location} is one document of more than {MAX_DOCUMENT_BYTES:,} bytes",
            "split it into several files, or make it JSONL with one document a line",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{location} is not UTF-8 at byte {error.start}",
            "convert it to UTF-8, or leave it out with a glob such as 'folder/**/*.txt'",
        ) from error


def _encodable(text: str, location: str) -> str:
    """Return `text`, which JSON may have given a lone surrogate that no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location} holds half of a surrogate pair at character {error.start}",
            "mend or remove that line",
        ) from error
    return text
