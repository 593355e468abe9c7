"""Text to hashed token shards: what `isthmus data prepare` does.

    inputs -> survey (count, hash, sample) -> tokenizer -> blocks, in batches, to processes -> shards -> manifest

The corpus is read twice: once to survey it, once to tokenise it. The same inputs and options give the same bytes,
however many processes work.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.corpus import CorpusFile, list_files, read_documents
from actors.errors import DataError, IsthmusError
from actors.store import BlobStore, open_store
from actors.token_shards import (
    MANIFEST,
    SHARD_NAME,
    SPLITS,
    TOKENIZER,
    VERSION,
    DataManifest,
    ShardWriter,
    Split,
    load_if_present,
)
from actors.tokenizer import MIN_VOCAB_SIZE, Block, TextEncoder, cut_blocks, open_tokenizer, train_tokenizer

# Done and total bytes of text; the total is 0 while it is not known yet.
Progress = Callable[[int, int], None]

# About a second of one core: little beside it is what a batch costs to send.
BATCH_BYTES = 4 * 2**20
BATCH_DEADLINE_S = 600.0
# Starting a process pays only for work of some seconds.
MIN_PROCESS_BYTES = 16 * 2**20
# A shard is assembled in memory.
MAX_SHARD_TOKENS = 2**28
MAX_TOKENIZER_BYTES = 2**27
_RANKS = 2**64


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """All that decides, with the inputs, which bytes are written."""

    vocab_size: int
    tokenizer_sha256: str | None
    eos: str | None
    text_key: str
    val_fraction: float
    shard_tokens: int
    train_bytes: int

    def __post_init__(self) -> None:
        if self.tokenizer_sha256 is None and not MIN_VOCAB_SIZE <= self.vocab_size <= 2**20:
            raise DataError(
                f"a vocabulary of {self.vocab_size} tokens cannot be trained",
                f"set --vocab-size between {MIN_VOCAB_SIZE} and {2**20}",
            )
        if not 0 < self.val_fraction < 1:
            raise DataError(f"val_fraction is {self.val_fraction}", "set --val-fraction between 0 and 1, such as 0.02")
        if not 1 <= self.shard_tokens <= MAX_SHARD_TOKENS:
            raise DataError(
                f"shards of {self.shard_tokens} tokens cannot be written",
                f"set --shard-tokens between 1 and {MAX_SHARD_TOKENS}",
            )
        if self.train_bytes < 1:
            raise DataError(f"train_bytes is {self.train_bytes}", "set --train-bytes to 1 or more")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the first pass learns of the corpus."""

    num_documents: int
    text_bytes: int
    # A document is held out if its rank is below this.
    val_below: int
    # Text for the tokenizer to learn from, in the order of its rank.
    sample: tuple[str, ...]


