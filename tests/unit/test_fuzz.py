"""The fuzzers: a minute of them finds nothing, and mistakes that are planted are found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from actors.kernels.cpu import SOURCES
from tests.fuzz import native
from tests.fuzz.choices import Choices, edit, patch
from tests.fuzz.hunt import HUNTED, NATIVE, hunt, missing_for
from tests.fuzz.last_input import last_input, noting
from tests.fuzz.targets import TARGETS

# Of the minute in CI, each half.
SECONDS = 30
PYTHON_TARGETS = tuple(target for target in HUNTED if target != NATIVE)
BOUNDS_CHECK = "if (index < num_elements) into[index]"

needs_atheris = pytest.mark.skipif(bool(missing_for("frames")), reason=missing_for("frames"))
needs_compiler = pytest.mark.skipif(bool(missing_for(NATIVE)), reason=missing_for(NATIVE))
# Starting and building take longer than hunting where other work goes on.
long = pytest.mark.timeout(400)


@pytest.mark.parametrize("target", PYTHON_TARGETS)
def test_good_starts_and_past_findings_pass(target: str) -> None:
    seeds = list(TARGETS[target].seeds())
    assert len(seeds) > 10
    for seed in seeds:
        TARGETS[target].check(seed)


def test_an_input_that_is_over_goes_on_with_zeros() -> None:
    choices = Choices(b"\x05\x01\x02")
    assert (choices.pick("abc"), choices.number(2), choices.are_over) == ("c", 0x0201, True)
    assert (choices.number(8), choices.pick("abc"), choices.rest()) == (0, "a", b"")


def test_patches_and_edits_do_what_was_chosen() -> None:
    buffer = bytearray(8)
    patch(buffer, Choices(bytes([2, 3, 0, 0, 0xAA, 7, 0, 1, 0xBB, 0xCC])))
    assert buffer.hex() == "000000aa000000bb"
    document = {"a": [1, 2], "b": "x"}
    assert edit(document, Choices(bytes([1, 4, 0, 2, 1]))) == {"a": [1], "b": "x"}
    assert edit(document, Choices(b"")) == document


def test_the_last_input_is_there_whatever_ended_the_check(tmp_path: Path) -> None:
    def check(data: bytes) -> None:
        raise ZeroDivisionError(data)

    with pytest.raises(ZeroDivisionError):
        noting(check, tmp_path / "noted")(b"abc")
    assert last_input(tmp_path / "noted") == b"abc"


@pytest.mark.slow
@long
@needs_atheris
def test_half_a_minute_in_python_finds_nothing(tmp_path: Path) -> None:
    for outcome in hunt(PYTHON_TARGETS, tmp_path, seconds=SECONDS, seed=1):
        assert outcome.is_clean, outcome.log.read_text(errors="replace")[-3000:]
        assert outcome.executions > len(list(TARGETS[outcome.target].seeds()))


@pytest.mark.slow
@long
@needs_compiler
def test_half_a_minute_in_the_library_finds_nothing(tmp_path: Path) -> None:
    [outcome] = hunt([NATIVE], tmp_path, seconds=SECONDS, seed=1)
    assert outcome.is_clean, outcome.log.read_text(errors="replace")[-3000:]
    assert outcome.corpus > len(list(native.seeds()))


@pytest.mark.slow
@long
@needs_atheris
def test_a_mailbox_that_takes_too_much_is_found(tmp_path: Path) -> None:
    [outcome] = hunt(["planted"], tmp_path, seconds=SECONDS, seed=1)
    assert not outcome.is_clean
    [finding] = outcome.findings
    with pytest.raises(AssertionError, match=r"frames .*wait"):
        TARGETS["planted"].check(finding.read_bytes())
    TARGETS["frames"].check(finding.read_bytes())


@pytest.mark.slow
@long
@needs_compiler
def test_a_bounds_check_that_is_gone_is_found(tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    [place] = [path for path in sources.glob("cpu_*") if BOUNDS_CHECK in path.read_text()]
    place.write_text(place.read_text().replace(BOUNDS_CHECK, "into[index]"))
    fuzzer = native.build(tmp_path / "build", sources)
    # Whole chunks only, so that it takes a mutation to name an element that is not there.
    write_seeds(tmp_path / "seeds", *native.seeds(sizes=(300, 4096)))
    done = run(fuzzer, "--seconds", str(SECONDS), "--seeds", tmp_path / "seeds", "--findings", tmp_path)
    assert done.returncode == 1
    assert "heap-buffer-overflow" in done.stderr
    [finding] = tmp_path.glob("finding-*")
    assert f"run it alone: {fuzzer} {finding}" in done.stdout
    assert "heap-buffer-overflow" in run(fuzzer, finding).stderr


# The driver itself, on targets of a few lines.

MAGIC = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint32_t magic = 0;
  if (size > 8) memcpy(&magic, data + 4, 4);
  if (magic == 0x4D544849u && data[0] == 'I') ENDING
  return 0;
}
"""


def build_toy(folder: Path, ending: str) -> Path:
    folder.mkdir()
    (folder / "toy.cpp").write_text(MAGIC.replace("ENDING", ending))
    return native.build(folder, sources=folder, target=folder / "toy.cpp")


def write_seeds(folder: Path, *seeds: bytes) -> None:
    folder.mkdir()
    for number, seed in enumerate(seeds):
        (folder / f"{number:03}").write_bytes(seed)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@needs_compiler
def test_the_driver_follows_comparisons_and_is_repeatable(tmp_path: Path) -> None:
    fuzzer = build_toy(tmp_path / "toy", "abort();")
    write_seeds(tmp_path / "seeds", bytes(16))
    options = ("--seconds", 60, "--seeds", tmp_path / "seeds", "--findings", tmp_path)
    few = [run(fuzzer, *options, "--executions", 50, "--seed", 3) for _ in range(2)]
    assert few[0].stdout == few[1].stdout != ""
    assert few[0].returncode == 0
    found = run(fuzzer, *options, "--seed", 3)
    assert found.returncode == 1
    [finding] = tmp_path.glob("finding-*")
    assert (finding.read_bytes()[:1], finding.read_bytes()[4:8]) == (b"I", b"IHTM")
    assert run(fuzzer, finding).returncode != 0


@pytest.mark.slow
@needs_compiler
def test_the_driver_ends_a_run_that_hangs(tmp_path: Path) -> None:
    fuzzer = build_toy(tmp_path / "toy", "for (volatile int i = 0;; i = i + 1) {}")
    write_seeds(tmp_path / "seeds", bytes(16))
    done = run(fuzzer, "--seconds", 60, "--hang-seconds", 1, "--seeds", tmp_path / "seeds", "--findings", tmp_path)
    assert done.returncode == 1
    assert "a run that did not end" in done.stdout
    assert len(list(tmp_path.glob("finding-*"))) == 1
