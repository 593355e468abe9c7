"""Orders for long delays: as many microbatches in flight as a link's delay needs, weight gradients while others travel.

PURE. A list scheduler: it plays the step as `actors.play` does, and whenever a stage is free gives it the most urgent
action that is ready. A few rules of urgency are tried and the one that ends first is kept: no clock, no chance.

`bdp` runs whole backwards, `bdp-split` their halves (zero bubble, Qi et al., arXiv 2401.10241): the first as soon as it
can, the second when nothing else is ready. 1F1B keeps S - s microbatches in flight at stage s whatever the links, which
long delays starve; here it is the bandwidth-delay product. CrossPipe (arXiv 2507.00217) orders actions greedily under
delays too.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import product
from math import ceil, inf
from typing import Literal

from actors.errors import PlanError
from actors.play import Orders, PipelineTimes, Timings
from actors.schedule import Action, Op, stage_actions
from actors.spec import ScheduleName

# How much more than a link's delay needs is kept in flight where a schedule may choose: without it, any jitter starves
# (at 1.25 the slowest of four stages still waited 2 s of a step of 41 s; at 1.5 and above nothing is left to win).
IN_FLIGHT_MARGIN = 1.5
# How many actions may be placed in search of the best rule of urgency; the first rule is always tried.
_MAX_PLACED_ACTIONS = 150_000
# A count just above a whole number by rounding is that number.
_ROUNDING = 1e-9

ListScheduleName = Literal["bdp", "bdp-split"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many microbatches each stage may have in flight, and how many it may hold the activations of.

    In flight: from the start of the forward to the end of the backward, or of its first half. Held: to the end of the
    backward, or of its second half, so a put-off second half counts as much as a microbatch in flight: on the high
    side, for the first half lets go of some activations.
    """

    in_flight_S: tuple[int, ...]
    held_S: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ListSchedule:
    """What each stage does, in order, and when `actors.play` would have it done."""

    orders: Orders
    timings: Timings


def make_orders(
    schedule: ScheduleName,
    times: PipelineTimes,
    num_microbatches: int,
    room_S: tuple[int, ...] | None = None,
    margin: float = IN_FLIGHT_MARGIN,
) -> Orders:
    """Return what each stage does under any schedule; `room_S`: how many microbatches a stage's memory can hold.

    GPipe, 1F1B and ZB-H1 hold what they hold, whatever the room. Raises PlanError where a stage has room for
    no microbatch.
    """
    if schedule == "gpipe" or schedule == "1f1b" or schedule == "zb-h1":
        num_stages = times.num_stages
        return tuple(stage_actions(schedule, stage, num_stages, num_microbatches) for stage in range(num_stages))
    assert schedule != "interleaved", "that is an order of nodes, not of stages: see actors.interleaved"
    limits = bandwidth_delay_limits(schedule, times, num_microbatches, room_S, margin)
    return list_schedule(schedule, times, num_microbatches, limits).orders


def bandwidth_delay_limits(
    schedule: ListScheduleName,
    times: PipelineTimes,
    num_microbatches: int,
    room_S: tuple[int, ...] | None = None,
    margin: float = IN_FLIGHT_MARGIN,
) -> Limits:
    """Return how many microbatches to keep in flight so that delay is hidden, and how many may be held.

    In flight, the bandwidth-delay product times the margin: a microbatch is away from a stage for a round trip,
    meanwhile the pipeline could take one every `pace_s`; more also drains the pipeline faster. Second halves may pile
    up to what fills a stage's time between its last first half and the end of the step, when the gradient has gone on
    to stage 0, but no higher than the first stage must hold anyway. `room_S`: how many microbatches a stage's memory
    can hold; raises PlanError where that is none.
    """
    trip_s, trips = 0.0, list[float]()
    for stage in reversed(range(times.num_stages)):
        whole = schedule == "bdp"
        trip_s += times.stage_s(stage) - (0.0 if whole else times.weight_backward_s_S[stage])
        if stage + 1 < times.num_stages:
            trip_s += times.send_down_s_L[stage] + times.delay_down_s_L[stage]
            trip_s += times.send_up_s_L[stage] + times.delay_up_s_L[stage]
        trips.append(trip_s)
    room_S = room_S or (num_microbatches,) * times.num_stages
    in_flight, held = list[int](), list[int]()
    way_up_s = 0.0
    for stage, (trip_s, room) in enumerate(zip(reversed(trips), room_S, strict=True)):
        if room < 1:
            raise PlanError(
                f"stage {stage} has memory for no microbatch", "give it fewer layers or smaller microbatches"
            )
        wanted = ceil(margin * trip_s / times.pace_s - _ROUNDING) if times.pace_s else 1
        in_flight.append(max(1, min(num_microbatches, wanted, room)))
        put_off = 0
        if schedule == "bdp-split" and stage > 0:
            way_up_s += times.input_backward_s_S[stage - 1]
            way_up_s += times.send_up_s_L[stage - 1] + times.delay_up_s_L[stage - 1]
            weight_s = times.weight_backward_s_S[stage]
            fills = ceil(way_up_s / weight_s - _ROUNDING) if weight_s else 0
            put_off = max(0, min(fills, in_flight[0] - in_flight[stage]))
        held.append(min(in_flight[stage] + put_off, room))
    return Limits(in_flight_S=tuple(in_flight), held_S=tuple(held))


