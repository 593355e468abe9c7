"""Notes of frames: what is kept, how little it takes, and what a link and a mailbox note."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from actors.codecs import CODECS
from actors.frame import FrameHeader, WireDtype, run_id, split_frame
from actors.frame_log import MOST_FRAMES, ArrivalLog, SendLog
from actors.frame_times import ArrivedFrame, BlockedTime, FrameTimes, SentFrame
from actors.link import Link
from actors.spec import Kind
from tests.link_ends import (
    ACCEPTED,
    BUSY,
    CHUNK_BYTES,
    FRAME_BYTES,
    NUM_MICROBATCHES,
    Into,
    Scripted,
    Sender,
    open_mailbox,
    open_sender,
    quicken_repeats,
    send,
    take,
    tensor_of,
)


class Clock:
    """A clock that is one second later at each look, or stands where it is put."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_looks = 0

    def __call__(self) -> float:
        self.num_looks += 1
        self.now_s += 1.0
        return self.now_s


def header_of(microbatch: int, *, step: int = 0, generation: int = 1, kind: Kind = Kind.ACTIVATION) -> FrameHeader:
    return FrameHeader(
        codec=0,
        kind=kind,
        dtype=WireDtype.FLOAT32,
        shape=(2, 2),
        run=1,
        generation=generation,
        step=step,
        microbatch=microbatch,
        source=0,
        target=1,
        frame_bytes=16,
    )


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    quicken_repeats(monkeypatch)
    with open_sender() as made:
        yield made


def test_a_frames_way_out_is_noted_with_one_look_at_the_clock_for_each_thing() -> None:
    clock = Clock()
    log = SendLog(1, clock)
    mark = log.encoding(header_of(3))
    log.encoded(mark, 500)
    for _ in range(10):
        log.pushed(mark)
    log.settled(mark)
    assert clock.num_looks == 4
    own, late = log.drain((1, 0), 0.5)
    frame = SentFrame(
        target_stage=1,
        is_gradient=False,
        microbatch=3,
        encode_start_s=0.5,
        encode_end_s=1.5,
        pushed_s=2.5,
        settled_s=3.5,
        wire_bytes=500,
    )
    assert own == FrameTimes(sent=(frame,))
    assert late == FrameTimes()
    assert log.drain((1, 0), 0.0) == (FrameTimes(), FrameTimes())


def test_what_has_not_happened_yet_is_not_a_number() -> None:
    log = SendLog(1, Clock())
    log.encoding(header_of(0))
    (frame,) = log.drain((1, 0), 0.0)[0].sent
    assert frame.encode_start_s == 1.0
    assert all(math.isnan(t) for t in (frame.encode_end_s, frame.pushed_s, frame.settled_s))


def test_steps_are_apart_and_evaluations_are_not_noted() -> None:
    log, arrivals = SendLog(1, Clock()), ArrivalLog(Clock())
    for step in (0, 1):
        log.encoding(header_of(step, step=step))
        arrivals.arrived(header_of(step, step=step), 0.0, 0.0)
    mark = log.encoding(header_of(7, kind=Kind.EVAL_ACTIVATION))
    log.block("window", mark)
    log.unblock("window")
    arrivals.arrived(header_of(7, kind=Kind.EVAL_ACTIVATION), 0.0, 0.0)
    for step in (0, 1):
        own, _ = log.drain((1, step), 0.0)
        assert [frame.microbatch for frame in own.sent] == [step]
        assert [frame.microbatch for frame in arrivals.drain((1, step), 0.0)] == [step]
        assert own.blocked == ()


def test_memory_is_bounded_in_a_step_and_over_steps_that_nobody_asks_for() -> None:
    log, arrivals = SendLog(1, Clock()), ArrivalLog(Clock())
    for microbatch in range(MOST_FRAMES + 100):
        mark = log.encoding(header_of(microbatch))
        log.block("window", mark)
        log.unblock("window")
        arrivals.arrived(header_of(microbatch), 0.0, 0.0)
    own, _ = log.drain((1, 0), 0.0)
    assert len(own.sent) == len(own.blocked) == len(arrivals.drain((1, 0), 0.0)) == MOST_FRAMES
    for generation in range(1, 50):
        log.encoding(header_of(0, generation=generation))
        arrivals.arrived(header_of(0, generation=generation), 0.0, 0.0)
    kept = [generation for generation in range(50) if log.drain((generation, 0), 0.0)[0].sent]
    assert kept == [47, 48, 49]
    assert [generation for generation in range(50) if arrivals.drain((generation, 0), 0.0)] == [47, 48, 49]


