"""A fuzzer's input as a sequence of choices, so that any bytes mean something and a good start can be written by hand.

An input that is over goes on with zeros: choice 0 is everywhere the harmless one.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TypeVar

_Item = TypeVar("_Item")


class Choices:
    """Reads an input from its first byte to its last."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    @property
    def are_over(self) -> bool:
        return self._offset >= len(self._data)

    def take(self, size_bytes: int) -> bytes:
        """Return the next bytes, fewer where the input ends."""
        taken = self._data[self._offset : self._offset + size_bytes]
        self._offset += size_bytes
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def number(self, size_bytes: int = 1) -> int:
        """Return an unsigned number of so many bytes, little-endian."""
        return int.from_bytes(self.take(size_bytes), "little")

    def pick(self, items: Sequence[_Item]) -> _Item:
        return items[self.number() % len(items)]


def patch(buffer: bytearray, choices: Choices) -> None:
    """Overwrite up to seven places of a buffer that is not empty, each with 1 to 8 chosen bytes."""
    for _ in range(choices.number() % 8):
        offset = choices.number(2) % len(buffer)
        value = choices.take(choices.pick((1, 2, 4, 8)))[: len(buffer) - offset]
        buffer[offset : offset + len(value)] = value


def edit(document: object, choices: Choices) -> object:
    """Return a JSON document in which up to three values are changed, added or left out; it may be changed itself."""
    for _ in range(choices.number() % 4):
        document = _edited(document, choices)
    return document


_VALUES: tuple[object, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    1 << 31,
    (1 << 47) + 1,
    1 << 63,
    10**400,
    0.5,
    -0.0,
    1e308,
    "",
    "0" * 64,
    "float32",
    "bfloat16",
    "int64",
    "\ud800",
    "../x\n",
    [],
    [0, 1 << 47, 1 << 47],
    {},
)


def _edited(value: object, choices: Choices) -> object:
    """Return the value with one change, as deep in it as is chosen."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    what = choices.number() % 8
    if what == 0 or not keys:
        # A copy, because a later edit may go into it.
        return deepcopy(choices.pick(_VALUES))
    if what == 1:
        return choices.take(choices.number()).decode("utf-8", "surrogateescape")
    key = choices.pick(keys)
    assert isinstance(value, dict | list)
    if what == 2:
        del value[key]
    elif what == 3 and isinstance(value, dict):
        value[str(choices.number())] = value[key]
    elif what == 3 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = _edited(value[key], choices)
    return value
