"""What every bench shares: its arguments, and a result file that says on what machine it was measured."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def parse_arguments(description: str) -> argparse.Namespace:
    """Return the arguments that every bench takes."""
    return bench_parser(description).parse_args()


def bench_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of these arguments, for a bench that takes some of its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="five minutes at most, fewer rounds")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    parser.add_argument("--out", type=Path, help="where the JSON goes instead of bench/results")
    return parser


def result_path(name: str, arguments: argparse.Namespace) -> Path:
    """Return where the JSON of a bench goes."""
    return arguments.out or RESULTS / f"{name}{'-quick' if arguments.quick else ''}.json"


def save(name: str, arguments: argparse.Namespace, measured: Mapping[str, object]) -> Path:
    """Write what was measured, with the command, the machine and the versions, and return the file."""
    path = result_path(name, arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Where somebody's own files lie is nobody else's business.
    words = ["FOLDER" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    document = {
        "command": " ".join([f"python -m bench.{name}", *words]),
        "measured_at": moment(),
        "machine": machine(),
        **measured,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def moment() -> str:
    """Return the time of now, as results have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, object]:
    """Return what the figures depend on besides the code."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "ray": _version("ray"),
    }


def _version(package: str) -> str | None:
    """Return None where it is not installed, as Ray on a machine for kernels alone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
