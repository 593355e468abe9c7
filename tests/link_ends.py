"""The ends of a link in memory: carriers that do as they are told, a sender, and a mailbox."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from actors.codecs import CODECS
from actors.errors import IsthmusError
from actors.frame import FrameHeader, WireDtype, parse_chunk
from actors.link import Carrier, Link, LinkSettings
from actors.mailbox import Expectation, Mailbox, Receipt, Verdict
from actors.spec import Kind, LinkSizes

SHAPE = (2, 16, 32)
FRAME_BYTES = 4096
CHUNK_BYTES = 1024
NUM_MICROBATCHES = 8
# No test waits so long unless it fails.
PATIENCE_S = 10.0

Answer = Receipt | IsthmusError | None
ACCEPTED, BUSY = Receipt(Verdict.ACCEPTED), Receipt(Verdict.BUSY)


def quicken_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let links ask again sooner than they would."""
    monkeypatch.setattr("actors.link._ERROR_RETRY_S", 0.01)
    monkeypatch.setattr("actors.link._BUSY_RETRY_S", 0.002)
    monkeypatch.setattr("actors.link._MAX_BUSY_RETRY_S", 0.008)


class Scripted:
    """A carrier that answers each push as `answer(header, attempt)` says; None: never."""

    def __init__(self, answer: Callable[[FrameHeader, int], Answer]) -> None:
        self.peer = "stage 1 on node-1"
        self.pushed: queue.Queue[tuple[FrameHeader, Future[Receipt]]] = queue.Queue()
        self._answer = answer
        self._attempts: Counter[tuple[int, int]] = Counter()

    def push(self, chunk: bytes) -> Future[Receipt]:
        header, _ = parse_chunk(chunk)
        self._attempts[header.microbatch, header.chunk] += 1
        answer = self._answer(header, self._attempts[header.microbatch, header.chunk])
        future: Future[Receipt] = Future()
        self.pushed.put((header, future))
        if isinstance(answer, Receipt):
            future.set_result(answer)
        elif answer is not None:
            future.set_exception(answer)
        return future

    def next_pushed(self) -> tuple[FrameHeader, Future[Receipt]]:
        return self.pushed.get(timeout=PATIENCE_S)


class Into:
    """A carrier into a mailbox from several threads, so that chunks overtake one another; it notes the verdicts."""

    def __init__(self, mailbox: Mailbox, loses_ack: Callable[[FrameHeader, int], bool] = lambda h, a: False) -> None:
        self.peer = "stage 1 on node-1"
        self.verdicts: Counter[Verdict] = Counter()
        self.pool = ThreadPoolExecutor(3)
        self._mailbox = mailbox
        self._loses_ack = loses_ack
        self._attempts: Counter[tuple[int, int]] = Counter()
        self._lock = threading.Lock()

    def push(self, chunk: bytes) -> Future[Receipt]:
        header, _ = parse_chunk(chunk)
        self._attempts[header.microbatch, header.chunk] += 1
        delivered = self.pool.submit(self._deliver, chunk)
        return Future() if self._loses_ack(header, self._attempts[header.microbatch, header.chunk]) else delivered

    def _deliver(self, chunk: bytes) -> Receipt:
        receipt = self._mailbox.offer(chunk)
        with self._lock:
            self.verdicts[receipt.verdict] += 1
        return receipt


class Sender:
    """Makes links, closes them after the test, and gathers what they report."""

    def __init__(self) -> None:
        self.failures: queue.Queue[tuple[int, IsthmusError]] = queue.Queue()
        self.links: list[Link] = []

    def link(
        self,
        carrier: Carrier,
        *,
        window_bytes: int = 1 << 20,
        ack_s: float = PATIENCE_S,
        give_up_s: float = PATIENCE_S,
        target: int = 1,
        canary_every: int = 0,
    ) -> Link:
        settings = LinkSettings(
            run="demo",
            source=0,
            target=target,
            sizes=LinkSizes(chunk_bytes=CHUNK_BYTES, window_bytes=window_bytes),
            ack_s=ack_s,
            give_up_s=give_up_s,
            canary_every=canary_every,
        )
        self.links.append(Link(settings, carrier, lambda generation, error: self.failures.put((generation, error))))
        return self.links[-1]

    def failure(self, generation: int = 1) -> IsthmusError:
        """The next failure, which must be of this generation."""
        failed, error = self.failures.get(timeout=PATIENCE_S)
        assert failed == generation
        return error


@contextmanager
def open_sender() -> Iterator[Sender]:
    """Give a sender whose links are closed in the end."""
    made = Sender()
    yield made
    for link in made.links:
        link.close()


def tensor_of(microbatch: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(microbatch))


def send(link: Link, microbatch: int, *, generation: int = 1, codec: str = "none") -> None:
    link.send(
        tensor_of(microbatch), CODECS[codec], Kind.ACTIVATION, generation=generation, step=0, microbatch=microbatch
    )


def open_mailbox(window: int = NUM_MICROBATCHES, codec: str = "none") -> Mailbox:
    expected = Expectation(
        kind=Kind.ACTIVATION, source=0, codec=codec, dtype=WireDtype.FLOAT32, shape=SHAPE, window=window
    )
    mailbox = Mailbox("demo", 1, NUM_MICROBATCHES, (expected,))
    mailbox.open(1, 0)
    return mailbox


def take(mailbox: Mailbox, microbatch: int) -> torch.Tensor:
    return mailbox.take(Kind.ACTIVATION, microbatch, timeout_s=PATIENCE_S, monotonic=time.monotonic)


def poll_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def counted(link: Link) -> tuple[int, int, int]:
    (count,) = link.drain_counts()
    assert (count.source_stage, count.target_stage, count.kind) == (0, 1, Kind.ACTIVATION)
    return count.num_frames, count.raw_bytes, count.wire_bytes
