"""A model that fits nowhere: which stage is short, by how much, and the smallest change that would fit."""

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from actors.fleet_spec import Fleet, NodeCard
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec, WireConfig
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.evaluate import evaluate
from orchestrator.planner.problem import Placement
from orchestrator.planner.shortage import least_short, may_fit, no_fit
from tests.part_times import part_times

MODEL = ModelSpec(
    vocab_size=512, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=2, ffn_size=128, max_positions=64
)
WORK = Workload(
    model=MODEL,
    batch=BatchSpec(seq_len=32, microbatch_size=4, num_microbatches=8),
    schedule="1f1b",
    activation_checkpointing=False,
)


def fleet(*memory_bytes: int) -> Fleet:
    times = part_times(4, layer_forward_s=0.01, layer_backward_s=0.02, embedding_s=0.0, head_s=0.0)
    nodes = tuple(
        NodeCard(
            node=f"node-{number}",
            host="h",
            region="r",
            device="TestGPU",
            boundary_bytes=4,
            memory_bytes=size,
            times=(times,),
        )
        for number, size in enumerate(memory_bytes)
    )
    return Fleet(nodes=nodes, links=())


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("memory", [(3_000_000, 1_000_000, 2_000_000), (5_000_000, 4_000_000, 100_000)])
def test_the_least_shortage_is_that_of_the_best_cut(schedule, memory: tuple[int, ...]) -> None:
    problem = make_problem(fleet(*memory), replace(WORK, schedule=schedule), WireConfig())
    for count in (1, 2, 3):
        found = least_short(problem, count)
        shorts = []
        for cuts in combinations(range(1, 6), count - 1):
            placement = Placement(bounds=(0, *cuts, 6), nodes=tuple((node,) for node in found.nodes))
            sizes = evaluate(problem, placement).memory_S
            shorts.append(max(m - problem.memory_bytes_N[n] for (m,), n in zip(sizes, found.nodes, strict=True)))
        assert found.short_bytes == pytest.approx(min(shorts), abs=2)
        own = evaluate(problem, Placement(bounds=found.bounds, nodes=tuple((node,) for node in found.nodes)))
        assert max(0.0, found.short_bytes) == pytest.approx(own.short_bytes, abs=2)


def test_the_error_names_the_stage_the_shortage_and_a_change_that_fits() -> None:
    short = fleet(4_000_000, 4_000_000)
    error = no_fit(short, WORK, WireConfig(), None)
    found = re.search(r"stage (\d) \(layers (\d)-(\d)\) needs ([\d.]+) GB, node-\d \(TestGPU\) has", error.message)
    assert found is not None
    assert "it would fit with batch.microbatch_size=" in error.remedy
    size = int(error.remedy.partition("batch.microbatch_size=")[2].split()[0])
    # It does, and the next larger one does not.
    for fits, microbatch in ((True, size), (False, size * 2)):
        batch = BatchSpec(seq_len=32, microbatch_size=microbatch, num_microbatches=32 // microbatch)
        cards = tuple(
            replace(node, times=(replace(node.times[0], microbatch_size=microbatch),)) for node in short.nodes
        )
        problem = make_problem(Fleet(nodes=cards, links=()), replace(WORK, batch=batch), WireConfig())
        assert (least_short(problem, None).short_bytes <= 0) == fits


def test_more_nodes_are_proposed_where_nothing_else_helps() -> None:
    batch = BatchSpec(seq_len=32, microbatch_size=1, num_microbatches=8)
    work = replace(WORK, batch=batch, activation_checkpointing=True)
    times = part_times(1, layer_forward_s=0.01, layer_backward_s=0.02, embedding_s=0.0, head_s=0.0)
    one = fleet(2_600_000)
    one = Fleet(nodes=(replace(one.nodes[0], times=(times,)),), links=())
    error = no_fit(one, work, WireConfig(), None)
    assert re.search(r"it would fit with \d+ more nodes? like node-0", error.remedy)
    tiny = Fleet(nodes=(replace(one.nodes[0], memory_bytes=1000),), links=())
    assert "train a smaller model" in no_fit(tiny, work, WireConfig(), None).remedy


def test_memory_is_read_from_arrays_of_every_node() -> None:
    problem = make_problem(fleet(10**9, 10**9), WORK, WireConfig())
    assert np.all(problem.memory_bytes_N == 10**9)
    assert least_short(problem, None).short_bytes < 0


def test_nothing_is_searched_for_where_all_nodes_together_lack_room() -> None:
    roomy = make_problem(fleet(10**9, 10**9), WORK, WireConfig())
    assert may_fit(roomy)
    each = roomy.layer_state_bytes + float(roomy.layer_saved_bytes_N[0])
    once = float(roomy.fixed_bytes_N[0] + roomy.flight_bytes_N[0])
    for layers, fits in ((3, True), (2, False)):
        tight = make_problem(fleet(int(once + layers * each) + 1, int(once + 3 * each) + 1), WORK, WireConfig())
        assert may_fit(tight) == fits
