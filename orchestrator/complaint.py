"""How an error reaches a person: one line of what happened, one of what to do."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from rich.console import Console


def complain(message: str, remedy: str, exit_code: int) -> int:
    """Print an error and its remedy, and return the exit code."""
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    errors.print(f"isthmus: {_one_line(message)}", style="red")
    if remedy:
        errors.print(f"  remedy: {_one_line(remedy)}")
    return exit_code


def drop_output() -> None:
    """Send what standard output still holds nowhere: should it be what failed, it would fail again at exit."""
    # Where it is no file, as under a test, there is nothing to drop.
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return " ".join(text.split())