def test_a_frame_takes_few_bytes_of_a_report() -> None:
    """A report is a message over a wide-area link: what is noted must stay small beside the frames themselves."""
    log, arrivals = SendLog(1), ArrivalLog()
    for microbatch in range(64):
        log.encoded(log.encoding(header_of(microbatch)), 1000)
        arrivals.arrived(header_of(microbatch), 0.0, 0.0)
    times = FrameTimes(sent=log.drain((1, 0), 0.0)[0].sent, arrived=arrivals.drain((1, 0), 0.0))
    assert len(times) == 128
    assert len(pickle.dumps(times)) < 128 * 110


def test_being_held_up_is_one_span_from_the_first_time_it_is_said_to_the_last() -> None:
    log = SendLog(1, Clock())
    mark = log.encoding(header_of(0))
    log.block("window", mark)
    log.block("window", mark)
    log.unblock("window")
    log.unblock("window")
    # Two chunks found no room: it lasts until both have.
    log.answered(4, mark, is_busy=True)
    log.answered(5, mark, is_busy=True)
    log.answered(4, mark, is_busy=False)
    log.answered(9, mark, is_busy=False)
    log.answered(5, mark, is_busy=False)
    assert log.drain((1, 0), 0.0)[0].blocked == (
        BlockedTime(target_stage=1, why="window", start_s=2.0, end_s=3.0),
        BlockedTime(target_stage=1, why="room", start_s=4.0, end_s=5.0),
    )


def test_what_comes_late_is_told_with_the_next_step_on_its_own_steps_clock() -> None:
    clock = Clock()
    log = SendLog(1, clock)
    sent = log.encoding(header_of(0))
    for note in (lambda mark: log.encoded(mark, 10), log.pushed, log.settled):
        note(sent)
    under_way = log.encoding(header_of(1))
    log.encoded(under_way, 20)
    log.block("window", under_way)
    # now it is 7 s
    own, late = log.drain((1, 0), 4.0)
    assert [frame.microbatch for frame in own.sent] == [0, 1]
    assert math.isnan(own.sent[1].pushed_s)
    assert own.blocked == (BlockedTime(target_stage=1, why="window", start_s=3.0, end_s=4.0),)
    assert late == FrameTimes()
    log.unblock("window")
    log.pushed(under_way)
    log.settled(under_way)
    # One that was not even encoded by then.
    log.encoding(header_of(2))
    log.encoding(header_of(0, step=1))
    own, late = log.drain((1, 1), 12.0)
    assert [frame.microbatch for frame in own.sent] == [0]
    assert own.blocked == ()
    assert [(frame.microbatch, frame.encode_start_s, frame.settled_s) for frame in late.sent[:1]] == [(1, 1.0, 7.0)]
    assert [frame.microbatch for frame in late.sent] == [1, 2]
    assert late.blocked == (BlockedTime(target_stage=1, why="window", start_s=4.0, end_s=5.0),)
    # The last is of that step for good; the frame of step 1 is late now.
    _, late = log.drain((1, 2), 0.0)
    assert [frame.microbatch for frame in late.sent] == [0]
    assert log.drain((1, 3), 0.0) == (FrameTimes(), FrameTimes())


def test_late_is_only_what_is_of_the_step_before() -> None:
    log = SendLog(1, Clock())
    for step in (0, 2):
        log.encoding(header_of(0, step=step))
        assert log.drain((1, step), 0.0)[1] == FrameTimes()
    # A step that is run again, under a new generation, is still the next one.
    log.encoding(header_of(0, step=3))
    log.encoding(header_of(0, step=3, generation=2))
    own, late = log.drain((2, 3), 0.0)
    assert (len(own.sent), len(late.sent)) == (1, 1)


def test_what_is_given_up_holds_nothing_up() -> None:
    log = SendLog(1, Clock())
    mark = log.encoding(header_of(0))
    log.answered(1, mark, is_busy=True)
    log.drop()
    (span,) = log.drain((1, 0), 0.0)[0].blocked
    assert (span.why, span.end_s - span.start_s) == ("room", 1.0)
    log.answered(1, mark, is_busy=False)
    assert log.drain((1, 1), 0.0)[1].blocked == ()


