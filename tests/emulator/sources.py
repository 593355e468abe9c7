"""Copies of the kernels' source with one thing changed, to show that a test notices."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from actors.kernels.cuda import SOURCES

_BARRIER = re.compile(r"__sync(threads|warp)\(\);")


def barriers() -> list[tuple[str, int]]:
    """Return every barrier of the kernels: its file, and where in the file's text it starts."""
    return [
        (path.name, barrier.start())
        for path in sorted(SOURCES.glob("kernels*.cuh"))
        for barrier in _BARRIER.finditer(path.read_text())
    ]


def without_barrier(folder: Path, file: str, start: int) -> Path:
    """Copy the sources, but for one barrier."""
    text = (SOURCES / file).read_text()
    return _copy(folder, file, text[:start] + _BARRIER.sub("", text[start:], count=1))


def with_change(folder: Path, file: str, before: str, after: str) -> Path:
    """Copy the sources with a text, that is there once, replaced."""
    text = (SOURCES / file).read_text()
    assert text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
    return _copy(folder, file, text.replace(before, after))


def _copy(folder: Path, file: str, text: str) -> Path:
    copy = folder / "changed"
    shutil.copytree(SOURCES, copy)
    (copy / file).write_text(text)
    return copy
