"""When a link counts as changed: what the watch makes of readings, by hand."""

from __future__ import annotations

import math

import pytest

from actors.errors import ConfigError
from actors.spec import LinkReading
from orchestrator.link_watch import LinkChange, LinkWatch, RetuneConfig, on_readings
from orchestrator.planner.retuned import WayState

PLANNED = {(0, 1): WayState(rate_mbps=100.0, delay_s=0.02), (1, 0): WayState(rate_mbps=50.0, delay_s=0.03)}
FORTH, BACK = (0, 1), (1, 0)


def reading(way: tuple[int, int], rate_mbps: float, *, is_measured: bool = True, delay_s: float = 0.05) -> LinkReading:
    return LinkReading(
        source_stage=way[0],
        target_stage=way[1],
        rate_mbps=rate_mbps,
        is_measured=is_measured,
        delay_s=delay_s,
        num_bytes=10**6,
    )


def changes_of(*steps: tuple[LinkReading, ...], config: RetuneConfig | None = None) -> list[LinkChange]:
    """What changes, where the plan stays as it is."""
    watch, made = LinkWatch(planned=PLANNED), list[LinkChange]()
    for step, readings in enumerate(steps):
        watch, changes = on_readings(watch, step, readings, config or RetuneConfig())
        made += changes
    return made


def test_a_link_that_falls_is_told_after_two_steps_with_rate_and_delay() -> None:
    slow = reading(FORTH, 4.0)
    assert changes_of((slow,)) == []
    (forth, back) = changes_of((slow,), (reading(FORTH, 4.4),))
    assert forth.way == FORTH
    assert forth.now.rate_mbps == pytest.approx(math.sqrt(4.0 * 4.4))
    assert forth.now.delay_s == 0.05
    assert (forth.before, forth.num_readings, forth.is_measured) == (PLANNED[FORTH], 2, True)
    assert (back.way, back.num_readings) == (BACK, 0)
    assert back.now.rate_mbps == pytest.approx(50 * forth.now.rate_mbps / 100)
    assert back.now.delay_s == PLANNED[BACK].delay_s


def test_a_link_on_its_way_down_is_not_taken_for_what_it_passes() -> None:
    steps = [(reading(FORTH, rate),) for rate in (30.0, 10.0, 4.0, 4.0)]
    assert changes_of(*steps[:3]) == []
    assert changes_of(*steps)[0].now.rate_mbps == pytest.approx(4.0)


def test_a_step_that_is_as_planned_begins_anew_and_one_that_tells_nothing_does_not() -> None:
    slow, planned = (reading(FORTH, 4.0),), (reading(FORTH, 90.0),)
    assert changes_of(slow, planned, slow) == []
    assert changes_of(slow, (reading(FORTH, 70.0, is_measured=False),), slow) == []
    assert changes_of(slow, (), slow) != []
    assert changes_of(slow, (reading(FORTH, 3.0, is_measured=False),), slow) != []


def test_the_other_direction_speaks_for_itself() -> None:
    slow = reading(FORTH, 4.0)
    ways = [change.way for change in changes_of(*[(slow, reading(BACK, 45.0))] * 2)]
    assert ways == [FORTH], "it was measured"
    ways = [change.way for change in changes_of(*[(slow, reading(BACK, 30.0, is_measured=False))] * 2)]
    assert ways == [FORTH], "30 at least is near 50"
    _, back = changes_of(*[(slow, reading(BACK, 7.0, is_measured=False))] * 2)
    assert back.now.rate_mbps == 7.0, "7 at least is more than a twenty-fifth of 50"


def test_a_rise_needs_no_measurement_and_takes_the_other_direction_along() -> None:
    fast = reading(FORTH, 300.0, is_measured=False, delay_s=0.01)
    forth, back = changes_of((fast,), (fast,))
    assert forth.now == WayState(rate_mbps=pytest.approx(300.0), delay_s=0.01)
    assert not forth.is_measured
    assert back.now.rate_mbps == pytest.approx(150.0)


def test_a_delay_that_is_not_known_stays() -> None:
    slow = reading(FORTH, 4.0, delay_s=math.nan)
    assert changes_of((slow,), (slow,))[0].now.delay_s == PLANNED[FORTH].delay_s


def test_ways_that_the_plan_does_not_have_are_passed_over_and_factor_0_is_never() -> None:
    assert changes_of(*[(reading((5, 6), 1.0),)] * 5) == []
    assert changes_of(*[(reading(FORTH, 1.0),)] * 5, config=RetuneConfig(factor=0)) == []


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"factor": -2.0}, {"steps": 0}, {"cooldown_steps": 0}])
def test_a_watch_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="retune"):
        RetuneConfig(**wrong)  # pyright: ignore[reportArgumentType]
