"""The Ray shell around a node: calls come in by concurrency group, frames go out as actor calls. No maths here.

    compute (one thread)   probe, probe_link, require_store, assign, load, step, evaluate, flush
    control                ping, settings, abort
    inbox                  receive, receive_probe: a peer's chunk, inlined in the call

A plain threaded actor: one `async` method would put all of them on an event loop.
"""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import Future
from dataclasses import replace

import ray
import ray.actor
import ray.exceptions
import torch

from actors.errors import IsthmusError, PeerError, PeerLost, PeerTimeout, StageError, StoreError
from actors.fleet_spec import LinkCard, LinkProbeOrder, NodeCard, Offer, ProbeOrder
from actors.link import Carrier
from actors.mailbox import Receipt, Verdict
from actors.node_stages import NodeStages
from actors.probe import copy_mbps, device_name, fitting_sizes, free_memory_bytes, require_probe_memory
from actors.probe_cache import cache_file, cached_time_parts
from actors.spec import Assignment, EvalOrder, EvalReport, LoadOrder, SaveReport, StepOrder, StepReport, StoreProbe
from actors.stage import pick_device
from actors.store import check_store, open_store

CONCURRENCY_GROUPS = {"control": 4, "inbox": 4}
NAMESPACE = "isthmus"


class RayCarrier:
    """Takes chunks to one peer as calls of its `receive`, the bytes inlined in the call."""

    def __init__(self, peer: str, actor: ray.actor.ActorHandle) -> None:
        self.peer = peer
        self._actor = actor

    def push(self, chunk: bytes) -> Future[Receipt]:
        answer: Future[Receipt] = Future()
        self._actor.receive.remote(chunk).future().add_done_callback(lambda call: self._pass_on(call, answer))
        return answer

    def _pass_on(self, call: Future[Receipt], answer: Future[Receipt]) -> None:
        """Give Ray's answer or error as ours: an unavailable actor may come back, a dead one may not.

        What the peer itself raised is its own error, where that is one of ours.
        """
        error = call.exception()
        if error is None:
            answer.set_result(call.result())
        elif isinstance(error, ray.exceptions.ActorUnavailableError):
            answer.set_exception(PeerError(f"{self.peer} is not reachable now"))
        elif isinstance(error, ray.exceptions.RayTaskError):
            failed = StageError(f"{self.peer} failed to take a chunk: {error.cause!r}", "see that node's log")
            answer.set_exception(error.cause if isinstance(error.cause, IsthmusError) else failed)
        else:
            answer.set_exception(PeerLost(f"{self.peer} is gone: {error}", "isthmus status shows which node it was"))