def list_schedule(
    schedule: ListScheduleName, times: PipelineTimes, num_microbatches: int, limits: Limits
) -> ListSchedule:
    """Return orders that keep within the limits, and their times: of a few greedy rules' orders, the first to end.

    About 4 us an action. Forwards, backwards and halves each run in microbatch order; the orders never deadlock, for
    they were played. Same inputs, same orders.
    """
    assert min(*limits.in_flight_S, *limits.held_S, num_microbatches) > 0, "nothing would ever run"
    num_actions = times.num_stages * num_microbatches * (3 if schedule == "bdp-split" else 2)
    num_rules = max(1, _MAX_PLACED_ACTIONS // num_actions)
    tried = [_Greedy(schedule, times, num_microbatches, limits, rule).run() for rule in _RULES[:num_rules]]
    return min(tried, key=lambda found: found.timings.step_s)


def dispatched(schedule: ListScheduleName, times: PipelineTimes, num_microbatches: int, limits: Limits) -> ListSchedule:
    """Return the orders that come of `actors.dispatch`, what stages run, and their times."""
    return _Greedy(schedule, times, num_microbatches, limits, _RULES[0]).run()


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What is urgent."""

    # Which goes first where both are ready.
    forward_first: bool
    # A less urgent action waits for a more urgent one that comes within this share of its own duration.
    patience: float


# The best on most pipelines first, that of `actors.dispatch`; the limits keep eager forwards from taking memory.
_RULES = tuple(
    _Rule(forward_first=forward_first, patience=patience)
    for patience, forward_first in product((0.0, 0.3, 0.6, 1.0), (True, False))
)


class _Greedy:
    """One play of a step, in which each stage picks what it does next as it goes."""

    def __init__(
        self, schedule: ListScheduleName, times: PipelineTimes, num_microbatches: int, limits: Limits, rule: _Rule
    ) -> None:
        self._times = times
        self._stages = [
            _Stage(schedule, times, stage, num_microbatches, limits, rule) for stage in range(times.num_stages)
        ]
        self._stages[0].activation_s_M = [0.0] * num_microbatches
        # (when a stage looks for its next action, which stage)
        self._events = [(0.0, stage) for stage in range(times.num_stages)]

    def run(self) -> ListSchedule:
        events, stages = self._events, self._stages
        while events:
            now_s, index = heapq.heappop(events)
            stage = stages[index]
            if now_s != stage.looks_s:
                continue
            op = stage.pick(now_s)
            if op is not None:
                stage.begin(op, now_s)
                self._deliver(op, index, now_s)
            if stage.looks_s < inf:
                heapq.heappush(events, (stage.looks_s, index))
        return ListSchedule(
            orders=tuple(tuple(stage.order) for stage in stages),
            timings=Timings(
                start_s_SA=tuple(tuple(stage.starts_s) for stage in stages),
                end_s_SA=tuple(tuple(stage.ends_s) for stage in stages),
            ),
        )

    def _deliver(self, op: Op, index: int, now_s: float) -> None:
        """Send on what an action makes: it arrives when the link has carried what was sent before it."""
        stage, times = self._stages[index], self._times
        end_s = stage.free_s
        if op is Op.FORWARD:
            if index + 1 == len(self._stages):
                stage.gradient_s_M.append(end_s)
                return
            stage.sent_down_s = max(end_s, stage.sent_down_s) + times.send_down_s_L[index]
            arrival_s = stage.sent_down_s + times.delay_down_s_L[index]
            index += 1
            self._stages[index].activation_s_M.append(arrival_s)
        elif op is not Op.WEIGHT_BACKWARD and index > 0:
            index -= 1
            stage.sent_up_s = max(end_s, stage.sent_up_s) + times.send_up_s_L[index]
            arrival_s = stage.sent_up_s + times.delay_up_s_L[index]
            self._stages[index].gradient_s_M.append(arrival_s)
        else:
            return
        target = self._stages[index]
        # A stage at work looks when it is done.
        if target.free_s <= now_s and arrival_s < target.looks_s:
            target.looks_s = arrival_s
            heapq.heappush(self._events, (arrival_s, index))


class _Stage:
    """What one stage has done and may do next."""

    def __init__(
        self,
        schedule: ListScheduleName,
        times: PipelineTimes,
        stage: int,
        num_microbatches: int,
        limits: Limits,
        rule: _Rule,
    ) -> None:
        self._num_microbatches = num_microbatches
        self._in_flight, self._held = limits.in_flight_S[stage], limits.held_S[stage]
        self._forward_first, self._patience = rule.forward_first, rule.patience
        self._is_split = schedule == "bdp-split"
        self._backward = Op.INPUT_BACKWARD if self._is_split else Op.BACKWARD
        self._forward_s = times.forward_s_S[stage]
        self._backward_s = times.action_s(stage, self._backward)
        self._weight_s = times.weight_backward_s_S[stage]
        # How many of each have begun.
        self._forwards = self._backwards = self._weights = 0
        # When activations and gradients arrive, as far as is known.
        self.activation_s_M: list[float] = []
        self.gradient_s_M: list[float] = []
        # When each link has sent all that it was given.
        self.sent_down_s = self.sent_up_s = 0.0
        # When the stage is done with what it has begun, and when it looks for more.
        self.free_s = self.looks_s = 0.0
        self.order: list[Action] = []
        self.starts_s: list[float] = []
        self.ends_s: list[float] = []

    def pick(self, now_s: float) -> Op | None:
        """Return the action to begin now; where it is none, `looks_s` is when to look again, as far as is known."""
        forward_s, backward_s = self._next_forward_s(), self._next_backward_s()
        if self._forward_first:
            first, first_s, second, second_s, takes_s = (
                Op.FORWARD,
                forward_s,
                self._backward,
                backward_s,
                self._backward_s,
            )
        else:
            first, first_s, second, second_s, takes_s = (
                self._backward,
                backward_s,
                Op.FORWARD,
                forward_s,
                self._forward_s,
            )
        if first_s <= now_s:
            return first
        if second_s <= now_s:
            if first_s >= now_s + self._patience * takes_s:
                return second
            second_s = first_s
        next_s = min(first_s, second_s)
        if self._is_split and self._weights < self._backwards and next_s >= now_s + self._patience * self._weight_s:
            return Op.WEIGHT_BACKWARD
        self.looks_s = next_s
        return None

    def begin(self, op: Op, now_s: float) -> None:
        """Do the next action of this kind from now on."""
        if op is Op.FORWARD:
            microbatch, self._forwards, takes_s = self._forwards, self._forwards + 1, self._forward_s
        elif op is Op.WEIGHT_BACKWARD:
            microbatch, self._weights, takes_s = self._weights, self._weights + 1, self._weight_s
        else:
            microbatch, self._backwards, takes_s = self._backwards, self._backwards + 1, self._backward_s
        self.free_s = self.looks_s = now_s + takes_s
        self.order.append(Action(op, microbatch))
        self.starts_s.append(now_s)
        self.ends_s.append(self.free_s)

    def _next_forward_s(self) -> float:
        """Return when the next forward may begin, as far as is known and the limits allow."""
        begun = self._forwards
        kept = self._weights if self._is_split else self._backwards
        if begun >= len(self.activation_s_M):
            return inf
        if begun - self._backwards >= self._in_flight or begun - kept >= self._held:
            return inf
        return self.activation_s_M[begun]

    def _next_backward_s(self) -> float:
        begun = self._backwards
        return self.gradient_s_M[begun] if begun < len(self.gradient_s_M) else inf
