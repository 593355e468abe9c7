"""One simulated step: times that can be done by hand, what links share, what memory holds, and the record of it."""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest

from actors.errors import PlanError
from actors.schedule import Action, Op, num_in_flight
from actors.settings import WireConfig
from orchestrator.events import decode, encode
from orchestrator.pictures import timeline_picture
from orchestrator.planner.problem import Placement, Problem
from orchestrator.records import StepRecord
from orchestrator.simulator.links import loss_limited_bytes_per_s, window_limited_bytes_per_s
from orchestrator.simulator.overheads import CodecTimes, Overheads
from orchestrator.simulator.record import node_actions, step_record
from orchestrator.simulator.step import StepSimulation, simulate_step
from tests.planner_problems import uniform_problem

WIRE = WireConfig()
# Two layers a stage: 2 s forward, 4 s backward.
CHAIN = Placement(bounds=(0, 2, 4, 6), nodes=((0,), (1,), (2,)))


def problem_of(**changes: float) -> Problem:
    return uniform_problem(num_nodes=3, num_layers=6, num_microbatches=8, **changes)  # pyright: ignore[reportArgumentType]


def simulated(problem: Problem, placement: Placement = CHAIN, **options: object) -> StepSimulation:
    return simulate_step(problem, placement, WIRE, **options)  # pyright: ignore[reportArgumentType]


def test_a_chain_without_links_takes_its_fill_and_its_pace() -> None:
    for schedule in ("gpipe", "1f1b"):
        assert simulated(replace(problem_of(), schedule=schedule)).step_s == pytest.approx(3 * 6 + 7 * 6)


def test_gpipe_over_slow_links_adds_each_way_once() -> None:
    problem = replace(problem_of(frame_bytes=1.0, byte_s=1.0, delay_s=2.0), schedule="gpipe")
    # All forwards, down; all backwards; up: (16 + 2 * (3 + 2)) + 8 * 4 + 2 * (3 + 4).
    assert simulated(problem).step_s == pytest.approx(26 + 32 + 14)


def test_a_link_that_is_slower_than_all_stages_sets_the_pace() -> None:
    problem = replace(problem_of(frame_bytes=1.0, byte_s=10.0), schedule="gpipe")
    simulation = simulated(problem)
    # Eight frames of 10 s one after another, down and then up, behind the first forward and before the last backward.
    assert simulation.step_s == pytest.approx((2 + 8 * 10 + 2 + 10 + 2) + (4 + 8 * 10 + 4 + 10 + 4))
    assert simulation.link_busy_DQ.max() == pytest.approx(80 / simulation.step_s)


def test_a_schedule_that_fills_the_delay_keeps_eight_stages_busy() -> None:
    problem = uniform_problem(
        num_nodes=8, num_layers=8, num_microbatches=256, frame_bytes=1.0, byte_s=0.02, delay_s=0.1
    )
    problem = replace(
        problem,
        schedule="bdp-split",
        layer_forward_s_N=np.full(8, 0.05),
        layer_backward_s_N=np.full(8, 0.1),
        layer_weight_s_N=np.full(8, 0.05),
    )
    chain = Placement(bounds=tuple(range(9)), nodes=tuple((node,) for node in range(8)))
    ideal_s = 256 * 0.15
    assert ideal_s / simulated(problem, chain).step_s > 0.93
    assert ideal_s / simulated(replace(problem, schedule="1f1b"), chain).step_s == pytest.approx(0.41, abs=0.01)


def test_what_is_in_flight_is_the_schedules_own() -> None:
    for schedule in ("gpipe", "1f1b", "zb-h1"):
        simulation = simulated(replace(problem_of(), schedule=schedule))
        expected = [num_in_flight(schedule, stage, 3, 8) for stage in range(3)]
        assert simulation.in_flight_peak_U.tolist() == expected


def test_the_memory_ledger_counts_state_flights_and_frames() -> None:
    problem = replace(problem_of(frame_bytes=1.0, byte_s=1e-9), schedule="1f1b")
    memory = simulated(problem).memory_bytes_U
    # State of 2 layers is 4; in flight 3, 2 and 1 times two layers and an input; beside it a raw tensor or two.
    assert (memory >= [4 + 9, 4 + 6, 4 + 3]).all()
    assert (memory <= [4 + 9 + 3, 4 + 6 + 5, 4 + 3 + 3]).all()


