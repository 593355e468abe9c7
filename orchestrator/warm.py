"""Compiles planner and simulator before anyone waits for them: `python -m orchestrator.warm`, which `make env` runs.

Compiled code is kept beside the sources, or in the user's cache where that is not writable, so this is done once.
"""

from __future__ import annotations

from actors.fleet_spec import Fleet, NodeCard, PartTimes
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec, WireConfig
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.explain import explained_plan
from orchestrator.planner.large import plan_large
from orchestrator.planner.migration import StateSizes
from orchestrator.planner.objective import Limits
from orchestrator.planner.replan import replan
from orchestrator.simulator.step import simulate_step

_NO_STATE = StateSizes(layer_bytes=0.0, first_bytes=0.0, last_bytes=0.0, store_byte_s=0.0)


def warm() -> float:
    """Plan for a small made-up fleet, as a small one and as a large one, and simulate a step; return its seconds."""
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
    fleet, wire, config = Fleet(nodes=nodes, links=()), WireConfig(), PlanConfig(max_replicas=2, evaluations=500)
    explained_plan(fleet, work, wire, config)
    problem, limits = make_problem(fleet, work, wire), Limits(max_replicas=2)
    found = plan_large(problem, limits, seed=0, evaluations=50, steady=False).placement
    assert found is not None, "a fleet with room for everything has a plan"
    replan(problem, found, limits, state_sizes=_NO_STATE, horizon_s=1.0, seed=0, evaluations=500)
    return simulate_step(problem, found, wire).step_s


if __name__ == "__main__":
    warm()
