"""When a link is no longer what the plan takes it for: readings of each step in, changes of a rate out, few of them.

PURE. A direction of a link is judged by readings in a row that say the same: all below the plan's rate by more than
`retune.factor`, or all above it, and within that factor of one another. A reading that is only a lower bound never says
that a link is slow; it may say that it is fast. The other direction of a link that changed is taken to have changed
too, unless it shows that it did not. After a change there is a pause; what follows a rise waits twice as
long for the next rise each time, so that a link that goes up and down for ever, at whatever rhythm, changes a plan no
more often than the logarithm of the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.errors import ConfigError
from actors.spec import LinkReading
from orchestrator.planner.retuned import Way, WayState


@dataclass(frozen=True, kw_only=True)
class RetuneConfig:
    """When a run changes depths and codecs because a link changed."""

    # A link's rate must be so many times off the plan's; 0: plans stay as they are.
    factor: float = 2.0
    # ... in so many readings in a row, one a step.
    steps: int = 2
    # Steps from one change of a link to the next; more and more for rises.
    cooldown_steps: int = 5

    def __post_init__(self) -> None:
        if self.factor != 0 and self.factor <= 1:
            raise ConfigError(f"retune.factor is {self.factor:g}", "set retune.factor above 1, or to 0 for never")
        if self.steps < 1 or self.cooldown_steps < 1:
            raise ConfigError("retune.steps and retune.cooldown_steps must be 1 or more", "set them so")


@dataclass(frozen=True, kw_only=True)
class WayWatch:
    """One direction of a link: what the last readings in a row say, and when it may change again."""

    readings: tuple[LinkReading, ...] = ()
    is_rise: bool = False
    # Of its last change; of its rises so far.
    changed_at: int | None = None
    num_rises: int = 0


@dataclass(frozen=True, kw_only=True)
class LinkWatch:
    """What is remembered of a run's links from step to step."""

    # What the plan takes each for.
    planned: Mapping[Way, WayState]
    ways: Mapping[Way, WayWatch] = field(default_factory=dict[Way, WayWatch])


@dataclass(frozen=True, kw_only=True)
class LinkChange:
    """A direction of a link is something else than the plan says."""

    way: Way
    before: WayState
    now: WayState
    # By how many readings, 0 where the other direction's stand for it; the rate is at least `now`'s where it is a rise
    # that was not measured.
    num_readings: int
    is_measured: bool


def on_readings(
    watch: LinkWatch, step: int, readings: Sequence[LinkReading], config: RetuneConfig
) -> tuple[LinkWatch, tuple[LinkChange, ...]]:
    """Return the watch after a step's readings, and the links that changed for good."""
    if not config.factor:
        return watch, ()
    planned, ways, changes = watch.planned, dict(watch.ways), list[LinkChange]()
    for reading in readings:
        way = reading.source_stage, reading.target_stage
        if way not in planned:
            continue
        own = _after(ways.get(way, WayWatch()), reading, planned[way], config)
        # Only while it is so: what was seen during a pause may be over.
        is_told = len(own.readings) >= config.steps and own.readings[-1] is reading
        if is_told and step >= _free_at(own, config):
            changes.append(_change(way, own, planned[way]))
            own = WayWatch(changed_at=step, num_rises=own.num_rises + own.is_rise)
        ways[way] = own
    latest = {(reading.source_stage, reading.target_stage): reading for reading in readings}
    for change in tuple(changes):
        back = (change.way[1], change.way[0])
        if back in planned and back not in {other.way for other in changes}:
            also = _also(change, planned[back], latest.get(back), config)
            if also is not None:
                changes.append(also)
                ways[back] = replace(ways.get(back, WayWatch()), readings=(), changed_at=step)
    return replace(watch, ways=ways), tuple(changes)


def _also(
    change: LinkChange, planned: WayState, reading: LinkReading | None, config: RetuneConfig
) -> LinkChange | None:
    """Return the other direction as changed too, by as much, where it shows nothing to the contrary.

    Gradients come back at the pace at which activations go, so they never wait for one another where those do: nobody
    sees how thin that way is.
    """
    share = change.now.rate_mbps / change.before.rate_mbps
    at_least = reading.rate_mbps if reading is not None else 0.0
    # "At least so much" speaks against a fall where that is much.
    is_contrary = reading is not None and (
        reading.is_measured or (share < 1 and at_least * config.factor >= planned.rate_mbps)
    )
    rate_mbps = max(at_least, min(planned.rate_mbps * share, max(planned.rate_mbps, change.now.rate_mbps)))
    low, high = sorted((rate_mbps, planned.rate_mbps))
    if is_contrary or high <= config.factor * low:
        return None
    return LinkChange(
        way=(change.way[1], change.way[0]),
        before=planned,
        now=replace(planned, rate_mbps=rate_mbps),
        num_readings=0,
        is_measured=False,
    )


def _after(own: WayWatch, reading: LinkReading, planned: WayState, config: RetuneConfig) -> WayWatch:
    """Return what readings in a row say with one more."""
    factor = config.factor
    is_rise = reading.rate_mbps > factor * planned.rate_mbps
    is_fall = reading.is_measured and factor * reading.rate_mbps < planned.rate_mbps
    if not is_rise and not is_fall:
        # "At least so much", where that is little, says nothing; all else says that the plan is right.
        tells_nothing = not reading.is_measured and factor * reading.rate_mbps < planned.rate_mbps
        return own if tells_nothing else replace(own, readings=())
    agree = own.is_rise == is_rise and all(
        max(reading.rate_mbps, other.rate_mbps) <= factor * min(reading.rate_mbps, other.rate_mbps)
        for other in own.readings
    )
    # A link that is still on its way down says so by readings that differ.
    before = own.readings[1 - config.steps :] if agree and config.steps > 1 else ()
    return replace(own, readings=(*before, reading), is_rise=is_rise)


def _free_at(own: WayWatch, config: RetuneConfig) -> int:
    """Return the step from which on a link may change again."""
    if own.changed_at is None:
        return 0
    return own.changed_at + config.cooldown_steps * (2**own.num_rises if own.is_rise else 1)


def _change(way: Way, own: WayWatch, planned: WayState) -> LinkChange:
    rates = [reading.rate_mbps for reading in own.readings]
    is_measured = all(reading.is_measured for reading in own.readings)
    delays = sorted(reading.delay_s for reading in own.readings if not math.isnan(reading.delay_s))
    delay_s = planned.delay_s
    if delays:
        # What only bounds the delay may lower it.
        delay_s = delays[len(delays) // 2] if is_measured else min(delays[0], delay_s)
    rate_mbps = math.exp(sum(map(math.log, rates)) / len(rates))
    return LinkChange(
        way=way,
        before=planned,
        now=WayState(rate_mbps=rate_mbps, delay_s=delay_s),
        num_readings=len(rates),
        is_measured=is_measured,
    )
