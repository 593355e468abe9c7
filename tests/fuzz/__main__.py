"""Coverage-guided fuzzing of everything that parses bytes from a peer: python -m tests.fuzz; `make fuzz` runs it.

Exit code 1 where a target found something, 2 where one cannot run here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.hunt import HUNTED, Outcome, hunt, missing_for
from tests.fuzz.native import BuildFailed
from tests.fuzz.targets import TARGETS

_LOG_TAIL_LINES = 30


def main() -> int:
    """Hunt, or run one input alone."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(HUNTED)}; all of them where none is named")
    parser.add_argument("--seconds", type=int, default=600, help="how long, in all: targets run side by side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="for logs, corpora and findings")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one input of a Python target alone")
    options = parser.parse_args()
    if options.replay:
        name, path = options.replay
        TARGETS[name].check(Path(path).read_bytes())
        return 0
    targets = options.targets or HUNTED
    if odd := sorted(set(targets) - {*HUNTED, *TARGETS}):
        parser.error(f"no such target: {', '.join(odd)}")
    if missing := {missing_for(target) for target in targets} - {""}:
        parser.error("; ".join(sorted(missing)))
    try:
        outcomes = hunt(targets, options.folder.resolve(), seconds=options.seconds, seed=options.seed)
    except BuildFailed as error:
        parser.error(str(error))
    sys.stdout.write(f"{'target':10} {'executions':>12} {'coverage':>9} {'corpus':>7} findings\n")
    sys.stdout.writelines(map(_row, outcomes))
    return 0 if all(outcome.is_clean for outcome in outcomes) else 1


def _row(outcome: Outcome) -> str:
    counts = f"{outcome.executions:12,} {outcome.coverage:9,} {outcome.corpus:7,} {len(outcome.findings)}"
    if outcome.is_clean:
        return f"{outcome.target:10} {counts}\n"
    tail = "\n".join(outcome.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    alone = "".join(f"run it alone: {replay}\n" for replay in outcome.replays)
    return f"{outcome.target:10} {counts}\n{tail}\n{alone}"


if __name__ == "__main__":
    sys.exit(main())
