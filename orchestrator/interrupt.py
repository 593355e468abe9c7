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
    """Yield a function that says whether the run was asked to stop; `announce` is called at the first request.

    Handlers are put back after the first request, so that a second one does what it does by default.
    """
    asked = False
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number in _SIGNALS:
            signal.signal(number, before[number])

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        announce()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()
