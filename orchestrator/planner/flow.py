"""Maximum flow through small directed graphs, compiled, for searches that ask for millions of them.

PURE. Dinic's algorithm (Dinic 1970) on arrays: levels are distances to the sink, so that a search from the source
enters no vertex that cannot reach it. Arcs are tried in one fixed order: the same graph gives the same flows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]

# This part of a residual is all of it: what rounding leaves would cost a phase of its own.
_WHOLE = 1.0 - 1e-12


class FlowWorkspace(NamedTuple):
    """Scratch memory of `max_flow_into`, for graphs of up to so many vertices and edges; holds nothing between calls.

    Edge e is arc 2e forward and 2e + 1 backward. The arcs that leave a vertex form a linked list.
    """

    first_arc_V: Ints
    current_arc_V: Ints
    distance_V: Ints
    queue_V: Ints
    path_V: Ints
    room_V: Floats
    next_arc_A: Ints
    head_A: Ints
    residual_A: Floats


@njit(cache=True)
def flow_workspace(most_vertices: int, most_edges: int) -> FlowWorkspace:
    """Return scratch memory for graphs of up to `most_vertices` and `most_edges`; callable from compiled code."""
    return FlowWorkspace(
        np.empty(most_vertices, np.int32),
        np.empty(most_vertices, np.int32),
        np.empty(most_vertices, np.int32),
        np.empty(most_vertices, np.int32),
        np.empty(most_vertices, np.int32),
        np.empty(most_vertices, np.float64),
        np.empty(2 * most_edges, np.int32),
        np.empty(2 * most_edges, np.int32),
        np.empty(2 * most_edges, np.float64),
    )


@njit(cache=True)
def max_flow(
    num_vertices: int, tails_E: Ints, heads_E: Ints, capacities_E: Floats, source: int, sink: int
) -> tuple[float, Floats]:
    """Return the value of a maximum flow from `source` to `sink`, and each edge's flow.

    Edge e goes from vertex tails_E[e] to heads_E[e] (int32) and carries up to capacities_E[e] (float64, inf where
    without limit; 0, a negative number or NaN carries nothing). The value is inf where some path has no limit; then
    the flows of its edges are inf and the others' mean nothing. Raises ValueError where an endpoint is no vertex.
    """
    if not (0 <= source < num_vertices and 0 <= sink < num_vertices and source != sink):
        raise ValueError("source and sink must be two vertices of the graph")
    if len(tails_E) != len(heads_E) or len(tails_E) != len(capacities_E):
        raise ValueError("each edge needs a tail, a head and a capacity")
    for edge in range(len(tails_E)):
        if not (0 <= tails_E[edge] < num_vertices and 0 <= heads_E[edge] < num_vertices):
            raise ValueError("an edge's endpoint is no vertex of the graph")
    flows_E = np.empty(len(tails_E), np.float64)
    workspace = flow_workspace(num_vertices, len(tails_E))
    value = max_flow_into(num_vertices, tails_E, heads_E, capacities_E, source, sink, workspace, flows_E)
    return value, flows_E


@njit(cache=True)
def max_flow_into(
    num_vertices: int,
    tails_E: Ints,
    heads_E: Ints,
    capacities_E: Floats,
    source: int,
    sink: int,
    workspace: FlowWorkspace,
    flows_E: Floats,
) -> float:
    """Return what `max_flow` returns, with the flows in `flows_E`, and allocate nothing; for compiled code.

    `workspace` is as large as the graph or larger. The endpoints are not checked: a wrong one reads foreign memory.
    Where `flows_E` has length 0 the flows are not written.
    """
    first_arc_V, current_arc_V, distance_V, queue_V, path_V, room_V, next_arc_A, head_A, residual_A = workspace
    for vertex in range(num_vertices):
        first_arc_V[vertex] = -1
    for edge in range(len(tails_E) - 1, -1, -1):
        tail, head, capacity = tails_E[edge], heads_E[edge], capacities_E[edge]
        forward, backward = 2 * edge, 2 * edge + 1
        head_A[forward], head_A[backward] = head, tail
        residual_A[forward] = capacity if capacity > 0.0 else 0.0
        residual_A[backward] = 0.0
        next_arc_A[forward] = first_arc_V[tail]
        first_arc_V[tail] = forward
        next_arc_A[backward] = first_arc_V[head]
        first_arc_V[head] = backward
    value = 0.0
    while value < np.inf:
        # One phase: how far each vertex is from the sink, then flow along shortest paths until they are full.
        for vertex in range(num_vertices):
            distance_V[vertex] = num_vertices
            current_arc_V[vertex] = first_arc_V[vertex]
        distance_V[sink] = 0
        queue_V[0] = sink
        num_queued, position = 1, 0
        while position < num_queued and distance_V[source] == num_vertices:
            head = queue_V[position]
            position += 1
            arc = first_arc_V[head]
            while arc >= 0:
                # The arc's mate goes the other way, towards the sink.
                tail = head_A[arc]
                if distance_V[tail] == num_vertices and residual_A[arc ^ 1] > 0.0:
                    distance_V[tail] = distance_V[head] + 1
                    queue_V[num_queued] = tail
                    num_queued += 1
                arc = next_arc_A[arc]
        if distance_V[source] == num_vertices:
            break
        # The path so far: path_V[d] is its arc d, room_V[d] what its arcs before d have left.
        vertex, length = source, 0
        room_V[0] = np.inf
        while True:
            if vertex == sink:
                pushed, room, full = room_V[length], np.inf, length
                for step in range(length):
                    arc = path_V[step]
                    left = residual_A[arc] - pushed if pushed < _WHOLE * residual_A[arc] else 0.0
                    residual_A[arc] = left
                    residual_A[arc ^ 1] += pushed
                    if left == 0.0 and full == length:
                        full = step
                    room = min(room, left)
                    room_V[step + 1] = room
                value += pushed
                if pushed == np.inf:
                    break
                # Go on from where the path is full.
                length = full
                vertex = head_A[path_V[length] ^ 1]
            arc = current_arc_V[vertex]
            while arc >= 0 and not (residual_A[arc] > 0.0 and distance_V[head_A[arc]] + 1 == distance_V[vertex]):
                arc = next_arc_A[arc]
            current_arc_V[vertex] = arc
            if arc >= 0:
                path_V[length] = arc
                length += 1
                room_V[length] = min(room_V[length - 1], residual_A[arc])
                vertex = head_A[arc]
            elif vertex == source:
                break
            else:
                # A dead end: no path of this phase enters it again.
                distance_V[vertex] = num_vertices
                length -= 1
                vertex = head_A[path_V[length] ^ 1]
    for edge in range(len(flows_E)):
        # Rounding may have added a little too much.
        flows_E[edge] = min(residual_A[2 * edge + 1], max(capacities_E[edge], 0.0))
    return value
