"""Which codec each link carries, within what the loss may rise.

PURE. Links start without a codec; the one that holds the step up most gets the next smaller pair, while the budget
lasts and the step gets shorter by more than noise. What a pair costs was measured (docs/quality.md: three links, a
small model): costs are taken to add up over links, and to be at least what the measurement can tell from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

CodecPair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class CodecCost:
    """A pair of codecs, forward and backward, and the share by which one such link raises the held-out loss."""

    pair: CodecPair
    loss_share: float


# Mildest first; shares of `python -m bench.quality` (bench/results/quality.json) divided by its three links. Without a
# codec nothing is lost.
LADDER = (
    CodecCost(pair=("none", "none"), loss_share=0.0),
    CodecCost(pair=("q8", "q8"), loss_share=0.0004 / 3),
    CodecCost(pair=("q8", "hq4-stochastic"), loss_share=0.0016 / 3),
    CodecCost(pair=("hq4", "q8"), loss_share=0.0304 / 3),
    CodecCost(pair=("hq4", "hq4-stochastic"), loss_share=0.0325 / 3),
)


def choose_codecs(
    num_links: int, budget: float, least_gain: float, step_s: Callable[[Sequence[CodecPair]], float]
) -> tuple[CodecPair, ...]:
    """Return a pair for each link, so that `step_s` of them is short and their costs add up to `budget` at most.

    Only what shortens the step by `least_gain` of it costs anything.
    """

    def is_affordable(rungs: Sequence[int]) -> bool:
        return sum(LADDER[rung].loss_share for rung in rungs) <= budget

    ladder = tuple(cost.pair for cost in LADDER)
    return _choose((ladder,) * num_links, is_affordable, least_gain, step_s)


def choose_thin(
    set_L: Sequence[CodecPair],
    thin: Sequence[CodecPair],
    least_gain: float,
    step_s: Callable[[Sequence[CodecPair]], float],
) -> tuple[CodecPair, ...]:
    """Return a pair for each link: what is set, or, where that shortens the step by `least_gain` of it, one of `thin`.

    `thin` is mildest first.
    """
    return _choose([(own, *thin) for own in set_L], lambda rungs: True, least_gain, step_s)


def _choose(
    ladder_L: Sequence[Sequence[CodecPair]],
    is_allowed: Callable[[Sequence[int]], bool],
    least_gain: float,
    step_s: Callable[[Sequence[CodecPair]], float],
) -> tuple[CodecPair, ...]:
    """Return a pair for each link from its ladder, mildest first.

    What links got together, each gives back that does without.
    """
    pairs = list(_down(ladder_L, is_allowed, least_gain, step_s))
    most_s = step_s(pairs) / (1 - least_gain)
    for link, ladder in enumerate(ladder_L):
        for milder in ladder:
            if milder == pairs[link] or step_s([*pairs[:link], milder, *pairs[link + 1 :]]) <= most_s:
                pairs[link] = milder
                break
    return tuple(pairs)


def _down(
    ladder_L: Sequence[Sequence[CodecPair]],
    is_allowed: Callable[[Sequence[int]], bool],
    least_gain: float,
    step_s: Callable[[Sequence[CodecPair]], float],
) -> tuple[CodecPair, ...]:
    """Return a pair for each link from its ladder, all of one length.

    Greedy: of all single steps down a ladder that are allowed, and of all links at once, the one that shortens the step
    most is taken, until none does by more than `least_gain` of it.
    """
    num_links = len(ladder_L)
    rungs = [0] * num_links

    def pairs(rungs: Sequence[int]) -> tuple[CodecPair, ...]:
        return tuple(ladder[rung] for ladder, rung in zip(ladder_L, rungs, strict=True))

    best_s = step_s(pairs(rungs))
    num_rungs = len(ladder_L[0]) if ladder_L else 0
    while True:
        candidates = [
            [*rungs[:link], rung, *rungs[link + 1 :]]
            for link in range(num_links)
            for rung in range(rungs[link] + 1, num_rungs)
        ]
        candidates += [[max(rung, low) for rung in rungs] for low in range(1, num_rungs)]
        found = [
            (step_s(pairs(candidate)), candidate)
            for candidate in candidates
            if candidate != rungs and is_allowed(candidate)
        ]
        if not found or min(found)[0] >= best_s * (1 - least_gain):
            return pairs(rungs)
        best_s, rungs = min(found)


def loss_share(pairs: Sequence[CodecPair]) -> float | None:
    """Return by which share these links raise the held-out loss, as measured; None where a pair was not measured."""
    costs = {cost.pair: cost.loss_share for cost in LADDER}
    return sum(costs[pair] for pair in pairs) if all(pair in costs for pair in pairs) else None
