"""What holds of every small graph: the flow is one, and as large as the smallest cut."""

from itertools import product

import networkx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planner.flow import Floats, Ints, max_flow

Edges = tuple[Ints, Ints, Floats]
# Machines that run tests are slow at times.
relaxed = settings(max_examples=150, deadline=None)
TOLERANCE = 1e-9


@st.composite
def graphs(draw: st.DrawFn, *, most_vertices: int, most_edges: int) -> tuple[int, Edges]:
    """Loops, parallel and opposite edges among them; capacities that tie, differ by powers of ten, are 0 or inf."""
    vertices = draw(st.integers(2, most_vertices))
    vertex = st.integers(0, vertices - 1)
    capacity = st.one_of(st.integers(0, 4).map(float), st.floats(1e-3, 1e9), st.just(np.inf))
    edges = draw(st.lists(st.tuples(vertex, vertex, capacity), max_size=most_edges))
    tails, heads, capacities = zip(*edges, strict=True) if edges else ((), (), ())
    return vertices, (np.array(tails, np.int32), np.array(heads, np.int32), np.array(capacities, np.float64))


def smallest_cut(vertices: int, edges: Edges) -> float:
    tails_E, heads_E, capacities_E = edges
    smallest = np.inf
    for inner in product([True, False], repeat=vertices - 2):
        side_V = np.array([True, *inner, False])
        smallest = min(smallest, capacities_E[side_V[tails_E] & ~side_V[heads_E]].sum())
    return smallest


def same(value: float, other: float) -> bool:
    return value == other or abs(value - other) <= TOLERANCE * max(1.0, other)


def is_flow(vertices: int, edges: Edges, value: float, flows_E: Floats) -> bool:
    tails_E, heads_E, capacities_E = edges
    if value == np.inf:
        # Its flows are those of a path without limit.
        graph = networkx.DiGraph(zip(tails_E[flows_E == np.inf], heads_E[flows_E == np.inf], strict=True))
        return networkx.has_path(graph, 0, vertices - 1)
    gain_V = np.zeros(vertices)
    np.add.at(gain_V, tails_E, -flows_E)
    np.add.at(gain_V, heads_E, flows_E)
    gain_V[0] += value
    gain_V[-1] -= value
    scale = max(1.0, flows_E.max(initial=0.0))
    within = (flows_E >= 0.0) & (flows_E <= capacities_E)
    return bool(within.all()) and float(np.abs(gain_V).max()) <= TOLERANCE * scale


@relaxed
@given(graphs(most_vertices=7, most_edges=20))
def test_the_value_is_the_smallest_cut(graph: tuple[int, Edges]) -> None:
    vertices, edges = graph
    value, flows_E = max_flow(vertices, *edges, 0, vertices - 1)
    cut = smallest_cut(vertices, edges)
    assert same(value, cut)
    assert is_flow(vertices, edges, value, flows_E)


@settings(max_examples=40, deadline=None)
@given(graphs(most_vertices=40, most_edges=160))
def test_another_solver_finds_the_same_value(graph: tuple[int, Edges]) -> None:
    vertices, edges = graph
    other = networkx.DiGraph()
    other.add_nodes_from(range(vertices))
    for tail, head, capacity in zip(*(array.tolist() for array in edges), strict=True):
        before = other.edges[tail, head]["capacity"] if other.has_edge(tail, head) else 0.0
        other.add_edge(tail, head, capacity=before + capacity)
    value, flows_E = max_flow(vertices, *edges, 0, vertices - 1)
    try:
        expected = networkx.maximum_flow_value(other, 0, vertices - 1)
    except networkx.NetworkXUnbounded:
        expected = np.inf
    assert same(value, expected)
    assert is_flow(vertices, edges, value, flows_E)


@relaxed
@given(graphs(most_vertices=8, most_edges=30))
def test_the_same_graph_gives_the_same_flows(graph: tuple[int, Edges]) -> None:
    vertices, edges = graph
    once, again = (max_flow(vertices, *edges, 0, vertices - 1) for _ in range(2))
    assert once[0] == again[0]
    assert np.array_equal(*(flows_E for _, flows_E in (once, again)), equal_nan=True)


@relaxed
@given(graphs(most_vertices=8, most_edges=30), st.integers(0, 29), st.floats(0.0, 1e6))
def test_more_capacity_never_carries_less(graph: tuple[int, Edges], index: int, more: float) -> None:
    vertices, (tails_E, heads_E, capacities_E) = graph
    if not len(tails_E):
        return
    wider_E = capacities_E.copy()
    wider_E[index % len(wider_E)] += more
    before, _ = max_flow(vertices, tails_E, heads_E, capacities_E, 0, vertices - 1)
    after, _ = max_flow(vertices, tails_E, heads_E, wider_E, 0, vertices - 1)
    assert after >= before * (1.0 - TOLERANCE)
