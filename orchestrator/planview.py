"""A plan as tables to act on: what each node holds and why, what binds, what it costs, what would help."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from actors.fleet_spec import Fleet
from actors.frame import wire_bytes
from actors.spec import LinkPlan, Plan, StagePlan

# Of a stage with more nodes the first few are named.
_MOST_NAMES = 3


def render_plan(plan: Plan, fleet: Fleet) -> RenderableType:
    """Return the plan for a rich console."""
    tables = [_stages(plan, fleet)]
    if plan.links:
        tables.append(_links(plan))
    if plan.alternatives:
        tables.append(_alternatives(plan))
    return Group(*tables, Text("\n".join(_summary(plan, fleet))))


def _stages(plan: Plan, fleet: Fleet) -> Table:
    cards = {card.node: card for card in fleet.nodes}
    table = Table(
        "stage",
        "node",
        "device",
        "region",
        "layers",
        "compute/microbatch",
        "in flight",
        "memory",
        "free",
        "why",
        box=None,
    )
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            _names(stage),
            ", ".join(dict.fromkeys(cards[node].device for node in stage.nodes)),
            ", ".join(dict.fromkeys(cards[node].region for node in stage.nodes)),
            f"{stage.layer_start}-{stage.layer_stop - 1}",
            f"{stage.compute_s * 1e3:.1f} ms",
            str(stage.in_flight or "?"),
            decimal(stage.memory_bytes),
            decimal(stage.memory_limit_bytes),
            stage.why,
        )
    return table


def _names(stage: StagePlan) -> str:
    shown = ", ".join(stage.nodes[:_MOST_NAMES])
    hidden = len(stage.nodes) - _MOST_NAMES
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def _links(plan: Plan) -> Table:
    table = Table("link", "codec fwd/bwd", "raw frame", "on the wire fwd/bwd", "rate", "delay", box=None)
    for link in plan.links:
        table.add_row(
            f"{link.source_stage} -> {link.target_stage}",
            f"{link.forward_codec} / {link.backward_codec}",
            decimal(link.raw_frame_bytes),
            f"{_wire_text(link, link.frame_bytes_forward)} / {_wire_text(link, link.frame_bytes_backward)}",
            f"{link.rate_mbps:,.0f} Mbit/s",
            f"{link.delay_s * 1e3:.1f} ms",
        )
    return table


def _alternatives(plan: Plan) -> Table:
    table = Table("instead", "step", "tokens/s", "$/M tokens", "against this plan", box=None)
    for other in plan.alternatives:
        if math.isnan(other.step_s):
            table.add_row(other.name, "", "", "", "")
            continue
        table.add_row(
            other.name,
            f"{_digits(other.step_s)} s",
            f"{other.tokens_per_s:,.0f}",
            _digits(other.dollars_per_mtoken),
            f"{plan.step_s / other.step_s:.2f}x as fast",
        )
    return table


def _summary(plan: Plan, fleet: Fleet) -> list[str]:
    even = "an even split does not fit"
    if not math.isnan(plan.even_step_s):
        even = f"{_digits(plan.even_step_s)} s with an even split, {plan.even_step_s / plan.step_s:.2f}x"
    lines = [
        f"schedule {plan.schedule}, {plan.num_microbatches} microbatches of {plan.microbatch_size} sequences, step "
        f"{_digits(plan.step_s)} s expected ({even}), {plan.tokens_per_s:,.0f} tokens/s",
        f"of a step {_digits(plan.fill_s)} s fill the pipeline, {_digits(plan.sync_s)} s average replicas, "
        f"{_digits(plan.commit_s)} s commit",
        f"${_digits(plan.dollars_per_hour)} an hour, ${_digits(plan.dollars_per_mtoken)} per million tokens",
        f"what binds: {plan.binds}",
    ]
    if not math.isnan(plan.loss_share):
        lines.append(f"these codecs raise the held-out loss by {plan.loss_share:.2%} (measured on a small model)")
    if not math.isnan(plan.bound_tokens_per_s):
        gap = 1 - plan.tokens_per_s / plan.bound_tokens_per_s
        lines.append(
            f"no plan for this fleet exceeds {plan.bound_tokens_per_s:,.0f} tokens/s: this one is {gap:.1%} below, its "
            "fill included"
        )
    cards = {card.node: card for card in fleet.nodes}
    if any(cards[stage.node].estimated for stage in plan.stages):
        lines.append("times are estimated from a catalogue: probe the nodes before money is spent")
    used = {node for stage in plan.stages for node in stage.nodes}
    idle = [card.node for card in fleet.nodes if card.node not in used]
    if idle:
        names = ", ".join(idle[:_MOST_NAMES]) + (f" and {len(idle) - _MOST_NAMES} more" if idle[_MOST_NAMES:] else "")
        lines.append(f"not used: {names}")
    lines += [f"would help: {words}" for words in plan.advice]
    return lines


def _digits(value: float) -> str:
    """Return a figure with two decimals, or two digits where it is small."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _wire_text(link: LinkPlan, frame_bytes: int) -> str:
    """Return what a frame takes on its link, headers included, and how much less than raw: "68 kB (7.7x)"."""
    size = wire_bytes(frame_bytes, link.chunk_bytes)
    return f"{decimal(size)} ({link.raw_frame_bytes / size:.1f}x)"
