"""A mailbox with a mistake, to see that it is found."""

from __future__ import annotations

from collections.abc import Iterator

from actors.frame import FrameHeader
from actors.mailbox import Mailbox, Receipt, Verdict
from actors.spec import Kind
from tests.fuzz import frames


class LaxMailbox(Mailbox):
    """Takes frames beyond its window."""

    def _admission(self, key: tuple[int, int, Kind, int], header: FrameHeader) -> Receipt:
        receipt = super()._admission(key, header)
        # Where it is busy for another reason it says so.
        return Receipt(Verdict.ACCEPTED) if receipt == Receipt(Verdict.BUSY) else receipt


def check(data: bytes) -> None:
    """Do with the mailbox what the input says."""
    frames.check(data, LaxMailbox)


def seeds() -> Iterator[bytes]:
    """Yield one good frame."""
    yield next(frames.seeds())
