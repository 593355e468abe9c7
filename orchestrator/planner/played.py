"""A placement's step by its own orders of actions, for the last few that a plan is chosen from.

PURE. The closed form that searches use knows what binds in the long run; how a step fills and drains it knows to a few
percent. Playing the actions says it exactly, and which of two nearly equal candidates is the better.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from actors.list_schedule import Limits, list_schedule
from actors.play import PipelineTimes, play
from actors.schedule import Action, stage_actions
from orchestrator.planner.evaluate import Evaluation, backward_s, forward_s
from orchestrator.planner.problem import Placement, Problem

# More actions than this are not played: the closed form stands.
_MOST_ACTIONS = 200_000


def played_step_s(problem: Problem, placement: Placement, found: Evaluation) -> float:
    """Return the seconds of a step as its actions play; the closed form's where a stage has several nodes."""
    num_stages, num_microbatches = placement.num_stages, problem.num_microbatches
    if any(len(nodes) > 1 for nodes in placement.nodes) or 2 * num_stages * num_microbatches > _MOST_ACTIONS:
        return found.step_s
    times = _times(problem, placement)
    orders: tuple[tuple[Action, ...], ...]
    if problem.schedule in ("gpipe", "1f1b"):
        orders = tuple(
            stage_actions(problem.schedule, stage, num_stages, num_microbatches) for stage in range(num_stages)
        )
        played_s = play(orders, times).step_s
    else:
        # What is put off counts as in flight, as memory is counted.
        limits = Limits(in_flight_S=found.in_flight_S, held_S=found.in_flight_S)
        played_s = list_schedule(problem.schedule, times, num_microbatches, limits).timings.step_s
    step_s = float(played_s) + found.sync_s + found.commit_s
    # A way that several links share is not played.
    is_shared = bool(np.isfinite(problem.shared_bytes_per_s_PP).any() or problem.uplink_byte_s_N.any())
    return max(step_s, found.step_s) if is_shared or problem.downlink_byte_s_N.any() else step_s


def _times(problem: Problem, placement: Placement) -> PipelineTimes:
    nodes = [stage[0] for stage in placement.nodes]
    spans = [placement.bounds[stage : stage + 2] for stage in range(len(nodes))]
    weights_s = [
        float((stop - start) * problem.layer_weight_s_N[node]) for node, (start, stop) in zip(nodes, spans, strict=True)
    ]
    backwards_s = [backward_s(problem, node, *span) for node, span in zip(nodes, spans, strict=True)]
    ends = [(problem.place_N[a], problem.place_N[b]) for a, b in pairwise(nodes)]
    down_L, up_L = problem.forward_bytes_L, problem.backward_bytes_L
    return PipelineTimes(
        forward_s_S=tuple(forward_s(problem, node, *span) for node, span in zip(nodes, spans, strict=True)),
        input_backward_s_S=tuple(whole - part for whole, part in zip(backwards_s, weights_s, strict=True)),
        weight_backward_s_S=tuple(weights_s),
        send_down_s_L=tuple(float(down_L[link] * problem.byte_s_PP[p, q]) for link, (p, q) in enumerate(ends)),
        delay_down_s_L=tuple(float(problem.delay_s_PP[p, q]) for p, q in ends),
        send_up_s_L=tuple(float(up_L[link] * problem.byte_s_PP[q, p]) for link, (p, q) in enumerate(ends)),
        delay_up_s_L=tuple(float(problem.delay_s_PP[q, p]) for p, q in ends),
    )
