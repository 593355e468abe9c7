"""A plan as a table that a person can act on: what each node holds, what binds, what it costs."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from actors.frame import wire_bytes
from actors.spec import Fleet, LinkPlan, Plan


def render_plan(plan: Plan, fleet: Fleet) -> RenderableType:
    """Return the plan for a rich console."""
    cards = {card.node: card for card in fleet.nodes}
    stages = Table("stage", "node", "device", "region", "layers", "compute/microbatch", "memory", "free", box=None)
    for stage in plan.stages:
        card = cards[stage.node]
        stages.add_row(
            str(stage.stage),
            stage.node,
            card.device,
            card.region,
            f"{stage.layer_start}-{stage.layer_stop - 1}",
            f"{stage.compute_s * 1e3:.1f} ms",
            decimal(stage.memory_bytes),
            decimal(stage.memory_limit_bytes),
        )
    links = Table(
        "link", "codec fwd/bwd", "raw frame", "on the wire fwd/bwd", "rate", "delay", "chunk", "window", box=None
    )
    for link in plan.links:
        links.add_row(
            f"{link.source_stage} -> {link.target_stage}",
            f"{link.forward_codec} / {link.backward_codec}",
            decimal(link.raw_frame_bytes),
            f"{_wire_text(link, link.frame_bytes_forward)} / {_wire_text(link, link.frame_bytes_backward)}",
            f"{link.rate_mbps:,.0f} Mbit/s",
            f"{link.delay_s * 1e3:.1f} ms",
            decimal(link.chunk_bytes),
            decimal(link.window_bytes),
        )
    faster = plan.even_step_s / plan.step_s
    lines = [
        f"schedule {plan.schedule}, step {plan.step_s:.2f} s expected ({plan.even_step_s:.2f} s with an even split, "
        f"{faster:.2f}x), {plan.tokens_per_s:,.0f} tokens/s",
        f"${plan.dollars_per_hour:.2f} an hour, ${plan.dollars_per_mtoken:.2f} per million tokens",
        f"what binds: {plan.binds}",
    ]
    tables = [stages, links] if plan.links else [stages]
    return Group(*tables, Text("\n".join(lines)))


def _wire_text(link: LinkPlan, frame_bytes: int) -> str:
    """Return what a frame takes on its link, headers included, and how much less than raw: "68 kB (7.7x)"."""
    size = wire_bytes(frame_bytes, link.chunk_bytes)
    return f"{decimal(size)} ({link.raw_frame_bytes / size:.1f}x)"
