"""Long simulated runs: traces read from hostile files, and what coming and going costs, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.errors import UserError
from actors.settings import WireConfig
from orchestrator.planner.problem import Placement, Problem
from orchestrator.simulator.outcome import RunRules, RunSimulation
from orchestrator.simulator.run import simulate_run
from orchestrator.simulator.trace import Change, Trace, drawn_trace, lay_on, parse_trace, read_trace
from tests.planner_problems import uniform_problem

COUNTS = b'[{"Time": 0, "GPUs": 2}, {"Time": 60.5, "GPUs": 1},\n {"Time": 90, "GPUs": 9}]'
MOMENTS = b"2021-12-11, 11:11:30, 2\n2021-12-11, 11:13:00, 9\n2021-12-11, 11:12:30.5, 1\n".replace(b"30.5", b"30")
EVENTS = b"480000,add,a\n480000,add,b\n540000,remove,a\n560000,add,c\n"
# Two nodes, a layer each: 3 s forward and backward, 4 microbatches: 15 s a step.
STEP_S = 15.0


def problem_of(num_nodes: int = 3) -> Problem:
    return replace(uniform_problem(num_nodes=num_nodes, num_layers=2, num_microbatches=4), schedule="1f1b")


def first_two(problem: Problem, here_N: NDArray[np.bool_], before: Placement | None) -> Placement | None:
    nodes = np.flatnonzero(here_N)[:2].tolist()
    return Placement(bounds=(0, 1, 2), nodes=((nodes[0],), (nodes[1],))) if len(nodes) == 2 else None


def run_of(trace: Trace, rules: RunRules, problem: Problem | None = None, replan=first_two) -> RunSimulation:
    return simulate_run(problem or problem_of(), trace, replan, WireConfig(), step_tokens=100, rules=rules)


RULES = RunRules(notice_s=5.0, restart_s=10.0, checkpoint_steps=4, checkpoint_write_s=0.0, load_mbps=1e12)


def test_a_quiet_run_does_nothing_but_steps() -> None:
    run = run_of(Trace(first=(0, 1, 2), changes=(), duration_s=10 + 20 * STEP_S), RULES)
    assert (run.steps, run.tokens, run.lost_steps, run.down_s) == (20, 2000, 0, 10.0)
    # Three nodes at a dollar an hour, the idle one too.
    assert run.dollars == pytest.approx(3 * run.duration_s / 3600)
    spared = run_of(Trace(first=(0, 1, 2), changes=(), duration_s=310.0), replace(RULES, pays_idle=False))
    assert spared.dollars == pytest.approx(2 * 300 / 3600)


def test_a_lost_node_takes_all_stages_back_to_the_newest_checkpoint() -> None:
    lost_s = 10 + 6.5 * STEP_S
    trace = Trace(first=(0, 1, 2), changes=(Change(time_s=lost_s, node=1, joins=False),), duration_s=lost_s + 150)
    run = run_of(trace, RULES)
    # Of six steps four are saved; half a step was in flight; then 15 s to notice and place, and nine more steps.
    assert (run.lost_steps, run.losses, run.replans) == (2, 1, 2)
    assert run.lost_s == pytest.approx(2.5 * STEP_S)
    assert run.down_s == pytest.approx(10 + 15)
    assert run.steps == 4 + 9
    assert [event.name for event in run.events] == ["placed", "node_lost", "placed"]


def test_a_checkpoint_that_is_still_being_written_does_not_count() -> None:
    lost_s = 10 + 4.5 * STEP_S
    trace = Trace(first=(0, 1, 2), changes=(Change(time_s=lost_s, node=0, joins=False),), duration_s=lost_s)
    assert run_of(trace, RULES).steps == 4
    assert run_of(trace, replace(RULES, checkpoint_write_s=10.0)).steps == 0


def test_a_node_that_nobody_uses_may_go() -> None:
    trace = Trace(first=(0, 1, 2), changes=(Change(time_s=100.0, node=2, joins=False),), duration_s=310.0)
    run = run_of(trace, RULES)
    assert (run.steps, run.losses) == (20, 0)
    assert run.dollars == pytest.approx((3 * 100 + 2 * 210) / 3600)


def test_a_run_that_fits_nowhere_waits_for_a_node() -> None:
    changes = (Change(time_s=100.0, node=1, joins=False), Change(time_s=500.0, node=2, joins=True))
    run = run_of(Trace(first=(0, 1), changes=changes, duration_s=500 + 10 + 5 * STEP_S), RULES)
    assert [event.name for event in run.events] == ["placed", "node_lost", "waiting", "node_joined", "placed"]
    assert run.steps == 4 + 5
    assert [point.tokens_per_s > 0 for point in run.points][-1]


def test_replicas_that_are_left_go_on_where_that_is_asked_for() -> None:
    def two_copies(problem: Problem, here_N: NDArray[np.bool_], before: Placement | None) -> Placement | None:
        nodes = np.flatnonzero(here_N).tolist()
        return Placement(bounds=(0, 2), nodes=(tuple(nodes),)) if nodes else None

    problem = problem_of(2)
    # Four microbatches of 6 s: 12 s on two replicas, 24 s on one.
    trace = Trace(first=(0, 1), changes=(Change(time_s=10 + 30.0, node=1, joins=False),), duration_s=10 + 35.0 + 48)
    healed = run_of(trace, replace(RULES, recovery="step"), problem, two_copies)
    assert healed.steps == 2 + 2
    assert healed.lost_s == pytest.approx(6.0)
    assert "healed" in {event.name for event in healed.events}
    estimated = run_of(trace, replace(RULES, recovery="step", exact_nodes=1), problem, two_copies)
    assert abs(estimated.steps - healed.steps) <= 1
    kept = run_of(trace, replace(RULES, recovery="microbatches"), problem, two_copies)
    # Half of the six seconds' work was the lost node's: as long again on one as on two.
    assert kept.lost_s == pytest.approx(6.0)
    assert kept.down_s == healed.down_s - 5.0
    assert run_of(trace, RULES, problem, two_copies).steps < healed.steps


def test_what_has_come_is_taken_in_where_that_pays() -> None:
    def fast_first(problem: Problem, here_N: NDArray[np.bool_], before: Placement | None) -> Placement | None:
        nodes = [n for n in (2, 0, 1) if here_N[n]]
        return Placement(bounds=(0, 2), nodes=((nodes[0],),)) if nodes else None

    problem = replace(
        problem_of(), layer_forward_s_N=np.array([1.0, 1.0, 0.1]), layer_backward_s_N=np.array([2, 2, 0.2])
    )
    trace = Trace(first=(0, 1), changes=(Change(time_s=30.0, node=2, joins=True),), duration_s=2000.0)
    today = run_of(trace, RULES, problem, fast_first)
    moved = run_of(trace, replace(RULES, replan_every_s=300.0), problem, fast_first)
    assert [event.name for event in moved.events] == ["placed", "node_joined", "moved"]
    assert (moved.lost_steps, moved.lost_s) == (0, 0.0)
    assert moved.steps > 5 * today.steps
    # Ten seconds are not worth a move for a gain of nothing.
    same = run_of(trace, replace(RULES, replan_every_s=300.0), problem_of(), fast_first)
    assert "moved" not in {event.name for event in same.events}


def test_too_many_rebuilds_without_a_checkpoint_would_have_stopped_the_run() -> None:
    # One of the two in use is lost every 50 s, which is too little for four steps, and is back when the other one is.
    changes = [
        Change(time_s=50.0 * i + after_s, node=i % 2, joins=after_s == 60) for i in range(6) for after_s in (40, 60)
    ]
    run = run_of(Trace(first=(0, 1, 2), changes=tuple(changes), duration_s=340.0), RULES)
    assert run.losses == 6
    assert run.stops == 1


def test_the_three_formats_say_the_same() -> None:
    for content in (COUNTS, MOMENTS):
        trace = lay_on(parse_trace(content, "t"), 3, seed=1)
        assert trace.first == (0, 1)
        assert [change.joins for change in trace.changes] == [False, True, True]
        assert trace.duration_s == 90
    trace = lay_on(parse_trace(EVENTS, "t"), 2, seed=1)
    assert trace.first == (0, 1)
    assert trace.changes == (Change(time_s=60, node=0, joins=False), Change(time_s=80, node=0, joins=True))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"hello",
        b"[",
        b"[" * 100_000,
        b"[]",
        b'[{"Time": -1, "GPUs": 2}]',
        b'[{"Time": NaN, "GPUs": 2}]',
        b'[{"Time": 1e30, "GPUs": 2}]',
        b'[{"Time": 0, "GPUs": true}]',
        b'[{"Time": 0, "GPUs": 1e9}]',
        b"[1, 2]",
        b"480000,add,a\n1,explode,b\n",
        b"999999999999999,add,a\n",
        b"2021-13-11, 11:11:30, 2\n",
        b"2021-12-11, 11:11:30, 99999999\n",
    ],
)
def test_what_is_no_trace_is_refused_with_a_remedy(content: bytes) -> None:
    with pytest.raises(UserError) as caught:
        parse_trace(content, "trace.txt")
    assert "trace.txt" in caught.value.message
    assert caught.value.remedy
    assert "\n" not in caught.value.message


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")


def test_drawn_lives_are_as_long_as_asked_and_follow_their_seed() -> None:
    rates = np.array([0.5] * 200 + [0.0])
    trace = drawn_trace(rates, duration_s=36_000, away_s=600, seed=3)
    losses = sum(not change.joins for change in trace.changes)
    # Ten hours, of which a life of two hours and ten minutes away leave 12/13.
    assert losses == pytest.approx(200 * 10 * 0.5 * 12 / 13, rel=0.1)
    assert all(change.node != 200 for change in trace.changes)
    assert [c.time_s for c in trace.changes] == sorted(c.time_s for c in trace.changes)
    assert trace == drawn_trace(rates, duration_s=36_000, away_s=600, seed=3)
    assert trace != drawn_trace(rates, duration_s=36_000, away_s=600, seed=4)
    with pytest.raises(UserError):
        drawn_trace(np.array([-1.0]), duration_s=1.0, away_s=1.0, seed=0)
