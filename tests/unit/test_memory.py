"""Memory that the planner counts from shapes, against what torch's profiler sees a stage take, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.fleet_spec import Fleet
from actors.model.spec import ModelSpec
from actors.schedule import SPLIT, Action, Op, peak_held, stage_actions
from actors.settings import BatchSpec, WireConfig
from orchestrator.planner.build import FRAME_COPIES, Workload, make_problem
from orchestrator.planner.evaluate import memory_bytes
from orchestrator.planner.problem import Placement
from orchestrator.simulator.step import simulate_step
from tests.small_fleets import node
from tests.tensor_peak import stage_peak_bytes

MODEL = ModelSpec(
    vocab_size=512, hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=8, ffn_size=704, max_positions=256
)
BATCH = BatchSpec(seq_len=128, microbatch_size=2, num_microbatches=5)


def counted_and_taken(
    layers: tuple[int, int], actions: tuple[Action, ...], model: ModelSpec = MODEL, **more: Any
) -> tuple[float, int]:
    """What the planner counts without the frames that wait, and what the profiler saw."""
    batch: BatchSpec = more.pop("batch", BATCH)
    checkpointing: bool = more.pop("activation_checkpointing", False)
    mask: bool = more.pop("document_mask", False)
    work = Workload(
        model=model,
        batch=batch,
        schedule="zb-h1" if any(action.op is Op.WEIGHT_BACKWARD for action in actions) else "1f1b",
        activation_checkpointing=checkpointing,
        document_mask=mask,
    )
    problem = make_problem(Fleet(nodes=(node("a"),), links=()), work, WireConfig())
    frames = FRAME_COPIES * float(problem.raw_frame_bytes_N[0])
    counted = memory_bytes(problem, 0, *layers, peak_held(actions)) - frames
    taken = stage_peak_bytes(model, layers, actions, batch, document_mask=mask, activation_checkpointing=checkpointing)
    return counted, taken


@pytest.mark.parametrize("layers", [(0, 2), (2, 3), (2, 5), (4, 6)], ids=["first", "one", "three", "last"])
@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_what_is_counted_is_what_is_taken_and_a_little_more(layers: tuple[int, int], in_flight: int) -> None:
    counted, taken = counted_and_taken(layers, stage_actions("1f1b", 4 - in_flight, 4, BATCH.num_microbatches))
    assert taken <= counted <= 1.1 * taken


@pytest.mark.parametrize(
    "shape",
    [
        {"ffn_size": 1408},
        {"num_kv_heads": 2},
        {"hidden_size": 512},
        {"num_heads": 16, "num_kv_heads": 4},
        {"vocab_size": 4096},
    ],
    ids=str,
)
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("layers", [(2, 4), (4, 6)], ids=["middle", "last"])
def test_whatever_the_models_shape(shape: dict[str, int], document_mask: bool, layers: tuple[int, int]) -> None:
    actions = stage_actions("1f1b", 1, 4, BATCH.num_microbatches)
    counted, taken = counted_and_taken(layers, actions, replace(MODEL, **shape), document_mask=document_mask)
    assert taken <= counted <= 1.1 * taken


def test_longer_sequences_and_blocks_computed_again() -> None:
    actions = stage_actions("1f1b", 0, 4, BATCH.num_microbatches)
    counted, taken = counted_and_taken((1, 3), actions, batch=replace(BATCH, seq_len=256), document_mask=True)
    assert taken <= counted <= 1.1 * taken
    counted, taken = counted_and_taken((1, 5), actions, activation_checkpointing=True)
    assert taken <= counted <= 1.1 * taken


@pytest.mark.parametrize("layers", [(0, 2), (2, 4), (4, 6)], ids=["first", "middle", "last"])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_halves_put_off_take_no_more_than_what_they_are_counted_for(
    layers: tuple[int, int], stage: int, checkpointing: bool
) -> None:
    actions = stage_actions("zb-h1", stage, 4, BATCH.num_microbatches)
    assert "zb-h1" in SPLIT
    assert any(action.op is Op.WEIGHT_BACKWARD for action in actions)
    counted, taken = counted_and_taken(layers, actions, activation_checkpointing=checkpointing)
    # On the high side: a first half lets go of some of what it counts for.
    assert taken <= counted


@pytest.mark.parametrize("num_put_off", [1, 3])
def test_the_simulator_counts_what_a_first_half_lets_go_of(num_put_off: int) -> None:
    halves = [(Action(Op.FORWARD, m), Action(Op.INPUT_BACKWARD, m)) for m in range(BATCH.num_microbatches)]
    later = [Action(Op.WEIGHT_BACKWARD, m) for m in range(BATCH.num_microbatches)]
    actions = [action for pair in halves[:num_put_off] for action in pair]
    for pair, weight in zip(halves[num_put_off:], later, strict=False):
        actions += [*pair, weight]
    actions += later[BATCH.num_microbatches - num_put_off :]
    work = Workload(model=MODEL, batch=BATCH, schedule="zb-h1", activation_checkpointing=False, document_mask=False)
    problem = make_problem(Fleet(nodes=(node("a"),), links=()), work, WireConfig())
    alone = Placement(bounds=(0, MODEL.num_layers), nodes=((0,),))
    simulation = simulate_step(problem, alone, WireConfig(), orders=(tuple(actions),))
    taken = stage_peak_bytes(MODEL, (0, MODEL.num_layers), actions, BATCH, document_mask=False)
    assert taken <= simulation.tensor_bytes_U[0] <= 1.1 * taken
    # Which tells it from a count of whole microbatches.
    whole = memory_bytes(problem, 0, 0, MODEL.num_layers, num_put_off + 1)
    assert whole - FRAME_COPIES * float(problem.raw_frame_bytes_N[0]) > 1.05 * simulation.tensor_bytes_U[0]
