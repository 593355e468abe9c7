"""What the planner may choose and what it must keep to, as a user sets it, and as limits on one fleet.

PURE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from actors.errors import ConfigError, PlanError
from actors.fleet_spec import Fleet
from actors.settings import BatchSpec
from actors.spec import ScheduleName
from orchestrator.planner.objective import Limits, Objective

# The schedules that a plan is chosen from: where they are foreseen to be equally fast, the first. bdp goes before 1f1b,
# for with more in flight it stands a link's unrest, which no plan foresees; and it is as fast as GPipe with less.
CHOSEN_SCHEDULES: tuple[ScheduleName, ...] = ("bdp", "1f1b", "bdp-split", "zb-h1")

# Plans for described fleets that are nearer to each other than this are as good, and the plainest is taken.
_TIE = 1e-3


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What the planner may choose, and what is fixed."""

    # What is wanted: the fastest step (throughput), the most tokens for a dollar (dollars), or the lowest price an hour
    # at which plan.min_tokens_per_s is reached (cheapest).
    objective: Objective = "throughput"
    min_tokens_per_s: float | None = None
    max_dollars_per_hour: float | None = None
    # How many stages, of interleaved how many nodes; None: as many as serve best.
    stages: int | None = None
    # Layers of each stage, in order; None: the planner's choice.
    split: tuple[int, ...] | None = None
    # gpipe, 1f1b, zb-h1, bdp, bdp-split or interleaved; None: the fastest, but these are not tried: gpipe; zb-h1,
    # bdp-split and interleaved where nodes share cores; zb-h1 and interleaved on more than 16 nodes.
    schedule: ScheduleName | None = None
    # Of interleaved: how many stages each node holds, 2 or more; None: as many as serve best.
    chunks: int | None = None
    # Microbatch sizes to choose from, with as many sequences a step as batch says; None: batch's own.
    microbatch_sizes: tuple[int, ...] | None = None
    # By how much the held-out loss may rise for smaller codecs, as a share (0.01: one percent): the planner then picks
    # each link's, the mildest that does not lengthen the step by more than plan.noise. None: what wire says.
    quality_budget: float | None = None
    # Only nodes of these regions; None: all.
    regions: tuple[str, ...] | None = None
    # Where nodes must be, by name: "first", "last" or a stage's number. A node that is not needed may stay unused.
    pins: dict[str, str] = field(default_factory=dict[str, str])
    # The node of each key has a later stage than the node that it names.
    after: dict[str, str] = field(default_factory=dict[str, str])
    # Nodes that may share a stage (planned and simulated; stages run on one node each today), each layer on at least
    # `copies` nodes in at least `domains` hosts.
    max_replicas: int = 1
    copies: int = 1
    domains: int = 1
    # A plan must be better by this share to take the place of a plainer one (an even split, `bdp`, batch's own size of
    # a microbatch), so that the probe's noise does not move layers about. Not applied to fleets that are estimated.
    noise: float = 0.05
    # Placements that the search may look at, for each schedule, microbatch size and set of codecs; and its seed.
    evaluations: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise ConfigError(f"plan.stages is {self.stages}", "set plan.stages to 1 or more")
        if self.split is not None and (not self.split or min(self.split) < 1):
            raise ConfigError(f"plan.split is {list(self.split)}", "give each stage 1 layer or more")
        if self.split is not None and self.stages not in (None, len(self.split)):
            raise ConfigError(
                f"plan.split has {len(self.split)} stages, plan.stages is {self.stages}", "set only one of them"
            )
        if self.microbatch_sizes is not None and (not self.microbatch_sizes or min(self.microbatch_sizes) < 1):
            raise ConfigError(
                f"plan.microbatch_sizes is {list(self.microbatch_sizes)}", "name sizes of 1 sequence or more"
            )
        self._require_chunks()
        for key in ("min_tokens_per_s", "max_dollars_per_hour", "quality_budget"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"plan.{key} is {value}", f"set plan.{key} to 0 or more, or leave it out")
        if (self.objective == "cheapest") != (self.min_tokens_per_s is not None):
            raise ConfigError(
                f"plan.objective={self.objective} and plan.min_tokens_per_s={self.min_tokens_per_s} contradict",
                "plan.objective=cheapest needs plan.min_tokens_per_s, and no other objective takes it",
            )
        if not 1 <= self.domains <= self.copies <= self.max_replicas:
            raise ConfigError(
                f"plan.domains={self.domains}, plan.copies={self.copies}, plan.max_replicas={self.max_replicas} "
                "contradict",
                "set 1 <= plan.domains <= plan.copies <= plan.max_replicas",
            )
        if not 0 <= self.noise < 1:
            raise ConfigError(f"plan.noise is {self.noise}", "set plan.noise to 0 or more, below 1")
        if self.evaluations is not None and self.evaluations < 1:
            raise ConfigError(f"plan.evaluations is {self.evaluations}", "set plan.evaluations to 1 or more")
        _require_no_cycle(self.after)

    @property
    def searched(self) -> PlanConfig:
        """What placements are searched by: of interleaved, a chain of its nodes, which is cut into chunks later."""
        if self.schedule != "interleaved":
            return self
        num_nodes = len(self.split) // self.chunks if self.split is not None and self.chunks else self.stages
        return replace(self, schedule="1f1b", chunks=None, split=None, stages=num_nodes)

    def _require_chunks(self) -> None:
        if self.chunks is not None and (self.chunks < 2 or self.schedule != "interleaved"):
            raise ConfigError(
                f"plan.chunks is {self.chunks} and plan.schedule {self.schedule}",
                "set plan.chunks to 2 or more with plan.schedule=interleaved, or leave it out",
            )
        if self.schedule != "interleaved":
            return
        if self.split is not None and (not self.chunks or len(self.split) % self.chunks):
            raise ConfigError(
                f"plan.split has {len(self.split)} stages, and plan.chunks is {self.chunks}",
                "name the layers of each node's chunks in stage order: plan.chunks times as many as there are nodes",
            )
        if self.max_replicas > 1:
            raise ConfigError(
                f"plan.schedule=interleaved and plan.max_replicas={self.max_replicas} do not go together",
                "leave out one of them",
            )

    def max_step_s(self, step_tokens: int) -> float:
        """Return the longest step with which plan.min_tokens_per_s is reached; inf without one."""
        return step_tokens / self.min_tokens_per_s if self.min_tokens_per_s else math.inf

    def batches(self, batch: BatchSpec) -> tuple[BatchSpec, ...]:
        """Return the ways to cut a step's sequences into microbatches that may be chosen from, batch's own first."""
        if self.microbatch_sizes is None:
            return (batch,)
        sequences = batch.microbatch_size * batch.num_microbatches
        uneven = [size for size in self.microbatch_sizes if sequences % size]
        if uneven:
            raise ConfigError(
                f"plan.microbatch_sizes has {uneven[0]}, which does not divide a step's {sequences} sequences",
                "name divisors of batch.microbatch_size * batch.num_microbatches",
            )
        own_first = sorted(dict.fromkeys(self.microbatch_sizes), key=lambda size: size != batch.microbatch_size)
        return tuple(
            BatchSpec(seq_len=batch.seq_len, microbatch_size=size, num_microbatches=sequences // size)
            for size in own_first
        )


def allowed_fleet(fleet: Fleet, config: PlanConfig) -> Fleet:
    """Return the part of a fleet that may be used, its nodes region by region.

    So a chain in the fleet's order, the plainest there is, crosses from a region to the next once.
    """
    if config.regions is None:
        regions = list(dict.fromkeys(node.region for node in fleet.nodes))
        return fleet.part(tuple(sorted(fleet.nodes, key=lambda node: regions.index(node.region))))
    there = sorted({node.region for node in fleet.nodes})
    for region in config.regions:
        if region not in there:
            raise PlanError(f"no node is in region {region} of plan.regions", f"the fleet has {', '.join(there)}")
    named = dict.fromkeys(config.regions)
    return fleet.part(tuple(node for region in named for node in fleet.nodes if node.region == region))


def noise_of(fleet: Fleet, config: PlanConfig) -> float:
    """Return by which share a plan must be better than a plainer one: next to nothing where no probe made noise."""
    return min(config.noise, _TIE) if all(node.estimated for node in fleet.nodes) else config.noise


def cores_are_shared(fleet: Fleet) -> bool:
    """Return whether nodes without a GPU stand on one host, as in a demo on a laptop."""
    hosts = [node.host for node in fleet.nodes if node.boundary_bytes == 4]
    return len(set(hosts)) < len(hosts)


def limits_of(fleet: Fleet, config: PlanConfig, step_tokens: int) -> Limits:
    """Return the limits that a configuration sets on this fleet, nodes as indices; names what contradicts."""
    index = {node.node: number for number, node in enumerate(fleet.nodes)}
    num_stages = len(config.split) if config.split is not None else config.stages
    pins = tuple((_index(index, node, "pins"), _pinned(node, where, num_stages)) for node, where in config.pins.items())
    stages = [stage for _, stage in pins]
    if config.max_replicas == 1 and len(set(stages)) < len(stages):
        raise PlanError("plan.pins puts two nodes in one stage", "pin one node to each stage, or none")
    after = tuple((_index(index, a, "after"), _index(index, b, "after")) for a, b in config.after.items())
    stage_of = dict(pins)
    for a, b in after:
        if a in stage_of and b in stage_of and _order(stage_of[a]) <= _order(stage_of[b]):
            names = fleet.nodes[a].node, fleet.nodes[b].node
            raise PlanError(f"plan.after wants {names[0]} later than {names[1]}, plan.pins not", "drop one of them")
    if config.objective != "throughput" and not any(node.price_per_hour for node in fleet.nodes):
        raise PlanError(
            f"plan.objective={config.objective}, but no node has a price",
            "set fleet.price_per_hour, or the nodes' Ray label `price`, or prices in the fleet file",
        )
    limit = config.max_dollars_per_hour
    if limit is not None and all(node.price_per_hour > limit for node in fleet.nodes):
        cheapest = min(fleet.nodes, key=lambda node: node.price_per_hour)
        raise PlanError(
            f"plan.max_dollars_per_hour={limit:g} buys no node: the cheapest, {cheapest.node}, is "
            f"${cheapest.price_per_hour:g} an hour",
            f"set plan.max_dollars_per_hour to {cheapest.price_per_hour:g} or more",
        )
    return Limits(
        objective=config.objective,
        num_stages=num_stages,
        max_replicas=config.max_replicas,
        max_dollars_per_hour=math.inf if limit is None else limit,
        max_step_s=config.max_step_s(step_tokens),
        min_copies=config.copies,
        min_domains=config.domains,
        pins=pins,
        after=after,
    )


def _index(index: dict[str, int], node: str, key: str) -> int:
    if node in index:
        return index[node]
    nearest = get_close_matches(node, index, n=1)
    raise PlanError(
        f"plan.{key} names {node}, which the fleet does not have",
        f"name {nearest[0]}" if nearest else f"name one of {', '.join(list(index)[:8])}",
    )


def _pinned(node: str, where: str, num_stages: int | None) -> int:
    """Return the stage that a pin names; -1 for the last."""
    if where in ("first", "last"):
        return 0 if where == "first" else -1
    if not where.isdecimal() or int(where) > 9999:
        raise PlanError(f"plan.pins.{node}={where} is no place", "write first, last, or the number of a stage")
    if num_stages is not None and int(where) >= num_stages:
        raise PlanError(f"plan.pins.{node}={where}, but there are {num_stages} stages", "pin it to an earlier one")
    return int(where)


def _order(stage: int) -> float:
    return math.inf if stage < 0 else stage


def _require_no_cycle(after: dict[str, str]) -> None:
    for start in after:
        seen, node = [start], after[start]
        while node in after and node not in seen:
            seen.append(node)
            node = after[node]
        if node in seen:
            cycle = [*seen[seen.index(node) :], node]
            raise ConfigError(f"plan.after goes in a circle: {' after '.join(cycle)}", "drop one of these")
