"""What holds of every small fleet: the split is the best there is, and more to work with is never worse."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actors.errors import PlanError
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec, WireConfig
from actors.spec import Fleet, LinkCard, NodeCard
from orchestrator.planner.cost import Workload, compute_s, memory_bytes
from orchestrator.planner.plan import PlanConfig, Split, best_split, even_split, make_plan
from tests.part_times import part_times

seconds = st.floats(0.001, 0.1)
times = st.fixed_dictionaries(
    {"layer_forward_s": seconds, "layer_backward_s": seconds, "embedding_s": seconds, "head_s": seconds}
)
works = st.builds(
    Workload,
    model=st.builds(
        ModelSpec,
        vocab_size=st.sampled_from([64, 4096]),
        hidden_size=st.just(32),
        num_layers=st.integers(1, 8),
        num_heads=st.just(2),
        num_kv_heads=st.just(1),
        ffn_size=st.just(64),
        max_positions=st.just(32),
    ),
    batch=st.builds(
        BatchSpec, seq_len=st.just(16), microbatch_size=st.integers(1, 4), num_microbatches=st.integers(1, 8)
    ),
    schedule=st.sampled_from(["gpipe", "1f1b"]),
    activation_checkpointing=st.booleans(),
)
rates = st.floats(0.1, 10_000.0)
AMPLE = 10**12
# Machines that run tests are slow at times.
relaxed = settings(max_examples=60, deadline=None)


def card(name: str, times: dict[str, float], memory: int) -> NodeCard:
    sizes = tuple(part_times(size, **times) for size in range(1, 5))
    return NodeCard(node=name, host="h", region="r", device="d", boundary_bytes=4, memory_bytes=memory, times=sizes)


def whole_bytes(work: Workload) -> int:
    """What the whole model takes on one node."""
    times = {"layer_forward_s": 1.0, "layer_backward_s": 1.0, "embedding_s": 1.0, "head_s": 1.0}
    return memory_bytes(card("any", times, 0), work, 0, 1, 0, work.model.num_layers)


@st.composite
def problems(draw: st.DrawFn, *, tight: bool) -> tuple[Workload, list[NodeCard]]:
    """A workload and nodes in their order; where `tight`, with memory that often does not do."""
    work = draw(works)
    most = whole_bytes(work)
    memory = st.integers(most // 8, most) if tight else st.just(AMPLE)
    count = draw(st.integers(1, min(5, work.model.num_layers)))
    return work, [card(f"node-{number}", draw(times), draw(memory)) for number in range(count)]


def all_splits(num_layers: int, num_stages: int) -> Iterator[Split]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield tuple(pairwise((0, *cuts, num_layers)))


def slowest_s(split: Split, nodes: list[NodeCard], work: Workload) -> float:
    return max(compute_s(node, work, *bounds) for node, bounds in zip(nodes, split, strict=True))


def fits(split: Split, nodes: list[NodeCard], work: Workload) -> bool:
    return all(
        memory_bytes(node, work, stage, len(nodes), *bounds) <= node.memory_bytes
        for stage, (node, bounds) in enumerate(zip(nodes, split, strict=True))
    )


@relaxed
@given(st.one_of(problems(tight=False), problems(tight=True)))
def test_the_best_split_is_that_of_brute_force(problem: tuple[Workload, list[NodeCard]]) -> None:
    work, nodes = problem
    feasible = [split for split in all_splits(work.model.num_layers, len(nodes)) if fits(split, nodes, work)]
    found = best_split(nodes, work)
    if not feasible:
        assert found is None
        return
    assert found in feasible
    assert slowest_s(found, nodes, work) == min(slowest_s(split, nodes, work) for split in feasible)


@relaxed
@given(problems(tight=True), st.data())
def test_a_plan_fits_and_is_not_slower_than_the_even_one_that_fits(
    problem: tuple[Workload, list[NodeCard]], data: st.DataObject
) -> None:
    work, nodes = problem
    links = tuple(
        LinkCard(source=a.node, target=b.node, delay_s=data.draw(st.floats(0, 0.2)), rate_mbps=data.draw(rates))
        for a, b in combinations(nodes, 2)
    )
    fleet = Fleet(nodes=tuple(nodes), links=links)
    config = PlanConfig(stages=len(nodes), schedule=work.schedule)
    even = even_split(work.model.num_layers, len(nodes))
    if best_split(nodes, work) is None:
        with pytest.raises(PlanError, match=" GB short"):
            make_plan(fleet, work, WireConfig(), config)
        return
    plan = make_plan(fleet, work, WireConfig(), config)
    split = tuple((stage.layer_start, stage.layer_stop) for stage in plan.stages)
    assert split in all_splits(work.model.num_layers, len(nodes))
    assert fits(split, nodes, work)
    if fits(even, nodes, work):
        assert plan.step_s <= plan.even_step_s
    assert make_plan(fleet, work, WireConfig(), config) == plan


@relaxed
@given(problems(tight=False), st.integers(1, 3))
def test_more_nodes_of_a_kind_never_make_it_slower(problem: tuple[Workload, list[NodeCard]], more: int) -> None:
    work, nodes = problem
    few = [replace(nodes[0], node=f"node-{number}") for number in range(len(nodes))]
    many = [replace(nodes[0], node=f"node-{number}") for number in range(len(nodes) + more)]

    def step_s(these: list[NodeCard]) -> float:
        return make_plan(Fleet(nodes=tuple(these), links=()), work, WireConfig(), PlanConfig()).step_s

    assert step_s(many) <= step_s(few)


@relaxed
@given(problems(tight=False), st.floats(1.1, 10.0))
def test_slower_nodes_make_it_slower_in_proportion_at_most(
    problem: tuple[Workload, list[NodeCard]], factor: float
) -> None:
    work, nodes = problem
    config = PlanConfig(stages=len(nodes))

    def step_s(factor: float) -> float:
        slowed = tuple(
            replace(
                node,
                times=tuple(
                    part_times(
                        times.microbatch_size,
                        layer_forward_s=times.layer_forward_s * factor,
                        layer_backward_s=times.layer_backward_s * factor,
                        embedding_s=(times.embedding_forward_s + times.embedding_backward_s) * factor,
                        head_s=(times.head_forward_s + times.head_backward_s) * factor,
                    )
                    for times in node.times
                ),
            )
            for node in nodes
        )
        return make_plan(Fleet(nodes=slowed, links=()), work, WireConfig(), config).step_s

    # The even split may give way to one that is up to 5% faster.
    assert 0.95 * step_s(1.0) < step_s(factor) <= factor * step_s(1.0) * (1 + 1e-9)


@relaxed
@given(problems(tight=False), rates, st.floats(1.5, 100.0))
def test_a_thinner_link_never_makes_it_faster(
    problem: tuple[Workload, list[NodeCard]], rate_mbps: float, factor: float
) -> None:
    work, nodes = problem
    assume(len(nodes) > 1)

    def step_s(rate: float) -> float:
        links = tuple(
            LinkCard(source=a.node, target=b.node, delay_s=0.01, rate_mbps=rate) for a, b in combinations(nodes, 2)
        )
        return make_plan(Fleet(nodes=tuple(nodes), links=links), work, WireConfig(), PlanConfig()).step_s

    assert step_s(rate_mbps) <= step_s(rate_mbps / factor)


wires = st.tuples(st.integers(1024, 10**6), st.integers(0, 10**6), st.integers(0, 10**7)).map(
    lambda parts: WireConfig(min_chunk_bytes=parts[0], max_chunk_bytes=parts[0] + parts[1], max_window_bytes=sum(parts))
)


@relaxed
@given(wires, st.floats(1e-3, 1e6), problems(tight=False))
def test_chunks_and_windows_keep_to_any_bounds(
    wire: WireConfig, rate_mbps: float, problem: tuple[Workload, list[NodeCard]]
) -> None:
    work, nodes = problem
    assume(work.model.num_layers > 1)
    links = (LinkCard(source="node-0", target="node-1", delay_s=0.1, rate_mbps=rate_mbps),)
    fleet = Fleet(nodes=(nodes[0], replace(nodes[0], node="node-1")), links=links)
    (link,) = make_plan(fleet, work, wire, PlanConfig(stages=2)).links
    assert wire.min_chunk_bytes <= link.chunk_bytes <= wire.max_chunk_bytes
    assert link.chunk_bytes <= link.window_bytes <= wire.max_window_bytes
    if wire.min_chunk_bytes < link.chunk_bytes < wire.max_chunk_bytes:
        assert link.chunk_bytes == pytest.approx(rate_mbps * 125_000 * wire.chunk_s, abs=1)
