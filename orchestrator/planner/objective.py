"""What is wanted of a placement, and what is allowed.

PURE. Every search minimises `score`; a placement that is not allowed, or does not fit, scores infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from orchestrator.planner.evaluate import Evaluation, evaluate
from orchestrator.planner.problem import Placement, Problem

# throughput: the shortest step. dollars: the fewest dollars a step. cheapest: the fewest dollars an hour for which a
# step takes no longer than `max_step_s`.
Objective = Literal["throughput", "dollars", "cheapest"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan is judged by and must keep to; nodes are indices into a Problem."""

    objective: Objective = "throughput"
    # Stages, exactly or at most; None: as many as serve best.
    num_stages: int | None = None
    # Nodes that share a stage, at most.
    max_replicas: int = 1
    max_dollars_per_hour: float = math.inf
    max_step_s: float = math.inf
    # Each layer on at least so many nodes, of at least so many failure domains.
    min_copies: int = 1
    min_domains: int = 1
    # (node, stage): that node, if used, has that stage; -1 is the last one. Others may share it.
    pins: tuple[tuple[int, int], ...] = ()
    # (node, other): where both are used, the first has a later stage.
    after: tuple[tuple[int, int], ...] = ()


def is_allowed(problem: Problem, limits: Limits, placement: Placement) -> bool:
    """Return whether a placement keeps to all limits but those on time and memory."""
    if limits.num_stages not in (None, placement.num_stages):
        return False
    most = limits.max_dollars_per_hour
    if most < math.inf and sum(float(problem.price_N[node]) for node in placement.used) > most:
        return False
    for nodes in placement.nodes:
        if not limits.min_copies <= len(nodes) <= limits.max_replicas:
            return False
        if limits.min_domains > 1 and len({int(problem.domain_N[node]) for node in nodes}) < limits.min_domains:
            return False
    if not limits.pins and not limits.after:
        return True
    stage_of = {node: stage for stage, nodes in enumerate(placement.nodes) for node in nodes}
    for node, stage in limits.pins:
        if stage_of.get(node, stage % placement.num_stages) != stage % placement.num_stages:
            return False
        if not -1 <= stage < placement.num_stages:
            return False
    return all(stage_of.get(a, math.inf) > stage_of.get(b, -1) for a, b in limits.after)


def score(problem: Problem, limits: Limits, placement: Placement, evaluation: Evaluation | None = None) -> float:
    """Return what is to be as small as possible: seconds or dollars a step, or dollars an hour; infinity if refused."""
    if not is_allowed(problem, limits, placement):
        return math.inf
    found = evaluation or evaluate(problem, placement)
    if found.short_bytes > 0 or found.step_s > limits.max_step_s:
        return math.inf
    if limits.objective == "throughput":
        return found.step_s
    dollars_per_hour = sum(float(problem.price_N[node]) for node in placement.used)
    if limits.objective == "dollars":
        return dollars_per_hour / 3600 * found.step_s
    return dollars_per_hour


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to; `placement` is None where it found nothing that is allowed and fits."""

    placement: Placement | None
    score: float
    evaluations: int
