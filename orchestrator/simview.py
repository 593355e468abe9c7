"""What a simulation came to, as tables that a person can act on. Everything here says that it is simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from orchestrator.console import duration_text
from orchestrator.simulator.outcome import RunSimulation
from orchestrator.simulator.step import StepSimulation

# Of a large placement only the busiest are listed.
_MAX_ROWS = 40


def render_step(simulation: StepSimulation, node_names: Sequence[str], step_tokens: int) -> RenderableType:
    """Return one step: each node's part in it, what the links carry, what it costs."""
    nodes = Table(
        "stage", "node", "layers", "microbatches", "computes", "idle", "in flight", "memory", "free", box=None
    )
    busiest = sorted(range(len(simulation.nodes_U)), key=lambda u: float(-simulation.compute_s_U[u]))[:_MAX_ROWS]
    bounds = simulation.placement.bounds
    for u in sorted(busiest):
        stage = int(simulation.stage_U[u])
        nodes.add_row(
            str(stage),
            node_names[int(simulation.nodes_U[u])],
            f"{bounds[stage]}-{bounds[stage + 1] - 1}",
            str(simulation.shares_U[u]),
            f"{simulation.compute_s_U[u]:.3f} s",
            f"{simulation.idle_share_U[u]:.0%}",
            str(simulation.in_flight_peak_U[u]),
            decimal(int(simulation.memory_bytes_U[u])),
            decimal(int(simulation.memory_limit_bytes_U[u])),
        )
    links = Table("link", "down a step", "up a step", "busiest pair, down / up", box=None)
    for cut in range(simulation.placement.num_stages - 1):
        pairs = set(simulation.layout.pair_SM[cut].tolist())
        busy = [max(float(simulation.link_busy_DQ[way, pair]) for pair in pairs) for way in (0, 1)]
        links.add_row(
            f"{cut} -> {cut + 1}",
            decimal(int(simulation.link_bytes_DS[0, cut])),
            decimal(int(simulation.link_bytes_DS[1, cut])),
            f"{busy[0]:.0%} / {busy[1]:.0%}",
        )
    hidden = len(simulation.nodes_U) - len(busiest)
    tokens_per_s = step_tokens / simulation.step_s
    per_mtoken = simulation.dollars * 1e6 / step_tokens
    lines = [
        *([f"and {hidden:,} nodes that compute less"] if hidden else []),
        f"simulated: {simulation.step_s:.3f} s a step, {tokens_per_s:,.0f} tokens/s, "
        f"${per_mtoken:.4f} per million tokens",
    ]
    if simulation.short_bytes:
        lines.append(f"a node is {decimal(int(simulation.short_bytes))} short of memory")
    tables = [nodes, links] if simulation.placement.num_stages > 1 else [nodes]
    return Group(*tables, Text("\n".join(lines)))


def render_run(run: RunSimulation, step_tokens: int) -> RenderableType:
    """Return what a long run came to."""
    rows = Table("simulated", "", box=None)
    hours = run.duration_s / 3600
    undisturbed = max((step_tokens / s.step_s for s in run.stretches), default=0.0)
    per_mtoken = f"${run.dollars_per_mtoken:.4f}" if math.isfinite(run.dollars_per_mtoken) else "-"
    for label, value in (
        ("time", f"{hours:.1f} h"),
        ("steps that count", f"{run.steps:,}"),
        ("goodput", f"{run.tokens_per_s:,.0f} tokens/s ({undisturbed:,.0f} at best)"),
        ("dollars", f"{run.dollars:,.2f}"),
        ("per million tokens", per_mtoken),
        ("nodes lost in use", f"{run.losses:,}"),
        ("work thrown away", f"{run.lost_steps:,} steps, {duration_text(run.lost_s)}"),
        ("nothing ran for", f"{duration_text(run.down_s)} ({run.down_s / run.duration_s:.1%})"),
        ("planned anew", f"{run.replans:,} times"),
        ("would have given up", f"{run.stops:,} times"),
    ):
        rows.add_row(label, value)
    return rows
