"""How long a sender waits for a receipt before it takes a chunk for lost: a link that is merely slow repeats nothing.

PURE: times are arguments. A chunk on the link waits for those pushed before it, so its deadline counts from the last
receipt of one of them; a lost chunk, which later ones overtake, gets no such grace. What the link took lately for one
chunk sets how long the next may take, twice that, as TCP's timer follows the round trip (RFC 6298); each repeat waits
twice as long as the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from actors.outgoing import Pending


class Patience:
    """The deadlines of one sender's chunks."""

    def __init__(self, ack_s: float, give_up_s: float) -> None:
        """`ack_s`: the least that a receipt is waited for; half of `give_up_s` at most where the link is slow."""
        self._least_s, self._most_s, self._give_up_s = ack_s, max(ack_s, give_up_s / 2), give_up_s
        self._ack_s = ack_s
        self._heard_s = -math.inf

    def begin(self, pending: Pending, order: int, now_s: float) -> None:
        """Start the clock of a chunk that is pushed now, the `order`-th push of its sender."""
        if pending.attempt == 0:
            pending.pushed_s, pending.give_up_s = now_s, now_s + self._give_up_s
        pending.order, pending.is_under_way = order, True
        pending.attempt += 1
        pending.due_s = self._due_s(pending, now_s)

    def heard(self, answered: Pending, under_way: Iterable[Pending], now_s: float) -> None:
        """Note a receipt: the peer is there, and what was pushed after the answered chunk has come nearer."""
        waited_s = now_s - max(answered.pushed_s, self._heard_s)
        self._ack_s = min(max(self._least_s, 2 * waited_s), self._most_s)
        self._heard_s = now_s
        for pending in under_way:
            if pending.is_under_way and pending.order > answered.order:
                pending.give_up_s = max(pending.give_up_s, now_s + self._give_up_s)
                pending.due_s = max(pending.due_s, self._due_s(pending, now_s))

    def _due_s(self, pending: Pending, now_s: float) -> float:
        return min(now_s + self._ack_s * 2.0 ** (pending.attempt - 1), pending.give_up_s)
