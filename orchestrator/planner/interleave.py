"""Interleaved plans: the nodes of a chain, each with several chunks of layers, where that is the faster.

PURE. With V chunks a node the pipeline fills in 1/V of the time, and every microbatch crosses V times as many links;
so it pays among nodes near to one another, where a step has few microbatches. A plan is made on the nodes of the best
chain, in their order: its layers are dealt to the chunks, then moved while the step gets shorter as it plays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, islice, pairwise

from actors.errors import ConfigError, PlanError
from actors.interleaved import ChunkAction, node_actions, play_chunks
from actors.schedule import Op
from actors.spec import Alternative, Plan, StagePlan
from orchestrator.planner.assemble import Option, link_plan
from orchestrator.planner.choices import PlanConfig, cores_are_shared, noise_of
from orchestrator.planner.codecs import loss_share
from orchestrator.planner.evaluate import LinkUse, compute_s
from orchestrator.planner.link_codecs import with_codecs
from orchestrator.planner.played import pipeline_times
from orchestrator.planner.problem import Placement, Problem, even_sizes

# So many chunks a node are tried where none are asked for.
_MOST_CHUNKS = 4
# Of more nodes than this, delays want as much in flight as links need, which an order of its own has not.
_MOST_NODES = 16
# So many actions are played to move layers: a fifth of a second; an order of more is not played at all.
_POLISHING_ACTIONS, _MOST_ACTIONS = 100_000, 200_000
_ROUNDING = 1e-9


def with_chunks(plan: Plan, option: Option, config: PlanConfig, before: Plan | None = None) -> Plan:
    """Return the interleaved plan where it is asked for, or faster by more than noise; else the plan, as it is.

    `option` is what the plan was made of. The chunks that were run `before` stay, unless another plan is better by
    noise. PlanError where interleaving is asked for and nothing fits.
    """
    is_asked_for = config.schedule == "interleaved"
    is_chain = len(option.placement.used) == option.placement.num_stages
    may_be_chosen = config.schedule is None and config.split is None and config.objective == "throughput"
    # Where nodes share cores, what one does not use the others do.
    may_be_chosen &= is_chain and not cores_are_shared(option.fleet)
    # Codecs that are set for single links are meant for those of a chain.
    may_be_chosen &= not option.wire.links
    if not is_asked_for and not may_be_chosen:
        return plan
    num_layers = option.problem.num_layers
    if config.split is not None and sum(config.split) != num_layers:
        raise ConfigError(
            f"plan.split has {sum(config.split)} layers, the model {num_layers}",
            f"make plan.split sum to {num_layers}",
        )
    found = list(_candidates(option, config, before))
    if not found:
        if not is_asked_for:
            return plan
        raise _refusal(option, config)
    fastest = min(found, key=lambda chunks: chunks.step_s)
    step_tokens = option.work.batch.step_tokens
    max_step_s = config.max_step_s(step_tokens)
    if is_asked_for and fastest.step_s > max_step_s:
        raise PlanError(
            f"no interleaved plan keeps to plan.min_tokens_per_s={config.min_tokens_per_s:g}",
            f"the best on {option.placement.num_stages} nodes takes {fastest.step_s:.2f} s a step "
            f"({step_tokens / fastest.step_s:,.0f} tokens/s): set less, more plan.stages, or leave out plan.schedule",
        )
    found = [chunks for chunks in found if chunks.step_s <= max_step_s]
    best_s = fastest.step_s if is_asked_for else min(fastest.step_s, plan.step_s)
    noise = noise_of(option.fleet, config)
    # What was run before comes first, then fewer chunks.
    for chunks in found:
        is_kept = before is not None and _is_of(before, chunks)
        is_free = is_kept or is_asked_for or chunks.step_s <= (1 - noise) * plan.step_s
        if is_free and chunks.step_s * (1 - noise) <= best_s:
            return _plan_of(chunks, plan)
    return plan


def _refusal(option: Option, config: PlanConfig) -> PlanError:
    """Return why there is no interleaved plan at all."""
    num_nodes, num_chunks = option.placement.num_stages, config.chunks or 2
    if num_nodes < 2:
        why, remedy = "the best chain has one node", "set plan.stages to 2 or more nodes"
    elif num_nodes > _MOST_NODES:
        why, remedy = f"the best chain has {num_nodes} nodes", f"set plan.stages to {_MOST_NODES} nodes or fewer"
    elif num_nodes * num_chunks > option.problem.num_layers:
        why = f"{option.problem.num_layers} layers are too few for {num_chunks} stages on each of {num_nodes} nodes"
        remedy = "set fewer plan.chunks, or fewer nodes by plan.stages"
    elif _num_actions(option, num_chunks) > _MOST_ACTIONS:
        why = f"{option.problem.num_microbatches} microbatches make orders too long to be played"
        remedy = "set a larger batch.microbatch_size"
    else:
        why = f"{num_chunks} stages on each of {num_nodes} nodes do not fit their memory"
        remedy = "set a smaller batch.microbatch_size, train.activation_checkpointing=true, or more nodes"
    return PlanError(f"no interleaved plan: {why}", f"{remedy}, or leave out plan.schedule")


def _num_actions(option: Option, num_chunks: int) -> int:
    return 2 * option.placement.num_stages * num_chunks * option.problem.num_microbatches


def _candidates(option: Option, config: PlanConfig, before: Plan | None) -> Iterator[_Chunks]:
    """Yield what fits: what was run before, then fewer chunks before more."""
    num_nodes, num_layers = option.placement.num_stages, option.problem.num_layers
    if config.split is not None:
        assert config.chunks is not None, "required with it"
        fixed = _chunks(option, config, option.placement.nodes, config.split)
        if fixed.short_bytes <= 0:
            yield fixed
        return
    if before is not None and _may_be_kept(before, config):
        kept = _kept(option, config, before)
        if kept is not None and kept.short_bytes <= 0:
            yield kept
    if not 2 <= num_nodes <= _MOST_NODES:
        return
    chooses_codecs = config.quality_budget is not None or bool(option.wire.thin)
    for num_chunks in (config.chunks,) if config.chunks else range(2, _MOST_CHUNKS + 1):
        num_actions = _num_actions(option, num_chunks)
        if num_nodes * num_chunks > num_layers or num_actions > _MOST_ACTIONS:
            return
        # For each link every codec that it might have is played.
        if chooses_codecs and num_actions * num_nodes * num_chunks > _POLISHING_ACTIONS:
            return
        best = _moved(_chunks(option, config, option.placement.nodes, _dealt(option.placement, num_chunks)))
        if best.short_bytes <= 0:
            yield best


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunks:
    """An option whose placement has each node several times, with the orders of its nodes."""

    option: Option
    # Of each node: they depend on no cut, and every cut that is tried has the same.
    orders: tuple[tuple[ChunkAction, ...], ...]

    @property
    def num_nodes(self) -> int:
        return len(self.orders)

    @property
    def placement(self) -> Placement:
        return self.option.placement

    @property
    def num_chunks(self) -> int:
        return self.placement.num_stages // self.num_nodes

    @cached_property
    def played_s(self) -> float:
        """The seconds of a step's actions."""
        return play_chunks(self.orders, pipeline_times(self.option.problem, self.placement)).step_s

    @property
    def commit_s(self) -> float:
        problem, nodes = self.option.problem, self.placement.used
        places = problem.place_N[list(nodes)]
        return 2 * float(problem.delay_s_PP[places[0], places].max())

    @property
    def step_s(self) -> float:
        """The seconds of a step, ways that links share included, which are not played."""
        return max(self.played_s, self._shared_s) + self.commit_s

    @property
    def _shared_s(self) -> float:
        """How long nodes' own ways out and in, and what regions share, are busy in a step at least."""
        placement, nodes = self.placement, [node for (node,) in self.placement.nodes]
        use = LinkUse(self.option.problem, placement, down=True, up=True)
        own_s = [
            max(map(sum, zip(*(use.ways_s(stage, nodes[stage]) for stage in stages), strict=True)))
            for stages in (range(seat, len(nodes), self.num_nodes) for seat in range(self.num_nodes))
        ]
        pair_s = use.shared_s([(stage, a, b, 1.0) for stage, (a, b) in enumerate(pairwise(nodes))])
        return self.option.problem.num_microbatches * max(*own_s, pair_s)

    @cached_property
    def memory_S(self) -> tuple[float, ...]:
        """What each stage takes at its node's peak; a node's stages add up to it."""
        return tuple(self._memory(stage) for stage in range(self.placement.num_stages))

    @cached_property
    def short_bytes(self) -> float:
        """By how much the worst node is short of memory; 0 or less where all fit."""
        problem, nodes = self.option.problem, [node for (node,) in self.placement.nodes[: self.num_nodes]]
        used = [sum(self.memory_S[first :: self.num_nodes]) for first in range(self.num_nodes)]
        return max(own - float(problem.memory_bytes_N[node]) for own, node in zip(used, nodes, strict=True))

    @cached_property
    def in_flight_S(self) -> tuple[int, ...]:
        """How many microbatches each stage keeps in flight at most."""
        most = [0] * self.placement.num_stages
        for node, order in enumerate(self.orders):
            for held in _held(order, self.num_chunks):
                for chunk, count in enumerate(held):
                    stage = chunk * self.num_nodes + node
                    most[stage] = max(most[stage], count)
        return tuple(most)

    def _memory(self, stage: int) -> float:
        problem, placement, last = self.option.problem, self.placement, self.placement.num_stages - 1
        (node,), (start, stop) = placement.nodes[stage], placement.bounds[stage : stage + 2]
        # Each stage has frames of its own.
        total = (stop - start) * problem.layer_state_bytes + problem.fixed_bytes_N[node]
        total += problem.first_state_bytes * (stage == 0)
        total += (problem.last_state_bytes + problem.last_bytes) * (stage == last)
        seat = stage % self.num_nodes
        return float(total + self._peak_held(seat)[stage // self.num_nodes] * self._flight_bytes(stage))

    def _peak_held(self, seat: int) -> tuple[int, ...]:
        """Return how many microbatches each chunk of a node holds when the node holds most."""
        stages = range(seat, self.placement.num_stages, self.num_nodes)
        sizes = [self._flight_bytes(stage) for stage in stages]
        return max(
            _held(self.orders[seat], self.num_chunks),
            key=lambda held: sum(count * size for count, size in zip(held, sizes, strict=True)),
        )

    def _flight_bytes(self, stage: int) -> float:
        """Return what a microbatch in flight keeps at a stage."""
        problem, placement = self.option.problem, self.placement
        (node,), (start, stop) = placement.nodes[stage], placement.bounds[stage : stage + 2]
        saved = (stop - start) * problem.layer_saved_bytes_N[node] + problem.flight_bytes_N[node]
        return float(saved + problem.last_saved_bytes * (stage == placement.num_stages - 1))


def _held(order: Sequence[ChunkAction], num_chunks: int) -> Iterator[tuple[int, ...]]:
    """Yield, after each forward, how many microbatches a node holds of each of its chunks."""
    held = [0] * num_chunks
    for action in order:
        held[action.chunk] += 1 if action.op is Op.FORWARD else -1
        if action.op is Op.FORWARD:
            yield tuple(held)


def _chunks(option: Option, config: PlanConfig, nodes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> _Chunks:
    """Return stages of these sizes dealt to the nodes in turn, each link with codecs of its own."""
    num_nodes, num_chunks = len(nodes), len(sizes) // len(nodes)
    placement = Placement(bounds=(0, *accumulate(sizes)), nodes=tuple(nodes) * num_chunks)
    num_microbatches = option.problem.num_microbatches
    orders = tuple(node_actions(node, num_nodes, num_chunks, num_microbatches) for node in range(num_nodes))
    pairs = tuple(option.wire.codecs_of(stage) for stage in range(len(sizes) - 1))
    draft = replace(option, placement=placement, pairs=pairs)

    def step_s(problem: Problem) -> float:
        return _Chunks(option=replace(draft, problem=problem), orders=orders).step_s

    return _Chunks(option=with_codecs(draft, config, step_s), orders=orders)


def _dealt(placement: Placement, num_chunks: int) -> list[int]:
    """Return the layers of each stage where nodes keep theirs, in chunks; an even cut where one has too few."""
    own = [stop - start for start, stop in pairwise(placement.bounds)]
    if min(own) < num_chunks:
        return list(even_sizes(sum(own), len(own) * num_chunks))
    # The last stage has the head besides: rests go to earlier chunks.
    return list(chain.from_iterable(zip(*(even_sizes(layers, num_chunks) for layers in own), strict=True)))


def _moved(chunks: _Chunks) -> _Chunks:
    """Return it after the moves of a layer that shorten its step, until none does, or enough were looked at."""
    num_actions = sum(map(len, chunks.orders))
    left = _POLISHING_ACTIONS // num_actions
    while left > 0:
        around = list(islice(_neighbours(chunks), left))
        left -= len(around)
        fitting = [near for near in around if near.short_bytes <= max(0.0, chunks.short_bytes)]
        best = min(fitting, key=lambda near: (max(0.0, near.short_bytes), near.step_s), default=chunks)
        is_roomier = best.short_bytes < chunks.short_bytes and chunks.short_bytes > 0
        if not is_roomier and best.step_s >= chunks.step_s * (1 - _ROUNDING):
            break
        chunks = best
    return chunks


def _neighbours(chunks: _Chunks) -> Iterator[_Chunks]:
    """Yield the same with a layer moved to another stage, near ones first."""
    sizes = [stop - start for start, stop in pairwise(chunks.placement.bounds)]
    for apart in range(1, len(sizes)):
        for one in range(len(sizes) - apart):
            for source, target in ((one, one + apart), (one + apart, one)):
                if sizes[source] > 1:
                    moved = [size + (stage == target) - (stage == source) for stage, size in enumerate(sizes)]
                    placement = replace(chunks.placement, bounds=(0, *accumulate(moved)))
                    yield replace(chunks, option=replace(chunks.option, placement=placement))


def _kept(option: Option, config: PlanConfig, before: Plan) -> _Chunks | None:
    """Return the chunks that were run before, on the same nodes; None where one is gone, or the model another."""
    index = {card.node: number for number, card in enumerate(option.fleet.nodes)}
    names = [stage.node for stage in before.stages]
    bounds = _bounds(before)
    is_whole = len(names) % before.num_nodes == 0 and names == names[: before.num_nodes] * (
        len(names) // before.num_nodes
    )
    is_cut = all(start < stop for start, stop in pairwise(bounds)) and bounds[-1] == option.problem.num_layers
    if not is_whole or not is_cut or any(name not in index for name in names):
        return None
    sizes = [stop - start for start, stop in pairwise(bounds)]
    return _chunks(option, config, [(index[name],) for name in names[: before.num_nodes]], sizes)


def _may_be_kept(before: Plan, config: PlanConfig) -> bool:
    """Return whether a plan is interleaved, and nothing is set that it was not found under or might not keep to."""
    num_nodes = before.num_nodes
    if num_nodes == len(before.stages) or config.pins or config.after or config.max_dollars_per_hour is not None:
        return False
    is_asked = config.chunks in (None, len(before.stages) // num_nodes)
    return is_asked and config.stages in (None, num_nodes)


def _is_of(plan: Plan, chunks: _Chunks) -> bool:
    return plan.num_nodes == chunks.num_nodes and _bounds(plan) == chunks.placement.bounds


def _bounds(plan: Plan) -> tuple[int, ...]:
    return (0, *(stage.layer_stop for stage in plan.stages))


def _plan_of(chunks: _Chunks, chain: Plan) -> Plan:
    """Return the plan that these chunks make; the chain that it was made from is its alternative."""
    option, placement, problem = chunks.option, chunks.placement, chunks.option.problem
    nodes = [option.fleet.nodes[node] for (node,) in placement.nodes]
    spans = list(pairwise(placement.bounds))
    compute_s_S = [compute_s(problem, node, *span) for (node,), span in zip(placement.nodes, spans, strict=True)]
    busy_s = [sum(compute_s_S[seat :: chunks.num_nodes]) for seat in range(chunks.num_nodes)]
    slowest = max(range(chunks.num_nodes), key=lambda seat: busy_s[seat])
    stages = tuple(
        StagePlan(
            stage=stage,
            node=nodes[stage].node,
            layer_start=start,
            layer_stop=stop,
            memory_bytes=int(chunks.memory_S[stage]),
            memory_limit_bytes=int(problem.memory_bytes_N[placement.nodes[stage][0]]),
            compute_s=compute_s_S[stage],
            shares=(problem.num_microbatches,),
            in_flight=chunks.in_flight_S[stage],
            why=f"chunk {stage // chunks.num_nodes + 1} of {chunks.num_chunks} of its node",
        )
        for stage, (start, stop) in enumerate(spans)
    )
    tokens_per_s = option.work.batch.step_tokens / chunks.step_s
    dollars_per_hour = float(sum(problem.price_N[node] for (node,) in placement.nodes[: chunks.num_nodes]))
    lost = loss_share(option.pairs)
    names = ", ".join(map(str, range(slowest, placement.num_stages, chunks.num_nodes)))
    one_each = Alternative(
        name="one stage a node",
        step_s=chain.step_s,
        tokens_per_s=chain.tokens_per_s,
        dollars_per_mtoken=chain.dollars_per_mtoken,
    )
    return replace(
        chain,
        stages=stages,
        links=tuple(link_plan(option, stage) for stage in range(placement.num_stages - 1)),
        schedule="interleaved",
        step_s=chunks.step_s,
        tokens_per_s=tokens_per_s,
        dollars_per_hour=dollars_per_hour,
        dollars_per_mtoken=dollars_per_hour / 3600 / tokens_per_s * 1e6,
        binds=f"stages {names} ({nodes[slowest].node})",
        loss_share=chain.loss_share if lost is None else lost,
        fill_s=chunks.played_s - problem.num_microbatches * busy_s[slowest],
        sync_s=0.0,
        commit_s=chunks.commit_s,
        alternatives=(one_each, *chain.alternatives),
    )
