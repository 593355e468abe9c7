"""Deadlines of chunks: a slow link is waited for, a lost chunk is not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from actors.codecs import CODECS
from actors.frame_log import SendMark
from actors.mailbox import Receipt, Verdict
from actors.outgoing import Frame, Pending
from actors.patience import Patience
from actors.spec import Kind
from tests.lab.throttle import Throttle
from tests.link_ends import (
    FRAME_BYTES,
    NUM_MICROBATCHES,
    PATIENCE_S,
    Sender,
    open_mailbox,
    open_sender,
    send,
    take,
    tensor_of,
)

ACK_S, GIVE_UP_S = 2.0, 100.0


@pytest.fixture
def sender() -> Iterator[Sender]:
    with open_sender() as made:
        yield made


def pushed(patience: Patience, count: int) -> list[Pending]:
    chunks = [Pending(Frame(Kind.ACTIVATION, 1, SendMark(None, False, 0, 0.0)), b"", 0.1) for _ in range(count)]
    for order, chunk in enumerate(chunks, 1):
        patience.begin(chunk, order, 0.0)
    return chunks


def test_a_chunk_waits_for_those_before_it() -> None:
    patience = Patience(ACK_S, GIVE_UP_S)
    chunks = pushed(patience, 20)
    for number in range(19):
        now_s = number + 1.0
        patience.heard(chunks[number], chunks, now_s)
        assert chunks[-1].due_s >= now_s + ACK_S
        assert chunks[-1].give_up_s == now_s + GIVE_UP_S


def test_a_lost_chunk_gets_no_grace_from_later_ones() -> None:
    patience = Patience(ACK_S, GIVE_UP_S)
    lost, *others = pushed(patience, 20)
    for number, chunk in enumerate(others):
        patience.heard(chunk, [lost, *others], 0.1 * number)
    assert lost.due_s == ACK_S
    assert lost.give_up_s == GIVE_UP_S


def test_a_chunk_that_waits_to_be_sent_again_is_not_put_off() -> None:
    patience = Patience(ACK_S, GIVE_UP_S)
    first, second = pushed(patience, 2)
    second.is_under_way, second.due_s = False, 0.5
    patience.heard(first, [second], 0.4)
    assert second.due_s == 0.5


def test_repeats_wait_longer_and_longer_and_then_it_is_over() -> None:
    patience = Patience(ACK_S, GIVE_UP_S)
    (chunk,) = pushed(patience, 1)
    waits: list[float] = []
    while chunk.due_s < chunk.give_up_s:
        now_s = chunk.due_s
        patience.begin(chunk, 2 + len(waits), now_s)
        waits.append(chunk.due_s - now_s)
    assert waits[:4] == [2 * ACK_S, 4 * ACK_S, 8 * ACK_S, 16 * ACK_S]
    assert chunk.due_s == chunk.give_up_s == GIVE_UP_S


def test_what_one_chunk_took_the_next_may_take_twice() -> None:
    patience = Patience(ACK_S, GIVE_UP_S)
    slow, later = pushed(patience, 2)
    patience.heard(slow, [later], 20.0)
    assert later.due_s == 20.0 + 40.0
    patience.heard(later, [], 20.1)
    (again,) = pushed(patience, 1)
    assert again.due_s == ACK_S, "it is fast again"


@pytest.mark.parametrize("ack_s", [0.15])
def test_a_window_on_a_link_grown_slow_is_sent_once(sender: Sender, ack_s: float) -> None:
    """The window holds what the link takes several deadlines for."""
    mailbox = open_mailbox()
    carrier = Throttle("stage 1", mailbox.offer, rate_mbps=100.0)
    link = sender.link(carrier, ack_s=ack_s, give_up_s=PATIENCE_S)
    send(link, 0)
    take(mailbox, 0)
    # A chunk of a kilobyte then takes 22 ms, and all of them 0.7 s.
    carrier.rate_mbps = 0.4
    for microbatch in range(1, NUM_MICROBATCHES):
        send(link, microbatch)
    began_s = time.monotonic()
    for microbatch in range(1, NUM_MICROBATCHES):
        assert take(mailbox, microbatch).equal(tensor_of(microbatch))
    assert time.monotonic() - began_s > 3 * ack_s, "nothing was slow"
    link.wait_for_room(1, PATIENCE_S)
    carrier.close()
    assert carrier.num_pushed == NUM_MICROBATCHES * FRAME_BYTES // 1024
    assert sender.failures.empty()
    (reading,) = link.drain_readings()
    assert (reading.source_stage, reading.target_stage) == (0, 1)


def test_a_slow_link_is_read_as_what_it_is(sender: Sender) -> None:
    carrier = Throttle("stage 1", lambda chunk: Receipt(Verdict.ACCEPTED), rate_mbps=4.0, delay_s=0.01)
    link = sender.link(carrier, window_bytes=1 << 16)
    for microbatch in range(40):
        link.send(tensor_of(microbatch), CODECS["none"], Kind.ACTIVATION, generation=1, step=0, microbatch=microbatch)
    link.wait_for_room(1, PATIENCE_S)
    carrier.close()
    (reading,) = link.drain_readings()
    assert reading.is_measured
    assert reading.rate_mbps == pytest.approx(4.0, rel=0.15)
