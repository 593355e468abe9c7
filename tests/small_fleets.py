"""Small fleets by hand, and plans for them, for the tests of the planner."""

from actors.fleet_spec import Fleet, LinkCard, NodeCard
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec, WireConfig
from actors.spec import Plan
from orchestrator.planner.build import Workload, make_problem
from orchestrator.planner.choices import PlanConfig
from orchestrator.planner.evaluate import compute_s, memory_bytes
from orchestrator.planner.plan import make_plan
from tests.part_times import part_times

MODEL = ModelSpec(
    vocab_size=1000, hidden_size=64, num_layers=12, num_heads=4, num_kv_heads=2, ffn_size=128, max_positions=64
)
BATCH = BatchSpec(seq_len=32, microbatch_size=2, num_microbatches=8)
WORK = Workload(model=MODEL, batch=BATCH, schedule="1f1b", activation_checkpointing=False)
GB = 10**9


def node(
    name: str, slowness: float = 1.0, *, memory_bytes: int = 64 * GB, price: float = 0.0, boundary_bytes: int = 4
) -> NodeCard:
    """A node whose layer takes 30 ms at slowness 1, embedding and head 10 and 20 ms."""
    times = part_times(
        2,
        layer_forward_s=0.01 * slowness,
        layer_backward_s=0.02 * slowness,
        embedding_s=0.01 * slowness,
        head_s=0.02 * slowness,
    )
    return NodeCard(
        node=name,
        host="h",
        region="r",
        device="TestGPU",
        boundary_bytes=boundary_bytes,
        memory_bytes=memory_bytes,
        times=(times,),
        price_per_hour=price,
    )


def link(source: str, target: str, rate_mbps: float, delay_s: float = 0.01) -> LinkCard:
    return LinkCard(source=source, target=target, delay_s=delay_s, rate_mbps=rate_mbps)


def fleet(*nodes: NodeCard, links: tuple[LinkCard, ...] = ()) -> Fleet:
    return Fleet(nodes=nodes, links=links)


def plan(these: Fleet, work: Workload = WORK, wire: WireConfig | None = None, **config) -> Plan:
    return make_plan(these, work, wire or WireConfig(), PlanConfig(**config))


def sizes(made: Plan) -> list[int]:
    """How many layers each node has, by its name."""
    return [stage.layer_stop - stage.layer_start for stage in sorted(made.stages, key=lambda stage: stage.node)]


def need(card: NodeCard, start: int, stop: int, *, in_flight: int, work: Workload = WORK) -> int:
    """What layers take on a node, in bytes."""
    return int(memory_bytes(make_problem(fleet(card), work, WireConfig()), 0, start, stop, in_flight))


def seconds(card: NodeCard, start: int, stop: int, work: Workload = WORK) -> float:
    return compute_s(make_problem(fleet(card), work, WireConfig()), 0, start, stop)