def drain_link(link: Link) -> tuple[tuple[SentFrame, ...], tuple[BlockedTime, ...]]:
    own, _ = link.log.drain((1, 0), 0.0)
    return own.sent, own.blocked


def test_a_link_notes_each_frame_in_the_order_of_things(sender: Sender) -> None:
    link = sender.link(Scripted(lambda header, attempt: ACCEPTED))
    began_s = time.monotonic()
    for microbatch in range(3):
        send(link, microbatch)
    link.wait_for_room(1, 10.0)
    sent, blocked = drain_link(link)
    assert [frame.microbatch for frame in sent] == [0, 1, 2]
    for frame in sent:
        times = (began_s, frame.encode_start_s, frame.encode_end_s, frame.pushed_s, frame.settled_s, time.monotonic())
        # They are rounded to microseconds.
        assert all(a <= b + 1e-6 for a, b in pairwise(times))
        assert frame.wire_bytes == FRAME_BYTES + 4 * 104
    assert blocked == ()


def test_a_full_window_and_a_peer_without_room_are_noted_as_such(sender: Sender) -> None:
    slow = Scripted(lambda header, attempt: None)
    link = sender.link(slow, window_bytes=1)
    send(link, 0)
    for _ in range(4):
        slow.next_pushed()[1].set_result(ACCEPTED)
    link.wait_for_room(1, 10.0)
    sent, blocked = drain_link(link)
    assert [block.why for block in blocked] == ["window"]
    (frame,) = sent
    assert frame.pushed_s <= blocked[0].start_s <= blocked[0].end_s <= frame.settled_s

    full = sender.link(Scripted(lambda header, attempt: BUSY if attempt < 4 else ACCEPTED))
    send(full, 0)
    full.wait_for_room(1, 10.0)
    ((frame,), (block,)) = drain_link(full)
    assert block.why == "room"
    # 2 + 4 + 8 ms between the attempts.
    assert block.end_s - block.start_s >= 0.014 - 1e-6
    assert frame.pushed_s <= block.start_s


def test_a_link_looks_at_the_clock_a_few_times_a_frame_however_many_chunks_it_has(sender: Sender) -> None:
    clock = Clock()
    link = sender.link(Scripted(lambda header, attempt: ACCEPTED))
    link.log = SendLog(1, clock)
    link.send(torch.zeros(64, 1024), CODECS["none"], Kind.ACTIVATION, generation=1, step=0, microbatch=0)
    link.wait_for_room(1, 10.0)
    assert 64 * 1024 * 4 // CHUNK_BYTES == 256
    assert clock.num_looks == 4


def test_a_mailbox_notes_when_a_frame_came_and_was_read_and_looks_thrice_at_the_clock(sender: Sender) -> None:
    mailbox = open_mailbox()
    clock = Clock()
    mailbox.log = ArrivalLog(clock)
    link = sender.link(Into(mailbox))
    for microbatch in range(NUM_MICROBATCHES):
        send(link, microbatch)
        take(mailbox, microbatch)
    link.wait_for_room(1, 10.0)
    assert clock.num_looks == 3 * NUM_MICROBATCHES
    arrived = mailbox.log.drain((1, 0), 0.0)
    assert [frame.microbatch for frame in arrived] == list(range(NUM_MICROBATCHES))
    first = ArrivedFrame(source_stage=0, is_gradient=False, microbatch=0, first_s=1.0, whole_s=2.0, decoded_s=3.0)
    assert arrived[0] == first


def test_a_frame_is_noted_before_anyone_can_take_it() -> None:
    mailbox = open_mailbox()
    payload = tensor_of(0).numpy().tobytes()
    header = replace(
        header_of(0), run=run_id("demo"), shape=tuple(tensor_of(0).shape), codec=CODECS["none"].code, frame_bytes=4096
    )
    seen: list[bool] = []
    noted = mailbox.log.arrived

    def arrived(header: FrameHeader, first_s: float, whole_s: float) -> None:
        seen.append(mailbox.has(Kind.ACTIVATION, 0))
        noted(header, first_s, whole_s)

    mailbox.log.arrived = arrived
    for chunk in split_frame(header, memoryview(payload), CHUNK_BYTES):
        assert mailbox.offer(chunk) == ACCEPTED
    assert seen == [False]
    assert mailbox.has(Kind.ACTIVATION, 0)
