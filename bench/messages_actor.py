"""An actor that only passes messages on: no torch, so that many fit on one machine."""

from __future__ import annotations

import time
from collections import deque

import ray
import ray.actor

CONCURRENCY_GROUPS = {"inbox": 4}


class Messenger:
    """Sends to one peer as a node does to the next stage: calls with the bytes inlined, so many under way at once."""

    def __init__(self, number: int) -> None:
        self._number = number

    @ray.method(concurrency_group="inbox")
    def receive(self, message: bytes) -> int:
        """Take a message, and answer as briefly as a receipt does."""
        return len(message)

    def send(self, peer: ray.actor.ActorHandle, count: int, size_bytes: int, window: int) -> float:
        """Send so many messages, `window` of them under way; return this process's CPU seconds."""
        message = bytes(size_bytes)
        began_s = time.process_time()
        under_way: deque[ray.ObjectRef[int]] = deque()
        for _ in range(count):
            if len(under_way) == window:
                ray.get(under_way.popleft())
            under_way.append(peer.receive.remote(message))
        ray.get(list(under_way))
        return time.process_time() - began_s

    def answer(self) -> int:
        """Answer the driver, as a stage does after a step."""
        return self._number
