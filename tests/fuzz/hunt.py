"""Runs fuzz targets side by side, each in a process of its own, and says what each did and found."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import native
from tests.fuzz.last_input import last_input
from tests.fuzz.targets import TARGETS

NATIVE = "native"
HUNTED = (*(name for name in TARGETS if name != "planted"), NATIVE)

_ROOT = Path(__file__).parents[2]
# Starting, a last input and writing the statistics come on top of the time to hunt.
_GRACE_S = 120.0
_HANG_S = 20
_LAST_INPUT = "last-input"
_MAX_MEMORY_MB = 4096
_COUNTS = {
    "executions": re.compile(r"^(?:executions |stat::number_of_executed_units:\s*)(\d+)", re.MULTILINE),
    "coverage": re.compile(r"(?:coverage |cov: )(\d+)"),
    "corpus": re.compile(r"(?:corpus |corp: )(\d+)"),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one target's hunt came to; counts are 0 where it ended before it told them."""

    target: str
    executions: int
    # Of Python the branches and comparisons, of the library the steps from one block of code to another.
    coverage: int
    corpus: int
    findings: tuple[Path, ...]
    # It ended as asked: no finding, no crash of the fuzzer itself.
    is_clean: bool
    log: Path
    # The command that runs each finding alone.
    replays: tuple[str, ...]


@dataclass(frozen=True)
class _Running:
    target: str
    process: subprocess.Popen[bytes]
    folder: Path
    # To which a finding's path is added.
    replay: tuple[str, ...]

    @property
    def log(self) -> Path:
        return self.folder / "log"


def missing_for(target: str) -> str:
    """Say what a target needs that is not here; empty where it can run."""
    if target == NATIVE:
        return "" if shutil.which("g++") else "g++ is not installed"
    return "" if importlib.util.find_spec("atheris") else "atheris is not installed: pip install atheris==3.0.0"


def hunt(targets: Iterable[str], folder: Path, *, seconds: int, seed: int) -> list[Outcome]:
    """Run targets side by side for so many seconds; logs, corpora and findings go to `folder`."""
    commands = {target: _prepare(target, folder / target, seconds, seed) for target in targets}
    deadline = time.monotonic() + seconds + _GRACE_S
    running: list[_Running] = []
    try:
        for target, (command, replay) in commands.items():
            running.append(_start(target, folder / target, command, replay))
        return [_finish(one, deadline) for one in running]
    finally:
        for one in running:
            one.process.kill()


def _prepare(target: str, folder: Path, seconds: int, seed: int) -> tuple[Sequence[str], tuple[str, ...]]:
    """Return the command that hunts, and the one that runs an input alone; the seeds are written, the library built."""
    seeds, findings = folder / "seeds", folder / "findings"
    for made in (seeds, findings):
        made.mkdir(parents=True, exist_ok=True)
    # What an earlier hunt found is tried again first.
    for finding in findings.iterdir():
        finding.replace(seeds / finding.name)
    _write_seeds(native.seeds() if target == NATIVE else TARGETS[target].seeds(), seeds)
    if target == NATIVE:
        program = str(native.build(folder / "build"))
        limits = ["--seconds", str(seconds), "--seed", str(seed)]
        return [program, *limits, "--seeds", str(seeds), "--findings", str(findings)], (program,)
    (folder / "corpus").mkdir(exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-timeout={_HANG_S}",
        f"-rss_limit_mb={_MAX_MEMORY_MB}",
        # Seeds differ in what they mean more than in what they cover, and long ones from the start.
        "-keep_seed=1",
        "-len_control=0",
        f"-artifact_prefix={findings}/",
        "-print_final_stats=1",
    ]
    python = (sys.executable, "-m")
    process = [*python, "tests.fuzz.atheris_process", target, str(folder / _LAST_INPUT)]
    return [*process, *options, str(folder / "corpus"), str(seeds)], (*python, "tests.fuzz", "--replay", target)


def _write_seeds(seeds: Iterable[bytes], folder: Path) -> None:
    for seed in seeds:
        (folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)


def _start(target: str, folder: Path, command: Sequence[str], replay: tuple[str, ...]) -> _Running:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=_ROOT)
    return _Running(target, process, folder, replay)


def _keep_last_input(folder: Path) -> None:
    """Where a process ended without a word of its last input, make that the finding."""
    findings, noted = folder / "findings", folder / _LAST_INPUT
    if noted.exists() and not any(findings.iterdir()):
        (findings / "last-input").write_bytes(last_input(noted))


def _finish(one: _Running, deadline: float) -> Outcome:
    """Wait for a hunt; one that is not over in time is ended, and is not clean."""
    try:
        one.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        one.process.kill()
        one.process.wait()
    said = one.log.read_text(errors="replace")
    counts = {name: int((pattern.findall(said) or ["0"])[-1]) for name, pattern in _COUNTS.items()}
    if one.process.returncode != 0:
        _keep_last_input(one.folder)
    findings = tuple(sorted((one.folder / "findings").iterdir()))
    return Outcome(
        target=one.target,
        **counts,
        findings=findings,
        is_clean=one.process.returncode == 0 and not findings,
        log=one.log,
        replays=tuple(shlex.join([*one.replay, str(finding)]) for finding in findings),
    )
