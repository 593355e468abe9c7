"""From a placement to the plan that a run is given and a person reads.

PURE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from actors.codecs import CODECS
from actors.fleet_spec import Fleet
from actors.frame import HEADER_BYTES
from actors.settings import WireConfig
from actors.spec import LinkPlan, Plan, StagePlan
from orchestrator.planner.binding import Binding, what_binds
from orchestrator.planner.build import BITS_PER_MEGABIT, Workload
from orchestrator.planner.codecs import CodecPair, loss_share
from orchestrator.planner.evaluate import Evaluation, compute_s, memory_bytes
from orchestrator.planner.played import played_step_s
from orchestrator.planner.problem import Placement, Problem
from orchestrator.planner.wide import evaluated

# A stage this much quicker than the slowest one waits most of the time it saves; memory this full leaves no layer more.
_IDLE_SHARE = 0.15


@dataclass(frozen=True, kw_only=True, eq=False)
class Option:
    """A placement with all that it was found for: the fleet on one batch and schedule, and each link's codecs."""

    fleet: Fleet
    work: Workload
    wire: WireConfig
    problem: Problem
    placement: Placement
    pairs: tuple[CodecPair, ...]

    @cached_property
    def found(self) -> Evaluation:
        return evaluated(self.problem, self.placement)

    @cached_property
    def step_s(self) -> float:
        """The seconds of a step as its actions play."""
        return played_step_s(self.problem, self.placement, self.found)


def plan_of(option: Option, *, even_step_s: float | None) -> Plan:
    """Return the plan that an option makes, with what it is expected to cost."""
    fleet, work, problem, placement = option.fleet, option.work, option.problem, option.placement
    found = option.found
    binding = what_binds(problem, placement, found)
    stages = tuple(_stage(option, found, binding, stage) for stage in range(placement.num_stages))
    links = tuple(link_plan(option, stage) for stage in range(placement.num_stages - 1))
    step_s = option.step_s
    tokens_per_s = work.batch.step_tokens / step_s
    dollars_per_hour = float(sum(problem.price_N[node] for node in placement.used))
    lost = loss_share(option.pairs)
    return Plan(
        stages=stages,
        links=links,
        schedule=work.schedule,
        step_s=step_s,
        even_step_s=math.nan if even_step_s is None else even_step_s,
        tokens_per_s=tokens_per_s,
        dollars_per_hour=dollars_per_hour,
        dollars_per_mtoken=dollars_per_hour / 3600 / tokens_per_s * 1e6,
        binds=_binding_text(option, binding, [fleet.nodes[nodes[0]].node for nodes in placement.nodes]),
        microbatch_size=work.batch.microbatch_size,
        num_microbatches=work.batch.num_microbatches,
        loss_share=math.nan if lost is None else lost,
        fill_s=found.fill_s,
        sync_s=found.sync_s,
        commit_s=found.commit_s,
    )


def _stage(option: Option, found: Evaluation, binding: Binding, stage: int) -> StagePlan:
    problem, placement = option.problem, option.placement
    start, stop = placement.bounds[stage : stage + 2]
    nodes = placement.nodes[stage]
    cards = [option.fleet.nodes[node] for node in nodes]
    fullest = max(range(len(nodes)), key=lambda r: found.memory_S[stage][r] - problem.memory_bytes_N[nodes[r]])
    return StagePlan(
        stage=stage,
        node=cards[0].node,
        layer_start=start,
        layer_stop=stop,
        memory_bytes=int(found.memory_S[stage][fullest]),
        memory_limit_bytes=int(problem.memory_bytes_N[nodes[fullest]]),
        compute_s=max(compute_s(problem, node, start, stop) for node in nodes),
        others=tuple(card.node for card in cards[1:]),
        shares=found.shares_S[stage],
        in_flight=max(found.in_flight_SR[stage]),
        why=_why(option, found, binding, stage),
    )


def _why(option: Option, found: Evaluation, binding: Binding, stage: int) -> str:
    """Return why a stage is as large as it is."""
    problem, placement = option.problem, option.placement
    start, stop = placement.bounds[stage : stage + 2]
    node = placement.nodes[stage][0]
    window = found.in_flight_SR[stage][0]
    if binding.kind == "stage" and binding.stage == stage:
        return "sets the pace"
    if memory_bytes(problem, node, start, min(stop + 1, problem.num_layers), window) > problem.memory_bytes_N[node]:
        return "memory full"
    busy_s = compute_s(problem, node, start, stop) / len(placement.nodes[stage])
    every_s = 1 / found.rate
    if busy_s + float(problem.layer_s_N[node]) / len(placement.nodes[stage]) > every_s:
        return "one more layer would set the pace"
    if stop - start == 1 and busy_s < (1 - _IDLE_SHARE) * every_s:
        return "one layer, for its place"
    return f"waits {max(0.0, 1 - busy_s / every_s):.0%} of the time"


