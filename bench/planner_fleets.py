"""Synthetic fleets for the planner's figures: six kinds of GPU in regions joined by uneven links, all from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.fleet_spec import Fleet, NodeCard, PartTimes, RegionLink
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec, WireConfig
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What one kind computes in training (not its data sheet's peak), holds, and costs."""

    name: str
    tflops: float
    memory_gb: float
    dollars_per_hour: float


GPUS = (
    Gpu(name="20T", tflops=20, memory_gb=12, dollars_per_hour=0.10),
    Gpu(name="35T", tflops=35, memory_gb=16, dollars_per_hour=0.15),
    Gpu(name="65T", tflops=65, memory_gb=24, dollars_per_hour=0.35),
    Gpu(name="120T", tflops=120, memory_gb=24, dollars_per_hour=0.45),
    Gpu(name="165T", tflops=165, memory_gb=48, dollars_per_hour=0.90),
    Gpu(name="312T", tflops=312, memory_gb=80, dollars_per_hour=1.80),
)
# About 8 and 70 billion parameters.
MODEL_8B = ModelSpec(
    vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336, max_positions=4096
)
MODEL_70B = ModelSpec(
    vocab_size=32000, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, ffn_size=28672, max_positions=4096
)
SEQ_LEN = 4096
# Nodes of one kind differ by so much (lognormal).
SPEED_SIGMA = 0.05
# Between regions: one flow's rate and delay, drawn for each pair, and what all flows of the pair carry together.
RATES_MBPS = (30.0, 30_000.0)
DELAYS_S = (0.005, 0.15)
SHARED_FLOWS = 50.0
NEAR_RATE_MBPS, NEAR_DELAY_S, NIC_MBPS = 10_000.0, 0.0005, 10_000.0


def synthetic_fleet(num_nodes: int, num_regions: int, model: ModelSpec, *, seed: int) -> Fleet:
    """Return nodes of kinds spread unevenly over regions (Dirichlet), each a little faster or slower than its kind."""
    rng = np.random.default_rng(seed)
    cells = rng.multinomial(num_nodes, rng.dirichlet(np.ones(num_regions * len(GPUS))))
    nodes: list[NodeCard] = []
    for cell, count in enumerate(cells.tolist()):
        region, gpu = cell // len(GPUS), GPUS[cell % len(GPUS)]
        for factor in np.exp(rng.normal(0.0, SPEED_SIGMA, count)).tolist():
            nodes.append(_card(f"n{len(nodes)}", f"r{region}", gpu, model, gpu.tflops * factor))
    links: list[RegionLink] = []
    for a in range(num_regions):
        links.append(_link(a, a, NEAR_DELAY_S, NEAR_RATE_MBPS, 0.0))
        for b in range(a + 1, num_regions):
            rate_mbps = float(np.exp(rng.uniform(*np.log(RATES_MBPS))))
            delay_s = float(rng.uniform(*DELAYS_S))
            links += [_link(*ends, delay_s, rate_mbps, rate_mbps * SHARED_FLOWS) for ends in ((a, b), (b, a))]
    return Fleet(nodes=tuple(nodes), links=(), regions=tuple(links))


def synthetic_problem(fleet: Fleet, model: ModelSpec, num_microbatches: int) -> Problem:
    """Return the fleet on one sequence a microbatch, boundaries kept and blocks computed again, frames in q8."""
    batch = BatchSpec(seq_len=SEQ_LEN, microbatch_size=1, num_microbatches=num_microbatches)
    work = Workload(model=model, batch=batch, schedule="bdp", activation_checkpointing=True)
    return make_problem(fleet, work, WireConfig(), codecs=[("q8", "q8")])


def _card(name: str, region: str, gpu: Gpu, model: ModelSpec, tflops: float) -> NodeCard:
    def seconds(params: int) -> float:
        return 2 * params * SEQ_LEN / (tflops * 1e12)

    layer_s, head_s = seconds(model.layer_params), seconds(model.head_params)
    times = PartTimes(
        microbatch_size=1,
        layer_forward_s=layer_s,
        layer_backward_s=2 * layer_s,
        layer_weight_s=layer_s,
        embedding_forward_s=0.01 * layer_s,
        embedding_backward_s=0.01 * layer_s,
        head_forward_s=head_s,
        head_backward_s=2 * head_s,
    )
    return NodeCard(
        node=name,
        host=name,
        region=region,
        device=gpu.name,
        boundary_bytes=2,
        memory_bytes=int(gpu.memory_gb * 1e9),
        times=(times,),
        price_per_hour=gpu.dollars_per_hour,
        uplink_mbps=NIC_MBPS,
        downlink_mbps=NIC_MBPS,
    )


def _link(source: int, target: int, delay_s: float, rate_mbps: float, shared_mbps: float) -> RegionLink:
    return RegionLink(
        source=f"r{source}", target=f"r{target}", delay_s=delay_s, rate_mbps=rate_mbps, shared_mbps=shared_mbps
    )
