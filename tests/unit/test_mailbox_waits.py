"""Who waits at the mailbox: for what, for how long, and who is woken."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch

from actors.errors import PeerLost, PeerTimeout, StepAborted
from actors.mailbox import Mailbox, Verdict
from actors.spec import Kind
from tests.mailbox_frames import ACCEPTED, header_of, offer_all, open_box, take_now, tensor_of, waits_for


@pytest.fixture
def mailbox() -> Mailbox:
    """One that has step 4 open, in generation 2."""
    return open_box()


class Waiting:
    """A take in a thread of its own, known to have begun to wait."""

    def __init__(self, mailbox: Mailbox, microbatch: int = 0) -> None:
        self._waits = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._taken = self._pool.submit(
            mailbox.take, Kind.ACTIVATION, microbatch, timeout_s=20.0, monotonic=self._monotonic
        )
        assert self._waits.wait(5)

    def result(self) -> torch.Tensor:
        try:
            return self._taken.result(timeout=5)
        finally:
            self._pool.shutdown()

    def _monotonic(self) -> float:
        # Called with the mailbox's lock held, which is given up only by waiting.
        self._waits.set()
        return time.monotonic()


def test_a_take_waits_for_its_frame(mailbox: Mailbox) -> None:
    waiting = Waiting(mailbox)
    assert offer_all(mailbox, header_of(0)) == ACCEPTED
    assert torch.equal(waiting.result(), tensor_of(0))


def test_abort_wakes_a_take(mailbox: Mailbox) -> None:
    waiting = Waiting(mailbox)
    mailbox.abort(2)
    with pytest.raises(StepAborted, match="stage 1: generation 2 has ended"):
        waiting.result()


def test_an_aborted_generation_is_over(mailbox: Mailbox) -> None:
    offer_all(mailbox, header_of(0))
    offer_all(mailbox, header_of(0, step=5))
    mailbox.abort(2)
    with pytest.raises(StepAborted):
        take_now(mailbox, 0)
    with pytest.raises(StepAborted):
        mailbox.open(2, 5)
    assert offer_all(mailbox, header_of(1)) == [Verdict.STALE] * 4
    assert offer_all(mailbox, header_of(0, generation=3)) == ACCEPTED
    mailbox.open(3, 4)
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_an_old_abort_ends_nothing_new(mailbox: Mailbox) -> None:
    mailbox.abort(1)
    mailbox.abort(0)
    assert offer_all(mailbox, header_of(0)) == ACCEPTED
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_a_failed_link_fails_the_take_and_only_that_step(mailbox: Mailbox) -> None:
    waiting = Waiting(mailbox)
    mailbox.fail(2, PeerLost("stage 2 on node-2 is gone"))
    with pytest.raises(PeerLost, match="node-2"):
        waiting.result()
    with pytest.raises(PeerLost, match="node-2"):
        take_now(mailbox, 0)
    mailbox.open(3, 4)
    # Of frames that the new generation has done with.
    mailbox.fail(2, PeerLost("stage 2 on node-2 is gone"))
    assert waits_for(mailbox, 0)
    offer_all(mailbox, header_of(0, generation=3))
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_the_deadline_names_the_peer_the_frame_and_the_remedy(mailbox: Mailbox) -> None:
    seconds = count(0, 60)
    with pytest.raises(PeerTimeout) as caught:
        mailbox.take(Kind.GRADIENT, 3, timeout_s=45.0, monotonic=lambda: next(seconds))
    assert caught.value.message == (
        "stage 1 waited 45 s for GRADIENT of microbatch 3, step 4, generation 2 from stage 2"
    )
    assert "timeouts.frame_s" in caught.value.remedy


def test_whatever_comes_first_ends_a_wait_for_several(mailbox: Mailbox) -> None:
    wanted = [(Kind.ACTIVATION, 0), (Kind.GRADIENT, 0)]
    assert not mailbox.has(Kind.GRADIENT, 0)
    begun = threading.Event()

    def monotonic() -> float:
        begun.set()
        return time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mailbox.wait_for_any, wanted, timeout_s=20.0, monotonic=monotonic)
        assert begun.wait(20)
        # Not wanted yet.
        offer_all(mailbox, header_of(1))
        assert offer_all(mailbox, header_of(0, kind=Kind.GRADIENT)) == ACCEPTED
        waiting.result(20)
    assert mailbox.has(Kind.GRADIENT, 0)
    assert not mailbox.has(Kind.ACTIVATION, 0)
    assert torch.equal(take_now(mailbox, 0, Kind.GRADIENT), tensor_of(0, kind=Kind.GRADIENT))


def test_a_wait_for_several_names_them_all_and_ends_with_the_step(mailbox: Mailbox) -> None:
    seconds = count(0, 60)
    wanted = [(Kind.ACTIVATION, 2), (Kind.GRADIENT, 1)]
    with pytest.raises(PeerTimeout, match=r"ACTIVATION of microbatch 2.* from stage 0 and for GRADIENT .*from stage 2"):
        mailbox.wait_for_any(wanted, timeout_s=45.0, monotonic=lambda: next(seconds))
    mailbox.fail(2, PeerLost("stage 2 on node-2 is gone"))
    with pytest.raises(PeerLost, match="node-2"):
        mailbox.has(Kind.ACTIVATION, 0)
    mailbox.abort(2)
    with pytest.raises(StepAborted):
        mailbox.wait_for_any(wanted, timeout_s=45.0, monotonic=time.monotonic)
