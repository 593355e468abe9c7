"""Being asked to stop: what happens in a signal's handler, what outside of it, and what a second signal does."""

import signal

import pytest

from orchestrator.interrupt import catch_interrupts


def test_a_request_is_announced_once_and_where_it_is_looked_for() -> None:
    announced: list[bool] = []
    with catch_interrupts(lambda: announced.append(True)) as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGTERM)
        # A handler may run in the midst of a print: it must not print itself.
        assert announced == []
        assert interrupted()
        assert interrupted()
    assert announced == [True]


def test_a_second_request_ends_what_runs_and_the_handlers_from_before_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with catch_interrupts(lambda: None):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
