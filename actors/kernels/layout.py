"""The layout of what the kernels write: sizes and offsets that follow from the codec's form and the element count.

PURE. Nothing of a payload's layout is read from the payload. All little-endian.

    blocks: codes of every block | steps, bfloat16 each, padded with zeros to 8 bytes | trailer
    chunks: records of every chunk, padded with zeros to 8 bytes | trailer
    trailer: checksum, uint64 | how many blocks or chunks could not be encoded, uint64; always 0 on a link
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

BLOCK = 128
CHUNK = 4096
TRAILER_BYTES = 16


class Fault(IntEnum):
    """What is wrong with a payload of the right size; the first of these that holds."""

    NONE = 0
    # Altered or cut together wrongly since it was made.
    CHECKSUM = 1
    # Its source held an infinity, NaN, or a value beyond the codec's range.
    NOT_FINITE = 2
    # No encoder makes these bytes.
    GRAMMAR = 3


def _to_8(size_bytes: int) -> int:
    return -(-size_bytes // 8) * 8


@dataclass(frozen=True, kw_only=True)
class BlockForm:
    """How blocks of 128 elements are quantised: one step a block, `bits` a code; the last block is padded with 0."""

    # 8: a code is an int8; 4: byte i of a block holds element i, plus 8, low and element i + 64, plus 8, high.
    bits: int
    # Whether a block is rotated (random signs, then the Walsh-Hadamard transform) before it is rounded.
    hadamard: bool = False
    # Round up with the probability of the remainder, from a seed; else to nearest, ties to even.
    stochastic: bool = False

    @property
    def codes_bytes(self) -> int:
        """Of one block."""
        return BLOCK * self.bits // 8

    def num_blocks(self, num_elements: int) -> int:
        return -(-num_elements // BLOCK)

    def steps_offset(self, num_elements: int) -> int:
        return self.num_blocks(num_elements) * self.codes_bytes

    def trailer_offset(self, num_elements: int) -> int:
        return self.steps_offset(num_elements) + _to_8(2 * self.num_blocks(num_elements))

    def payload_bytes(self, num_elements: int) -> int:
        return self.trailer_offset(num_elements) + TRAILER_BYTES


@dataclass(frozen=True, kw_only=True)
class ChunkForm:
    """How chunks of 4096 elements are thinned to their `k` largest; the last chunk is padded with 0.

    A record: low level and high level, bfloat16 each | of each kept index, ascending, its `low_bits` low bits | the
    indices' high parts in unary (Elias-Fano): bit (index >> low_bits) + rank is set | of each a sign bit, and with two
    bits a value one that says which level. Each section starts on a byte and fills its bytes from the lowest bit.
    """

    k: int
    # 2: sign and one of two levels; 1: sign and one level, the low one, the high one is 0.
    bits: int = 2

    @property
    def low_bits(self) -> int:
        return (CHUNK // self.k).bit_length() - 1

    @property
    def high_bits(self) -> int:
        """The length of the unary section; its last bit is never set."""
        return self.k + (CHUNK >> self.low_bits)

    # Where a record's sections start, in bytes.
    @property
    def high_offset(self) -> int:
        return 4 + self.k * self.low_bits // 8

    @property
    def values_offset(self) -> int:
        return self.high_offset + self.high_bits // 8

    @property
    def record_bytes(self) -> int:
        return self.values_offset + self.k * self.bits // 8

    def num_chunks(self, num_elements: int) -> int:
        return -(-num_elements // CHUNK)

    def trailer_offset(self, num_elements: int) -> int:
        return _to_8(self.num_chunks(num_elements) * self.record_bytes)

    def payload_bytes(self, num_elements: int) -> int:
        return self.trailer_offset(num_elements) + TRAILER_BYTES
