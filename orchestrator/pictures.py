"""Two pictures of a run: what each stage did in a step, and how the loss fell.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Figures are made without pyplot, whose global
state no thread but the main one may touch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from orchestrator.records import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

    from orchestrator.simulator.outcome import RunPoint

PictureFormat = Literal["png", "svg"]

BLUE, ORANGE, GREEN, VERMILLION, YELLOW, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#F0E442", "#CC79A7"
HATCH_GREY = "#8A8A8A"

# Action name -> (legend, colour, hatch); names as in actors.spec.ActionTime.
_ACTIONS = {
    "F": ("forward", BLUE, ""),
    "B": ("backward", ORANGE, ""),
    "W": ("weight gradients", YELLOW, ""),
    "S": ("exchanges gradients", PURPLE, ""),
    "C": ("commit", GREEN, ""),
    "wF": ("waits for activations", "#F2F2F2", "////"),
    "wB": ("waits for gradients", "#F2F2F2", "\\\\\\\\"),
}
# More bars than this are too thin to carry their microbatch's number.
_MAX_NUMBERED_BARS = 400
# A bar narrower than this share of the picture does not carry its number.
_MIN_NUMBERED_SHARE = 0.014
# Training loss is averaged with this share of the curve on either side.
_WINDOWS_A_CURVE = 60


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of the loss picture: nats a token over tokens trained on."""

    label: str
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    colour: str
    # Held-out loss: dashed, with a dot at each evaluation.
    is_validation: bool


def timeline_picture(record: StepRecord, target: str | Path | IO[bytes], picture_format: PictureFormat = "png") -> None:
    """Draw a step as a Gantt chart: a row a stage, a bar an action, with the microbatch's number where it fits."""
    from matplotlib.figure import Figure

    num_stages = len(record.stages)
    figure = Figure(figsize=(11, 1.7 + 0.42 * num_stages), layout="constrained", dpi=130)
    axes = figure.subplots()
    for row, stage in enumerate(record.stages):
        for name, (_, colour, hatch) in _ACTIONS.items():
            spans = [(a.start_s, a.end_s - a.start_s) for a in stage.actions if a.name == name]
            edge = HATCH_GREY if hatch else "white"
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolor=colour, hatch=hatch, edgecolor=edge, linewidth=0.5)
    _number_bars(axes, record)
    axes.set_yticks(range(num_stages), [f"stage {stage.stage} {stage.node}".strip() for stage in record.stages])
    axes.set_ylim(num_stages - 0.5, -0.5)
    axes.set_xlim(0, _timeline_end_s(record))
    axes.set_xlabel("seconds since the step began")
    said = "simulated, nothing was trained" if record.is_simulated else f"loss {record.loss:.4f}"
    axes.set_title(f"step {record.step + 1}: {record.step_s:.2f} s, {said}", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if handles := _timeline_legend(record):
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
    figure.savefig(target, format=picture_format)


def churn_picture(
    points: Sequence[RunPoint], duration_s: float, target: str | Path | IO[bytes], picture_format: PictureFormat = "png"
) -> None:
    """Draw a simulated run over hours: how many nodes there are and how many have a stage; how fast it trains."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    hours = [point.time_s / 3600 for point in points] + [duration_s / 3600]
    figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=130)
    above, below = figure.subplots(2, 1, sharex=True)
    rows = (
        (above, "nodes there", [point.nodes_here for point in points], HATCH_GREY),
        (above, "nodes with a stage", [point.nodes_used for point in points], BLUE),
        (below, "tokens/s", [point.tokens_per_s for point in points], GREEN),
    )
    for axes, label, values, colour in rows:
        # Each holds until the next.
        axes.stairs(values, hours, color=colour, label=label, fill=axes is below, gid=label)
    above.legend(frameon=False)
    for axes, label in ((above, "nodes"), (below, "tokens/s")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    below.yaxis.set_major_formatter(EngFormatter(sep=""))
    below.set_xlabel("hours")
    above.set_title("simulated: nothing was trained", loc="left")
    figure.savefig(target, format=picture_format)


def _timeline_end_s(record: StepRecord) -> float:
    return max((a.end_s for stage in record.stages for a in stage.actions), default=record.step_s) or 1.0


def _number_bars(axes: Axes, record: StepRecord) -> None:
    bars = [(row, a) for row, stage in enumerate(record.stages) for a in stage.actions if a.name in ("F", "B")]
    if len(bars) > _MAX_NUMBERED_BARS:
        return
    min_width_s = _MIN_NUMBERED_SHARE * _timeline_end_s(record)
    for row, action in bars:
        if action.end_s - action.start_s >= min_width_s:
            centre_s = (action.start_s + action.end_s) / 2
            colour = "white" if action.name == "F" else "black"
            axes.text(centre_s, row, str(action.microbatch), ha="center", va="center", fontsize=7, color=colour)


def _timeline_legend(record: StepRecord) -> list[Patch]:
    from matplotlib.patches import Patch

    seen = {a.name for stage in record.stages for a in stage.actions}
    return [
        Patch(facecolor=colour, hatch=hatch, edgecolor=HATCH_GREY if hatch else colour, label=label)
        for name, (label, colour, hatch) in _ACTIONS.items()
        if name in seen
    ]


def centred_mean(losses: Sequence[float], half_window: int) -> list[float]:
    """Return each loss averaged with `half_window` on either side of it; what is not finite is passed over."""
    finite = [loss if math.isfinite(loss) else None for loss in losses]
    sums = list(accumulate((loss or 0.0 for loss in finite), initial=0.0))
    counts = list(accumulate((loss is not None for loss in finite), initial=0))
    means = []
    for i in range(len(losses)):
        # Cut alike on both sides near the ends, where one side alone would pull the mean off a falling curve.
        reach = min(half_window, i, len(losses) - 1 - i)
        start, stop = i - reach, i + reach + 1
        count = counts[stop] - counts[start]
        means.append((sums[stop] - sums[start]) / count if count else math.nan)
    return means


def curves_picture(
    curves: Sequence[Curve], target: str | Path | IO[bytes], picture_format: PictureFormat = "png"
) -> None:
    """Draw loss over tokens: training loss faint with its mean on top, held-out loss dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=130)
    axes = figure.subplots()
    for curve in curves:
        name = f"curve {curve.label}"
        if curve.is_validation:
            axes.plot(curve.tokens, curve.losses, "o--", color=curve.colour, markersize=4, label=curve.label, gid=name)
        else:
            means = centred_mean(curve.losses, len(curve.losses) // _WINDOWS_A_CURVE)
            axes.plot(curve.tokens, curve.losses, color=curve.colour, alpha=0.25, linewidth=0.8)
            axes.plot(curve.tokens, means, color=curve.colour, label=curve.label, gid=name)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(frameon=False)
    figure.savefig(target, format=picture_format)