def prepare(
    inputs: Sequence[str],
    out: Path | str,
    *,
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    eos: str | None = None,
    text_key: str = "text",
    val_fraction: float = 0.02,
    shard_tokens: int = 2**24,
    train_bytes: int = 4_000_000,
    workers: int = 1,
    force: bool = False,
    progress: Progress = lambda done_bytes, total_bytes: None,
) -> DataManifest:
    """Tokenise `inputs` (see `list_files`) into a folder or s3:// prefix that a TokenSource reads; return its manifest.

    A byte-level BPE of `vocab_size` is trained on about `train_bytes` of the text, unless `tokenizer` names a
    tokenizer.json, whose end-of-document token `eos` may name. About `val_fraction` of the documents, at least one,
    is held out; of a lone document, its end. What `out` already holds for the same inputs (by name and size) and
    options is returned at once; other data there are replaced only with `force`.

    Raises DataError for inputs or options that do not do, DiskFull, and StoreError.
    """
    if workers < 1:
        raise DataError(f"{workers} processes cannot work", "set --workers to 1 or more")
    own_tokenizer = None if tokenizer is None else _tokenizer_bytes(tokenizer)
    options = PrepareOptions(
        vocab_size=vocab_size,
        tokenizer_sha256=None if own_tokenizer is None else hashlib.sha256(own_tokenizer).hexdigest(),
        eos=eos,
        text_key=text_key,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        train_bytes=train_bytes,
    )
    files = list_files(inputs)
    store = open_store(str(out))
    options_sha256 = _options_sha256(files, options)
    prepared = None if force else _prepared(store, options_sha256)
    if prepared is not None:
        return prepared

    survey = survey_corpus(read_documents(files, text_key), options, progress)
    tokenizer_json = own_tokenizer or train_tokenizer(survey.sample, vocab_size)
    encoder = open_tokenizer(tokenizer_json, eos, str(tokenizer or "the trained tokenizer"))

    _clear(store)
    store.put(TOKENIZER, tokenizer_json)
    documents = split_documents(read_documents(files, text_key), survey, val_fraction)
    processes = max(1, min(workers, survey.text_bytes // MIN_PROCESS_BYTES))
    writers = {split: ShardWriter(store, split, encoder.dtype_name, shard_tokens) for split in SPLITS}
    counts = {split: np.zeros(encoder.vocab_size, dtype=np.int64) for split in SPLITS}
    done_bytes = 0
    for batch, tokens in _encoded(encoder, batch_by_split(documents), processes):
        writers[batch.split].append(tokens)
        counts[batch.split] += np.bincount(tokens, minlength=encoder.vocab_size)
        done_bytes += batch.text_bytes
        progress(done_bytes, survey.text_bytes)

    manifest = DataManifest(
        version=VERSION,
        dtype=encoder.dtype_name,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
        options_sha256=options_sha256,
        source=", ".join(inputs),
        num_documents=survey.num_documents,
        unigram_loss=unigram_loss(counts["train"], counts["val"]),
        shards=tuple(shard for split in SPLITS for shard in writers[split].close()),
    )
    store.put(MANIFEST, manifest.to_json())
    return manifest


def survey_corpus(texts: Iterable[str], options: PrepareOptions, progress: Progress) -> Survey:
    """Count and hash the documents, find which are to be held out, and sample the others for the tokenizer.

    The sample is the blocks of highest rank, `train_bytes` of them: spread evenly over the corpus, and the same
    whatever order it is read in. (Those of lowest rank are mostly the held-out documents themselves.) Raises DataError
    where the corpus cannot be split in two.
    """
    num_documents = text_bytes = sample_bytes = 0
    lowest, highest = _RANKS, 0
    # A heap, the block of lowest rank first: (rank, bytes, rank of its document, text).
    sample: list[tuple[int, int, int, str]] = []
    for text in texts:
        document = _rank(text)
        lowest, highest = min(lowest, document), max(highest, document)
        num_documents += 1
        for block in cut_blocks(text):
            block_bytes = len(block.text.encode())
            text_bytes += block_bytes
            sample_bytes += block_bytes
            heapq.heappush(sample, (_rank(block.text), block_bytes, document, block.text))
            while sample_bytes - sample[0][1] >= options.train_bytes:
                sample_bytes -= heapq.heappop(sample)[1]
        progress(text_bytes, 0)
    if num_documents == 0:
        raise DataError("the inputs hold no text", "name files that are not empty")
    if num_documents > 1 and lowest == highest:
        raise DataError(
            f"all {num_documents} documents are the same: none can be held out", "give at least two that differ"
        )
    # At least one document on either side; a lone one is cut instead.
    val_below = min(max(int(options.val_fraction * _RANKS), lowest + 1), highest)
    return Survey(
        num_documents=num_documents,
        text_bytes=text_bytes,
        val_below=val_below,
        sample=tuple(text for _, _, document, text in sorted(sample) if num_documents == 1 or document >= val_below),
    )


def split_documents(texts: Iterable[str], survey: Survey, val_fraction: float) -> Iterator[tuple[Split, str]]:
    """Yield each document with the split it is for; equal documents go to the same one."""
    for text in texts:
        if survey.num_documents == 1:
            cut = math.ceil(len(text) * (1 - val_fraction))
            yield "train", text[:cut]
            yield "val", text[cut:]
        else:
            yield ("val" if _rank(text) < survey.val_below else "train"), text


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Blocks of one split, in order, that one process tokenises."""

    split: Split
    blocks: tuple[Block, ...]
    text_bytes: int


def batch_by_split(documents: Iterable[tuple[Split, str]]) -> Iterator[Batch]:
    """Group the blocks of each split's documents, in order, into batches of about BATCH_BYTES."""
    pending: dict[Split, list[Block]] = {split: [] for split in SPLITS}
    num_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)

    def finished(split: Split) -> Batch:
        batch = Batch(split=split, blocks=tuple(pending[split]), text_bytes=num_bytes[split])
        pending[split], num_bytes[split] = [], 0
        return batch

    for split, text in documents:
        for block in cut_blocks(text):
            pending[split].append(block)
            num_bytes[split] += len(block.text.encode())
            if num_bytes[split] >= BATCH_BYTES:
                yield finished(split)
    yield from (finished(split) for split in SPLITS if pending[split])


def unigram_loss(train_counts: NDArray[np.int64], val_counts: NDArray[np.int64]) -> float:
    """Return the nats a token of `val_counts` under the frequencies of `train_counts`, smoothed by adding one."""
    frequencies = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    # Rounded, because the last digits of a logarithm differ between machines.
    return round(float(-(val_counts * np.log(frequencies)).sum() / val_counts.sum()), 6)


def _encoded(encoder: TextEncoder, batches: Iterable[Batch], processes: int) -> Iterator[tuple[Batch, NDArray]]:
    """Yield each batch with its tokens, in order, with few batches under way at once."""
    if processes == 1:
        # The tokenizers library runs the blocks of a batch on threads of its own.
        yield from ((batch, encoder.encode(batch.blocks)) for batch in batches)
        return
    pending: deque[tuple[Batch, Future[NDArray]]] = deque()
    # Spawned, not forked: threads run here already.
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_become_worker)

    def next_result() -> tuple[Batch, NDArray]:
        batch, future = pending.popleft()
        return batch, future.result(timeout=BATCH_DEADLINE_S)

    try:
        for batch in batches:
            pending.append((batch, pool.submit(encoder.encode, batch.blocks)))
            if len(pending) > 2 * processes:
                yield next_result()
        while pending:
            yield next_result()
    except TimeoutError as error:
        raise IsthmusError(
            f"a tokenising process did not answer in {BATCH_DEADLINE_S:.0f} s",
            "see whether this machine swaps or was suspended, and run again with fewer --workers",
        ) from error
    except BrokenProcessPool as error:
        raise IsthmusError(
            "a tokenising process died, perhaps for want of memory", "run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _become_worker() -> None:
    # One core each; and Ctrl-C is the parent's to handle.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _rank(text: str) -> int:
    """Return a text's place among all texts, uniform in [0, 2**64), from its content alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _options_sha256(files: Sequence[CorpusFile], options: PrepareOptions) -> str:
    listing = [(file.name, file.size_bytes) for file in files]
    return hashlib.sha256(json.dumps([VERSION, asdict(options), listing]).encode()).hexdigest()


def _prepared(store: BlobStore, options_sha256: str) -> DataManifest | None:
    """Return what the store holds for these options, None where that is nothing or lacks a file; else DataError."""
    manifest = load_if_present(store)
    if manifest is None:
        return None
    if manifest.options_sha256 != options_sha256:
        raise DataError(
            f"{store.url} holds data of other inputs or options ({manifest.source})",
            "choose another --out, or replace them with --force",
        )
    sizes = store.sizes()
    whole = TOKENIZER in sizes and all(sizes.get(shard.name) == shard.size_bytes for shard in manifest.shards)
    return manifest if whole else None


def _clear(store: BlobStore) -> None:
    # The manifest goes first: what is left without one is not data.
    store.delete(MANIFEST)
    for name in store.list():
        if SHARD_NAME.fullmatch(name):
            store.delete(name)


def _tokenizer_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror})", "name the tokenizer.json of a model folder with --tokenizer"
        ) from error
    if len(data) > MAX_TOKENIZER_BYTES:
        raise DataError(
            f"{path} has more than {MAX_TOKENIZER_BYTES:,} bytes",
            "name a tokenizer.json, not weights, with --tokenizer",
        )
    return data
