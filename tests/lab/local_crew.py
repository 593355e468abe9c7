"""A crew without a cluster: nodes in this process, and links between them whose rate a test changes on the way.

The controller cannot tell: `train` with `open_fleet` replaced by `local_fleet` is a whole run, without Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

from actors.errors import PeerTimeout
from actors.fleet_spec import Fleet, ProbeOrder
from actors.link import Carrier
from actors.node_stages import NodeStages
from actors.spec import StepOrder
from tests.lab.throttle import Throttle


@dataclass
class LocalCrew:
    """Stands for `orchestrator.fleet.Crew`: one compute thread a node; frames cross `Throttle`s."""

    fleet: Fleet
    # Of every link, both ways, at the start.
    rate_mbps: float
    delay_s: float
    # Called with each step before it runs.
    on_step: Callable[[LocalCrew, int], None] = lambda crew, step: None
    orders: list[StepOrder] = field(default_factory=list[StepOrder])
    throttles: list[Throttle] = field(default_factory=list[Throttle])
    stages: dict[str, NodeStages] = field(default_factory=dict[str, NodeStages])
    pools: dict[str, ThreadPoolExecutor] = field(default_factory=dict[str, ThreadPoolExecutor])

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(card.node for card in self.fleet.nodes)

    def actor_name(self, node: str) -> str:
        return node

    def probe(self, order: ProbeOrder, probe_bytes: int) -> Fleet:
        return self.fleet

    def revive(self) -> None:
        pass

    def set_rate(self, rate_mbps: float) -> None:
        for throttle in self.throttles:
            throttle.rate_mbps = rate_mbps

    def call(self, nodes: Sequence[str], method: str, orders: Sequence[object], timeout_s: float) -> tuple[object, ...]:
        if isinstance(orders[0], StepOrder) and orders[0].run_step:
            self.orders.append(orders[0])
            self.on_step(self, orders[0].step)
        calls = [
            self._pool(node).submit(self._do, node, method, order) for node, order in zip(nodes, orders, strict=True)
        ]
        if wait(calls, timeout_s).not_done:
            raise PeerTimeout(f"{method} took longer than {timeout_s:g} s")
        return tuple(call.result() for call in calls)

    def tell(self, nodes: Sequence[str], method: str, order: object) -> None:
        for node in nodes:
            getattr(self.stages[node], method)(order)

    def close(self) -> None:
        for stage in self.stages.values():
            stage.close()
        for throttle in self.throttles:
            throttle.close()
        for pool in self.pools.values():
            pool.shutdown()

    def _pool(self, node: str) -> ThreadPoolExecutor:
        return self.pools.setdefault(node, ThreadPoolExecutor(1))

    def _do(self, node: str, method: str, order: object) -> object:
        if method == "require_store":
            return None
        if not isinstance(order, tuple):
            return getattr(self.stages[node], method)(order)
        peers = order[0].peers

        def carrier_to(stage: int) -> Carrier:
            peer = peers[stage]
            throttle = Throttle(
                peer, lambda chunk: self.stages[peer].receive(chunk), rate_mbps=self.rate_mbps, delay_s=self.delay_s
            )
            self.throttles.append(throttle)
            return throttle

        self.stages[node] = NodeStages(order, carrier_to)
        return None


@contextmanager
def local_fleet(crew: LocalCrew) -> Iterator[LocalCrew]:
    """Stand for `orchestrator.fleet.open_fleet`."""
    try:
        yield crew
    finally:
        crew.close()
