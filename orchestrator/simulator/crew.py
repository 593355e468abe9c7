"""Who is left of a placement as its nodes are lost, and how long a step takes with them.

PURE.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from orchestrator.planner.evaluate import compute_s
from orchestrator.planner.problem import Floats, Placement, Problem
from orchestrator.simulator.step import StepSimulation


class Crew:
    """Who is left of a placement, and how long a step takes with them."""

    def __init__(
        self,
        problem: Problem,
        placement: Placement,
        step_s: float,
        exact_nodes: int,
        simulated: Callable[[Placement], StepSimulation],
    ) -> None:
        self._problem, self._bounds = problem, placement.bounds
        self._nodes = [list(nodes) for nodes in placement.nodes]
        self._simulated = simulated
        self._is_exact = len(placement.used) <= exact_nodes
        self._full_step_s = self.step_s = step_s
        # Microbatches a second of each stage, all its nodes together.
        self._rate_S: Floats = np.array(
            [sum(self._node_rate(stage, node) for node in nodes) for stage, nodes in enumerate(self._nodes)]
        )
        self._full_pace_s = float(1 / self._rate_S.min())

    def placement(self) -> Placement:
        return Placement(bounds=self._bounds, nodes=tuple(map(tuple, self._nodes)))

    def num_left(self, stage: int) -> int:
        return len(self._nodes[stage])

    def lose(self, stage: int, node: int) -> float:
        """Go on without a node; return how much it did for each microbatch that the rest of its stage does."""
        rate = self._node_rate(stage, node)
        self._nodes[stage].remove(node)
        self._rate_S[stage] -= rate
        if self._is_exact:
            self.step_s = self._simulated(self.placement()).step_s
        else:
            # Where its stage is now the slowest, every microbatch but the first waits for it; else nothing changes.
            slower_s = max(0.0, float(1 / self._rate_S.min()) - self._full_pace_s)
            self.step_s = self._full_step_s + (self._problem.num_microbatches - 1) * slower_s
        return rate / float(self._rate_S[stage])

    def _node_rate(self, stage: int, node: int) -> float:
        return 1 / compute_s(self._problem, node, self._bounds[stage], self._bounds[stage + 1])
