"""Cuts the model's layers into stages on nodes in their given order.

PURE. An exact dynamic programme finds the split whose slowest stage is fastest, within memory; the even split is kept
unless the better one is clearly better, so that probe noise does not move layers about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from actors.codecs import CODECS
from actors.errors import ConfigError, PlanError
from actors.settings import WireConfig
from actors.spec import Fleet, LinkCard, LinkPlan, NodeCard, Plan, ScheduleName, StagePlan
from orchestrator.planner.cost import Workload, compute_s, memory_bytes, step_s

# What probe noise may be: a split must beat the even one by this share of its step to be taken.
_CLEARLY_BETTER = 0.05
# Where no link was measured: two nodes of one machine or one rack.
_NEAR_LINK_DELAY_S, _NEAR_LINK_RATE_MBPS = 0.0005, 4000.0

Split = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What the planner may choose, and what is fixed."""

    # How many stages; None: as many as train fastest.
    stages: int | None = None
    # Layers of each stage, in order; None: the planner's choice.
    split: tuple[int, ...] | None = None
    schedule: ScheduleName = "1f1b"

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise ConfigError(f"plan.stages is {self.stages}", "set plan.stages to 1 or more")
        if self.split is not None and (not self.split or min(self.split) < 1):
            raise ConfigError(f"plan.split is {list(self.split)}", "give each stage 1 layer or more")
        if self.split is not None and self.stages not in (None, len(self.split)):
            raise ConfigError(
                f"plan.split has {len(self.split)} stages, plan.stages is {self.stages}", "set only one of them"
            )


def make_plan(fleet: Fleet, work: Workload, wire: WireConfig, config: PlanConfig) -> Plan:
    """Return the fastest plan that fits; raises PlanError with the stage, the shortage and the remedy."""
    num_layers = work.model.num_layers
    if config.split is not None:
        if sum(config.split) != num_layers:
            raise ConfigError(
                f"plan.split has {sum(config.split)} layers, the model {num_layers}",
                f"make plan.split sum to {num_layers}",
            )
        counts = [len(config.split)]
    else:
        counts = [config.stages] if config.stages else list(range(1, min(len(fleet.nodes), num_layers) + 1))
    if counts[0] > num_layers:
        raise PlanError(f"{counts[0]} stages for {num_layers} layers", f"set plan.stages to {num_layers} or fewer")
    if counts[0] > len(fleet.nodes):
        raise PlanError(
            f"{counts[0]} stages need as many nodes; the fleet has {len(fleet.nodes)}",
            f"set plan.stages={len(fleet.nodes)} or add nodes",
        )
    plans: list[Plan] = []
    shortage: PlanError | None = None
    for num_stages in counts:
        # The roomiest, for a model that does not fit the fastest.
        for nodes in (_fastest(fleet.nodes, num_stages), _roomiest(fleet.nodes, num_stages)):
            try:
                plans.append(_plan_chain(nodes, fleet.links, work, wire, config))
                break
            except PlanError as error:
                shortage = error
    if not plans:
        assert shortage is not None
        raise shortage
    return min(plans, key=lambda plan: plan.step_s)


def even_split(num_layers: int, num_stages: int) -> Split:
    """Return the split whose stages differ by one layer at most, the larger ones first."""
    size, num_larger = divmod(num_layers, num_stages)
    bounds = [stage * size + min(stage, num_larger) for stage in range(num_stages + 1)]
    return tuple(pairwise(bounds))


