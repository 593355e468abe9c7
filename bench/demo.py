"""The demo as a stranger meets it: how soon the first loss line, how long in all, how far below a unigram model.

    python -m bench.demo [--check]

Runs `isthmus demo` in a folder of its own, from no data to the sample, and draws its curve to docs/demo.png. The demo
itself is done within five minutes, so that --quick changes nothing but the name of the result.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from actors.token_shards import DataManifest
from bench.record import parse_arguments, save
from orchestrator.events import read_history
from orchestrator.pictures import BLUE, curves_picture, timeline_picture
from orchestrator.report import loss_curves
from orchestrator.runfolder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = {"first_loss_s": 30.0, "total_s": 240.0, "below_unigram_nats": 1.0}


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"runs_dir={scratch}/runs", f"data.path={scratch}/data"]
        began_s = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", "demo", *words],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        )
        first_loss_s = 0.0
        assert process.stdout is not None
        for line in process.stdout:
            if not first_loss_s and line.startswith("step") and " loss " in line:
                first_loss_s = time.monotonic() - began_s
            print(line, end="", flush=True)
        if process.wait() != 0:
            print(f"the demo failed with exit code {process.returncode}")
            return 1
        total_s = time.monotonic() - began_s
        history = read_history(RunFolder(Path(scratch) / "runs" / "demo").events)
        unigram_loss = DataManifest.load(f"{scratch}/data").unigram_loss
    curves_picture(loss_curves(history, "demo", BLUE), ROOT / "docs" / "demo.png")
    timeline_picture(
        next(step for step in reversed(history.steps) if step.stages[0].actions), ROOT / "docs" / "timeline.png"
    )
    measured = {
        "first_loss_s": first_loss_s,
        "total_s": total_s,
        "val_loss": history.evaluations[-1].loss,
        "unigram_loss": unigram_loss,
        "below_unigram_nats": unigram_loss - history.evaluations[-1].loss,
        "tokens": history.steps[-1].total_tokens,
        "tokens_per_s": history.steps[-1].total_tokens / sum(step.step_s for step in history.steps),
        "train_loss": [step.loss for step in history.steps],
        "val_losses": [[evaluation.step, evaluation.loss] for evaluation in history.evaluations],
        "bounds": BOUNDS,
    }
    print(f"saved {save('demo', arguments, measured)}")
    missed = [key for key in ("first_loss_s", "total_s") if measured[key] > BOUNDS[key]]
    if measured["below_unigram_nats"] < BOUNDS["below_unigram_nats"]:
        missed.append("below_unigram_nats")
    print(
        f"first loss line after {first_loss_s:.1f} s ({BOUNDS['first_loss_s']:.0f}), all in {total_s:.0f} s "
        f"({BOUNDS['total_s']:.0f}), validation loss {measured['val_loss']:.3f}, "
        f"{measured['below_unigram_nats']:.2f} nats below a unigram model's ({BOUNDS['below_unigram_nats']:.0f})"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
