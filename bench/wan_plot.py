"""The picture of bench.wan: tokens a second of every system, case by case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.wan_cases import BATCH
from bench.wan_judge import best_torch_s, median_s
from orchestrator.pictures import BLUE, VERMILLION

GREY, GREEN = "#999999", "#009e73"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the rates of Isthmus, of Isthmus with raw links, of torch, and the limit; nothing where there are none."""
    if not any("limit_s" in result["figures"] for result in results.values()):
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    # Of a run whose links change there is no one rate.
    names = [name for name, result in results.items() if "limit_s" in result["figures"]]
    figure, axes = pyplot.subplots(figsize=(1.4 + 1.3 * len(names), 4.2), layout="constrained")
    for offset, (label, colour) in enumerate(
        (("Isthmus", BLUE), ("Isthmus, raw links", GREEN), ("torch, better schedule", VERMILLION))
    ):
        for index, name in enumerate(names):
            step_s = _step_s(results[name], label)
            if step_s is not None:
                axes.bar(index + (offset - 1) * 0.27, _rate(results[name], step_s), 0.25, color=colour)
        axes.bar(0, 0, color=colour, label=label)
    for index, name in enumerate(names):
        limit = _rate(results[name], results[name]["figures"]["limit_s"])
        axes.hlines(limit, index - 0.42, index + 0.42, color="black", label="" if index else "limit when all overlaps")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylabel("tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _step_s(result: dict[str, Any], label: str) -> float | None:
    measured = result["measured"]
    if label == "Isthmus":
        return median_s(measured["isthmus"]["shaped"])
    if label == "Isthmus, raw links":
        return median_s(measured["isthmus-none"]["shaped"]) if "isthmus-none" in measured else None
    return best_torch_s(measured, "shaped")


def _rate(result: dict[str, Any], step_s: float) -> float:
    return BATCH["seq_len"] * BATCH["microbatch_size"] * result["num_microbatches"] / step_s
