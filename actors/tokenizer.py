"""Text to token ids: a byte-level BPE trained on a sample, or a tokenizer.json that the user brings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from actors.errors import DataError

# What ends a document, under the names that published tokenizers give it.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")

# A byte-level BPE has one token for each byte before it learns any, and the end of a document.
MIN_VOCAB_SIZE = 257

# Longer documents are cut at line ends, since an encoding takes a hundred times the memory of its text.
BLOCK_CHARS = 2**18


class Block(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


def cut_blocks(text: str) -> Iterator[Block]:
    """Yield a document in blocks of at most BLOCK_CHARS characters, cut after a line where there is one."""
    start = 0
    while len(text) - start > BLOCK_CHARS:
        stop = text.rfind("\n", start, start + BLOCK_CHARS) + 1 or start + BLOCK_CHARS
        yield Block(text[start:stop], ends_document=False)
        start = stop
    yield Block(text[start:], ends_document=True)


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A tokenizer with its end-of-document token; small enough to travel with each batch to another process."""

    tokenizer_json: bytes
    eos_id: int
    vocab_size: int

    @property
    def dtype_name(self) -> str:
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    def encode(self, blocks: Sequence[Block]) -> NDArray:
        """Return the blocks' tokens end to end, an end-of-document token after each document.

        Text that spells a special token is encoded as the text it is: no document can forge a border.
        """
        texts = [block.text for block in blocks]
        encodings = _parsed(self.tokenizer_json).encode_batch_fast(texts, add_special_tokens=False)
        end = [self.eos_id]
        parts = [
            np.array(encoding.ids + end if block.ends_document else encoding.ids, dtype=self.dtype_name)
            for block, encoding in zip(blocks, encodings, strict=True)
        ]
        return np.concatenate(parts)


def open_tokenizer(tokenizer_json: bytes, eos: str | None, location: str) -> TextEncoder:
    """Return the encoder of a tokenizer.json; `eos` names its end-of-document token, else the usual names are tried.

    Raises DataError, naming `location`, for bytes that are no tokenizer, or one without such a token.
    """
    try:
        tokenizer = _parsed(tokenizer_json)
    except Exception as error:  # The tokenizers library raises nothing narrower.
        raise DataError(
            f"{location} is not a tokenizer ({error})", "give the tokenizer.json of a Hugging Face model folder"
        ) from error
    names = EOS_NAMES if eos is None else (eos,)
    eos_ids = [token_id for name in names if (token_id := tokenizer.token_to_id(name)) is not None]
    if not eos_ids:
        raise DataError(
            f"{location} has no end-of-document token {' or '.join(names)}", "name one of its tokens with --eos"
        )
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextEncoder(tokenizer_json=tokenizer_json, eos_id=eos_ids[0], vocab_size=vocab_size)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Return the tokenizer.json of a byte-level BPE of at most `vocab_size` tokens (Sennrich et al. 2016; GPT-2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer.to_str().encode()


@lru_cache(maxsize=1)
def _parsed(tokenizer_json: bytes) -> Tokenizer:
    """Parse once a process: a batch brings the same bytes as the one before it."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer
