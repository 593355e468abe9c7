"""What holds of every sequence of readings: few changes, none of them for what is no evidence."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.spec import LinkReading
from orchestrator.link_watch import LinkChange, LinkWatch, RetuneConfig, on_readings
from orchestrator.planner.retuned import WayState

relaxed = settings(deadline=None, max_examples=200)

LOW, HIGH = 1.0, 1000.0
rates = st.floats(LOW, HIGH)
configs = st.builds(
    RetuneConfig, factor=st.sampled_from([1.5, 2.0, 4.0]), steps=st.integers(1, 4), cooldown_steps=st.integers(1, 8)
)


def reading(rate_mbps: float, *, is_measured: bool = True, way: tuple[int, int] = (0, 1)) -> LinkReading:
    return LinkReading(
        source_stage=way[0],
        target_stage=way[1],
        rate_mbps=rate_mbps,
        is_measured=is_measured,
        delay_s=0.01,
        num_bytes=10**6,
    )


def follow(
    readings: list[list[LinkReading]], config: RetuneConfig, planned_mbps: float = 100.0
) -> list[tuple[int, LinkChange]]:
    """Every change is taken into the plan, as a run does; return them with their steps."""
    state = WayState(rate_mbps=planned_mbps, delay_s=0.02)
    watch = LinkWatch(planned={(0, 1): state, (1, 0): state})
    made: list[tuple[int, LinkChange]] = []
    for step, these in enumerate(readings):
        before = watch
        watch, changes = on_readings(watch, step, these, config)
        # PURE: asked again, it says the same again.
        assert on_readings(before, step, these, config) == (watch, changes)
        made += [(step, change) for change in changes]
        watch = replace(watch, planned={**watch.planned, **{change.way: change.now for change in changes}})
    return made


def most_rises(num_steps: int, config: RetuneConfig) -> int:
    """The n-th rise comes cooldown_steps * 2^n after the change before it, at the earliest."""
    return 2 + math.ceil(math.log2(max(1.0, num_steps / config.cooldown_steps)))


@relaxed
@given(st.lists(st.tuples(rates, st.booleans()), max_size=300), configs)
def test_changes_are_few_whatever_the_link_does(steps: list[tuple[float, bool]], config: RetuneConfig) -> None:
    made = follow([[reading(rate, is_measured=measured)] for rate, measured in steps], config)
    own = [change for _, change in made if change.num_readings]
    rises = sum(change.now.rate_mbps > change.before.rate_mbps for change in own)
    assert rises <= most_rises(len(steps), config)
    # Between two rises each fall is by the factor at least.
    falls = 1 + math.ceil(math.log(HIGH / LOW, config.factor))
    assert len(own) <= rises + (rises + 1) * falls
    times = [step for step, change in made if change.way == (0, 1)]
    assert all(later - earlier >= config.cooldown_steps for earlier, later in pairwise(times))


@relaxed
@given(rates, rates, st.lists(st.integers(1, 40), min_size=1, max_size=60), configs)
def test_a_link_that_flaps_between_two_rates_is_left_alone_in_the_end(
    one: float, other: float, spells: list[int], config: RetuneConfig
) -> None:
    steps = [rate for n, spell in enumerate(spells) for rate in [(one, other)[n % 2]] * spell]
    made = [change for _, change in follow([[reading(rate)] for rate in steps], config, one) if change.way == (0, 1)]
    assert len(made) <= 2 * most_rises(len(steps), config) + 1
    if max(one, other) <= config.factor * min(one, other):
        assert not made


@relaxed
@given(st.lists(st.tuples(rates, st.booleans()), max_size=100), configs)
def test_each_change_has_its_evidence(steps: list[tuple[float, bool]], config: RetuneConfig) -> None:
    for step, change in follow([[reading(rate, is_measured=measured)] for rate, measured in steps], config):
        if not change.num_readings:
            continue
        assert change.num_readings == config.steps
        rate, measured = steps[step]
        if change.now.rate_mbps < change.before.rate_mbps:
            assert measured, "a lower bound is no fall"
            assert rate * config.factor < change.before.rate_mbps
        else:
            assert rate > config.factor * change.before.rate_mbps
        assert 1 / config.factor <= change.now.rate_mbps / rate <= config.factor


@relaxed
@given(st.lists(rates, min_size=1, max_size=50), configs)
def test_lower_bounds_alone_never_make_a_link_slow(steps: list[float], config: RetuneConfig) -> None:
    made = follow([[reading(rate, is_measured=False)] for rate in steps], config, HIGH)
    assert made == []


@relaxed
@given(rates, rates, configs)
def test_a_change_that_lasts_is_found_in_time(before: float, now: float, config: RetuneConfig) -> None:
    made = follow([[reading(now)]] * 30, config, before)
    own = [(step, change) for step, change in made if change.num_readings]
    if max(before, now) <= config.factor * min(before, now):
        assert own == []
    else:
        ((step, change),) = own
        assert step == config.steps - 1
        assert math.isclose(change.now.rate_mbps, now)
