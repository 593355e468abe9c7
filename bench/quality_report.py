"""docs/quality.md and docs/quality.png, written from what `bench.quality` saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bench.quality_statistics import LEVEL_SHARE
from orchestrator.pictures import BLUE, GREEN, HATCH_GREY, ORANGE, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A pair that loses more of the loss than this is no default.
NO_DEFAULT_SHARE = 0.01
_COLOURS = (HATCH_GREY, BLUE, GREEN, "#56B4E9", ORANGE, VERMILLION)

Summary = Mapping[str, Any]

_INTRODUCTION = f"""\
Made by `python -m bench.quality`; the figures are in `bench/results/quality.json`. Losses are held-out cross-entropies
in nats a token, means over the seeds. A seed sets weights and order of tokens, so differences are taken seed by seed.
+- is half of a 95% interval: Student's t over the seeds of that row alone and, after the bar, with the spread of all
rows taken as one (more degrees of freedom, but the rows of a seed share their baseline, so it is a guide only).
Verdicts go by the first: *level* where all of the interval lies within {LEVEL_SHARE:.1%} of the loss, *worse* or
*better* where it leaves out zero, else *not shown*. Losses on the way are of a part of the held-out tokens."""

_PIPELINE_LEGEND = f"""\
**(!)** marks a pair that loses more than {NO_DEFAULT_SHARE:.0%}: it is no default. Relative error and cosine compare
what was decoded with what was sent, in the mean over boundaries and steps. `none` is float32 here."""

_LIMITS = """\
Models of a few million parameters, trained for some hundred steps, rank gross failures; they certify no ratio. Noise of
quantisation adds up over boundaries, and there are three here. A sparse method sends in each round what is largest and
the rest later, so that few rounds count against it."""


def markdown(summary: Summary) -> str:
    """Return the page: both tables, how they were measured, and which codec to use when."""
    sections = (
        "# What the codecs cost in learning",
        _INTRODUCTION,
        "![differences in loss](quality.png)",
        "## Boundaries of a pipeline",
        _pipeline_setting(summary),
        _pipeline_table(summary["pipeline"]["methods"]),
        _PIPELINE_LEGEND,
        _gap_over_steps(summary["pipeline"]),
        "## Pseudo-gradients",
        _outer_setting(summary),
        _outer_table(summary["outer"]),
        _gap_over_rounds(summary["outer"]),
        _skipped(summary["outer"]["methods"]),
        _lr_check(summary),
        "## What this cannot show",
        _LIMITS,
    )
    return "\n\n".join(sections) + "\n"


def _pipeline_setting(summary: Summary) -> str:
    part, data = summary["pipeline"], summary["data"]
    recipe = part["recipe"]
    batch = recipe["batch"]
    tokens = batch["seq_len"] * batch["microbatch_size"] * batch["num_microbatches"]
    return (
        f"{part['num_params'] / 1e6:.2f} M parameters, hidden size {recipe['model']['hidden_size']}, "
        f"{recipe['model']['num_layers']} layers in {len(recipe['split'])} stages, so {part['num_boundaries']} "
        f"boundaries; {recipe['num_steps']} steps of {tokens:,} tokens (seeds {_listed(part['seeds'])}), float32, "
        f"AdamW at {recipe['optim']['lr']:g}. Tokens: {data['source']}, a vocabulary of {data['vocab_size']:,}; "
        f"{part['held_out_tokens']:,} held out, whose evaluation passes through the forward codec as well. A unigram "
        f"model's loss is {data['unigram_loss']:.2f}."
    )


def _pipeline_table(methods: Mapping[str, Any]) -> str:
    rows = [
        "| forward/backward | bytes of bf16's: forward, backward | loss | difference | of the loss | "
        "relative error: activations, gradients | cosine of gradients | verdict | use |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, method in methods.items():
        less, errors = method["times_less_than_bf16"], method["codec_errors"]
        difference = method["difference"]
        cells = (
            f"`{name}`" + (" **(!)**" if difference and difference["share"] > NO_DEFAULT_SHARE else ""),
            f"{1 / less['forward']:.1%}, {1 / less['backward']:.1%}",
            f"{fmean(method['losses']):.4f}",
            *_difference_cells(difference),
            f"{errors['activations']['relative_error']:.2%}, {errors['gradients']['relative_error']:.2%}",
            f"{errors['gradients']['cosine']:.5f}",
            difference["verdict"] if difference else "",
            _use(difference, sends_all=name == "none/none"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _use(difference: Mapping[str, Any] | None, *, sends_all: bool) -> str:
    """Return when a codec is for use, by the loss that it was seen to cost; one that sends all bytes saves none."""
    if difference is None or sends_all:
        return "near links"
    if difference["share"] > NO_DEFAULT_SHARE:
        return "only where nothing milder fits the link"
    if difference["verdict"] == "level" or difference["verdict"].startswith("better"):
        return "anywhere"
    return "links that a milder one would hold up"


def _outer_setting(summary: Summary) -> str:
    part = summary["outer"]
    recipe = part["recipe"]
    by_optimizer: dict[str, list[str]] = {}
    for name, method in part["methods"].items():
        by_optimizer.setdefault(_outer_optimizer(method["method"]), []).append(f"`{name}`")
    listed = "; ".join(f"{', '.join(names)}: {optimizer}" for optimizer, names in by_optimizer.items())
    batch = recipe["batch"]
    return (
        f"{part['num_replicas']} replicas of {part['num_params'] / 1e6:.2f} M parameters "
        f"({recipe['model']['num_layers']} layers), each {part['num_rounds']} rounds of {part['num_local_steps']} "
        f"local AdamW steps of {batch['microbatch_size'] * batch['seq_len']} tokens of its own, seeds "
        f"{_listed(part['seeds'])}. Outer optimizers: {listed}. `dense` and `dense-mean` send float32; `dense-mean` "
        "is what `tk2` would be if it sent everything."
    )


def _outer_optimizer(method: Mapping[str, Any]) -> str:
    momentum = f"Nesterov momentum {method['momentum']:g}" if method["momentum"] else "no momentum"
    feedback = f", error feedback with beta {method['beta']:g}" if method["beta"] else ""
    return f"lr {method['lr']:g}, {momentum}{feedback}"


def _outer_table(part: Mapping[str, Any]) -> str:
    rows = [
        "| pseudo-gradients | bytes against float32 | loss | to `dense` | of the loss | verdict | to `dense-mean` | "
        "of the loss | verdict | use |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, method in part["methods"].items():
        to_dense, to_mean = method["difference"], method["difference_to_mean"]
        cells = (
            f"`{name}`",
            f"1/{method['times_less_than_float32']:.1f}",
            f"{fmean(method['losses']):.4f}",
            *_difference_cells(to_dense),
            to_dense["verdict"] if to_dense else "",
            *_difference_cells(to_mean),
            to_mean["verdict"] if to_mean else "",
            _use(to_dense, sends_all=method["method"]["codec"] == "none"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _difference_cells(difference: Mapping[str, Any] | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    own, pooled = difference["half_width"], difference["pooled_half_width"]
    interval = "" if own is None else f" +- {own:.4f} \\| {pooled:.4f}"
    return f"{difference['mean']:+.4f}{interval}", f"{difference['share']:+.2%}"


def _gap_over_steps(part: Mapping[str, Any]) -> str:
    """Return how far each pair is behind none/none, as training goes on."""
    names = [name for name in part["methods"] if name != "none/none"]
    return _gaps(part["methods"], names, "none/none", part["recipe"]["num_steps"], "steps")


def _gap_over_rounds(part: Mapping[str, Any]) -> str:
    """Return how far the sparse methods are behind their dense counterpart, as training goes on."""
    names = [name for name in part["methods"] if name.startswith("tk2")]
    return _gaps(part["methods"], names, "dense-mean", part["num_rounds"], "rounds")


def _gaps(methods: Mapping[str, Any], names: Sequence[str], baseline: str, total: int, unit: str) -> str:
    marks = [round(total * share) for share in (0.25, 0.5, 0.75, 1.0)]
    rows = [
        f"| behind `{baseline}` after | {' | '.join(f'{mark} {unit}' for mark in marks)} |",
        "|---|" + "---|" * len(marks),
    ]
    for name in names:
        gaps = dict(mean_gap(methods, name, baseline))
        rows.append(f"| `{name}` | {' | '.join(f'{gaps[mark]:+.4f}' for mark in marks)} |")
    return "\n".join(rows)


def _skipped(methods: Mapping[str, Any]) -> str:
    """Return which methods' runs had steps that the guard dropped, as it would in a real run."""
    listed = [
        f"`{name}` {', '.join(map(str, method['skipped_steps']))}"
        for name, method in methods.items()
        if any(method["skipped_steps"])
    ]
    return f"Local steps that the guard dropped, of all replicas, by seed: {'; '.join(listed) or 'none'}."


