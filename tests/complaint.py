"""What a verb says when something is wrong: one line, one remedy, an exit code, and never a traceback."""

from __future__ import annotations

import pytest

from orchestrator.cli import main


def complaint_of(capsys: pytest.CaptureFixture[str], exit_code: int, *argv: str) -> str:
    """Run `isthmus ARGV`, check the exit code and the form of what it says on standard error, and return that."""
    code = main(argv)
    said = capsys.readouterr().err
    assert code == exit_code, said
    assert_one_complaint(said)
    return said


def assert_one_complaint(said: str) -> None:
    lines = said.splitlines()
    assert len([line for line in lines if line.startswith("isthmus: ")]) == 1, said
    assert len([line for line in lines if line.startswith("  remedy: ")]) == 1, said
    assert "Traceback" not in said
