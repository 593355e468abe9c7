"""The meter of a link on traces of links that are known: what it claims is so, and it claims no more."""

from __future__ import annotations

import math

import pytest

from actors.link_meter import LinkMeter, LinkState
from tests.link_traces import Burst, Wire, even_chunks, play

KB, MB = 1000, 1_000_000


def read(wire: Wire, bursts: list[Burst], window_bytes: int = 16 * MB, seed: int = 1) -> LinkState:
    meter = LinkMeter()
    play(meter, wire, bursts, window_bytes=window_bytes, seed=seed)
    state = meter.drain()
    assert state is not None
    assert state.num_bytes == sum(sum(frame) for burst in bursts for frame in burst.frames)
    return state


def constant(rate_mbps: float, delay_s: float, **more: float) -> Wire:
    return Wire(rate_mbps=lambda _: rate_mbps, delay_s=delay_s, **more)  # pyright: ignore[reportArgumentType]


def every(period_s: float, frames: list[list[int]], count: int) -> list[Burst]:
    return [Burst(at_s=n * period_s, frames=frames) for n in range(count)]


@pytest.mark.parametrize("rate_mbps", [1.0, 4.0, 20.0, 100.0])
@pytest.mark.parametrize("delay_s", [0.001, 0.025, 0.15])
@pytest.mark.parametrize("seed", range(5))
def test_a_full_link_is_measured(rate_mbps: float, delay_s: float, seed: int) -> None:
    # As a plan made for this link sizes chunks and window.
    chunk_bytes = int(max(65_536, rate_mbps * 1e5 / 8))
    frame = even_chunks(int(rate_mbps * 1e6 / 8), chunk_bytes)
    noisy = constant(rate_mbps, delay_s, jitter_s=0.1 * 2 * delay_s, decode_s=0.02)
    state = read(noisy, every(0.5, [frame], 4), window_bytes=max(2 * chunk_bytes, int(rate_mbps * 1e6 / 8)), seed=seed)
    assert state.is_measured
    assert state.rate_mbps == pytest.approx(rate_mbps, rel=0.15)
    if 2 * delay_s > chunk_bytes * 8e-6 / rate_mbps:
        assert state.delay_s == pytest.approx(delay_s, rel=0.35)
    if 20 * delay_s < chunk_bytes * 8e-6 / rate_mbps:
        assert math.isnan(state.delay_s)


def test_single_chunks_behind_one_another_are_a_measurement() -> None:
    """A link that was fat: frames are one chunk each, and the second waits for the first."""
    state = read(constant(4.0, 0.02, jitter_s=0.01), every(6.0, [[MB], [MB]], 2))
    assert state.is_measured
    assert state.rate_mbps == pytest.approx(4.0, rel=0.15)
    assert math.isnan(state.delay_s), "two seconds of a chunk say nothing of 0.02"


