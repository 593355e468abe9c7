"""The shortest step that any order of a small pipeline's actions gives, by branch and bound: what list schedules meet.

Active schedules hold an optimum, and Giffler and Thompson's rule (1960) makes them all: of the actions that may come
next, take the one that would end first, and branch over those of its stage that could begin before that. Microbatches
are alike and links are queues, so each kind of action may as well run in microbatch order. A branch ends where its
lower bound is no better than the best known, or where the same actions were placed before, no time of theirs later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product

from actors.errors import ScheduleError
from actors.list_schedule import Limits, ListScheduleName
from actors.play import PipelineTimes, play
from actors.schedule import Action, Op, peak_held, peak_in_flight

_LATER = 1e-12


def optimal_step_s(
    schedule: ListScheduleName, times: PipelineTimes, num_microbatches: int, limits: Limits, known_s: float
) -> float:
    """Return the shortest step within the limits; `known_s` is that of some orders, which prunes the search."""
    return _Search(schedule, times, num_microbatches, limits, known_s).run()


def every_step_s(
    schedule: ListScheduleName, times: PipelineTimes, num_microbatches: int, limits: Limits
) -> Iterator[float]:
    """Yield the step of every combination of orders within the limits that does not deadlock, one by one."""
    choices = [
        [
            order
            for order in _merges(schedule, num_microbatches)
            if peak_in_flight(order) <= in_flight and peak_held(order) <= held
        ]
        for in_flight, held in zip(limits.in_flight_S, limits.held_S, strict=True)
    ]
    for orders in product(*choices):
        with suppress(ScheduleError):
            yield play(orders, times).step_s


def _merges(schedule: ListScheduleName, num_microbatches: int) -> list[tuple[Action, ...]]:
    """Return every order of one stage in which each kind runs in microbatch order and nothing before what it needs."""
    kinds = (
        (Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD) if schedule == "bdp-split" else (Op.FORWARD, Op.BACKWARD)
    )
    found: list[tuple[Action, ...]] = []

    def extend(order: tuple[Action, ...], counts: tuple[int, ...]) -> None:
        if len(order) == num_microbatches * len(kinds):
            found.append(order)
        for k, op in enumerate(kinds):
            if counts[k] < (num_microbatches if k == 0 else counts[k - 1]):
                extend((*order, Action(op, counts[k])), (*counts[:k], counts[k] + 1, *counts[k + 1 :]))

    extend((), (0,) * len(kinds))
    return found


class _Search:
    """Depth first; the state is lists that a step down changes and a step up restores."""

    def __init__(
        self, schedule: ListScheduleName, times: PipelineTimes, num_microbatches: int, limits: Limits, known_s: float
    ) -> None:
        self.times, self.limits, self.best_s = times, limits, known_s
        self.num_stages, self.num_microbatches = times.num_stages, num_microbatches
        self.is_split = schedule == "bdp-split"
        self.seconds = [
            (
                times.forward_s_S[s],
                times.action_s(s, Op.INPUT_BACKWARD if self.is_split else Op.BACKWARD),
                times.weight_backward_s_S[s] if self.is_split else 0.0,
            )
            for s in range(self.num_stages)
        ]
        # From the end of a stage's last first half, or whole backward, to the end of the step at the earliest.
        self.way_up_s = [0.0 + self.seconds[0][2]]
        for s in range(1, self.num_stages):
            hop_s = times.send_up_s_L[s - 1] + times.delay_up_s_L[s - 1] + self.seconds[s - 1][1]
            self.way_up_s.append(self.way_up_s[-1] + hop_s)
        # From the end of a stage's last forward to the end of the step at the earliest.
        self.way_round_s = [0.0] * self.num_stages
        for s in reversed(range(self.num_stages)):
            if s == self.num_stages - 1:
                self.way_round_s[s] = self.seconds[s][1] + self.way_up_s[s]
            else:
                hop_s = times.send_down_s_L[s] + times.delay_down_s_L[s] + self.seconds[s + 1][0]
                self.way_round_s[s] = hop_s + self.way_round_s[s + 1]
        self.seen: dict[tuple[tuple[int, int, int], ...], list[tuple[float, ...]]] = {}

    def run(self) -> float:
        stages = self.num_stages
        self._branch(
            [(0, 0, 0)] * stages,
            [0.0] * stages,
            [(0.0,) * self.num_microbatches, *[()] * (stages - 1)],
            [()] * stages,
            [0.0] * stages,
            [0.0] * stages,
        )
        return self.best_s

    def _branch(self, counts, free_s, activations, gradients, sent_down_s, sent_up_s) -> None:
        if all(self._is_done(c) for c in counts):
            self.best_s = min(self.best_s, max(free_s))
            return
        if self._bound(counts, free_s) >= self.best_s - _LATER or self._is_dominated(
            counts, free_s, activations, gradients, sent_down_s, sent_up_s
        ):
            return
        options = [
            (max(free_s[s], ready_s), s, kind)
            for s in range(self.num_stages)
            for kind, ready_s in self._ready(s, counts[s], activations[s], gradients[s])
        ]
        first_end_s, stage = min((begin_s + self.seconds[s][kind], s) for begin_s, s, kind in options)
        for begin_s, s, kind in sorted(options, key=lambda option: (option[0], -option[2])):
            if s == stage and begin_s <= first_end_s:
                self._place(s, kind, begin_s, counts, free_s, activations, gradients, sent_down_s, sent_up_s)

    def _place(self, s, kind, begin_s, counts, free_s, activations, gradients, sent_down_s, sent_up_s) -> None:
        times = self.times
        end_s = begin_s + self.seconds[s][kind]
        count = counts[s]
        counts, free_s = list(counts), list(free_s)
        counts[s] = (*count[:kind], count[kind] + 1, *count[kind + 1 :])
        free_s[s] = end_s
        if kind == 0 and s + 1 == self.num_stages:
            gradients = list(gradients)
            gradients[s] = (*gradients[s], end_s)
        elif kind == 0:
            activations, sent_down_s = list(activations), list(sent_down_s)
            sent_down_s[s] = max(end_s, sent_down_s[s]) + times.send_down_s_L[s]
            activations[s + 1] = (*activations[s + 1], sent_down_s[s] + times.delay_down_s_L[s])
        elif kind == 1 and s > 0:
            gradients, sent_up_s = list(gradients), list(sent_up_s)
            sent_up_s[s] = max(end_s, sent_up_s[s]) + times.send_up_s_L[s - 1]
            gradients[s - 1] = (*gradients[s - 1], sent_up_s[s] + times.delay_up_s_L[s - 1])
        self._branch(counts, free_s, activations, gradients, sent_down_s, sent_up_s)

    def _ready(self, s, count, activations, gradients) -> Iterator[tuple[int, float]]:
        """Yield the kinds of action that may come next on a stage, and since when their inputs are there."""
        forwards, backwards, weights = count
        kept = weights if self.is_split else backwards
        may_hold = forwards - backwards < self.limits.in_flight_S[s] and forwards - kept < self.limits.held_S[s]
        if forwards < len(activations) and may_hold:
            yield 0, activations[forwards]
        if backwards < len(gradients):
            yield 1, gradients[backwards]
        if self.is_split and weights < backwards:
            yield 2, 0.0

    def _is_done(self, count) -> bool:
        return count[1] == self.num_microbatches and (not self.is_split or count[2] == self.num_microbatches)

    def _bound(self, counts, free_s) -> float:
        """Return what the step takes at least: a stage's work, and the way of the last microbatch from it."""
        bound_s = 0.0
        for s, (forwards, backwards, weights) in enumerate(counts):
            left = [self.num_microbatches - done for done in (forwards, backwards, weights)]
            forward_s, backward_s, weight_s = (n * each for n, each in zip(left, self.seconds[s], strict=True))
            bound_s = max(bound_s, free_s[s] + forward_s + backward_s + weight_s)
            if left[1]:
                bound_s = max(bound_s, free_s[s] + forward_s + backward_s + self.way_up_s[s])
            if left[0]:
                bound_s = max(bound_s, free_s[s] + forward_s + self.way_round_s[s])
        return bound_s

    def _is_dominated(self, counts, free_s, activations, gradients, sent_down_s, sent_up_s) -> bool:
        waiting = [t for s, (f, _, _) in enumerate(counts) for t in activations[s][f:]]
        waiting += [t for s, (_, b, _) in enumerate(counts) for t in gradients[s][b:]]
        moments = (*free_s, *waiting, *sent_down_s, *sent_up_s)
        known = self.seen.setdefault(tuple(counts), [])
        if any(all(a <= b for a, b in zip(other, moments, strict=True)) for other in known):
            return True
        known[:] = [other for other in known if not all(b <= a for a, b in zip(other, moments, strict=True))]
        known.append(moments)
        return False
