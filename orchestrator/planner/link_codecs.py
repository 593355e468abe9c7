"""The codecs of one placement's links: what is set, or the choice that plan.quality_budget or wire.thin leaves.

PURE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.planner.assemble import Option
from orchestrator.planner.build import make_problem
from orchestrator.planner.choices import PlanConfig, noise_of
from orchestrator.planner.codecs import LADDER, CodecPair, choose_codecs, choose_thin
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.problem import Problem


def with_codecs(option: Option, config: PlanConfig, foreseen_s: Callable[[Problem], float] | None = None) -> Option:
    """Return the option with each link's codecs chosen within what the configuration allows; else as they are set.

    `foreseen_s` says how long a step of the option takes under other codecs; by default the closed form does.
    """
    placement = option.placement
    num_links = placement.num_stages - 1

    def with_pairs(pairs: Sequence[CodecPair]) -> Problem:
        # A plan of one stage has no link.
        return make_problem(option.fleet, option.work, option.wire, codecs=pairs or (LADDER[0].pair,))

    def step_s(pairs: Sequence[CodecPair]) -> float:
        problem = with_pairs(pairs)
        return evaluate(problem, placement).step_s if foreseen_s is None else foreseen_s(problem)

    if config.quality_budget is not None:
        pairs = choose_codecs(num_links, config.quality_budget, noise_of(option.fleet, config), step_s)
    elif option.wire.thin and num_links:
        set_L = tuple(option.wire.codecs_of(stage) for stage in range(num_links))
        pairs = choose_thin(set_L, option.wire.thin_pairs, noise_of(option.fleet, config), step_s)
    else:
        return option
    return replace(option, problem=with_pairs(pairs), pairs=pairs)
