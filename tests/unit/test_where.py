"""Where time went, on steps that are played with known answers: each cause by itself, and the clocks under them."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from actors.frame_times import ArrivedFrame, FrameTimes, SentFrame
from orchestrator.causes import Cause, Part, StageTime
from orchestrator.clocks import step_starts
from orchestrator.records import StageRecord, StepRecord
from orchestrator.where import telling_steps, where_time_went
from tests.played_frames import Line, Rig, played_step
from tests.unit.synthetic_run import make_step

EVEN = Rig(forward_s=(1.0, 1.0), backward_s=(2.0, 2.0))
MOMENT_S = 1e-6
COMPUTES = (Cause.FORWARD, Cause.BACKWARD, Cause.WEIGHTS)


def where(rig: Rig) -> tuple[StageTime, ...]:
    record = played_step(rig)
    told = where_time_went([record], rig.figures())
    assert [time.stage for time in told] == list(range(rig.num_stages))
    for time in told:
        # Every second of the driver's step is in one part of every stage.
        assert time.total_s == pytest.approx(record.step_s)
        assert sum(time.share(cause) for cause in Cause) == pytest.approx(1.0)
        assert all(part.seconds > 0 for part in time.parts)
        assert time.seconds(Cause.OTHER) == pytest.approx(0.0, abs=1e-6)
        assert time.seconds(*COMPUTES) == pytest.approx(
            rig.num_microbatches * (rig.forward_s[time.stage] + rig.backward_s[time.stage])
        )
    return told


def seconds(time: StageTime) -> dict[Cause, float]:
    causes = [cause for cause in Cause if time.seconds(cause) > MOMENT_S and cause not in COMPUTES]
    return {cause: pytest.approx(time.seconds(cause)) for cause in causes}


def largest(time: StageTime) -> Part:
    """What the stage lost most by."""
    return max((part for part in time.parts if part.cause not in COMPUTES), key=lambda part: part.seconds)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_even_stages_without_links_lose_only_fill_and_drain(num_stages: int, schedule) -> None:
    rig = Rig(forward_s=(1.0,) * num_stages, backward_s=(2.0,) * num_stages, schedule=schedule)
    # (S - 1) (F + B), the same for every stage.
    expected = {Cause.BUBBLE: 3.0 * (num_stages - 1)} if num_stages > 1 else {}
    assert [seconds(time) for time in where(rig)] == num_stages * [expected]


def test_few_microbatches_make_the_bubble_the_most_of_the_step() -> None:
    for time in where(replace(EVEN, forward_s=(1.0,) * 6, backward_s=(2.0,) * 6, num_microbatches=2)):
        assert time.share(Cause.BUBBLE) == pytest.approx(5 / 7)


def test_a_slower_stage_is_named_by_all_that_wait_for_it() -> None:
    rig = Rig(forward_s=(1.0, 3.0, 1.0), backward_s=(2.0, 6.0, 2.0), num_microbatches=40)
    first, slow, last = where(rig)
    for time in (first, last):
        (part,) = (part for part in time.parts if part.cause is Cause.SLOWER)
        assert part.place == (1,)
        # It computes 240 s longer; the rest of what they wait is fill and drain, which no balance takes away.
        assert 0.9 * 240 < part.seconds <= 240
        assert time.seconds(Cause.SLOWER, Cause.BUBBLE) == pytest.approx(time.total_s - 120)
    assert seconds(slow) == {Cause.BUBBLE: 3.0}


def test_commit_and_the_drivers_round_trip_are_every_stages() -> None:
    for time in where(replace(EVEN, commit_s=0.5, trip_s=4.0)):
        assert seconds(time) == {Cause.BUBBLE: 3.0, Cause.COMMIT: 0.5, Cause.DRIVER: 4.0}


def test_an_order_that_comes_late_is_the_drivers_time_for_all_that_wait() -> None:
    first, second = where(replace(EVEN, starts=(3.0, 0.0)))
    assert seconds(first) == {Cause.BUBBLE: 3.0, Cause.DRIVER: 3.0}
    # It is there early and waits for a stage that has no order yet.
    assert seconds(second) == {Cause.BUBBLE: 3.0, Cause.DRIVER: 3.0}


def test_a_long_delay_is_found_on_its_link_both_ways() -> None:
    rig = replace(EVEN, num_microbatches=20, line=Line(delay_s=5.0))
    for time in where(rig):
        assert largest(time).cause is Cause.DELAY
        assert {part.place for part in time.parts if part.cause is Cause.DELAY} == {(0, 1), (1, 0)}
        # A round trip of 10 s for every two microbatches in flight; 3 s of it pass while the other one is computed.
        assert time.seconds(Cause.DELAY) == pytest.approx(10 * 7.0, abs=5.0)
        assert time.seconds(Cause.BUSY, Cause.WINDOW, Cause.ROOM, Cause.CODEC) < MOMENT_S
        # With equal stages nobody is called slow: the other 3 s would be filled by more in flight.
        assert time.seconds(Cause.SLOWER) == 0.0
        assert time.seconds(Cause.IN_FLIGHT) == pytest.approx(10 * 3.0, abs=5.0)


def test_a_link_that_carries_bytes_all_the_time_is_busy() -> None:
    # 9 s for each activation, where a microbatch computes for 3 s.
    heavy = Line(rate_mbps=8.0, frame_bytes=9_000_000)
    for time in where(replace(EVEN, num_microbatches=30, lines={(0, 1): heavy})):
        part = largest(time)
        assert (part.cause, part.place) == (Cause.BUSY, (0, 1))
        assert part.seconds == pytest.approx(30 * 6.0, rel=0.1)
        assert time.seconds(Cause.DELAY, Cause.WINDOW, Cause.ROOM, Cause.IN_FLIGHT) < MOMENT_S


def test_a_link_with_time_to_spare_wants_more_in_flight() -> None:
    # 4 s for each activation: with two in flight, 3 s of compute at each end, a microbatch takes 5 s.
    heavy = Line(rate_mbps=8.0, frame_bytes=4_000_000)
    first, second = where(replace(EVEN, num_microbatches=30, lines={(0, 1): heavy}))
    for time in (first, second):
        assert time.seconds(Cause.BUSY, Cause.IN_FLIGHT) == pytest.approx(30 * 2.0, rel=0.1)
    assert largest(first).cause is Cause.IN_FLIGHT
    assert (largest(second).cause, largest(second).place) == (Cause.BUSY, (0, 1))


def test_a_window_too_small_for_its_round_trip_is_not_taken_for_a_busy_link() -> None:
    narrow = Line(rate_mbps=80.0, frame_bytes=1_000_000, chunk_bytes=100_000, delay_s=0.5, window_s=6.0)
    rig = replace(EVEN, num_microbatches=30, lines={(0, 1): narrow, (1, 0): Line(delay_s=0.5)})
    for time in where(rig):
        part = largest(time)
        assert (part.cause, part.place) == (Cause.WINDOW, (0, 1))
        # 0.1 s of 6.1 s carries bytes.
        assert time.seconds(Cause.BUSY) == pytest.approx(part.seconds / 60, rel=1e-2)
    # Where nothing is known of the link, no window can be told from a rate.
    for time in where_time_went([played_step(rig)], {}):
        assert time.seconds(Cause.WINDOW) == 0.0
        assert time.seconds(Cause.BUSY) > 0.2 * time.total_s


def test_a_peer_without_room_is_named() -> None:
    full = Line(room_s=5.0)
    for time in where(replace(EVEN, num_microbatches=30, lines={(1, 0): full})):
        part = largest(time)
        assert (part.cause, part.place) == (Cause.ROOM, (1, 0))


def test_a_slow_stage_that_lets_nothing_in_is_slow_and_no_link_is_full() -> None:
    # All forwards go out at once, and each is refused until the one before is done with.
    slow = Rig(
        forward_s=(1.0, 3.0),
        backward_s=(2.0, 6.0),
        num_microbatches=40,
        schedule="gpipe",
        lines={(0, 1): Line(room_s=9.5)},
    )
    first, second = where(slow)
    (part,) = (part for part in first.parts if part.cause is Cause.SLOWER)
    assert part.place == (1,)
    # Of every backward but the first, which fills the pipeline.
    assert part.seconds == pytest.approx(39 * (6.0 - 2.0), rel=0.05)
    assert largest(second).cause is Cause.ROOM
    # Were it the link that carried bytes all that time, it would set the pace.
    full = Line(rate_mbps=8.0, frame_bytes=9_500_000)
    assert where(replace(slow, lines={(0, 1): full}))[0].seconds(Cause.SLOWER) == 0.0


def test_codecs_that_take_longer_than_compute_are_found() -> None:
    rig = replace(EVEN, num_microbatches=20, encode_s=2.0, decode_s=1.5)
    for time in where(rig):
        assert largest(time).cause is Cause.CODEC
        # For every two microbatches in flight 3.5 s each way; 3 s of it pass while the other one is computed.
        codec_s = sum(part.seconds for part in time.parts if part.cause is Cause.CODEC)
        assert codec_s == pytest.approx(10 * 4.0, abs=5.0)
        assert time.seconds(Cause.BUSY, Cause.DELAY, Cause.WINDOW, Cause.ROOM) < MOMENT_S


def test_a_wait_is_followed_to_the_far_end_of_the_pipeline() -> None:
    """Every stage waits for the one link that is full, though only two are at its ends."""
    heavy = Line(rate_mbps=8.0, frame_bytes=9_000_000)
    rig = Rig(forward_s=(1.0,) * 5, backward_s=(2.0,) * 5, num_microbatches=40, lines={(1, 2): heavy})
    for time in where(rig):
        assert largest(time).cause is Cause.BUSY
        assert {part.place for part in time.parts if part.cause is Cause.BUSY and part.seconds > MOMENT_S} == {(1, 2)}
        # 9 s a microbatch, of which a stage computes 3.
        assert time.share(Cause.BUSY) == pytest.approx(2 / 3, abs=0.1)
        assert time.seconds(Cause.IN_FLIGHT) < MOMENT_S


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_whatever_the_pipeline(seed: int) -> None:
    rng = random.Random(seed)
    num_stages = rng.randint(2, 6)
    line = Line(
        rate_mbps=rng.choice([1e9, 100.0, 10.0]),
        frame_bytes=rng.randint(1_000, 2_000_000),
        delay_s=rng.choice([0.0, rng.uniform(0, 3)]),
        window_s=rng.choice([0.0, rng.uniform(0, 2)]),
        room_s=rng.choice([0.0, rng.uniform(0, 2)]),
    )
    rig = Rig(
        forward_s=tuple(rng.uniform(0.1, 2) for _ in range(num_stages)),
        backward_s=tuple(rng.uniform(0.1, 4) for _ in range(num_stages)),
        num_microbatches=rng.randint(1, 12),
        schedule=rng.choice(["1f1b", "gpipe"]),
        commit_s=rng.uniform(0, 0.5),
        encode_s=rng.uniform(0, 0.5),
        decode_s=rng.uniform(0, 0.5),
        line=line,
        starts=tuple(rng.uniform(-2, 2) for _ in range(num_stages)),
        trip_s=rng.uniform(0, 1),
    )
    where(rig)


def test_frames_of_which_the_sender_knew_nothing_yet_are_taken_for_the_others() -> None:
    rig = replace(EVEN, encode_s=0.25, line=Line(delay_s=0.5))
    record = played_step(rig)

    def forgetful(stage: StageRecord) -> StageRecord:
        *known, last = stage.frames.sent
        begun = replace(last, encode_end_s=math.nan, pushed_s=math.nan, settled_s=math.nan)
        return replace(stage, frames=replace(stage.frames, sent=(*known, begun)))

    def without_last(stage: StageRecord) -> StageRecord:
        return replace(stage, frames=replace(stage.frames, sent=stage.frames.sent[:-1]))

    whole = where_time_went([record], rig.figures())
    for change in (forgetful, without_last):
        told = where_time_went([replace(record, stages=tuple(map(change, record.stages)))], rig.figures())
        assert [seconds(time) for time in told] == [seconds(time) for time in whole]


def test_times_of_steps_are_summed() -> None:
    record = played_step(EVEN)
    once, thrice = where_time_went([record], {}), where_time_went([record] * 3, {})
    for a, b in zip(once, thrice, strict=True):
        assert b.total_s == pytest.approx(3 * a.total_s)
        assert b.share(Cause.BUBBLE) == pytest.approx(a.share(Cause.BUBBLE))


def test_on_cuda_a_wait_beside_compute_is_compute() -> None:
    record = played_step(EVEN)
    stage = record.stages[0]
    # The host waits for what the device needs later.
    wait = replace(stage.actions[0], name="wB", start_s=0.0, end_s=2.0)
    changed = replace(record, stages=(replace(stage, actions=(wait, *stage.actions)), record.stages[1]))
    assert where_time_went([changed], {}) == where_time_went([record], {})


def test_what_cannot_be_told_is_left_out() -> None:
    record = played_step(EVEN)
    first, second = record.stages
    cases = [
        # Of before frames were noted; a simulation; replicas; a lost report; damaged numbers.
        make_step(0),
        replace(record, is_simulated=True),
        replace(record, stages=(first, second, second)),
        replace(record, stages=(first, replace(second, frames=FrameTimes()))),
        replace(record, stages=(first, replace(second, step_s=math.nan))),
        replace(record, stages=(first, replace(second, step_s=None))),
        replace(record, step_s=math.inf),
        replace(record, stages=(first, replace(second, actions=(replace(second.actions[0], end_s=math.nan),)))),
        replace(record, stages=()),
    ]
    for case in cases:
        assert telling_steps([case]) == ()
        assert where_time_went([case], {}) == ()
    assert where_time_went([], {}) == ()


def test_the_last_few_steps_tell_and_the_first_only_where_it_is_alone() -> None:
    def at(step: int) -> StepRecord:
        return replace(played_step(EVEN), step=step)

    assert telling_steps([at(0)]) == (at(0),)
    assert [record.step for record in telling_steps([at(0), make_step(1), at(2), at(2)])] == [2]
    assert [record.step for record in telling_steps([at(step) for step in range(9)])] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("seed", range(10))
def test_starts_that_lie_seconds_apart_are_recovered_from_frames_alone(seed: int) -> None:
    rng = random.Random(seed)
    starts = tuple(rng.uniform(-30, 30) for _ in range(5))
    line = Line(delay_s=rng.uniform(0, 0.3), rate_mbps=50.0, frame_bytes=100_000)
    rig = Rig(forward_s=(0.1,) * 5, backward_s=(0.2,) * 5, line=line, starts=starts, encode_s=0.01, decode_s=0.02)
    told = step_starts(played_step(rig).stages, rig.figures())
    assert told == {stage: pytest.approx(start - starts[0], abs=1e-6) for stage, start in enumerate(starts)}
    # Both ways take as long, so it matters not what is known of the link.
    assert step_starts(played_step(rig).stages, {}) == {stage: pytest.approx(start) for stage, start in told.items()}


def test_the_error_of_a_start_is_half_the_difference_of_the_two_delays() -> None:
    lines = {(0, 1): Line(delay_s=0.05), (1, 0): Line(delay_s=0.25)}
    told = step_starts(played_step(replace(EVEN, lines=lines, starts=(0.0, 7.0))).stages, {})
    assert told == {0: 0.0, 1: pytest.approx(7.1)}


def unheard(stage: StageRecord) -> StageRecord:
    """The same without receipts."""
    sent = tuple(replace(frame, settled_s=math.nan) for frame in stage.frames.sent)
    return replace(stage, frames=replace(stage.frames, sent=sent))


def test_activations_larger_than_gradients_move_no_clock() -> None:
    line = Line(rate_mbps=10.0, delay_s=0.1)
    lines = {(0, 1): replace(line, frame_bytes=500_000), (1, 0): replace(line, frame_bytes=100_000)}
    rig = replace(EVEN, lines=lines, starts=(0.0, -4.0))
    stages = played_step(rig).stages
    assert step_starts(stages, rig.figures()) == {0: 0.0, 1: pytest.approx(-4.0)}
    # Receipts are small both ways.
    assert step_starts(stages, {}) == {0: 0.0, 1: pytest.approx(-4.0)}
    # Without them the link's rate must be known: its chunks take 0.4 s and 0.08 s.
    stages = list(map(unheard, stages))
    assert step_starts(stages, rig.figures()) == {0: 0.0, 1: pytest.approx(-4.0)}
    assert step_starts(stages, {}) == {0: 0.0, 1: pytest.approx(-4.0 - 0.16)}


def test_frames_that_found_no_room_tell_no_time() -> None:
    rig = replace(EVEN, lines={(1, 0): Line(room_s=5.0)}, starts=(0.0, 3.0))
    for change in (lambda stage: stage, unheard):
        stages = [change(stage) for stage in played_step(rig).stages]
        assert step_starts(stages, rig.figures())[1] == pytest.approx(3.0 if change is not unheard else 5.5)


def test_jitter_hides_behind_the_fastest_frame() -> None:
    rng = random.Random(1)

    def late(frame: ArrivedFrame) -> ArrivedFrame:
        by_s = 0.0 if frame.microbatch == 3 else rng.uniform(0, 1)
        return replace(frame, first_s=frame.first_s + by_s, whole_s=frame.whole_s + by_s)

    record = played_step(replace(EVEN, line=Line(delay_s=0.1), starts=(0.0, 2.0)))
    stages = [
        replace(unheard(stage), frames=replace(stage.frames, arrived=tuple(map(late, stage.frames.arrived))))
        for stage in record.stages
    ]
    assert step_starts(stages, {}) == {0: 0.0, 1: pytest.approx(2.0)}


def test_receipts_tell_where_frames_went_one_way() -> None:
    def forward_only(stage: StageRecord) -> StageRecord:
        sent: tuple[SentFrame, ...] = tuple(f for f in stage.frames.sent if not f.is_gradient)
        arrived = tuple(f for f in stage.frames.arrived if not f.is_gradient)
        return replace(stage, frames=FrameTimes(sent=sent, arrived=arrived))

    record = played_step(replace(EVEN, line=Line(delay_s=0.1), starts=(0.0, -3.0), decode_s=0.2))
    stages = [forward_only(stage) for stage in record.stages]
    assert step_starts(stages, {}) == {0: 0.0, 1: pytest.approx(-3.0)}
    # Without receipts there is only one bound, and that is no estimate.
    assert step_starts(list(map(unheard, stages)), {}) is None
    assert step_starts([], {}) == {}
