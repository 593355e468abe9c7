"""A placement's step by its own orders of actions, for the last few that a plan is chosen from.

PURE. The closed form that searches use knows what binds in the long run; how a step fills and drains it knows to a few
percent. Playing the actions says it exactly, and which of two nearly equal candidates is the better; the best one is
changed a little further, as long as that makes its step shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate, islice, pairwise

import numpy as np

from actors.list_schedule import Limits as Windows
from actors.list_schedule import dispatched
from actors.play import PipelineTimes, play
from actors.schedule import FIXED, Action, stage_actions
from orchestrator.planner.evaluate import Evaluation, backward_s, evaluate, forward_s
from orchestrator.planner.objective import Limits, score
from orchestrator.planner.problem import Placement, Problem

# More actions than this are not played: the closed form stands.
_MOST_ACTIONS = 200_000
# So many are played to polish a plan: a fifth of a second.
_POLISHING_ACTIONS = 100_000
_ROUNDING = 1e-9


def played_step_s(problem: Problem, placement: Placement, found: Evaluation) -> float:
    """Return the seconds of a step as its actions play; the closed form's where a stage has several nodes."""
    num_stages, num_microbatches = placement.num_stages, problem.num_microbatches
    if any(len(nodes) > 1 for nodes in placement.nodes) or 2 * num_stages * num_microbatches > _MOST_ACTIONS:
        return found.step_s
    times = pipeline_times(problem, placement)
    orders: tuple[tuple[Action, ...], ...]
    if problem.schedule == "gpipe" or problem.schedule == "1f1b" or problem.schedule == "zb-h1":
        orders = tuple(
            stage_actions(problem.schedule, stage, num_stages, num_microbatches) for stage in range(num_stages)
        )
        played_s = play(orders, times).step_s
    else:
        assert problem.schedule != "interleaved", "searched by its chain"
        # What is put off counts as in flight, as memory is counted and stages have it.
        in_flight_S = tuple(in_flight for (in_flight,) in found.in_flight_SR)
        limits = Windows(in_flight_S=in_flight_S, held_S=in_flight_S)
        played_s = dispatched(problem.schedule, times, num_microbatches, limits).timings.step_s
    step_s = float(played_s) + found.sync_s + found.commit_s
    # A way that several links share is not played.
    is_shared = bool(np.isfinite(problem.shared_bytes_per_s_PP).any() or problem.uplink_byte_s_N.any())
    return max(step_s, found.step_s) if is_shared or problem.downlink_byte_s_N.any() else step_s


def polished(problem: Problem, limits: Limits, placement: Placement) -> Placement:
    """Return a chain after the changes near it that make its step shorter as it plays, until none does.

    A layer moves, or two nodes swap; `_POLISHING_ACTIONS` bounds them. The same placement where it has replicas,
    which are not played, where its step is no matter of its score, and for schedules that are made by trying.
    """
    num_actions = 2 * placement.num_stages * problem.num_microbatches
    is_chain = len(placement.used) == placement.num_stages
    if not is_chain or problem.schedule not in FIXED or limits.objective == "cheapest":
        return placement
    best, left = _played_score(problem, limits, placement), _POLISHING_ACTIONS // num_actions
    while left > 0:
        around = [(_played_score(problem, limits, near), near) for near in islice(_neighbours(placement), left)]
        left -= len(around)
        found, near = min(around, key=lambda one: one[0], default=(math.inf, placement))
        if found >= best * (1 - _ROUNDING):
            break
        best, placement = found, near
    return placement


def _played_score(problem: Problem, limits: Limits, placement: Placement) -> float:
    found = evaluate(problem, placement)
    own = score(problem, limits, placement, found)
    return own if math.isinf(own) else own * played_step_s(problem, placement, found) / found.step_s


def _neighbours(placement: Placement) -> Iterator[Placement]:
    """Yield the placement with a layer moved to another stage, or two stages' nodes swapped; near ones first."""
    num_stages, nodes = placement.num_stages, placement.nodes
    sizes = [stop - start for start, stop in pairwise(placement.bounds)]
    for apart in range(1, num_stages):
        for one, other in ((stage, stage + apart) for stage in range(num_stages - apart)):
            for source, target in ((one, other), (other, one)):
                if sizes[source] > 1:
                    moved = [size + (stage == target) - (stage == source) for stage, size in enumerate(sizes)]
                    yield Placement(bounds=(0, *accumulate(moved)), nodes=nodes)
            swapped = list(nodes)
            swapped[one], swapped[other] = nodes[other], nodes[one]
            yield Placement(bounds=placement.bounds, nodes=tuple(swapped))


def pipeline_times(problem: Problem, placement: Placement) -> PipelineTimes:
    """Return what stages and the links between them take for a microbatch, each stage by its first node."""
    nodes = [stage[0] for stage in placement.nodes]
    spans = [placement.bounds[stage : stage + 2] for stage in range(len(nodes))]
    weights_s = [
        float((stop - start) * problem.layer_weight_s_N[node]) for node, (start, stop) in zip(nodes, spans, strict=True)
    ]
    backwards_s = [backward_s(problem, node, *span) for node, span in zip(nodes, spans, strict=True)]
    ends = [(problem.place_N[a], problem.place_N[b]) for a, b in pairwise(nodes)]
    down_L, up_L = problem.forward_bytes_L, problem.backward_bytes_L

    byte_s = problem.frame_byte_s_PP

    def way_s(source: int, target: int) -> float:
        own_s = max(problem.uplink_byte_s_N[source], problem.downlink_byte_s_N[target])
        return max(byte_s[problem.place_N[source], problem.place_N[target]], own_s)

    return PipelineTimes(
        forward_s_S=tuple(forward_s(problem, node, *span) for node, span in zip(nodes, spans, strict=True)),
        input_backward_s_S=tuple(whole - part for whole, part in zip(backwards_s, weights_s, strict=True)),
        weight_backward_s_S=tuple(weights_s),
        send_down_s_L=tuple(float(down_L[link] * way_s(a, b)) for link, (a, b) in enumerate(pairwise(nodes))),
        delay_down_s_L=tuple(float(problem.delay_s_PP[p, q]) for p, q in ends),
        send_up_s_L=tuple(float(up_L[link] * way_s(b, a)) for link, (a, b) in enumerate(pairwise(nodes))),
        delay_up_s_L=tuple(float(problem.delay_s_PP[q, p]) for p, q in ends),
    )
