"""A node's part in a run: the stages that it holds, one, or as interleaved several, which take turns at its compute.

    load -> step, step, ... (evaluate between) -> flush

Every order names its run, generation and step; the same order again gets the same reports again. No Ray: `actors.node`
is the shell around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from actors.errors import IsthmusError, OutOfDeviceMemory
from actors.frame import target_of
from actors.interleaved import node_actions
from actors.link import Carrier
from actors.mailbox import Receipt
from actors.pipeline import EVAL_WINDOW, Timeline
from actors.resident import ResidentMemory
from actors.schedule import Action
from actors.spec import Assignment, EvalOrder, EvalReport, LoadOrder, SaveReport, StepOrder, StepReport
from actors.stage import Stage


class NodeStages:
    """The stages of one run on this node, in stage order; they hear every order together."""

    def __init__(self, assignments: Sequence[Assignment], carrier_to: Callable[[int], Carrier]) -> None:
        """Build each stage; `carrier_to` gives the way to a stage's neighbour."""
        resident = ResidentMemory()
        self._stages = {own.stage: Stage(own, carrier_to, resident, self._fail) for own in assignments}
        self._all = tuple(self._stages.values())
        self._first = self._all[0]
        # What was last asked and answered, so that the same order gets the same reports.
        self._last_step: tuple[StepOrder, tuple[StepReport, ...]] | None = None
        self._last_evaluation: tuple[EvalOrder, tuple[EvalReport, ...]] | None = None

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of these stages by their name in the whole model."""
        return {name: parameter for stage in self._all for name, parameter in stage.parameters.items()}

    def load(self, order: LoadOrder) -> None:
        """Take the weights that the order names, and frames of its step from now on."""
        self._first.require_current(order.run, order.generation)
        for stage in self._all:
            stage.load(order)
        self._last_step = self._last_evaluation = None

    def step(self, order: StepOrder) -> tuple[StepReport, ...]:
        """Commit the step before, save if asked, run this step, report."""
        self._first.require_current(order.run, order.generation)
        if self._last_step is not None and self._last_step[0] == order:
            return self._last_step[1]
        with self._naming_out_of_memory(f"step {order.step}"):
            # All of them before the device has anything to do: each starts with the host's clock.
            timelines = {number: stage.new_timeline() for number, stage in self._stages.items()}
            for number, stage in self._stages.items():
                stage.begin(order, timelines[number])
            if order.run_step:
                for number, action in self._actions(timelines):
                    self._stages[number].act(action, order, timelines[number])
            reports = tuple(stage.report(order, timelines[number]) for number, stage in self._stages.items())
        self._last_step = order, reports
        return reports

    def evaluate(self, order: EvalOrder) -> tuple[EvalReport, ...]:
        """Run the held-out microbatches forward and report their loss."""
        self._first.require_current(order.run, order.generation)
        if self._last_evaluation is not None and self._last_evaluation[0] == order:
            return self._last_evaluation[1]
        with self._naming_out_of_memory(f"the evaluation at step {order.step}"):
            reports = self._evaluate(order)
        self._last_evaluation = order, reports
        return reports

    def abort(self, generation: int) -> None:
        """End every generation up to this one; a step that waits for its frames fails at once."""
        for stage in self._all:
            stage.abort(generation)

    def receive(self, chunk: bytes) -> Receipt:
        """Take one chunk from a peer; one for no stage of this node the first one refuses."""
        target = target_of(chunk) if len(self._stages) > 1 else None
        stage = self._first if target is None else self._stages.get(target, self._first)
        return stage.receive(chunk)

    def flush(self, timeout_s: float) -> tuple[SaveReport, ...]:
        """Wait for checkpoints that are being written, at most so long, and report them."""
        deadline_s = time.monotonic() + timeout_s
        return tuple(save for stage in self._all for save in stage.flush(max(0.0, deadline_s - time.monotonic())))

    def close(self) -> None:
        """Stop the threads of each stage."""
        for stage in self._all:
            stage.close()

    def _fail(self, generation: int, error: IsthmusError) -> None:
        """Make the step fail in every stage: the node may be waiting in another one than that whose link failed."""
        for stage in self._all:
            stage.fail(generation, error)

    def _actions(self, timelines: dict[int, Timeline]) -> Iterator[tuple[int, Action]]:
        """Yield what this node does in a step, and on which of its stages."""
        numbers, first = tuple(self._stages), self._first
        if len(numbers) == 1:
            yield from ((numbers[0], action) for action in first.actions(timelines[numbers[0]]))
            return
        assignment = first.assignment
        num_nodes = assignment.num_stages // len(numbers)
        num_microbatches = assignment.batch.num_microbatches
        for action in node_actions(assignment.stage, num_nodes, len(numbers), num_microbatches):
            yield numbers[action.chunk], Action(action.op, action.microbatch)

    def _evaluate(self, order: EvalOrder) -> tuple[EvalReport, ...]:
        sums: dict[int, tuple[float, int]] = dict.fromkeys(self._stages, (0.0, 0))
        for stage in self._all:
            stage.open_evaluation(order)
        # So many at a time that no stage waits for room at one of this node's that has yet to have its turn.
        for start in range(0, order.num_microbatches, EVAL_WINDOW):
            microbatches = range(start, min(start + EVAL_WINDOW, order.num_microbatches))
            for number, stage in self._stages.items():
                loss_sum, num_targets = stage.evaluate(order, microbatches, stage.new_timeline())
                sums[number] = sums[number][0] + loss_sum, sums[number][1] + num_targets
        return tuple(
            EvalReport(
                run=order.run,
                generation=order.generation,
                step=order.step,
                stage=number,
                loss_sum=loss_sum,
                num_targets=num_targets,
            )
            for number, (loss_sum, num_targets) in sums.items()
        )

    @contextmanager
    def _naming_out_of_memory(self, when: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            stages = " and ".join(map(str, self._stages))
            raise OutOfDeviceMemory(
                f"stage {stages} on {self._first.assignment.own.node} ran out of device memory in {when}",
                "set a smaller batch.microbatch_size, train.activation_checkpointing=true, or use more nodes",
            ) from error
