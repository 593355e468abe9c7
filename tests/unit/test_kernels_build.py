"""How the CPU library is built, cached and loaded; what happens where it cannot be; and that no sanitizer objects."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from actors.kernels import reference
from actors.kernels.cpu import GENERIC, NativeUnavailable, levels_here, levels_of, load_native
from actors.kernels.dispatch import host_kernels, prepare_kernels
from actors.kernels.layout import BlockForm

ROOT = Path(__file__).parents[2]
SUBPROCESS_TIMEOUT_S = 100.0
Q8 = BlockForm(bits=8)
# Compiles in a moment.
FAST = ("-O0",)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("", []),
        ("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3", ["x86-64-v2"]),
        ("avx avx2 bmi1 bmi2 f16c fma abm movbe", []),
        (
            "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe avx512f",
            ["x86-64-v3", "x86-64-v2"],
        ),
    ],
)
def test_a_level_needs_those_below_it(flags: str, levels: list[str]) -> None:
    assert levels_of(f"processor : 0\nflags\t\t: fpu {flags}\n\n") == [*levels, GENERIC]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library in a cache of its own."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    cache = tmp_path_factory.mktemp("cache")
    load_native(cache=cache, options=FAST)
    (library,) = cache.iterdir()
    return library


def test_a_built_library_is_not_built_again(built: Path) -> None:
    made_ns = built.stat().st_mtime_ns
    load_native(cache=built.parent, options=FAST)
    assert [(path, path.stat().st_mtime_ns) for path in built.parent.iterdir()] == [(built, made_ns)]


def test_a_library_that_cannot_be_loaded_is_named(built: Path, tmp_path: Path) -> None:
    (tmp_path / built.name).write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match=rf"{built.name} cannot be loaded .*; delete it"):
        load_native(levels_here()[0], cache=tmp_path, options=FAST)


@needs_compiler
def test_processes_may_build_at_once(tmp_path: Path) -> None:
    program = f"from actors.kernels.cpu import load_native; print(load_native(options={FAST}).name)"
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "ISTHMUS_CACHE": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [build.communicate(timeout=SUBPROCESS_TIMEOUT_S)[0] for build in builds] == [f"cpu {levels_here()[0]}\n"] * 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.skipif(levels_here() == [GENERIC], reason="needs an x86-64 processor of level v2 or above")
def test_no_element_costs_a_call(tmp_path: Path) -> None:
    load_native(levels_here()[0], cache=tmp_path)
    (library,) = tmp_path.iterdir()
    # What is called of the mathematics library is not in vectors: five times slower.
    called = {
        name for name in (b"fmaxf", b"fminf", b"floorf", b"fabsf", b"fmaf") if name + b"\0" in library.read_bytes()
    }
    assert not called


def fake_compiler(folder: Path, script: str) -> None:
    (folder / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "g++").chmod(0o755)


@needs_compiler
def test_a_level_that_the_compiler_does_not_know_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(
        tmp_path, f'case "$*" in *x86-64-v*) echo bad architecture >&2; exit 1;; esac\nexec {shutil.which("g++")} "$@"'
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert load_native(cache=tmp_path / "cache", options=FAST).name == f"cpu {GENERIC}"


def test_without_a_compiler_codecs_run_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"there is no g\+\+"):
        load_native(cache=tmp_path)
    with pytest.warns(UserWarning, match=r"plain torch.*there is no g\+\+.*install g\+\+"):
        assert host_kernels.__wrapped__() is reference


def test_the_compiler_s_complaint_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, "echo one >&2; echo two >&2; echo three >&2; echo four >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(NativeUnavailable) as caught:
        load_native(cache=tmp_path / "cache")
    assert "one\ntwo\nthree" in str(caught.value)
    assert "four" not in str(caught.value)


@needs_compiler
@pytest.mark.parametrize("cache", ["file/cache", "long" * 100], ids=["in a file", "not even looked into"])
def test_a_cache_that_cannot_be_used_costs_a_build_but_not_the_library(tmp_path: Path, cache: str) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"cannot be used .*compiles the codecs anew; set ISTHMUS_CACHE"):
        kernels = load_native(levels_here()[0], cache=tmp_path / cache, options=FAST)
    source_N = torch.linspace(-3.0, 5.0, 1000)
    assert torch.equal(kernels.encode_blocks(source_N, Q8, 0), reference.encode_blocks(source_N, Q8, 0))


@needs_compiler
def test_where_nothing_can_be_written_codecs_run_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with (
        pytest.warns(UserWarning, match="set ISTHMUS_CACHE"),
        pytest.raises(NativeUnavailable, match="no folder can be written to compile in"),
    ):
        load_native(levels_here()[0], cache=tmp_path / "file" / "cache", options=FAST)


@needs_compiler
def test_machines_of_another_kind_do_not_share_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        load_native(GENERIC, cache=tmp_path, options=FAST)
    assert len(list(tmp_path.iterdir())) == 2


@needs_compiler
@pytest.mark.slow
def test_no_sanitizer_finds_anything() -> None:
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        if not Path(found.strip()).is_absolute():
            pytest.skip(f"g++ has no {name}")
        libraries.append(found.strip())
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_cases"],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
        timeout=SUBPROCESS_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_gpus_stage_has_the_cpus_kernels_before_a_frame_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr("actors.kernels.dispatch._cuda_kernels", lambda: built.append("cuda"))
    monkeypatch.setattr("actors.kernels.dispatch.host_kernels", lambda: built.append("cpu"))
    prepare_kernels(torch.device("cuda"))
    assert built == ["cuda", "cpu"]
