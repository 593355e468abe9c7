"""What is still to happen, in the order in which it will, compiled: a binary heap of events on arrays (Williams 1964).

PURE. Of events at one moment the first made comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Longs = NDArray[np.int64]


class EventQueue(NamedTuple):
    """Events that wait: when, which was made first, of which kind, about whom; how many, and how many were made."""

    when_s_E: NDArray[np.float64]
    made_E: Longs
    kind_E: Longs
    whom_E: Longs
    size_1: Longs
    made_1: Longs


@njit(cache=True)
def event_queue(most: int) -> EventQueue:
    """Return a queue for up to `most` events at once; callable from compiled code, as all of these."""
    return EventQueue(
        np.empty(most),
        np.empty(most, np.int64),
        np.empty(most, np.int64),
        np.empty(most, np.int64),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
    )


@njit(cache=True)
def push(queue: EventQueue, when_s: float, kind: int, whom: int) -> None:
    """Add an event."""
    made = queue.made_1[0]
    queue.made_1[0] = made + 1
    hole = queue.size_1[0]
    queue.size_1[0] = hole + 1
    while hole > 0:
        above = (hole - 1) // 2
        if queue.when_s_E[above] <= when_s:
            break
        _move(queue, above, hole)
        hole = above
    queue.when_s_E[hole] = when_s
    queue.made_E[hole] = made
    queue.kind_E[hole] = kind
    queue.whom_E[hole] = whom


@njit(cache=True)
def pop(queue: EventQueue) -> tuple[float, int, int]:
    """Take the next event: when, of which kind, about whom; the queue must not be empty."""
    when_s, kind, whom = queue.when_s_E[0], queue.kind_E[0], queue.whom_E[0]
    last = queue.size_1[0] - 1
    queue.size_1[0] = last
    hole = 0
    while 2 * hole + 1 < last:
        below = 2 * hole + 1
        if below + 1 < last and _is_before(queue, below + 1, below):
            below += 1
        if not _is_before(queue, below, last):
            break
        _move(queue, below, hole)
        hole = below
    _move(queue, last, hole)
    return when_s, kind, whom


@njit(cache=True)
def _is_before(queue: EventQueue, one: int, other: int) -> bool:
    if queue.when_s_E[one] != queue.when_s_E[other]:
        return queue.when_s_E[one] < queue.when_s_E[other]
    return queue.made_E[one] < queue.made_E[other]


@njit(cache=True)
def _move(queue: EventQueue, source: int, target: int) -> None:
    queue.when_s_E[target] = queue.when_s_E[source]
    queue.made_E[target] = queue.made_E[source]
    queue.kind_E[target] = queue.kind_E[source]
    queue.whom_E[target] = queue.whom_E[source]
