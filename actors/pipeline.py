"""One stage's part of one step: the schedule's actions, each fed by a frame and feeding one.

    take(frame) -> forward or backward -> send(frame)

No Ray: links are `actors.link.Link`s over any carrier. Sending never blocks, and frames are decoded as they arrive, so
transfer overlaps with compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from actors.codecs import Codec
from actors.data import Microbatch
from actors.dispatch import Dispatch
from actors.engine import StageEngine
from actors.link import Link
from actors.mailbox import Mailbox
from actors.schedule import Action, Op
from actors.spec import COMPUTES, ActionTime, Kind

# (step, microbatch) -> its tokens; None on a stage that needs none.
ReadMicrobatch = Callable[[int, int], Microbatch | None]

# How many frames beyond the next needed one may wait in an evaluation, and as many on their way.
EVAL_WINDOW = 4


@dataclass(frozen=True, kw_only=True)
class Outlet:
    """What goes to one neighbour, and how it is encoded."""

    link: Link
    codec: Codec

    def send(self, tensor: torch.Tensor, kind: Kind, moment: Moment, microbatch: int) -> None:
        self.link.send(tensor, self.codec, kind, generation=moment.generation, step=moment.step, microbatch=microbatch)


@dataclass(frozen=True, kw_only=True)
class Ports:
    """How a stage meets its neighbours; the first stage has no previous one, the last no next one."""

    mailbox: Mailbox
    to_previous: Outlet | None
    to_next: Outlet | None
    frame_s: float


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Which step, and which try of it."""

    generation: int
    step: int


class Timeline:
    """What a stage did in a step and when, in seconds from the step's start.

    On CUDA compute is timed by events on the device, for the host only launches it; they are read at the step's end.
    """

    def __init__(self, clock: Callable[[], float], device: torch.device) -> None:
        """Start the clock; the device must be idle, so that its time starts with the host's."""
        self.clock = clock
        self._origin = _cuda_event() if device.type == "cuda" else None
        self._start_s = clock()
        # (name, microbatch, when it began, when it ended)
        self._marks: list[tuple[str, int, _Seconds, _Seconds]] = []

    @property
    def start_s(self) -> float:
        """The clock's reading at the step's start."""
        return self._start_s

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self._start_s

    @contextmanager
    def record(self, name: str, microbatch: int = -1) -> Iterator[None]:
        began = self._mark(name)
        yield
        self._marks.append((name, microbatch, began, self._mark(name)))

    def actions(self) -> tuple[ActionTime, ...]:
        """Return what was recorded; on CUDA waits until the device has done it."""
        return tuple(
            ActionTime(name=name, microbatch=microbatch, start_s=began(), end_s=ended())
            for name, microbatch, began, ended in self._marks
        )

    def _mark(self, name: str) -> _Seconds:
        """Note this moment; the result gives its seconds from the start."""
        if self._origin is None or name not in COMPUTES:
            return partial(float, self.elapsed_s)
        return partial(_device_s, self._origin, _cuda_event())


_Seconds = Callable[[], float]


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _device_s(origin: torch.cuda.Event, event: torch.cuda.Event) -> float:
    event.synchronize()
    return origin.elapsed_time(event) / 1000


def total_s(actions: Sequence[ActionTime], *names: str) -> float:
    """Return the seconds of all actions of these names."""
    return sum(action.end_s - action.start_s for action in actions if action.name in names)


def run_action(
    engine: StageEngine, ports: Ports, action: Action, read: ReadMicrobatch, moment: Moment, timeline: Timeline
) -> None:
    """Run one action of a training step; after the step's last the engine holds its gradients and loss."""
    microbatch = action.microbatch
    if action.op is Op.FORWARD:
        hidden_BTD = _take(ports, ports.to_previous, Kind.ACTIVATION, microbatch, timeline, "wF")
        with timeline.record("F", microbatch):
            output_BTD = engine.forward(microbatch, hidden_BTD, read(moment.step, microbatch))
        if ports.to_next and output_BTD is not None:
            ports.to_next.send(output_BTD, Kind.ACTIVATION, moment, microbatch)
    elif action.op is Op.WEIGHT_BACKWARD:
        with timeline.record("W", microbatch):
            engine.weight_backward(microbatch)
    else:
        grad_BTD = _take(ports, ports.to_next, Kind.GRADIENT, microbatch, timeline, "wB")
        run = engine.backward if action.op is Op.BACKWARD else engine.input_backward
        with timeline.record("B", microbatch):
            input_grad_BTD = run(microbatch, grad_BTD)
        if ports.to_previous and input_grad_BTD is not None:
            ports.to_previous.send(input_grad_BTD, Kind.GRADIENT, moment, microbatch)


def arriving_actions(dispatch: Dispatch, ports: Ports, timeline: Timeline) -> Iterator[Action]:
    """Yield what a stage does next by what has arrived, each when the one before is done; wait if nothing is ready."""
    mailbox, is_first, is_last = ports.mailbox, ports.to_previous is None, ports.to_next is None
    while not dispatch.is_done:
        forward, backward = dispatch.wanted_activation, dispatch.wanted_gradient
        action = dispatch.next(
            has_activation=is_first or (forward is not None and mailbox.has(Kind.ACTIVATION, forward)),
            has_gradient=is_last or (backward is not None and mailbox.has(Kind.GRADIENT, backward)),
        )
        if action is not None:
            yield action
            continue
        wanted = [(Kind.ACTIVATION, forward)] if forward is not None else []
        wanted += [(Kind.GRADIENT, backward)] if backward is not None else []
        # Where both would do it waits for the gradient: that one's way is the longer.
        with timeline.record("wF" if backward is None else "wB", wanted[-1][1]):
            mailbox.wait_for_any(wanted, timeout_s=ports.frame_s, monotonic=timeline.clock)


def run_evaluation(
    engine: StageEngine, ports: Ports, microbatches: range, read: ReadMicrobatch, moment: Moment, timeline: Timeline
) -> tuple[float, int]:
    """Run held-out microbatches forward; return the sum of losses and their number, zeros but on the last stage."""
    loss_sum, num_targets = 0.0, 0
    for microbatch in microbatches:
        hidden_BTD = _take(ports, ports.to_previous, Kind.EVAL_ACTIVATION, microbatch, timeline, "wF")
        batch = read(0, microbatch)
        output = engine.evaluate(hidden_BTD, batch)
        if ports.to_next:
            # No gradient comes back to hold this stage to the others' pace.
            ports.to_next.link.wait_for_room(EVAL_WINDOW, ports.frame_s)
            ports.to_next.send(output, Kind.EVAL_ACTIVATION, moment, microbatch)
        elif batch is not None:
            loss_sum += float(output)
            num_targets += batch.num_targets
    return loss_sum, num_targets


def _take(
    ports: Ports, neighbour: Outlet | None, kind: Kind, microbatch: int, timeline: Timeline, name: str
) -> torch.Tensor | None:
    """Wait for a neighbour's frame; None where there is no such neighbour."""
    if neighbour is None:
        return None
    with timeline.record(name, microbatch):
        return ports.mailbox.take(kind, microbatch, timeout_s=ports.frame_s, monotonic=timeline.clock)
