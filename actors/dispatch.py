"""What a stage does next where its schedule goes by what has arrived: as many microbatches in flight as links need.

PURE. Under `bdp` a forward goes first, as soon as its activation is there and fewer microbatches are in flight than the
plan allows; else the next backward whose gradient is there. Under `bdp-split` a backward is two halves, and the second,
for which nobody waits, is done when there is nothing else; until then its microbatch counts as in flight, for its
activations are held. Forwards, backwards and halves each run in microbatch order, so what arrives when changes neither
the sums nor their bits. `actors.list_schedule` foresees with the same rule what comes of it.
"""

from __future__ import annotations

from actors.schedule import Action, Op
from actors.spec import ScheduleName


class Dispatch:
    """One step of one stage: which of its actions have begun, and which may."""

    def __init__(self, schedule: ScheduleName, num_microbatches: int, in_flight: int) -> None:
        """`in_flight`: how many microbatches the stage holds at most."""
        assert in_flight > 0, "nothing would ever run"
        self._is_split = schedule == "bdp-split"
        self._num_microbatches, self._in_flight = num_microbatches, in_flight
        self._forwards = self._backwards = self._weights = 0

    @property
    def is_done(self) -> bool:
        return self._let_go == self._num_microbatches

    @property
    def wanted_activation(self) -> int | None:
        """The microbatch whose forward may begin once its activation is there; None where none may."""
        has_room = self._forwards - self._let_go < self._in_flight
        return self._forwards if has_room and self._forwards < self._num_microbatches else None

    @property
    def wanted_gradient(self) -> int | None:
        """The microbatch whose backward may begin once its gradient is there; None where none may."""
        return self._backwards if self._backwards < self._forwards else None

    def next(self, *, has_activation: bool, has_gradient: bool) -> Action | None:
        """Return what to do now, which counts as begun; None where the stage must wait.

        The flags say whether what the wanted forward and the wanted backward need is there.
        """
        if has_activation and self.wanted_activation is not None:
            self._forwards += 1
            return Action(Op.FORWARD, self._forwards - 1)
        if has_gradient and self.wanted_gradient is not None:
            self._backwards += 1
            return Action(Op.INPUT_BACKWARD if self._is_split else Op.BACKWARD, self._backwards - 1)
        if self._is_split and self._weights < self._backwards:
            self._weights += 1
            return Action(Op.WEIGHT_BACKWARD, self._weights - 1)
        return None

    @property
    def _let_go(self) -> int:
        """How many microbatches' activations are no longer held."""
        return self._weights if self._is_split else self._backwards
