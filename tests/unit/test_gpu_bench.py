"""What bench.gpu makes of its figures; measuring them takes a GPU."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from bench import gpu


def test_a_sanitizer_that_does_not_end_is_a_miss_and_costs_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def never_ends(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    monkeypatch.setattr(subprocess, "run", never_ends)
    outcomes = gpu.run_sanitizer()
    assert set(outcomes) == {"memcheck", "racecheck", "initcheck", "synccheck"}
    assert gpu.misses({}, {}, {}, outcomes) == [f"{tool}: not done in 900 s" for tool in outcomes]


@pytest.mark.parametrize("work", ["float32 q8 encode", "bfloat16 hq4 decode", "float32 tk2 decode and add"])
def test_every_encode_and_decode_of_the_targets_is_held_to_one(work: str) -> None:
    assert len(gpu.misses({work: {"gbps": 1.0, "share_of_copy": 0.59}}, {}, {}, {})) == 1
