"""A simulated step as the record that real runs make, so that one viewer shows both. What is simulated says so.

PURE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from actors.spec import WAITS, ActionTime
from orchestrator.records import LinkRecord, StageRecord, StepRecord
from orchestrator.simulator.kernel import BACKWARD, FORWARD, WEIGHT
from orchestrator.simulator.step import StepSimulation

_NAMES = {FORWARD: "F", BACKWARD: "B", WEIGHT: "W"}
# A wait shorter than this is rounding.
_SHORTEST_WAIT_S = 1e-9


def step_record(
    simulation: StepSimulation,
    *,
    step: int,
    num_steps: int,
    step_tokens: int,
    node_names: Sequence[str],
    dollars: float,
    with_actions: bool = True,
) -> StepRecord:
    """Return a step's record; `dollars` are those of the run up to it. Loss and norms, which nothing made, are NaN.

    `node_names` are by index into the Problem.
    """
    return StepRecord(
        step=step,
        num_steps=num_steps,
        loss=math.nan,
        lr=math.nan,
        grad_norm=math.nan,
        clip_scale=math.nan,
        skipped=False,
        num_skipped=0,
        num_targets=step_tokens,
        total_tokens=step_tokens * (step + 1),
        step_s=simulation.step_s,
        tokens_per_s=step_tokens / simulation.step_s,
        eta_s=(num_steps - step - 1) * simulation.step_s,
        dollars=dollars,
        stages=stage_records(simulation, node_names, with_actions=with_actions),
        links=link_records(simulation),
        is_simulated=True,
    )


def stage_records(
    simulation: StepSimulation, node_names: Sequence[str], *, with_actions: bool
) -> tuple[StageRecord, ...]:
    """Return one record for each node, stage by stage."""
    records: list[StageRecord] = []
    for u, node in enumerate(simulation.nodes_U):
        actions = node_actions(simulation, u)
        records.append(
            StageRecord(
                stage=int(simulation.stage_U[u]),
                compute_s=float(simulation.compute_s_U[u]),
                wait_s=sum(a.end_s - a.start_s for a in actions if a.name in WAITS),
                idle_share=float(simulation.idle_share_U[u]),
                peak_memory_bytes=int(simulation.memory_bytes_U[u]),
                actions=actions if with_actions else (),
                node=node_names[int(node)],
            )
        )
    return tuple(records)


def node_actions(simulation: StepSimulation, u: int) -> tuple[ActionTime, ...]:
    """Return what one node did, in seconds from when its order came: commit, operations, and waits between them."""
    layout, played, stage = simulation.layout, simulation.played, int(simulation.stage_U[u])
    began_s = float(simulation.order_s_U[u])
    own = layout.own_O[layout.own_U[u] : layout.own_U[u + 1]]
    ops = (FORWARD, BACKWARD, WEIGHT) if layout.is_split else (FORWARD, BACKWARD)
    done = sorted(
        (float(played.begin_s_ASM[op, stage, m]), float(played.end_s_ASM[op, stage, m]), op, int(m))
        for op in ops
        for m in own
    )
    actions: list[ActionTime] = []
    free_s = began_s + float(simulation.commit_s_U[u])
    if free_s > began_s:
        actions.append(ActionTime(name="C", microbatch=-1, start_s=0.0, end_s=free_s - began_s))
    for start_s, end_s, op, m in done:
        if start_s > free_s + _SHORTEST_WAIT_S:
            name = "wF" if op == FORWARD else "wB"
            actions.append(ActionTime(name=name, microbatch=m, start_s=free_s - began_s, end_s=start_s - began_s))
        actions.append(ActionTime(name=_NAMES[op], microbatch=m, start_s=start_s - began_s, end_s=end_s - began_s))
        free_s = end_s
    if sync := simulation.sync_s_S[stage]:
        last_s = float(played.end_s_ASM[:, stage].max()) - began_s
        actions.append(ActionTime(name="S", microbatch=-1, start_s=last_s, end_s=last_s + sync))
    return tuple(actions)


def link_records(simulation: StepSimulation) -> tuple[LinkRecord, ...]:
    """Return one record for each direction between a stage and the next, all replicas together."""
    layout = simulation.layout
    records: list[LinkRecord] = []
    num_frames = layout.node_SM.shape[1]
    for cut in range(simulation.placement.num_stages - 1):
        for direction, (source, target) in enumerate(((cut, cut + 1), (cut + 1, cut))):
            raw_bytes = float(np.sum(layout.raw_bytes_U[layout.node_SM[source]]))
            records.append(
                LinkRecord(
                    source_stage=source,
                    target_stage=target,
                    num_frames=num_frames,
                    raw_bytes=int(raw_bytes),
                    wire_bytes=int(simulation.link_bytes_DS[direction, cut]),
                )
            )
    return tuple(records)
