"""One target under atheris: python -m tests.fuzz.atheris_process TARGET LAST_INPUT [libFuzzer's options and folders].

atheris gives libFuzzer the coverage of our own modules' bytecode: https://github.com/google/atheris.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # pyright: ignore
import torch

with atheris.instrument_imports(include=["actors", "orchestrator"]):  # pyright: ignore
    from tests.fuzz.last_input import MAX_INPUT_BYTES, noting
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Hunt until libFuzzer's options say to stop, or a check fails; does not return."""
    program, name, path, *options = sys.argv
    # Payloads are small: a pool of threads would only take time from the other targets.
    torch.set_num_threads(1)
    check = noting(TARGETS[name].check, Path(path))
    atheris.Setup([program, f"-max_len={MAX_INPUT_BYTES}", *options], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