class NodeActor:
    """One node of the fleet; may become one stage of a run, or several."""

    def __init__(self, node: str, region: str, num_threads: int, offer: Offer, num_sharing: int) -> None:
        """Stand for one place of `num_sharing` that share their machine's memory equally."""
        torch.set_num_threads(num_threads)
        self._node = node
        self._region = region
        self._offer = offer
        self._num_sharing = num_sharing
        self._stages: NodeStages | None = None

    @ray.method(concurrency_group="control")
    def ping(self, order: None) -> int:
        """Answer with this node's process: it is up."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def settings(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the values of Ray's settings that this node runs with, empty where unset."""
        return tuple(os.environ.get(name, "") for name in names)

    def probe(self, order: ProbeOrder) -> NodeCard:
        """Measure this node on the model's own layers."""
        device = pick_device()
        memory_bytes = free_memory_bytes(device) // self._num_sharing
        require_probe_memory(order.model, order.batch, memory_bytes, self._node)
        sizes = fitting_sizes(order.model, order.batch, order.microbatch_sizes, memory_bytes)
        return NodeCard(
            node=self._node,
            host=socket.gethostname(),
            region=self._region,
            device=device_name(device),
            boundary_bytes=2 if device.type == "cuda" else 4,
            memory_bytes=memory_bytes,
            times=tuple(
                cached_time_parts(
                    cache_file(),
                    order.model,
                    replace(order.batch, microbatch_size=size),
                    device,
                    time.perf_counter,
                    time.time(),
                    document_mask=order.document_mask,
                )
                for size in sizes
            ),
            price_per_hour=self._offer.price_per_hour,
            losses_per_hour=self._offer.losses_per_hour,
            uplink_mbps=self._offer.uplink_mbps,
            downlink_mbps=self._offer.downlink_mbps,
            copy_mbps=copy_mbps(device, time.perf_counter),
        )

    def probe_link(self, order: LinkProbeOrder) -> LinkCard:
        """Measure delay and rate to another node: the best of a few empty and a few full calls.

        Raises PeerTimeout where a call takes longer than the order allows.
        """
        peer = ray.get_actor(order.actor_name, namespace=NAMESPACE)

        def call_s(payload: bytes) -> float:
            began_s = time.perf_counter()
            try:
                ray.get(peer.receive_probe.remote(payload), timeout=order.timeout_s)
            except ray.exceptions.GetTimeoutError as error:
                raise PeerTimeout(
                    f"{order.target} did not answer a link probe of {len(payload)} bytes from {self._node} within "
                    f"{order.timeout_s:g} s",
                    "check that node and its link, or set a smaller fleet.probe_bytes",
                ) from error
            return time.perf_counter() - began_s

        call_s(b"")
        empty_s = min(call_s(b"") for _ in range(3))
        full_s = min(call_s(bytes(order.size_bytes)) for _ in range(2))
        rate_mbps = order.size_bytes * 8e-6 / max(full_s - empty_s, 1e-6)
        return LinkCard(source=self._node, target=order.target, delay_s=empty_s / 2, rate_mbps=rate_mbps)

    @ray.method(concurrency_group="inbox")
    def receive_probe(self, payload: bytes) -> int:
        """Answer a link probe."""
        return len(payload)

    def require_store(self, probe: StoreProbe) -> None:
        """Raise StoreError where this node does not share the store of the checkpoints, or may not write there."""
        store = open_store(probe.store_url)
        if store.size(probe.key) is None:
            raise StoreError(
                f"{self._node} on {socket.gethostname()} does not see what the driver writes to {probe.store_url}",
                "set checkpoints.url to a folder that all nodes share, or to s3://bucket/prefix",
            )
        check_store(store)

    def assign(self, assignments: tuple[Assignment, ...]) -> None:
        """Become these stages: build their layers and their links to the neighbours."""
        if self._stages is not None:
            self._stages.close()
            # Its memory is free before the new ones need it.
            self._stages = None
        peers, plan = assignments[0].peers, assignments[0].plan

        def carrier_to(stage: int) -> Carrier:
            peer = f"stage {stage} on {plan.stages[stage].node}"
            return RayCarrier(peer, ray.get_actor(peers[stage], namespace=NAMESPACE))

        self._stages = NodeStages(assignments, carrier_to)

    def load(self, order: LoadOrder) -> None:
        """Take the weights that the order names."""
        self._own_stages.load(order)

    def step(self, order: StepOrder) -> tuple[StepReport, ...]:
        """Commit the step before, run this one, report for each stage."""
        return self._own_stages.step(order)

    def evaluate(self, order: EvalOrder) -> tuple[EvalReport, ...]:
        """Run held-out microbatches forward."""
        return self._own_stages.evaluate(order)

    @ray.method(concurrency_group="control")
    def abort(self, generation: int) -> None:
        """End every generation up to this one."""
        self._own_stages.abort(generation)

    def flush(self, timeout_s: float) -> tuple[SaveReport, ...]:
        """Wait for checkpoints that are being written."""
        return self._own_stages.flush(timeout_s)

    @ray.method(concurrency_group="inbox")
    def receive(self, chunk: bytes) -> Receipt:
        """Take one chunk of a frame from a peer."""
        # Read once: `assign` may put it away meanwhile.
        stages = self._stages
        if stages is None:
            return Receipt(Verdict.BUSY, "this node has no stage yet")
        return stages.receive(chunk)

    @property
    def _own_stages(self) -> NodeStages:
        stages = self._stages
        if stages is None:
            raise StageError(f"{self._node} has no stage yet")
        return stages
