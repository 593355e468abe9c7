"""What a process holds over what it held: the system's count, not ours."""

from __future__ import annotations

import sys

import pytest

from actors.resident import ResidentMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is missing")
SIZE = 64 * 1024 * 1024


def test_what_was_there_before_does_not_count_and_the_peak_does() -> None:
    before = bytearray(b"x") * SIZE
    memory = ResidentMemory()
    idle_bytes = memory.peak_bytes()
    assert idle_bytes < SIZE // 2
    held = bytearray(b"y") * SIZE
    assert idle_bytes + 0.9 * SIZE < memory.peak_bytes() < idle_bytes + 1.5 * SIZE
    del held
    assert memory.peak_bytes() > idle_bytes + 0.9 * SIZE
    assert len(before) == SIZE
