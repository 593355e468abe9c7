"""The linear programme behind the certified bound: what any placement's flow keeps to, whatever its stages.

A placement that `evaluate` gives a rate of T microbatches a second sends a flow of T through its stages. Let x_n be
the flow through node n, which holds the layers [a_n, b_n). Summed over the nodes n of a class c, and over the stages:

    w_c = sum x_n (b_n - a_n)     layers a second        first_c, last_c = sum x_n over nodes that hold layer 0, L - 1
    v_c = sum x_n                 visits a second        f_pq = flow from nodes in place p to nodes in place q

satisfy every row below, so the largest T of the programme is at least that of the best placement:

    compute   w_c + first_c * (layers an end is worth) + last_c * (...) <= the class's layers a second: x_n times the
              node's seconds a microbatch is 1 at most; divided by its seconds a layer and summed
    cover     every layer is done T times a second: sum w = L T, sum first = sum last = T
    memory    a node holds K layers at most, each at T at most: w_c <= min(nodes * K, L) T, and w_c <= K v_c;
              one that cannot hold all layers is not both first and last: first_c + last_c <= v_c
    visit     who holds a layer is visited: first_c, last_c <= v_c <= w_c, and first_c + last_c <= w_c where L > 1
    own       a visit sends and takes its frames over the node's own way: by the class's sum of rates
    peers     a node has R peers a side at most (R = max_replicas), each at the rate of one pair of nodes
    place     in + first = out + last for each place, with what goes between two nodes of one place counted in both
    coverage  what a place does at its busiest layer came in, or started there, and goes out, or ends there; where its
              nodes together cannot hold all layers, there is a layer it does not have, on one side of which all must
              come or go over links. The busiest layer has at least w_p / min(sum of K, L)
    link      f_pq <= pairs of nodes (R peers each) * the rate of one; all flows of a pair of places keep to its share
    budget    dollars an hour of the part of each node that is used; nodes used <= R * stages

Not in it: whole layers and nodes, what windows of microbatches in flight and sync cost. Nodes of one class may differ
in speed: sums are exact, other figures are the best of the class (orchestrator.planner.classes).

The solver's duals prove the bound whatever its tolerances: by weak duality any multipliers of the right sign give one
(Neumaier and Shcherbina 2004), and the columns are bounded by the sums of what nodes can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from orchestrator.planner.classes import Classes, Counts, Floats, Phase, classify
from orchestrator.planner.objective import Limits
from orchestrator.planner.problem import Problem

# With more places than this, what goes between each two of them is summed by place.
_MOST_PLACES = 200
# With more places than this, a node's peers are not looked at.
_MOST_PEERS = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowProgram:
    """Maximise column 0 over rows lower_R <= A x <= upper_R and columns 0 <= x <= most_J; A by rows.

    `key` is what must agree for two programmes to differ in numbers alone. Rows have a kind and what they are of;
    `rate_scale` is what a column's 1 stands for, in microbatches a second.
    """

    key: tuple[object, ...]
    rate_scale: float
    start_R: Counts
    columns_E: Counts
    values_E: Floats
    lower_R: Floats
    upper_R: Floats
    most_J: Floats
    kind_R: tuple[str, ...]
    places_R: tuple[tuple[int, ...], ...]
    nodes_R: tuple[int, ...]
    # Columns that stand for the links between two places, and which.
    first_link: int
    links: tuple[tuple[int, int], ...]


# Row in its block, column, value.
_Term: TypeAlias = tuple[Counts, Counts, Floats | float]


class _Rows:
    """Rows of a programme, as they are added: blocks of equally many entries a row."""

    def __init__(self) -> None:
        self.entries: list[tuple[Counts, Counts, Floats]] = []
        self.lower: list[Floats] = []
        self.upper: list[Floats] = []
        self.kinds: list[str] = []
        self.places: list[tuple[int, ...]] = []
        self.nodes: list[int] = []

    def add(
        self,
        kind: str,
        terms: Sequence[_Term],
        upper: Floats | float,
        places: list[tuple[int, ...]],
        nodes: list[int],
        *,
        equal: bool = False,
    ) -> None:
        """Add len(places) rows; a term is (row in this block, column, value)."""
        base, count = len(self.kinds), len(places)
        for row, column, value in terms:
            self.entries.append((row + base, column, np.broadcast_to(np.asarray(value, np.float64), row.shape)))
        high = np.broadcast_to(np.asarray(upper, np.float64), (count,))
        self.upper.append(high)
        self.lower.append(high if equal else np.full(count, -np.inf))
        self.kinds += [kind] * count
        self.places += places
        self.nodes += nodes


def flow_program(problem: Problem, limits: Limits, phase: Phase) -> FlowProgram | None:
    """Return the programme of a problem in one phase, or None where no node can hold a layer."""
    places = _Places(problem, limits, phase)
    classes = classify(problem, limits, phase, places.peers)
    total_speed = float(classes.speed_C.sum())
    if total_speed <= 0 or not classes.first_C.any() or not classes.last_C.any():
        return None
    size = problem.num_layers
    scale = total_speed / size
    num_classes, num_places = len(classes.keys), problem.num_places
    c, p = np.arange(num_classes), np.arange(num_places)
    zero = np.zeros(num_classes, np.int64)
    w, first, last, visit = (1 + block * num_classes + c for block in range(4))
    inside = 1 + 4 * num_classes + p
    source, target = places.links
    link = inside[-1] + 1 + np.arange(len(source))
    own = [(int(place),) for place in classes.place_C]
    count = [int(nodes) for nodes in classes.nodes_C]
    rows = _Rows()
    ends = [(c, first, classes.first_layers_C), (c, last, classes.last_layers_C)]
    rows.add("compute", [(c, w, 1.0), *ends], classes.speed_C / scale, own, count)
    rows.add("cover", [(zero, w, 1.0), (zero[:1], zero[:1], -float(size))], 0.0, [()], [0], equal=True)
    for end in (first, last):
        rows.add("cover", [(zero, end, 1.0), (zero[:1], zero[:1], -1.0)], 0.0, [()], [0], equal=True)
    held = np.minimum(classes.nodes_C * classes.layers_C, size).astype(np.float64)
    rows.add("memory", [(c, w, 1.0), (c, zero, -held)], 0.0, own, count)
    rows.add("memory", [(c, w, 1.0), (c, visit, -classes.layers_C.astype(np.float64))], 0.0, own, count)
    not_both = np.where(classes.layers_C < size, 0.0, np.inf)
    rows.add("visit", [(c, first, 1.0), (c, last, 1.0), (c, visit, -1.0)], not_both, own, count)
    for end in (first, last):
        rows.add("visit", [(c, end, 1.0), (c, visit, -1.0)], 0.0, own, count)
    rows.add("visit", [(c, visit, 1.0), (c, w, -1.0)], 0.0, own, count)
    if size > 1:
        rows.add("visit", [(c, first, 1.0), (c, last, 1.0), (c, w, -1.0)], 0.0, own, count)
    down, up = phase.down_bytes(problem), phase.up_bytes(problem)
    for kind, after, before, rate_C in (
        ("uplink", down, up, classes.uplink_C),
        ("downlink", up, down, classes.downlink_C),
    ):
        # In frames of both ways, so that the numbers are near 1.
        frame = max(down + up, 1.0)
        terms = [(c, visit, (after + before) / frame), (c, last, -after / frame), (c, first, -before / frame)]
        rows.add(kind, terms, rate_C / frame / scale, own, count)
    rows.add("peers", [(c, visit, 1.0), (c, last, -1.0)], classes.out_C / scale, own, count)
    rows.add("peers", [(c, visit, 1.0), (c, first, -1.0)], classes.in_C / scale, own, count)
    _add_places(rows, problem, classes, (w, first, last, visit), inside, (source, target, link))
    if places.summed:
        rows.add("place", [(0 * link, link, np.where(source >= 0, 1.0, -1.0))], 0.0, [()], [0], equal=True)
    places.add_shared(rows, problem, inside, link, scale, (down, up))
    # The part of a node's time that is used, at the best dollars and nodes of its class for what it does.
    used = [(zero, w, np.ones(num_classes)), *((zero, end, worth) for _, end, worth in ends)]
    dollars = [(row, column, value * classes.dollars_C * scale) for row, column, value in used]
    rows.add("budget", dollars, limits.max_dollars_per_hour, [()], [0])
    shares = [(row, column, value * classes.share_C * scale) for row, column, value in used]
    rows.add("nodes", shares, float(limits.max_replicas) * (limits.num_stages or size), [()], [0])
    # Wide enough not to bind where a row says as much.
    speed = 2 * classes.speed_C / scale
    most = [
        np.full(1, 2.0),
        speed,
        speed * classes.first_C,
        speed * classes.last_C,
        speed,
        np.minimum(places.inside_most / scale, 2.0 * size),
        np.minimum(places.link_most / scale, 2.0 * size),
    ]
    return _sealed(rows, (classes.keys, num_places, len(source)), scale, most, (int(inside[0]), places.named))


class _Places:
    """Links between places as columns: one for each ordered pair, or, where there are many, one in and one out each."""

    def __init__(self, problem: Problem, limits: Limits, phase: Phase) -> None:
        count_P = np.bincount(problem.place_N, minlength=problem.num_places).astype(np.float64)
        self.num_places = len(count_P)
        replicas = float(limits.max_replicas)
        down, up = phase.down_bytes(problem), phase.up_bytes(problem)
        seconds = np.maximum(down * problem.byte_s_PP, up * problem.byte_s_PP.T)
        with np.errstate(divide="ignore"):
            rate_PP = 1 / seconds
        # A node's peers: R of the best places.
        peers = np.full((2, problem.num_nodes), np.inf)
        if self.num_places <= _MOST_PEERS:
            for side, rates in enumerate((rate_PP, rate_PP.T)):
                best = np.argsort(-rates, axis=1, kind="stable")
                numbers = count_P[best] - (best == np.arange(self.num_places)[:, None])
                taken = np.diff(np.minimum(np.cumsum(numbers, axis=1), replicas), axis=1, prepend=0.0)
                with np.errstate(invalid="ignore"):
                    sums = np.where(taken > 0, taken * np.take_along_axis(rates, best, 1), 0.0).sum(axis=1)
                peers[side] = sums[problem.place_N]
        self.peers = (peers[0], peers[1])
        pairs = np.minimum(
            count_P[:, None] * np.minimum(replicas, count_P), count_P * np.minimum(replicas, count_P[:, None])
        )
        with np.errstate(invalid="ignore"):
            most_PP = np.where(pairs > 0, pairs * rate_PP, 0.0)
            alone = count_P * np.minimum((count_P - 1) / 2, replicas)
            self.inside_most = np.where(alone > 0, alone * np.diag(rate_PP), 0.0)
        np.fill_diagonal(most_PP, 0.0)
        self.summed = self.num_places > _MOST_PLACES
        if self.summed:
            p = np.arange(self.num_places)
            # -1 stands for any other place.
            self.links = np.concatenate([p, 0 * p - 1]), np.concatenate([0 * p - 1, p])
            self.link_most = np.concatenate([most_PP.sum(axis=1), most_PP.sum(axis=0)])
        else:
            self.links = np.nonzero(~np.eye(self.num_places, dtype=np.bool_))
            self.link_most = most_PP[self.links]
        ends = [
            *((place, place) for place in range(self.num_places)),
            *zip(*map(np.ndarray.tolist, self.links), strict=True),
        ]
        self.named = tuple(ends)

    def add_shared(
        self, rows: _Rows, problem: Problem, inside: Counts, link: Counts, scale: float, frames: tuple[float, float]
    ) -> None:
        """Add what all flows from one place to another keep to: frames forward one way, frames back the other way."""
        down, up = frames
        if self.summed or down + up == 0:
            return
        column_PP = np.empty((self.num_places, self.num_places), np.int64)
        np.fill_diagonal(column_PP, inside)
        column_PP[self.links] = link
        bound = np.isfinite(problem.shared_bytes_per_s_PP)
        p, q = np.nonzero(bound)
        row = np.arange(len(p))
        capacity = problem.shared_bytes_per_s_PP[p, q] / scale / (down + up)
        terms: list[_Term] = [
            (row, column_PP[p, q], down / (down + up)),
            (row, column_PP[q, p], up / (down + up)),
        ]
        rows.add("link", terms, capacity, list(zip(p.tolist(), q.tolist(), strict=True)), [0] * len(p))


def _add_places(
    rows: _Rows,
    problem: Problem,
    classes: Classes,
    columns: tuple[Counts, Counts, Counts, Counts],
    inside: Counts,
    links: tuple[Counts, Counts, Counts],
) -> None:
    """Add each place's balance, and what it must take in and give out for what it does."""
    w, first, last, visit = columns
    place_C, num_places = classes.place_C, problem.num_places
    source, target, link = links
    p = np.arange(num_places)
    coming, going = target >= 0, source >= 0
    ins, outs = (target[coming], link[coming]), (source[going], link[going])
    names: list[tuple[int, ...]] = [(place,) for place in range(num_places)]
    counts = np.bincount(problem.place_N, minlength=num_places).tolist()
    for end, crossing in ((first, ins), (last, outs)):
        terms = [(place_C, visit, 1.0), (place_C, end, -1.0), (*crossing, -1.0), (p, inside, -1.0)]
        rows.add("place", terms, 0.0, names, counts, equal=True)
    size = problem.num_layers
    held_P = np.bincount(place_C, weights=classes.nodes_C * classes.layers_C, minlength=num_places)
    most_P = np.maximum(np.minimum(held_P, size), 1.0)
    for end, crossing in ((first, ins), (last, outs)):
        each = 1 / most_P
        terms = [(place_C, w, each[place_C]), (place_C, end, -1.0), (*crossing, -1.0)]
        rows.add("coverage", terms, 0.0, names, counts)
    both = [(place_C, w, (1 / most_P)[place_C]), (*ins, -1.0), (*outs, -1.0)]
    rows.add("coverage", both, np.where(held_P < size, 0.0, np.inf), names, counts)


