"""How much of eight equal stages each schedule uses over long links, simulated, and what it holds in memory for it.

Every stage takes 50 ms for a forward and for each half of a backward, a frame holds a link for 20 ms; 256 microbatches.
Simulated by actors.play: no node computes anything here. Utilisation is the stages' work over the whole step, filling
and draining included. The ceiling is what no order of these actions exceeds, whatever the memory.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from itertools import accumulate

from actors.list_schedule import IN_FLIGHT_MARGIN, make_orders
from actors.play import PipelineTimes, play
from actors.schedule import peak_held, peak_in_flight
from actors.spec import ScheduleName
from bench.record import parse_arguments, save

NUM_STAGES, NUM_MICROBATCHES = 8, 256
PART_S, SEND_S = 0.05, 0.02
DELAYS_S = (0.01, 0.05, 0.1, 0.3)
SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "bdp", "bdp-split")
# Beside the margin that is used: what twice as much in flight as the delay needs would bring, for its memory.
WIDE_MARGIN = 2.0
# At this delay the best schedule must use this much, and 1F1B be as starved as it is known to be.
CHECKED_DELAY_S, LEAST_UTILISATION, STARVED = 0.1, 0.94, (0.40, 0.42)
# Of a large pipeline: stages, microbatches, and the seconds of one core that the orders may take.
LARGE_STAGES, LARGE_MICROBATCHES, MOST_LARGE_S = 64, 512, 2.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One schedule at one delay."""

    schedule: ScheduleName
    # Of the bandwidth-delay product; GPipe and 1F1B have none.
    margin: float | None
    delay_s: float
    step_s: float
    utilisation: float
    ceiling: float
    # Microbatches at the peak: in flight, and held with halves put off, of each stage.
    in_flight_S: tuple[int, ...]
    held_S: tuple[int, ...]
    # CPU seconds to make the orders.
    took_s: float


def run(quick: bool) -> tuple[Row, ...]:
    """Return a row for each schedule and delay; quick: the delay with a bound only."""
    delays = (CHECKED_DELAY_S,) if quick else DELAYS_S
    cases: list[tuple[ScheduleName, float]] = [(schedule, IN_FLIGHT_MARGIN) for schedule in SCHEDULES]
    cases.append(("bdp-split", WIDE_MARGIN))
    return tuple(
        _row(schedule, _equal_stages(NUM_STAGES, delay_s), delay_s, NUM_MICROBATCHES, margin)
        for delay_s in delays
        for schedule, margin in cases
    )


def run_large() -> Row:
    """Return a row for a pipeline of many stages: how long its orders take to make."""
    times = _equal_stages(LARGE_STAGES, CHECKED_DELAY_S)
    return _row("bdp-split", times, CHECKED_DELAY_S, LARGE_MICROBATCHES, IN_FLIGHT_MARGIN)


def is_met(rows: tuple[Row, ...]) -> bool:
    """Return whether the rows at the delay with a bound keep to it."""
    checked = [row for row in rows if row.delay_s == CHECKED_DELAY_S and row.margin != WIDE_MARGIN]
    used = {row.schedule: row.utilisation for row in checked}
    return used["bdp-split"] >= LEAST_UTILISATION and STARVED[0] <= used["1f1b"] <= STARVED[1]


def ceiling_s(times: PipelineTimes, num_microbatches: int, is_split: bool) -> float:
    """Return what a step takes at least: the first activation comes, a stage does all its work, the last gradient goes.

    A second half, which nobody waits for, can be what a stage ends with; a whole backward is waited for by stage 0.
    """
    last = times.num_stages - 1
    hops_down_s = [times.forward_s_S[s] + times.send_down_s_L[s] + times.delay_down_s_L[s] for s in range(last)]
    backward_s_S = [i + w for i, w in zip(times.input_backward_s_S, times.weight_backward_s_S, strict=True)]
    hops_up_s = [times.send_up_s_L[s] + times.delay_up_s_L[s] + backward_s_S[s] for s in range(last)]
    before_s = accumulate(hops_down_s, initial=0.0)
    after_s = [0.0] * times.num_stages if is_split else accumulate(hops_up_s, initial=0.0)
    return max(
        before + num_microbatches * times.stage_s(stage) + after
        for stage, (before, after) in enumerate(zip(before_s, after_s, strict=True))
    )


def _row(schedule: ScheduleName, times: PipelineTimes, delay_s: float, num_microbatches: int, margin: float) -> Row:
    began_s = time.process_time()
    orders = make_orders(schedule, times, num_microbatches, margin=margin)
    took_s = time.process_time() - began_s
    step_s = play(orders, times).step_s
    work_s = num_microbatches * times.stage_s(0)
    return Row(
        schedule=schedule,
        margin=margin if schedule in ("bdp", "bdp-split") else None,
        delay_s=delay_s,
        step_s=step_s,
        utilisation=work_s / step_s,
        ceiling=work_s / ceiling_s(times, num_microbatches, schedule == "bdp-split"),
        in_flight_S=tuple(map(peak_in_flight, orders)),
        held_S=tuple(map(peak_held, orders)),
        took_s=took_s,
    )


def _equal_stages(num_stages: int, delay_s: float) -> PipelineTimes:
    stages, links = (PART_S,) * num_stages, num_stages - 1
    return PipelineTimes(
        forward_s_S=stages,
        input_backward_s_S=stages,
        weight_backward_s_S=stages,
        send_down_s_L=(SEND_S,) * links,
        delay_down_s_L=(delay_s,) * links,
        send_up_s_L=(SEND_S,) * links,
        delay_up_s_L=(delay_s,) * links,
    )


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    rows = run(arguments.quick)
    large = run_large()
    for row in (*rows, large):
        margin = f", margin {row.margin}" if row.margin else ""
        print(
            f"{len(row.held_S)} stages, {row.delay_s * 1000:.0f} ms, {row.schedule}{margin}: "
            f"{row.utilisation:.3f} used (ceiling {row.ceiling:.3f}), in flight {max(row.in_flight_S)}, "
            f"held {max(row.held_S)} at most, {sum(row.held_S)} in all; orders took {row.took_s:.2f} s"
        )
    settings = {"part_s": PART_S, "send_s": SEND_S, "num_microbatches": NUM_MICROBATCHES}
    measured = {"simulated": True, **settings, "rows": [asdict(row) for row in rows], "large": asdict(large)}
    save("planner_schedule", arguments, measured)
    met = is_met(rows) and large.took_s <= MOST_LARGE_S
    print(
        f"at {CHECKED_DELAY_S * 1000:.0f} ms bdp-split must use {LEAST_UTILISATION}, 1f1b {STARVED}; "
        f"{LARGE_STAGES} x {LARGE_MICROBATCHES} must take {MOST_LARGE_S} s of a core: {met}"
    )
    return 1 if arguments.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
