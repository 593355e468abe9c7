"""What the codecs cost in learning: held-out loss against the same training without them, paired by seed.

    python -m bench.quality [--quick] [--check] [--fresh]

Two parts: a pipeline of four stages whose boundary tensors pass through each pair of codecs, forward and backward; and
four replicas that take local steps and exchange pseudo-gradients through each codec. Every case is one training run in
one process, with the project's own layers, optimizer and codecs, on real bytes; two run at a time, a thread each. What
is done is kept in bench/results/quality and not run again, until --fresh.

Writes bench/results/quality.json, docs/quality.md and docs/quality.png; --quick writes its JSON only.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from actors.prepare import prepare
from actors.settings import DataConfig
from bench.quality_cases import VOCAB_SIZE, full_cases, quick_cases
from bench.quality_report import markdown, picture
from bench.quality_runs import run_cases
from bench.quality_summary import summarise
from bench.record import RESULTS, bench_parser, save

ROOT = Path(__file__).resolve().parent.parent
# What a pair may lose of none/none's loss.
BOUNDS = {"q8/q8": 0.005, "hq4/q8": 0.015}


def main() -> int:
    parser = bench_parser(__doc__ or "")
    parser.add_argument("--fresh", action="store_true", help="run again what is kept, too")
    arguments = parser.parse_args()
    kept = RESULTS / "quality" / ("quick" if arguments.quick else "full")
    if arguments.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    data = DataConfig(path=str(ROOT / "data" / "quality"), document_mask=False)
    manifest = prepare(["python-stdlib"], data.path, vocab_size=VOCAB_SIZE, val_fraction=0.05)
    results = run_cases(quick_cases() if arguments.quick else full_cases(), data, kept)
    summary = {"bounds": BOUNDS, **summarise(results, manifest)}
    print(f"saved {save('quality', arguments, summary)}")
    if not arguments.quick:
        picture(summary, ROOT / "docs" / "quality.png")
        (ROOT / "docs" / "quality.md").write_text(markdown(summary))
        print("wrote docs/quality.md and docs/quality.png")
    shares = {name: _share(summary, name) for name in BOUNDS}
    missed = [name for name, bound in BOUNDS.items() if shares[name] > bound]
    print(
        "of none/none's loss: "
        + ", ".join(f"{name} {shares[name]:+.2%} (at most {bound:.1%})" for name, bound in BOUNDS.items())
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if arguments.check and missed else 0


def _share(summary: dict[str, Any], pair: str) -> float:
    return summary["pipeline"]["methods"][pair]["difference"]["share"]


if __name__ == "__main__":
    sys.exit(main())