def _sealed(
    rows: _Rows,
    key: tuple[object, ...],
    scale: float,
    most: list[Floats],
    links: tuple[int, tuple[tuple[int, int], ...]],
) -> FlowProgram:
    row = np.concatenate([entry[0] for entry in rows.entries])
    column = np.concatenate([entry[1] for entry in rows.entries])
    value = np.concatenate([entry[2] for entry in rows.entries])
    # A link of a place with itself is named twice in the row of its share: such entries add up.
    most_J = np.concatenate(most)
    cells, cell_of = np.unique(row * len(most_J) + column, return_inverse=True)
    value = np.bincount(cell_of.reshape(-1), weights=value).astype(np.float64)
    start = np.searchsorted(cells // len(most_J), np.arange(len(rows.kinds) + 1))
    return FlowProgram(
        key=(*key, len(cells), len(rows.kinds)),
        rate_scale=scale,
        start_R=start,
        columns_E=cells % len(most_J),
        values_E=value,
        lower_R=np.concatenate(rows.lower),
        upper_R=np.concatenate(rows.upper),
        most_J=most_J,
        kind_R=tuple(rows.kinds),
        places_R=tuple(rows.places),
        nodes_R=tuple(rows.nodes),
        first_link=links[0],
        links=links[1],
    )
