"""What a fuzzing process was at when it ended, in a file mapped into its memory: there it is, whatever ended it."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

MAX_INPUT_BYTES = 16_384
_SIZE_BYTES = 4


def noting(check: Callable[[bytes], None], path: Path) -> Callable[[bytes], None]:
    """Return the check, which now leaves each input, of up to MAX_INPUT_BYTES, in the file before it looks at it."""
    path.write_bytes(bytes(_SIZE_BYTES + MAX_INPUT_BYTES))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)

    def noting_check(data: bytes) -> None:
        memory[:_SIZE_BYTES] = len(data).to_bytes(_SIZE_BYTES, "little")
        memory[_SIZE_BYTES : _SIZE_BYTES + len(data)] = data
        check(data)

    return noting_check


def last_input(path: Path) -> bytes:
    """Return the input that was noted last."""
    noted = path.read_bytes()
    return noted[_SIZE_BYTES:][: int.from_bytes(noted[:_SIZE_BYTES], "little")]
