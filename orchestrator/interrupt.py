"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, the second ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def catch_interrupts(announce: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the run was asked to stop; its first yes calls `announce`.

    The first request only sets a flag, since a handler may run in the midst of a print. A second one ends the process:
    Ctrl-C as KeyboardInterrupt, SIGTERM at once. On leaving, the handlers from before are put back.
    """
    asked = announced = False
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number in _SIGNALS:
            signal.signal(number, before[number])

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))

    def is_asked() -> bool:
        nonlocal announced
        if asked and not announced:
            announced = True
            announce()
        return asked

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield is_asked
    finally:
        restore()