def link_plan(option: Option, stage: int) -> LinkPlan:
    """Return the link from `stage` to the next: codecs from the option, chunks and window from its rate."""
    problem, work, wire = option.problem, option.work, option.wire
    sources, targets = option.placement.nodes[stage], option.placement.nodes[stage + 1]
    ends = [(problem.place_N[a], problem.place_N[b]) for a in sources for b in targets]
    # The run's link carries both ways: what is planned is the worse of the two.
    delay_s = max(max(float(problem.delay_s_PP[p, q]), float(problem.delay_s_PP[q, p])) for p, q in ends)
    byte_s = max(max(float(problem.byte_s_PP[p, q]), float(problem.byte_s_PP[q, p])) for p, q in ends)
    rate_mbps = 8 / byte_s / BITS_PER_MEGABIT
    chunk_bytes, window_bytes = chunk_and_window_bytes(rate_mbps, wire)
    num_elements = work.batch.microbatch_tokens * work.model.hidden_size
    source = option.fleet.nodes[sources[0]]
    dtype = torch.bfloat16 if source.boundary_bytes == 2 else torch.float32
    forward, backward = option.pairs[stage]
    frame_bytes = [CODECS[name].size_bytes(num_elements, dtype) for name in (forward, backward)]
    # At least two to a frame, if it is not small: a chunk behind another says how fast the link is, one alone does not.
    chunk_bytes = min(chunk_bytes, max(-(-min(frame_bytes) // 2), wire.min_chunk_bytes))
    return LinkPlan(
        source_stage=stage,
        target_stage=stage + 1,
        forward_codec=forward,
        backward_codec=backward,
        frame_elements=num_elements,
        raw_frame_bytes=num_elements * dtype.itemsize,
        frame_bytes_forward=frame_bytes[0],
        frame_bytes_backward=frame_bytes[1],
        delay_s=delay_s,
        rate_mbps=rate_mbps,
        chunk_bytes=chunk_bytes,
        window_bytes=window_bytes,
    )


def chunk_and_window_bytes(rate_mbps: float, wire: WireConfig) -> tuple[int, int]:
    """Return how large the chunks of frames on a link of this rate are at most, and how many bytes may be under way."""
    bytes_per_s = rate_mbps * BITS_PER_MEGABIT / 8
    chunk_bytes = int(min(max(bytes_per_s * wire.chunk_s, wire.min_chunk_bytes), wire.max_chunk_bytes))
    # Two whole chunks at least: else a thin link is empty while one is acknowledged.
    least_bytes = 2 * (chunk_bytes + HEADER_BYTES)
    window_bytes = int(min(max(bytes_per_s * wire.window_s, least_bytes), wire.max_window_bytes))
    return chunk_bytes, window_bytes


def _binding_text(option: Option, binding: Binding, names: Sequence[str]) -> str:
    """Return what binds, for people: "stage 2 (node-1)", "link 0 -> 1 (20 Mbit/s)", a way, or a round trip."""
    stage = binding.stage
    if binding.kind == "stage":
        return f"stage {stage} ({names[stage]})"
    cards = [option.fleet.nodes[node] for node in binding.nodes]
    if binding.kind == "link":
        return f"link {stage} -> {stage + 1} ({link_plan(option, stage).rate_mbps:,.0f} Mbit/s)"
    if binding.kind == "uplink":
        return f"the uplink of {cards[0].node} ({cards[0].uplink_mbps:,g} Mbit/s), stage {stage}"
    if binding.kind == "downlink":
        return f"the downlink of {cards[0].node} ({cards[0].downlink_mbps:,g} Mbit/s), stage {stage}"
    if binding.kind == "shared way":
        p, q = (option.problem.place_N[node] for node in binding.nodes)
        shared_mbps = 8 * float(option.problem.shared_bytes_per_s_PP[p, q]) / BITS_PER_MEGABIT
        return f"what {cards[0].region} and {cards[1].region} share ({shared_mbps:,g} Mbit/s)"
    last = binding.last
    trip = f"the round trip of {binding.seconds * 1e3:.0f} ms from stage {stage} ({names[stage]})"
    if last + 1 < len(names):
        lets = f"{option.problem.schedule} lets {binding.count} microbatches through in one"
        return f"{trip} to stage {last} ({names[last]}): {lets}"
    return f"{trip}, with {binding.count} microbatches in flight"