def best_split(nodes: Sequence[NodeCard], work: Workload) -> Split | None:
    """Return the split over these nodes, in this order, whose slowest stage is fastest; None where none fits.

    Dynamic programming over (stages placed, layers placed): exact, O(S L^2).
    """
    num_layers, num_stages = work.model.num_layers, len(nodes)
    # best[l]: the slowest stage's time when the stages so far hold layers [0, l), with the split itself.
    best: dict[int, tuple[float, Split]] = {0: (0.0, ())}
    for stage, node in enumerate(nodes):
        reached: dict[int, tuple[float, Split]] = {}
        stages_left = num_stages - stage - 1
        for start, (slowest_s, split) in best.items():
            last_stop = num_layers - stages_left
            first_stop = num_layers if stages_left == 0 else start + 1
            for stop in range(first_stop, last_stop + 1):
                if memory_bytes(node, work, stage, num_stages, start, stop) > node.memory_bytes:
                    break
                candidate_s = max(slowest_s, compute_s(node, work, start, stop))
                if stop not in reached or candidate_s < reached[stop][0]:
                    reached[stop] = (candidate_s, (*split, (start, stop)))
        best = reached
    return best[num_layers][1] if num_layers in best else None


def _plan_chain(
    nodes: Sequence[NodeCard],
    links: Sequence[LinkCard],
    work: Workload,
    wire: WireConfig,
    config: PlanConfig,
) -> Plan:
    """Return the plan over exactly these nodes in this order."""
    even = _assemble(nodes, links, work, wire, even_split(work.model.num_layers, len(nodes)), None)
    if config.split is not None:
        stops = [sum(config.split[: stage + 1]) for stage in range(len(config.split))]
        given = tuple(zip([0, *stops[:-1]], stops, strict=True))
        plan = _assemble(nodes, links, work, wire, given, even.step_s)
        _require_fit(plan, nodes)
        return plan
    split = best_split(nodes, work)
    if split is None:
        # Not even the even one, which is short somewhere.
        _require_fit(even, nodes)
        return even
    best = _assemble(nodes, links, work, wire, split, even.step_s)
    even_fits = all(stage.memory_bytes <= stage.memory_limit_bytes for stage in even.stages)
    return even if even_fits and best.step_s > (1 - _CLEARLY_BETTER) * even.step_s else best


_SMALLER = (
    "set a smaller batch.microbatch_size or batch.seq_len, train.activation_checkpointing=true, or add nodes with "
    "more memory"
)


def _require_fit(plan: Plan, nodes: Sequence[NodeCard]) -> None:
    """Raise PlanError for the stage that is shortest of memory."""
    worst = max(plan.stages, key=lambda stage: stage.memory_bytes - stage.memory_limit_bytes)
    short_bytes = worst.memory_bytes - worst.memory_limit_bytes
    if short_bytes > 0:
        raise PlanError(
            f"stage {worst.stage} (layers {worst.layer_start}-{worst.layer_stop - 1}) needs "
            f"{worst.memory_bytes / 1e9:.2f} GB, {worst.node} ({nodes[worst.stage].device}) has "
            f"{worst.memory_limit_bytes / 1e9:.2f} GB free: {short_bytes / 1e9:.2f} GB short",
            _SMALLER,
        )


def _assemble(
    nodes: Sequence[NodeCard],
    links: Sequence[LinkCard],
    work: Workload,
    wire: WireConfig,
    split: Split,
    even_step_s: float | None,
) -> Plan:
    """Return the plan that this split makes, with what it is expected to cost."""
    stages = tuple(
        StagePlan(
            stage=stage,
            node=node.node,
            layer_start=start,
            layer_stop=stop,
            memory_bytes=memory_bytes(node, work, stage, len(nodes), start, stop),
            memory_limit_bytes=node.memory_bytes,
            compute_s=compute_s(node, work, start, stop),
        )
        for stage, (node, (start, stop)) in enumerate(zip(nodes, split, strict=True))
    )
    link_plans = tuple(
        _plan_link(stage, nodes[stage], nodes[stage + 1], links, work, wire) for stage in range(len(nodes) - 1)
    )
    stage_s = [stage.compute_s for stage in stages]
    frame_s = [max(link.frame_bytes_forward, link.frame_bytes_backward) * 8e-6 / link.rate_mbps for link in link_plans]
    seconds = step_s(stage_s, frame_s, [link.delay_s for link in link_plans], work.batch.num_microbatches)
    slowest = max(range(len(stages)), key=lambda stage: stage_s[stage])
    binds = f"stage {slowest} ({stages[slowest].node})"
    if frame_s and max(frame_s) > stage_s[slowest]:
        thin = frame_s.index(max(frame_s))
        binds = f"link {thin} -> {thin + 1} ({link_plans[thin].rate_mbps:.0f} Mbit/s)"
    tokens_per_s = work.batch.step_tokens / seconds
    dollars_per_hour = sum(node.price_per_hour for node in nodes)
    return Plan(
        stages=stages,
        links=link_plans,
        schedule=work.schedule,
        step_s=seconds,
        even_step_s=seconds if even_step_s is None else even_step_s,
        tokens_per_s=tokens_per_s,
        dollars_per_hour=dollars_per_hour,
        dollars_per_mtoken=dollars_per_hour / 3600 / tokens_per_s * 1e6,
        binds=binds,
    )


