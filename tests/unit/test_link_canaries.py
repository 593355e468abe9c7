"""Canaries of a link: frames that are compared beside the way, each told once, and waited for within bounds."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.errors import PeerTimeout
from tests.link_ends import ACCEPTED, PATIENCE_S, Scripted, Sender, open_sender, quicken_repeats, send


@pytest.fixture(autouse=True)
def quick_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken_repeats(monkeypatch)


@pytest.fixture
def sender() -> Iterator[Sender]:
    with open_sender() as made:
        yield made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Comparisons of canaries wait until it is set."""
    opened = threading.Event()

    def compare_once_open(*compared: object) -> tuple[float, float]:
        assert opened.wait(PATIENCE_S)
        return 0.25, 0.75

    monkeypatch.setattr("actors.encoding.compare", compare_once_open)
    return opened


def test_canaries_are_drained_once_all_of_them_are_read(sender: Sender, gate: threading.Event) -> None:
    carrier = Scripted(lambda header, attempt: ACCEPTED)
    link = sender.link(carrier, canary_every=1)
    send(link, 0)
    # The frame does not wait for its comparison.
    assert carrier.next_pushed()[0].microbatch == 0
    with pytest.raises(PeerTimeout, match=r"stage 1 on node-1 were not encoded within 0\.01 s"):
        link.drain_canaries(0.01)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(link.drain_canaries, PATIENCE_S)
        gate.set()
        (reading,) = drained.result(timeout=PATIENCE_S)
    assert (reading.step, reading.codec, reading.relative_error, reading.cosine) == (0, "none", 0.25, 0.75)
    assert link.drain_canaries(PATIENCE_S) == ()


def test_a_step_that_is_tried_again_tells_each_canary_once(sender: Sender, gate: threading.Event) -> None:
    gate.set()
    link = sender.link(Scripted(lambda header, attempt: ACCEPTED), canary_every=1)
    send(link, 0, generation=1)
    send(link, 0, generation=2)
    assert len(link.drain_canaries(PATIENCE_S)) == 1


def test_a_closed_link_has_no_canaries_to_wait_for(sender: Sender, gate: threading.Event) -> None:
    link = sender.link(Scripted(lambda header, attempt: ACCEPTED), canary_every=1, ack_s=0.01)
    send(link, 0)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(link.drain_canaries, PATIENCE_S)
        link.close()
        assert drained.result(timeout=PATIENCE_S / 2) == ()
    gate.set()