@pytest.mark.parametrize("seed", range(5))
def test_lone_frames_in_two_chunks_are_a_measurement_where_the_link_is_thin(seed: int) -> None:
    """A link that was fat, on which no frame waits for another: the second chunk waits for the first."""
    frame = [MB // 2, MB // 2]
    thin = read(constant(4.0, 0.025, jitter_s=0.01), every(3.0, [frame], 8), seed=seed)
    assert thin.is_measured
    assert thin.rate_mbps == pytest.approx(4.0, rel=0.1)
    fat = read(constant(100.0, 0.025, jitter_s=0.01), every(3.0, [frame], 8), seed=seed)
    assert fat.rate_mbps > 40.0


# Pushes and receipts of one step, six raw frames of 1 MB in two chunks each, as a host noted them that had to share its
# cores, on a link of the lab that fell from 100 to 4 Mbit/s: no two frames meet on it, and intervals differ by a third.
_NOTED = (
    (0.000, 1.167),
    (0.001, 2.345),
    (2.215, 3.973),
    (2.219, 4.974),
    (4.738, 6.007),
    (4.739, 7.521),
    (7.047, 8.602),
    (7.049, 9.956),
    (9.339, 10.876),
    (9.340, 12.254),
    (11.580, 13.465),
    (11.581, 14.473),
)


def test_a_noisy_hosts_lone_frames_are_a_measurement() -> None:
    meter = LinkMeter()
    for number, (pushed_s, _) in enumerate(_NOTED):
        meter.pushed(number, 524_392, pushed_s)
    for number, (_, heard_s) in enumerate(_NOTED):
        meter.settled(number, heard_s, 0.0)
    state = meter.drain()
    assert state is not None
    assert state.is_measured
    assert state.rate_mbps == pytest.approx(4.0, rel=0.15)


def test_a_chunk_pushed_while_another_is_on_the_link_also_waits() -> None:
    bursts = [Burst(at_s=0.0, frames=[[MB]]), Burst(at_s=0.5, frames=[[MB]])]
    state = read(constant(4.0, 0.02), bursts)
    assert state.is_measured
    assert state.rate_mbps == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("rate_mbps", [50.0, 1000.0])
def test_lone_chunks_with_pauses_say_only_at_least(rate_mbps: float) -> None:
    state = read(constant(rate_mbps, 0.05, jitter_s=0.01), every(1.0, [[100 * KB]], 20))
    assert not state.is_measured
    assert 0.3 < state.rate_mbps <= rate_mbps
    assert 0.05 <= state.delay_s <= 0.07


@pytest.mark.parametrize("jitter_s", [0.0, 0.004, 0.02])
@pytest.mark.parametrize("seed", range(5))
def test_a_fat_link_behind_a_small_window_is_not_read_as_slow(jitter_s: float, seed: int) -> None:
    # 500 kB a round trip of 0.2 s: 20 Mbit/s, of 1000.
    wire = constant(1000.0, 0.1, jitter_s=jitter_s)
    state = read(wire, every(2.0, [even_chunks(4 * MB, 62_500)], 2), window_bytes=500 * KB, seed=seed)
    assert not state.is_measured
    assert 10 < state.rate_mbps <= 21


@pytest.mark.parametrize("delay_s", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("num_chunks", [1, 2, 4, 16])
def test_slow_start_is_not_read_as_slow(delay_s: float, num_chunks: int) -> None:
    """At 1 Gbit/s a frame of some MB is over before TCP is up to speed."""
    frame = even_chunks(2 * MB, 2 * MB // num_chunks)
    state = read(constant(1000.0, delay_s, starts_slowly=True), every(2.0, [frame], 4))
    assert not state.is_measured
    assert state.rate_mbps < 1000


@pytest.mark.parametrize("delay_s", [0.02, 0.1])
def test_slow_start_on_a_thin_link_hides_nothing(delay_s: float) -> None:
    frame = even_chunks(500 * KB, 65_536)
    state = read(constant(4.0, delay_s, starts_slowly=True), every(3.0, [frame], 3))
    assert state.is_measured
    assert state.rate_mbps == pytest.approx(4.0, rel=0.15)


def test_a_peer_slow_to_decode_is_no_slow_link() -> None:
    """Each frame's last receipt comes 0.3 s late, and says so."""
    frame = even_chunks(MB, 250 * KB)
    state = read(constant(50.0, 0.01, decode_s=0.3), every(1.0, [frame, frame], 3))
    assert state.is_measured
    assert state.rate_mbps == pytest.approx(50.0, rel=0.15)


def test_a_delay_that_rises_is_no_slow_link() -> None:
    meter = LinkMeter()
    frame = even_chunks(MB, 125 * KB)
    end_s = play(meter, constant(100.0, 0.01), [Burst(at_s=0.0, frames=[frame])], window_bytes=250 * KB)
    first = meter.drain()
    assert first is not None
    assert first.is_measured or first.rate_mbps > 50
    play(meter, constant(100.0, 0.4), [Burst(at_s=end_s, frames=[frame])], window_bytes=250 * KB)
    second = meter.drain()
    assert second is not None
    assert not second.is_measured
    assert second.delay_s == pytest.approx(0.4, abs=0.02)


def test_a_rate_that_falls_is_read_in_the_next_reading() -> None:
    meter = LinkMeter()
    frame = even_chunks(500 * KB, 125 * KB)
    wire = Wire(rate_mbps=lambda now_s: 100.0 if now_s < 1.0 else 4.0, delay_s=0.02)
    end_s = play(meter, wire, [Burst(at_s=0.0, frames=[frame])], window_bytes=16 * MB)
    before = meter.drain()
    play(meter, wire, [Burst(at_s=end_s + 2.0, frames=[frame])], window_bytes=16 * MB)
    after = meter.drain()
    assert before is not None
    assert after is not None
    assert before.rate_mbps > 45
    assert after.is_measured
    assert after.rate_mbps == pytest.approx(4.0, rel=0.15)


def test_what_found_no_room_says_nothing() -> None:
    meter = LinkMeter()
    for number in range(1, 11):
        meter.pushed(number, 100 * KB, 0.0)
    for number in range(1, 11):
        if number % 2:
            meter.spoiled(number)
        meter.settled(number, 1.0 * number, 0.0)
    state = meter.drain()
    assert state is not None
    assert not state.is_measured, "no two chunks are next to one another"
    assert state.num_bytes == 500 * KB


def test_too_few_bytes_claim_nothing() -> None:
    state = read(constant(1.0, 0.001), [Burst(at_s=0.0, frames=[even_chunks(20 * KB, 5 * KB)])])
    assert not state.is_measured
    assert state.rate_mbps <= 1.0


def test_silence_is_no_reading() -> None:
    meter = LinkMeter()
    assert meter.drain() is None
    meter.pushed(1, 100 * KB, 0.0)
    assert meter.drain() is None
    meter.settled(1, 1.0, 0.0)
    state = meter.drain()
    assert state is not None, "its receipt came later than the last reading"
    assert state.rate_mbps == pytest.approx(0.8)
    assert meter.drain() is None
    meter.pushed(2, 100 * KB, 2.0)
    meter.forget()
    meter.settled(2, 3.0, 0.0)
    assert meter.drain() is None
