"""Schedules as text that others read and write: one line a stage, actions such as 2F0, 1B3, 1I2, 1W2 between commas.

PURE. The compute-only format of torch.distributed.pipelining (`_PipelineScheduleRuntime._load_csv`): stage, kind of
action, microbatch. There a line is a rank, which may own several stages; here line s is stage s. Text comes from
outside, so it is checked in full.
"""

from __future__ import annotations

import re

from actors.errors import ScheduleError
from actors.play import Orders
from actors.schedule import Action, Op

# Longer text is not read: 1,000 stages of 1,000 microbatches take less.
MAX_CHARACTERS = 40_000_000
_ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})", re.ASCII)


def to_csv(orders: Orders) -> str:
    """Return the orders as text, a line for each stage."""
    return "".join(
        ",".join(f"{stage}{action.op.value}{action.microbatch}" for action in order) + "\n"
        for stage, order in enumerate(orders)
    )


def from_csv(text: str) -> Orders:
    """Return the orders that the text holds; empty cells, where a rank idles, are passed over.

    Raises ScheduleError, with the line and what to mend, for text that is not whole orders of one stage a line, each
    kind of action in microbatch order. Whether the stages would wait for each other for ever is for actors.play to see.
    """
    if len(text) > MAX_CHARACTERS:
        raise ScheduleError(
            f"the schedule has {len(text)} characters", f"give one of {MAX_CHARACTERS} characters at most"
        )
    orders = tuple(_parse_line(stage, line) for stage, line in enumerate(text.splitlines()))
    if not orders or not orders[0]:
        raise ScheduleError("the schedule is empty", "give a line of actions for each stage, such as 0F0,0B0")
    check_complete(orders, sum(action.op is Op.FORWARD for action in orders[0]))
    return orders


def check_complete(orders: Orders, num_microbatches: int) -> None:
    """Raise ScheduleError unless each stage has, of each microbatch, one forward and one backward, whole or in halves.

    Each kind must run in microbatch order, so that gradients are summed in the order of a plain loop, and no action
    before what it needs from its own stage. A stage's backwards are all whole, or all in halves.
    """
    expected = list(range(num_microbatches))
    for stage, order in enumerate(orders):
        of = {op: [action.microbatch for action in order if action.op is op] for op in Op}
        if of[Op.FORWARD] != expected:
            raise ScheduleError(
                f"the forwards of stage {stage} are not microbatches 0 to {num_microbatches - 1} in order",
                "give each stage every forward once, in microbatch order",
            )
        halves = of[Op.INPUT_BACKWARD], of[Op.WEIGHT_BACKWARD]
        if (of[Op.BACKWARD], *halves) not in ((expected, [], []), ([], expected, expected)):
            raise ScheduleError(
                f"the backwards of stage {stage} are not microbatches 0 to {num_microbatches - 1} in order",
                "give each stage every B once, or every I and every W once, each in microbatch order",
            )
        done: set[tuple[Op, int]] = set()
        for action in order:
            needed = _NEEDS.get(action.op)
            if needed and (needed, action.microbatch) not in done:
                raise ScheduleError(
                    f"stage {stage} runs {action.op.value}{action.microbatch} before {needed.value}{action.microbatch}",
                    "put F before B or I, and I before W",
                )
            done.add((action.op, action.microbatch))


_NEEDS = {Op.BACKWARD: Op.FORWARD, Op.INPUT_BACKWARD: Op.FORWARD, Op.WEIGHT_BACKWARD: Op.INPUT_BACKWARD}


def _parse_line(stage: int, line: str) -> tuple[Action, ...]:
    cells = [cell.strip() for cell in line.split(",")]
    return tuple(_parse_cell(stage, cell) for cell in cells if cell)


def _parse_cell(stage: int, cell: str) -> Action:
    match = _ACTION.fullmatch(cell)
    if match is None:
        raise ScheduleError(
            f"line {stage + 1} of the schedule has {cell[:20]!r}, which is no action",
            "write stage, F, B, I or W, and microbatch, such as 2F0",
        )
    if int(match[1]) != stage:
        raise ScheduleError(
            f"line {stage + 1} of the schedule has {cell}, an action of another stage",
            f"write actions of stage {stage} only: a line is a stage",
        )
    return Action(Op(match[2]), int(match[3]))