def test_frames_that_a_thin_link_cannot_take_pile_up_at_the_sender() -> None:
    thin = replace(problem_of(frame_bytes=1.0, byte_s=100.0), schedule="gpipe")
    wide = replace(problem_of(frame_bytes=1.0, byte_s=1e-9), schedule="gpipe")
    assert simulated(thin).memory_bytes_U[0] >= simulated(wide).memory_bytes_U[0] + 5


def test_two_places_share_what_they_may_carry_together() -> None:
    # Two chains of replicas side by side, from one place to another.
    problem = uniform_problem(num_nodes=4, num_layers=2, num_microbatches=8, frame_bytes=1.0, num_places=2)
    across = Placement(bounds=(0, 1, 2), nodes=((0, 2), (1, 3)))
    problem = replace(problem, schedule="gpipe", byte_s_PP=np.array([[0.0, 10.0], [10.0, 0.0]]))
    alone_s = simulated(problem, across).step_s
    shared = replace(problem, shared_bytes_per_s_PP=np.array([[np.inf, 0.1], [0.1, np.inf]]))
    # Four frames over each of two links side by side: 1 s until the first, 4 times 10, a forward, two backwards of 2 s.
    assert alone_s == pytest.approx(1 + 40 + 1 + 2 + 40 + 2)
    # Eight over what both share; the replica that has its last 10 s earlier begins to send back.
    assert simulated(shared, across).step_s == pytest.approx(1 + 70 + 1 + 2 + 80 + 2)


def test_a_nodes_own_way_out_and_in_bind_whoever_the_peer() -> None:
    problem = replace(problem_of(frame_bytes=1.0), schedule="gpipe")
    wide_s = simulated(problem).step_s
    slow_N = np.array([10.0, 0.0, 0.0])
    out = simulated(replace(problem, uplink_byte_s_N=slow_N)).step_s
    back = simulated(replace(problem, downlink_byte_s_N=slow_N)).step_s
    assert out > wide_s + 60
    assert back > wide_s + 40


def test_codecs_and_frames_take_a_cpu_from_compute_and_run_beside_a_gpu() -> None:
    problem = replace(problem_of(frame_bytes=1.0, byte_s=1e-9), schedule="gpipe")
    costly = Overheads(codecs={"q8": CodecTimes(encode_byte_s=0.5, decode_byte_s=0.25)})
    codecs = [("q8", "q8")] * 2
    plain_s = simulated(problem).step_s
    on_cpu = simulated(problem, overheads=costly, codecs=codecs).step_s
    on_gpu = simulated(problem, overheads=replace(costly, codec_computes=False), codecs=codecs).step_s
    # Beside compute only the fill waits for them; on the CPU the middle stage does all of it itself.
    assert on_gpu == pytest.approx(plain_s + 4 * 0.75)
    assert on_cpu >= plain_s + 8 * 0.75
    assert simulated(problem, overheads=costly, codecs=[("none", "none")] * 2).step_s == plain_s


def test_a_step_has_orders_commits_and_reports() -> None:
    problem = problem_of()
    overheads = Overheads(commit_byte_s=0.5, step_s=3.0, report_s=1.0)
    # Each stage's state of 4 bytes takes 2 s to commit.
    assert simulated(problem, overheads=overheads).step_s == pytest.approx(simulated(problem).step_s + 2 + 1 + 3)
    actions = node_actions(simulated(problem, overheads=overheads), 0)
    assert (actions[0].name, actions[0].start_s, actions[0].end_s) == ("C", 0.0, 2.0)


def test_replicas_share_microbatches_by_speed_and_exchange_gradients() -> None:
    problem = uniform_problem(num_nodes=3, num_layers=2, num_microbatches=9, byte_s=0.5, sync_bytes=4.0)
    problem = replace(
        problem,
        layer_forward_s_N=np.array([1.0, 1.0, 2.0]),
        layer_backward_s_N=np.array([2.0, 2.0, 4.0]),
    )
    simulation = simulated(problem, Placement(bounds=(0, 1, 2), nodes=((0,), (1, 2))))
    assert simulation.shares_U.tolist() == [9, 6, 3]
    # Half of 4 bytes to the other and back, at half a second a byte.
    assert simulation.sync_s_S == (0.0, 2.0)
    assert simulation.sync_bytes_S == (0.0, 8.0)


def test_orders_that_wait_for_one_another_are_refused() -> None:
    forward, backward = Action(Op.FORWARD, 0), Action(Op.BACKWARD, 0)
    problem = uniform_problem(num_nodes=2, num_layers=2, num_microbatches=1)
    chain = Placement(bounds=(0, 1, 2), nodes=((0,), (1,)))
    with pytest.raises(PlanError, match="wait for one another"):
        simulated(problem, chain, orders=[(forward, backward), (backward, forward)])


