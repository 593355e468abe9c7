"""A link over carriers in memory: what arrives, what is repeated, and when it gives up."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch

from actors.codecs import CODECS
from actors.errors import FrameUnexpected, PeerError, PeerLost, PeerTimeout, StageError
from actors.frame import wire_bytes
from actors.mailbox import Receipt, Verdict
from actors.spec import Kind, LinkCount
from tests.link_ends import (
    ACCEPTED,
    BUSY,
    CHUNK_BYTES,
    FRAME_BYTES,
    NUM_MICROBATCHES,
    PATIENCE_S,
    Answer,
    Into,
    Scripted,
    Sender,
    counted,
    open_mailbox,
    open_sender,
    poll_until,
    quicken_repeats,
    send,
    take,
    tensor_of,
)


@pytest.fixture(autouse=True)
def quick_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken_repeats(monkeypatch)


@pytest.fixture
def sender() -> Iterator[Sender]:
    with open_sender() as made:
        yield made


@pytest.mark.parametrize("codec", ["none", "bf16"])
def test_frames_arrive_in_order_through_a_small_window(sender: Sender, codec: str) -> None:
    mailbox = open_mailbox(window=2, codec=codec)
    carrier = Into(mailbox)
    link = sender.link(carrier, window_bytes=3 * CHUNK_BYTES)
    for microbatch in range(NUM_MICROBATCHES):
        send(link, microbatch, codec=codec)
    poll_until(lambda: carrier.verdicts[Verdict.BUSY] > 0)
    for microbatch in range(NUM_MICROBATCHES):
        expected = tensor_of(microbatch)
        if codec == "bf16":
            expected = expected.bfloat16().float()
        assert torch.equal(take(mailbox, microbatch), expected)
    assert sender.failures.empty()


def test_no_more_is_under_way_than_the_window(sender: Sender) -> None:
    chunk_size = CHUNK_BYTES + wire_bytes(0, 1)
    carrier = Scripted(lambda header, attempt: None)
    link = sender.link(carrier, window_bytes=3 * chunk_size)
    for microbatch in range(3):
        send(link, microbatch)
    under_way = [carrier.next_pushed() for _ in range(3)]
    for number in range(3, 12):
        # The window is full: only an answer lets the next one out.
        assert carrier.pushed.empty()
        under_way.pop(0)[1].set_result(ACCEPTED)
        header, future = carrier.next_pushed()
        assert (header.microbatch, header.chunk) == divmod(number, 4)
        under_way.append((header, future))


def test_a_chunk_larger_than_the_window_goes_alone(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: None)
    send(sender.link(carrier, window_bytes=10), 0)
    for chunk in range(4):
        header, future = carrier.next_pushed()
        assert header.chunk == chunk
        assert carrier.pushed.empty()
        future.set_result(ACCEPTED)


def test_a_lost_acknowledgement_repeats_the_chunk_and_its_effect_is_once(sender: Sender) -> None:
    mailbox = open_mailbox()
    carrier = Into(mailbox, loses_ack=lambda header, attempt: attempt == 1 and header.chunk % 2 == 0)
    link = sender.link(carrier, ack_s=0.02)
    send(link, 0)
    assert torch.equal(take(mailbox, 0), tensor_of(0))
    poll_until(lambda: carrier.verdicts[Verdict.DUPLICATE] >= 2)
    assert carrier.verdicts[Verdict.ACCEPTED] == 4
    _, _, wire = counted(link)
    assert wire >= wire_bytes(FRAME_BYTES, CHUNK_BYTES) + wire_bytes(2 * CHUNK_BYTES, CHUNK_BYTES)
    assert sender.failures.empty()


def test_a_busy_peer_is_asked_again_for_as_long_as_it_takes(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: BUSY if attempt < 12 else ACCEPTED)
    # Longer than give_up_s in all: a peer that says BUSY is there.
    link = sender.link(carrier, give_up_s=0.03, window_bytes=1)
    send(link, 0)
    pushed = [carrier.next_pushed()[0].chunk for _ in range(48)]
    assert pushed == [chunk for chunk in range(4) for _ in range(12)]
    assert sender.failures.empty()


def test_a_busy_peer_is_asked_less_and_less_often(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.link._MAX_BUSY_RETRY_S", 0.064)
    carrier = Scripted(lambda header, attempt: BUSY if attempt < 8 else ACCEPTED)
    began_s = time.monotonic()
    send(sender.link(carrier, window_bytes=1), 0)
    pushed = [carrier.next_pushed()[0].chunk for _ in range(9)]
    assert pushed == [0] * 8 + [1]
    # 2 + 4 + 8 + 16 + 32 + 64 + 64 ms
    assert time.monotonic() - began_s >= 0.19


@pytest.mark.parametrize("receipt", [ACCEPTED, Receipt(Verdict.DUPLICATE), Receipt(Verdict.STALE)])
def test_a_late_receipt_settles_a_chunk_that_went_out_again(sender: Sender, receipt: Receipt) -> None:
    carrier = Scripted(lambda header, attempt: None)
    send(sender.link(carrier, window_bytes=1, ack_s=0.01), 0)
    _, first = carrier.next_pushed()
    carrier.next_pushed()
    first.set_result(receipt)
    while carrier.next_pushed()[0].chunk == 0:
        pass
    assert sender.failures.empty()


def test_a_late_refusal_fails_and_a_late_fault_matters_not(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: None)
    send(sender.link(carrier, window_bytes=1, ack_s=0.05), 0)
    attempts = [carrier.next_pushed()[1] for _ in range(3)]
    attempts[0].set_exception(PeerLost("stage 1 on node-1 is gone"))
    attempts[1].set_result(Receipt(Verdict.REFUSED, "shape (1,) is not (2,)"))
    assert isinstance(sender.failure(), FrameUnexpected)


def test_room_is_for_frames_that_are_not_settled(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: None)
    link = sender.link(carrier)
    for microbatch in range(2):
        link.wait_for_room(2, PATIENCE_S)
        send(link, microbatch)
    with pytest.raises(PeerTimeout, match="stage 1 on node-1 left 2 frames unacknowledged"):
        link.wait_for_room(2, 0.01)
    for _ in range(4):
        carrier.next_pushed()[1].set_result(ACCEPTED)
    link.wait_for_room(2, PATIENCE_S)
    # What is dropped leaves room too.
    send(link, 0, generation=2)
    link.wait_for_room(2, PATIENCE_S)


@pytest.mark.parametrize("answer", [Receipt(Verdict.CORRUPT, "the payload's checksum is wrong"), PeerError("away")])
def test_what_came_damaged_or_not_at_all_is_repeated(sender: Sender, answer: Answer) -> None:
    carrier = Scripted(lambda header, attempt: answer if attempt < 3 and header.chunk == 1 else ACCEPTED)
    link = sender.link(carrier)
    send(link, 0)
    pushed = [carrier.next_pushed()[0].chunk for _ in range(6)]
    assert sorted(pushed) == [0, 1, 1, 1, 2, 3]
    assert counted(link) == (1, FRAME_BYTES, wire_bytes(FRAME_BYTES, CHUNK_BYTES) + wire_bytes(2048, CHUNK_BYTES))
    assert sender.failures.empty()


def test_a_refused_frame_fails_with_the_peers_reason(sender: Sender) -> None:
    send(sender.link(Scripted(lambda header, attempt: Receipt(Verdict.REFUSED, "shape (1,) is not (2,)"))), 0)
    failure = sender.failure()
    assert isinstance(failure, FrameUnexpected)
    assert "stage 1 on node-1" in str(failure)
    assert "shape (1,) is not (2,)" in str(failure)


def test_a_lost_peer_fails_and_what_is_queued_for_it_is_dropped(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: PeerLost("stage 1 on node-1 is gone"))
    link = sender.link(carrier, window_bytes=1)
    send(link, 0)
    assert isinstance(sender.failure(), PeerLost)
    link.close()
    assert carrier.pushed.qsize() == 1


def test_a_silent_peer_is_named_when_its_time_is_up(sender: Sender) -> None:
    # ack_s says how often to repeat, not how long to wait in all.
    send(sender.link(Scripted(lambda header, attempt: None), ack_s=60.0, give_up_s=0.05), 0)
    failure = sender.failure()
    assert isinstance(failure, PeerTimeout)
    assert failure.message == "stage 1 on node-1 did not take a frame within 0.05 s: it answers nothing"
    assert "timeouts.frame_s" in failure.remedy


@pytest.mark.parametrize(
    "answer", [Receipt(Verdict.CORRUPT, "a frame of version 2 came"), PeerError("node-1 is not reachable now")]
)
def test_giving_up_says_what_the_peer_last_answered(sender: Sender, answer: Answer) -> None:
    send(sender.link(Scripted(lambda header, attempt: answer), give_up_s=0.05), 0)
    failure = sender.failure()
    assert isinstance(failure, PeerTimeout)
    assert failure.message.endswith(answer.reason if isinstance(answer, Receipt) else str(answer))


def test_a_new_generation_drops_what_is_queued_of_the_old(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: None)
    link = sender.link(carrier, window_bytes=1)
    send(link, 0)
    send(link, 1)
    _, old = carrier.next_pushed()
    send(link, 0, generation=2)
    header, future = carrier.next_pushed()
    assert (header.generation, header.chunk) == (2, 0)
    # An answer for what was dropped concerns nobody.
    old.set_exception(PeerLost("stage 1 on node-1 is gone"))
    future.set_result(ACCEPTED)
    assert carrier.next_pushed()[0].generation == 2
    assert sender.failures.empty()


def test_a_link_goes_on_after_a_failure(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: PeerLost("gone") if header.generation == 1 else ACCEPTED)
    link = sender.link(carrier)
    send(link, 0)
    assert isinstance(sender.failure(), PeerLost)
    send(link, 0, generation=2)
    poll_until(lambda: any(header.generation == 2 and header.chunk == 3 for header, _ in list(carrier.pushed.queue)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_carrier_itself_surfaces(sender: Sender) -> None:
    class Broken(Scripted):
        def push(self, chunk: bytes) -> Future[Receipt]:
            raise RuntimeError("the core worker has shut down")

    link = sender.link(Broken(lambda header, attempt: None))
    send(link, 0)
    failure = sender.failure()
    assert isinstance(failure, StageError)
    assert "stage 1 on node-1" in str(failure)
    assert "the core worker has shut down" in str(failure)
    with pytest.raises(StageError, match="the core worker has shut down"):
        send(link, 1)
    with pytest.raises(StageError, match="the core worker has shut down"):
        link.wait_for_room(1, PATIENCE_S)
    link.close()


def test_an_error_of_the_carrier_that_is_not_ours_means_a_lost_peer(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: None)
    send(sender.link(carrier), 0)
    carrier.next_pushed()[1].set_exception(OSError("connection reset"))
    failure = sender.failure()
    assert isinstance(failure, PeerLost)
    assert "connection reset" in str(failure)


def test_counts_are_of_each_kind_since_the_last_look(sender: Sender) -> None:
    link = sender.link(Scripted(lambda header, attempt: ACCEPTED))
    for microbatch in range(3):
        send(link, microbatch, codec="bf16")
    link.send(tensor_of(0), CODECS["none"], Kind.EVAL_ACTIVATION, generation=1, step=0, microbatch=0)

    def count(kind: Kind, num_frames: int, raw_bytes: int, wire: int) -> LinkCount:
        return LinkCount(
            source_stage=0, target_stage=1, kind=kind, num_frames=num_frames, raw_bytes=raw_bytes, wire_bytes=wire
        )

    assert set(link.drain_counts()) == {
        count(Kind.ACTIVATION, 3, 3 * FRAME_BYTES, 3 * wire_bytes(FRAME_BYTES // 2, CHUNK_BYTES)),
        count(Kind.EVAL_ACTIVATION, 1, FRAME_BYTES, wire_bytes(FRAME_BYTES, CHUNK_BYTES)),
    }
    assert link.drain_counts() == ()


def test_close_ends_the_thread_and_drops_what_is_queued(sender: Sender) -> None:
    carrier = Scripted(lambda header, attempt: None)
    link = sender.link(carrier, window_bytes=1, target=77)
    send(link, 0)
    carrier.next_pushed()
    link.close()
    assert "outbox-77" not in [thread.name for thread in threading.enumerate()]
    assert carrier.pushed.empty()
