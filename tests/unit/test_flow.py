"""Known graphs and bounds of the compiled maximum flow."""

import numpy as np
import pytest
from numba import njit

from orchestrator.planner.flow import Floats, FlowWorkspace, Ints, flow_workspace, max_flow, max_flow_into

Edge = tuple[int, int, float]


def arrays(edges: list[Edge]) -> tuple[Ints, Ints, Floats]:
    return (
        np.array([tail for tail, _, _ in edges], np.int32),
        np.array([head for _, head, _ in edges], np.int32),
        np.array([capacity for _, _, capacity in edges], np.float64),
    )


def test_a_cross_edge_is_undone_where_that_carries_more() -> None:
    value, flows_E = max_flow(4, *arrays([(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0), (1, 3, 1.0), (2, 3, 1.0)]), 0, 3)
    assert value == 2.0
    assert flows_E.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_an_edge_without_limit_takes_what_the_others_leave() -> None:
    value, flows_E = max_flow(3, *arrays([(0, 1, np.inf), (1, 2, 2.5), (1, 2, 1.0)]), 0, 2)
    assert (value, flows_E.tolist()) == (3.5, [3.5, 2.5, 1.0])


def test_a_path_without_limit_carries_infinitely_much() -> None:
    value, flows_E = max_flow(3, *arrays([(0, 2, 1.0), (0, 1, np.inf), (1, 2, np.inf)]), 0, 2)
    assert value == np.inf
    assert flows_E[1] == flows_E[2] == np.inf


@pytest.mark.parametrize("capacity", [0.0, -1.0, np.nan])
def test_an_edge_that_carries_nothing_carries_nothing(capacity: float) -> None:
    value, flows_E = max_flow(2, *arrays([(0, 1, capacity)]), 0, 1)
    assert (value, flows_E.tolist()) == (0.0, [0.0])


def test_no_edges_carry_nothing() -> None:
    assert max_flow(2, *arrays([]), 0, 1)[0] == 0.0


@pytest.mark.parametrize(("source", "sink"), [(0, 0), (-1, 1), (0, 2)])
def test_source_and_sink_are_two_vertices(source: int, sink: int) -> None:
    with pytest.raises(ValueError, match="source and sink"):
        max_flow(2, *arrays([(0, 1, 1.0)]), source, sink)


@pytest.mark.parametrize("edge", [(0, 2, 1.0), (-1, 1, 1.0)])
def test_an_endpoint_outside_the_graph_is_refused(edge: Edge) -> None:
    with pytest.raises(ValueError, match="no vertex"):
        max_flow(2, *arrays([edge]), 0, 1)


def test_each_edge_needs_a_capacity() -> None:
    tails_E, heads_E, _ = arrays([(0, 1, 1.0)])
    with pytest.raises(ValueError, match="a capacity"):
        max_flow(2, tails_E, heads_E, np.empty(0), 0, 1)


@njit
def _twice(
    vertices: int, tails_E: Ints, heads_E: Ints, capacities_E: Floats, workspace: FlowWorkspace, flows_E: Floats
) -> float:
    first = max_flow_into(vertices, tails_E, heads_E, capacities_E, 0, vertices - 1, workspace, flows_E)
    second = max_flow_into(
        vertices, tails_E[1:], heads_E[1:], capacities_E[1:], 0, vertices - 1, workspace, flows_E[:0]
    )
    return first - second


def test_compiled_code_calls_it_again_and_again_in_one_workspace() -> None:
    edges = arrays([(0, 2, 1.5), (0, 1, 2.0), (1, 2, 1.0)])
    flows_E = np.empty(3)
    assert _twice(3, *edges, flow_workspace(200, 1_000), flows_E) == 1.5
    assert flows_E.tolist() == [1.5, 1.0, 1.0]