def test_noise_follows_its_seed() -> None:
    steps = [simulated(problem_of(), sigma=0.2, seed=seed).step_s for seed in (1, 1, 2)]
    assert steps[0] == steps[1] != steps[2]


def test_losses_and_windows_limit_a_connection() -> None:
    lossy = loss_limited_bytes_per_s(0.1, 0.01, num_streams=2, segment_bytes=1448)
    assert lossy == pytest.approx(2 * 1448 / 0.1 * math.sqrt(1.5 / 0.01))
    assert loss_limited_bytes_per_s(0.1, 0.0, num_streams=1, segment_bytes=1448) == math.inf
    # A second of the link under way hides any shorter round trip; 16 MiB do not hide 0.2 s of 10 Gbit/s.
    assert window_limited_bytes_per_s(12.5e6, 0.2, WIRE) == 12.5e6
    assert window_limited_bytes_per_s(1.25e9, 0.2, WIRE) == pytest.approx(16_777_216 / 0.2, rel=0.01)
    problem = replace(problem_of(frame_bytes=1e6, byte_s=1e-9, delay_s=0.5), schedule="gpipe")
    assert simulated(problem, overheads=Overheads(loss_share=0.01)).step_s > simulated(problem).step_s + 100


def test_the_record_is_that_of_a_real_run_and_says_that_it_is_not_one() -> None:
    simulation = simulated(problem_of(frame_bytes=1.0, byte_s=1.0, delay_s=2.0))
    record = step_record(
        simulation, step=0, num_steps=3, step_tokens=1000, node_names=("a", "b", "c"), dollars=simulation.dollars
    )
    back = decode(StepRecord, encode(record))
    assert back.is_simulated
    assert math.isnan(back.loss)
    assert back.stages == record.stages
    assert [stage.node for stage in back.stages] == ["a", "b", "c"]
    for stage in back.stages:
        names = {action.name for action in stage.actions}
        assert {"F", "B"} <= names
        ends = [(a.start_s, a.end_s) for a in stage.actions]
        assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(ends))
    assert "wF" in {action.name for action in back.stages[1].actions}
    picture = BytesIO()
    timeline_picture(back, picture, "svg")
    assert b"simulated, nothing was trained" in picture.getvalue() or len(picture.getvalue()) > 1000


def test_a_connection_that_was_idle_starts_slowly_and_remembers_how_far_it_came() -> None:
    problem = uniform_problem(num_nodes=2, num_layers=2, num_microbatches=1, frame_bytes=7e4, byte_s=1e-9, delay_s=0.5)
    chain = Placement(bounds=(0, 1, 2), nodes=((0,), (1,)))
    at_once_s = simulated(problem, chain).step_s
    slow = Overheads(initial_window_bytes=1e4, idle_s=0.1)
    # 10, 20 and 40 kB a round trip of 1 s: 70 kB is there with the third window, two round trips late, each way.
    assert simulated(problem, chain, overheads=slow).step_s == pytest.approx(at_once_s + 4, abs=0.01)
    # Of two in a row the second finds the window that the first has opened.
    both = replace(problem, num_microbatches=2, schedule="gpipe")
    more_s = simulated(both, chain, overheads=slow).step_s - simulated(both, chain).step_s
    assert more_s == pytest.approx(4, abs=0.01)
    # Where a step comes soon after the last, its connections are still warm.
    patient = replace(slow, idle_s=1000.0)
    assert simulated(problem, chain, overheads=patient).step_s < at_once_s + 1


def test_the_driver_may_stand_elsewhere() -> None:
    problem = problem_of(delay_s=2.0)
    beside_first, beside_last = (simulated(problem, driver=node).step_s for node in (0, 2))
    # Its order is late at the first stage, and the first stage's report, the last one, is late at the driver.
    assert beside_last == pytest.approx(beside_first + 2 * 2)


def test_the_last_stage_keeps_logits_for_each_microbatch_in_flight() -> None:
    problem = replace(problem_of(), schedule="gpipe", last_bytes=300.0, last_saved_bytes=100.0)
    without = simulated(replace(problem, last_bytes=0.0, last_saved_bytes=0.0)).memory_bytes_U
    more = simulated(problem).memory_bytes_U - without
    # Some once, the rest for each of eight in flight.
    assert more.tolist() == pytest.approx([0, 0, 300 + 8 * 100])
