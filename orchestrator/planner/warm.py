"""Compiles the planner before anyone waits for a plan: `python -m orchestrator.planner.warm`, which `make env` runs.

Compiled code is kept beside the sources, or in the user's cache where that is not writable, so this is done once.
"""

from __future__ import annotations

from actors.fleet_spec import Fleet, NodeCard, PartTimes
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec, WireConfig
from orchestrator.planner.build import Workload
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.explain import explained_plan


def warm() -> float:
    """Plan for a small made-up fleet with all that there is to choose from; return the plan's seconds a step."""
    times = PartTimes(
        microbatch_size=1,
        layer_forward_s=0.1,
        layer_backward_s=0.2,
        layer_weight_s=0.1,
        embedding_forward_s=0.0,
        embedding_backward_s=0.0,
        head_forward_s=0.1,
        head_backward_s=0.2,
    )
    nodes = tuple(
        NodeCard(
            node=f"node-{number}",
            host=f"host-{number}",
            region="here",
            device="made up",
            boundary_bytes=2,
            memory_bytes=10**12,
            times=(times,),
        )
        for number in range(3)
    )
    work = Workload(
        model=ModelSpec(num_layers=4),
        batch=BatchSpec(seq_len=64, microbatch_size=1, num_microbatches=4),
        schedule="1f1b",
        activation_checkpointing=False,
    )
    config = PlanConfig(max_replicas=2, evaluations=500)
    return explained_plan(Fleet(nodes=nodes, links=()), work, WireConfig(), config).step_s


if __name__ == "__main__":
    warm()
