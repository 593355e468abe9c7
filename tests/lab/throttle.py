"""A link in this process that takes its time: chunks go one after another at a rate that a test changes on the way."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from actors.mailbox import Receipt


class Throttle:
    """A carrier that hands chunks over at `rate_mbps`, in order, `delay_s` after the last bit; receipts as late."""

    def __init__(
        self, peer: str, deliver: Callable[[bytes], Receipt], *, rate_mbps: float, delay_s: float = 0.0
    ) -> None:
        self.peer = peer
        self.rate_mbps = rate_mbps
        self.num_pushed = 0
        self._deliver = deliver
        self._delay_s = delay_s
        self._on_link: queue.SimpleQueue[tuple[float, bytes, Future[Receipt]] | None] = queue.SimpleQueue()
        self._arriving: queue.SimpleQueue[tuple[float, bytes, Future[Receipt]] | None] = queue.SimpleQueue()
        for run in (self._transmit, self._arrive):
            threading.Thread(target=run, daemon=True).start()

    def push(self, chunk: bytes) -> Future[Receipt]:
        self.num_pushed += 1
        answer: Future[Receipt] = Future()
        self._on_link.put((time.monotonic(), chunk, answer))
        return answer

    def close(self) -> None:
        self._on_link.put(None)

    def _transmit(self) -> None:
        """Let each chunk take its time; what sleeping adds to one is taken off the next."""
        free_s = 0.0
        while (message := self._on_link.get()) is not None:
            pushed_s, chunk, answer = message
            # Not from when this thread got to it: on a busy machine that is late, and would make the link slower.
            free_s = max(free_s, pushed_s) + len(chunk) * 8e-6 / self.rate_mbps
            time.sleep(max(0.0, free_s - time.monotonic()))
            self._arriving.put((free_s + 2 * self._delay_s, chunk, answer))
        self._arriving.put(None)

    def _arrive(self) -> None:
        while (message := self._arriving.get()) is not None:
            at_s, chunk, answer = message
            time.sleep(max(0.0, at_s - self._delay_s - time.monotonic()))
            receipt = self._deliver(chunk)
            time.sleep(max(0.0, at_s - time.monotonic()))
            answer.set_result(receipt)