def _plan_link(
    stage: int, source: NodeCard, target: NodeCard, links: Sequence[LinkCard], work: Workload, wire: WireConfig
) -> LinkPlan:
    """Return the link from `stage` to the next: codecs from the config, chunks and window from its rate."""
    # Of a link that was not measured among others that were, the worst is assumed.
    known = [link for link in links if (link.source, link.target) == (source.node, target.node)] or links
    delay_s = max((link.delay_s for link in known), default=_NEAR_LINK_DELAY_S)
    rate_mbps = min((link.rate_mbps for link in known), default=_NEAR_LINK_RATE_MBPS)
    chunk_bytes, window_bytes = chunk_and_window_bytes(rate_mbps, wire)
    num_elements = work.batch.microbatch_tokens * work.model.hidden_size
    dtype = torch.bfloat16 if source.boundary_bytes == 2 else torch.float32
    forward, backward = wire.codecs_of(stage)
    return LinkPlan(
        source_stage=stage,
        target_stage=stage + 1,
        forward_codec=forward,
        backward_codec=backward,
        frame_elements=num_elements,
        raw_frame_bytes=num_elements * dtype.itemsize,
        frame_bytes_forward=CODECS[forward].size_bytes(num_elements, dtype),
        frame_bytes_backward=CODECS[backward].size_bytes(num_elements, dtype),
        delay_s=delay_s,
        rate_mbps=rate_mbps,
        chunk_bytes=chunk_bytes,
        window_bytes=window_bytes,
    )


def chunk_and_window_bytes(rate_mbps: float, wire: WireConfig) -> tuple[int, int]:
    """Return how large the chunks of frames on a link of this rate are, and how many bytes may be under way."""
    bytes_per_s = rate_mbps * 125_000
    chunk_bytes = int(min(max(bytes_per_s * wire.chunk_s, wire.min_chunk_bytes), wire.max_chunk_bytes))
    window_bytes = int(min(max(bytes_per_s * wire.window_s, 2 * chunk_bytes), wire.max_window_bytes))
    return chunk_bytes, window_bytes


def _fastest(nodes: Sequence[NodeCard], num_stages: int) -> tuple[NodeCard, ...]:
    """Return the `num_stages` fastest nodes, in the fleet's order."""
    return _first_by(nodes, num_stages, lambda node: node.times[0].layer_forward_s + node.times[0].layer_backward_s)


def _roomiest(nodes: Sequence[NodeCard], num_stages: int) -> tuple[NodeCard, ...]:
    """Return the `num_stages` nodes with the most memory, in the fleet's order."""
    return _first_by(nodes, num_stages, lambda node: -node.memory_bytes)


def _first_by(nodes: Sequence[NodeCard], count: int, key: Callable[[NodeCard], float]) -> tuple[NodeCard, ...]:
    chosen = sorted(range(len(nodes)), key=lambda i: (key(nodes[i]), i))[:count]
    return tuple(nodes[i] for i in sorted(chosen))
