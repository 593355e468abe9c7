"""Differences between runs of the same seeds, their intervals, and what may be concluded.

PURE. A seed sets weights and order of tokens, so that runs of one seed differ by their codecs alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

# The 97.5% point of Student's t distribution, by degrees of freedom from 1 on.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# A difference within this share of the baseline's loss is none that matters.
LEVEL_SHARE = 0.005


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method's loss less the baseline's, in nats: the mean over seeds, and half of its 95% intervals."""

    by_seed: tuple[float, ...]
    mean: float
    # The share of the baseline's mean loss that the mean is.
    share: float
    # From this method's own seeds; None where there are fewer than two.
    half_width: float | None
    # With the spread of all methods' differences taken as one.
    pooled_half_width: float | None
    verdict: str


def differences(losses: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Difference]:
    """Return each method's difference to the baseline; losses are by method, then seed, the same seeds for all."""
    base = losses[baseline]
    by_method = {
        name: tuple(loss - other for loss, other in zip(own, base, strict=True))
        for name, own in losses.items()
        if name != baseline
    }
    pooled = _pooled_half_width(list(by_method.values()))
    return {
        name: _difference(by_seed, baseline_loss=fmean(base), pooled_half_width=pooled)
        for name, by_seed in by_method.items()
    }


def _difference(by_seed: tuple[float, ...], *, baseline_loss: float, pooled_half_width: float | None) -> Difference:
    mean = fmean(by_seed)
    half_width = None
    if len(by_seed) > 1:
        half_width = _half_width(variance(by_seed), freedom=len(by_seed) - 1, num_seeds=len(by_seed))
    return Difference(
        by_seed=by_seed,
        mean=mean,
        share=mean / baseline_loss,
        half_width=half_width,
        pooled_half_width=pooled_half_width,
        verdict=verdict(mean, half_width, LEVEL_SHARE * baseline_loss),
    )


def _pooled_half_width(by_method: Sequence[tuple[float, ...]]) -> float | None:
    num_seeds = len(by_method[0])
    if num_seeds < 2:
        return None
    freedom = len(by_method) * (num_seeds - 1)
    return _half_width(fmean(variance(by_seed) for by_seed in by_method), freedom=freedom, num_seeds=num_seeds)


def _half_width(spread: float, *, freedom: int, num_seeds: int) -> float:
    # Beyond the table the last one is a little too wide.
    return _T_975[min(freedom, len(_T_975)) - 1] * math.sqrt(spread / num_seeds)


def verdict(mean: float, half_width: float | None, level: float) -> str:
    """Return what a 95% interval shows of a difference, in nats: 'level' where all of it lies within +-`level`."""
    if half_width is None:
        return "not shown (one seed)"
    low, high = mean - half_width, mean + half_width
    if -level <= low and high <= level:
        return "level"
    if low > 0:
        return f"worse by {mean:.3f}"
    if high < 0:
        return f"better by {-mean:.3f}"
    return "not shown"