def _lr_check(summary: Summary) -> str:
    check = summary["outer_lr_check"]
    listed = ", ".join(f"{lr}: {loss:.4f}" for lr, loss in check["losses"].items())
    return (
        "Nothing was tuned: outer lr 0.7 and momentum 0.9 are DiLoCo's, lr 1 and beta 0.95 SparseLoCo's. `dense` at "
        f"other outer rates with that momentum, on seed {check['seed']}, which nothing else uses: {listed}."
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def mean_gap(methods: Mapping[str, Any], name: str, baseline: str) -> list[tuple[int, float]]:
    """Return (rounds done, loss less the baseline's): means over seeds of the held-out curves."""
    return [
        (points[0][0][0], fmean(own[1] - other[1] for own, other in points))
        for points in (
            list(zip(own, other, strict=True))
            for own, other in zip(
                zip(*methods[name]["curves"], strict=True), zip(*methods[baseline]["curves"], strict=True), strict=True
            )
        )
    ]


def picture(summary: Summary, path: Path) -> None:
    """Draw the pairs' differences with their intervals, and how each outer method's loss goes over rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained", dpi=130)
    pairs, curves, gaps = figure.subplots(1, 3)
    _draw_pairs(pairs, summary["pipeline"]["methods"])
    methods = summary["outer"]["methods"]
    for (name, method), colour in zip(methods.items(), _COLOURS, strict=True):
        points = list(zip(*method["curves"], strict=True))
        rounds = [of_seeds[0][0] for of_seeds in points]
        curves.plot(rounds, [fmean(loss for _, loss in of_seeds) for of_seeds in points], color=colour, label=name)
        gap = mean_gap(methods, name, "dense-mean")
        gaps.plot(*zip(*gap, strict=True), color=colour, label=name)
    curves.set_ylabel("held-out loss (nats a token)")
    gaps.set_ylabel("difference to dense-mean (nats a token)")
    for axes in (curves, gaps):
        axes.set_xlabel("rounds")
    curves.legend(frameon=False)
    curves.set_title("pseudo-gradients: means over seeds", loc="left")
    for axes in (pairs, curves, gaps):
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _draw_pairs(axes: Axes, methods: Mapping[str, Any]) -> None:
    compared = [(name, method["difference"]) for name, method in methods.items() if method["difference"]]
    for row, (_, difference) in enumerate(compared):
        axes.errorbar(difference["mean"], row, xerr=difference["half_width"], fmt="o", color=BLUE, capsize=4)
        axes.plot(difference["by_seed"], [row] * len(difference["by_seed"]), "|", color=ORANGE, markersize=12)
    axes.axvline(0, color=HATCH_GREY, linewidth=1)
    axes.set_yticks(range(len(compared)), [name for name, _ in compared])
    axes.invert_yaxis()
    axes.set_xlabel("difference to none/none (nats a token)")
    axes.set_title("boundaries, forward/backward: mean, 95% interval, seeds", loc="left")
