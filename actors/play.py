"""When each action of a schedule runs: every stage keeps to its order and waits for what each action needs.

PURE. The model of time that the list scheduler chooses by, and that its orders are judged by: a stage does one thing at
a time, sending never holds it up, and each direction of a link is a queue that one frame at a time goes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import ScheduleError
from actors.schedule import Action, Op

# What each stage does in one step, in order.
Orders = Sequence[Sequence[Action]]


@dataclass(frozen=True, kw_only=True)
class PipelineTimes:
    """What one microbatch takes, in seconds: of each stage, and of each link from a stage to the next.

    A frame occupies its link for the send time and arrives the delay later; `down` is towards the last stage.
    """

    forward_s_S: tuple[float, ...]
    input_backward_s_S: tuple[float, ...]
    weight_backward_s_S: tuple[float, ...]
    send_down_s_L: tuple[float, ...]
    delay_down_s_L: tuple[float, ...]
    send_up_s_L: tuple[float, ...]
    delay_up_s_L: tuple[float, ...]

    def __post_init__(self) -> None:
        stages = (self.forward_s_S, self.input_backward_s_S, self.weight_backward_s_S)
        links = (self.send_down_s_L, self.delay_down_s_L, self.send_up_s_L, self.delay_up_s_L)
        assert self.num_stages > 0, "a pipeline has one stage or more"
        assert all(len(seconds_S) == self.num_stages for seconds_S in stages), "each stage has three times"
        assert all(len(seconds_L) == self.num_stages - 1 for seconds_L in links), "stages are joined by one link fewer"

    @property
    def num_stages(self) -> int:
        return len(self.forward_s_S)

    @property
    def pace_s(self) -> float:
        """How long a microbatch takes whatever is busiest with it, a stage or one direction of a link."""
        return max([*map(self.stage_s, range(self.num_stages)), *self.send_down_s_L, *self.send_up_s_L])

    def stage_s(self, stage: int) -> float:
        """Return how long a stage is busy with one microbatch."""
        return self.forward_s_S[stage] + self.input_backward_s_S[stage] + self.weight_backward_s_S[stage]

    def action_s(self, stage: int, op: Op) -> float:
        """Return how long a stage takes for one action."""
        if op is Op.FORWARD:
            return self.forward_s_S[stage]
        if op is Op.INPUT_BACKWARD:
            return self.input_backward_s_S[stage]
        if op is Op.WEIGHT_BACKWARD:
            return self.weight_backward_s_S[stage]
        return self.input_backward_s_S[stage] + self.weight_backward_s_S[stage]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """When each action of each stage starts and ends, in the order of its actions, in seconds from the step's start."""

    start_s_SA: tuple[tuple[float, ...], ...]
    end_s_SA: tuple[tuple[float, ...], ...]

    @property
    def step_s(self) -> float:
        """When the last action ends."""
        return max((ends[-1] for ends in self.end_s_SA if ends), default=0.0)


def play(orders: Orders, times: PipelineTimes) -> Timings:
    """Return when each action runs if every stage does its own in order, each as soon as it can.

    A forward waits for the activation of the stage before, a backward or its first half for the gradient of the stage
    after and its own forward, a second half for its first. A whole backward sends its gradient when all of it is done.
    Raises ScheduleError where an order lets stages wait for ever. Seconds in and out; linear in the number of actions.
    """
    num_stages = times.num_stages
    assert len(orders) == num_stages, "each stage has an order"
    last = num_stages - 1
    # When the activation or gradient of a microbatch is there, by what waits for it.
    activation_s_SM: list[dict[int, float]] = [{} for _ in range(num_stages)]
    gradient_s_SM: list[dict[int, float]] = [{} for _ in range(num_stages)]
    halved_SM: list[set[int]] = [set() for _ in range(num_stages)]
    link_free_down_s_L, link_free_up_s_L = [0.0] * last, [0.0] * last
    now_s_S = [0.0] * num_stages
    starts: list[list[float]] = [[] for _ in range(num_stages)]
    ends: list[list[float]] = [[] for _ in range(num_stages)]
    # Stages that may go on, each once.
    runnable = dict.fromkeys(range(num_stages))
    while runnable:
        stage, _ = runnable.popitem()
        order, now_s = orders[stage], now_s_S[stage]
        activation_s_M, gradient_s_M, halved_M = activation_s_SM[stage], gradient_s_SM[stage], halved_SM[stage]
        forward_s, backward_s = times.forward_s_S[stage], times.action_s(stage, Op.BACKWARD)
        input_s, weight_s = times.input_backward_s_S[stage], times.weight_backward_s_S[stage]
        while len(starts[stage]) < len(order):
            action = order[len(starts[stage])]
            op, microbatch = action.op, action.microbatch
            if op is Op.FORWARD:
                ready_s, action_s = 0.0 if stage == 0 else activation_s_M.get(microbatch), forward_s
            elif op is Op.WEIGHT_BACKWARD:
                ready_s, action_s = 0.0 if microbatch in halved_M else None, weight_s
            else:
                ready_s = gradient_s_M.get(microbatch)
                action_s = input_s if op is Op.INPUT_BACKWARD else backward_s
            if ready_s is None:
                break
            start_s = max(now_s, ready_s)
            now_s = start_s + action_s
            starts[stage].append(start_s)
            ends[stage].append(now_s)
            if op is Op.FORWARD and stage < last:
                sent_s = max(now_s, link_free_down_s_L[stage]) + times.send_down_s_L[stage]
                link_free_down_s_L[stage] = sent_s
                activation_s_SM[stage + 1][microbatch] = sent_s + times.delay_down_s_L[stage]
                runnable[stage + 1] = None
            elif op is Op.FORWARD:
                gradient_s_M[microbatch] = now_s
            elif op is not Op.WEIGHT_BACKWARD:
                if op is Op.INPUT_BACKWARD:
                    halved_M.add(microbatch)
                if stage > 0:
                    sent_s = max(now_s, link_free_up_s_L[stage - 1]) + times.send_up_s_L[stage - 1]
                    link_free_up_s_L[stage - 1] = sent_s
                    gradient_s_SM[stage - 1][microbatch] = sent_s + times.delay_up_s_L[stage - 1]
                    runnable[stage - 1] = None
        now_s_S[stage] = now_s
    for stage, order in enumerate(orders):
        if len(starts[stage]) < len(order):
            action = order[len(starts[stage])]
            raise ScheduleError(
                f"stage {stage} waits for ever before {action.op.value}{action.microbatch}",
                "mend the order of this stage or of its neighbours",
            )
    return Timings(start_s_SA=tuple(map(tuple, starts)), end_s_SA=tuple(map(tuple, ends)))
