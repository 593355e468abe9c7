"""What bench.wan found, as a table for people: every case in a row, with what it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.wan_judge import AT_MOST, best_torch_s, median_s

_HEADER = (
    "case",
    "tau, s",
    "limit, s",
    "Isthmus, s",
    "of the limit",
    "of unshaped",
    "raw links, s",
    "torch, s",
    "times torch",
    "asked for",
)


def wan_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of the cases, and under it what of each was not asked in a column."""
    rows = [_HEADER, ("---",) * len(_HEADER), *(_row(name, result) for name, result in results.items())]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- {name}: {_notes(result)}" for name, result in results.items()]
    return "\n".join([*lines, "", *notes, ""])


def _row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    figures, measured = result["figures"], result["measured"]
    torch_s = best_torch_s(measured, "shaped")
    raw = measured.get("isthmus-none", {}).get("shaped")
    return (
        name,
        _shown(figures.get("tau_s"), 2),
        _shown(figures.get("limit_s"), 1),
        _shown(figures.get("step_s"), 1),
        _shown(figures.get("of_limit"), 3),
        _shown(figures.get("of_unshaped"), 3),
        "-" if raw is None else _shown(median_s(raw), 1),
        _shown(torch_s, 1),
        _shown(figures.get("of_torch"), 2),
        "; ".join(_asked(name, bound, result) for name, bound in result["bounds"].items()) or "reported",
    )


def _asked(name: str, bound: float, result: Mapping[str, Any]) -> str:
    sign = "<=" if name in AT_MOST else ">="
    verdict = ", **missed**" if name in result["missed"] else ""
    return f"{name} {sign} {bound:.3g}: {result['figures'].get(name, float('nan')):.3g}{verdict}"


def _notes(result: Mapping[str, Any]) -> str:
    case, measured = result["case"], result["measured"]
    first = measured["isthmus"]["shaped"][0]
    hosts = "+".join(f"{share:g}" for share in case["cpus"])
    words = [
        f"hosts {hosts} of a core, {case['congestion_control']}",
        f"{first['schedule']}, layers {_list(first['split'])}, in flight {_list(first['in_flight'])}",
        f"codecs {', '.join(dict.fromkeys(first['codecs']))}, loss +{first['loss_share']:.2%}",
        f"idle {', '.join(f'{share:.0%}' for share in first['idle_share'])}",
        f"of a core: controller {first['driver_share']:.2%}, Ray's daemons {first['daemons_share']:.1%}",
    ]
    if "planned_idle_share" in first:
        words.insert(4, f"planned {', '.join(f'{share:.0%}' for share in first['planned_idle_share'])}")
    others = {
        system: runs["shaped"]
        for system, runs in measured.items()
        if isinstance(runs, dict) and system not in ("isthmus", "isthmus-none") and "shaped" in runs
    }
    words += [f"{system} {median_s(runs):.1f} s" for system, runs in others.items()]
    return "; ".join(words)


def _list(values: list[int]) -> str:
    return " ".join(map(str, values))


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
