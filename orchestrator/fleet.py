"""Ray's nodes as ours: start or join a cluster, put a NodeActor on each, call them with deadlines.

The one module of the control plane that talks to Ray, beside the baseline's. Errors leave it as ours: PeerLost for a
node that died, PeerTimeout for one that did not answer, and the stage's own error as the stage raised it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from actors.errors import FleetError, IsthmusError, PeerLost, PeerTimeout, StageError
from actors.node import CONCURRENCY_GROUPS, NAMESPACE, NodeActor
from actors.settings import TimeoutConfig
from actors.spec import Fleet, LinkCard, LinkProbeOrder, NodeCard, ProbeOrder
from orchestrator.config import FleetConfig
from orchestrator.environment import REQUIRED_SETTINGS, unmet_settings

_EMBEDDED_NODES = 4
_FOLDER_PREFIX = "isthmus-"
# Every pair of up to this many nodes is probed; of more, each node and the next.
_MAX_ALL_PAIRS = 6
_CONNECT_S, _MAX_PORT = 10.0, 65535


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place for one node actor."""

    node: str
    ray_node_id: str
    region: str
    price_per_hour: float
    num_gpus: int
    num_threads: int
    # How many places take their memory from the same machine, this one included; of a GPU's, it has its own.
    num_sharing: int


class Crew:
    """The node actors of a run, by node name."""

    def __init__(self, run: str, find_slots: Callable[[], list[Slot]], timeouts: TimeoutConfig) -> None:
        self._run = run
        self._timeouts = timeouts
        self._find_slots = find_slots
        self._slots = {slot.node: slot for slot in find_slots()}
        self._num_wanted = len(self._slots)
        # Ray nodes that did not come up again.
        self._gone: set[str] = set()
        self._actors: dict[str, Any] = {}
        self._cards: dict[str, NodeCard] = {}

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the places that the crew has."""
        return tuple(self._slots)

    def actor_name(self, node: str) -> str:
        """Return the name under which a node's peers find it."""
        return f"{self._run}/{node}"

    def start(self) -> None:
        """Start an actor on every slot; FleetError names one that does not come up, or whose Ray lacks a setting."""
        nodes = self._launch()
        try:
            settings = self.call(nodes, "settings", [REQUIRED_SETTINGS for _ in nodes], self._timeouts.place_s)
        except PeerTimeout as error:
            raise FleetError(
                f"no free place for a node actor: {error.message}",
                "free a GPU or set fleet.nodes lower; `ray status` shows who holds what",
            ) from error
        for node, found in zip(nodes, settings, strict=True):
            values: dict[str, str] = dict(zip(REQUIRED_SETTINGS, found, strict=True))
            for key, needed in unmet_settings(values).items():
                raise FleetError(
                    f"Ray on {node} runs with {key}={values[key] or 'unset'}",
                    f"start Ray on every node with {key}={needed} (isthmus doctor prints all settings)",
                )

    def probe(self, order: ProbeOrder, probe_bytes: int) -> Fleet:
        """Measure every node that has not been, all at once, then the links; return what there is to plan with."""
        new = [node for node in self._slots if node not in self._cards]
        for card in self.call(new, "probe", [order for _ in new], self._timeouts.step_s):
            self._cards[card.node] = card
        nodes = tuple(self._cards[node] for node in self._slots)
        return Fleet(nodes=nodes, links=self._probe_links(probe_bytes))

    def revive(self) -> None:
        """Replace what is dead: an actor where its Ray node lives, else by a Ray node that has come since.

        FleetError where no node is left.
        """
        self._forget_lost()
        self._take_in_new()
        while silent := [node for node in self._launch() if not self._answers(node)]:
            # Ray takes a node for alive for a while after it is gone: what does not come up is not there.
            for node in silent:
                self._gone.add(self._slots[node].ray_node_id)
                self._forget(node)
            self._take_in_new()
        if not self._slots:
            raise FleetError("no node of the cluster is left", "bring nodes back, then start the same run again")

    def call(self, nodes: Sequence[str], method: str, orders: Sequence[object], timeout_s: float) -> tuple[Any, ...]:
        """Call a method of several nodes at once and return their answers in order.

        Raises at the first failure: PeerLost, PeerTimeout, or what the node raised.
        """
        refs = {
            getattr(self._actors[node], method).remote(order): node for node, order in zip(nodes, orders, strict=True)
        }
        deadline_s = time.monotonic() + timeout_s
        answers: dict[str, Any] = {}
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline_s - time.monotonic()))
            if not done:
                late = ", ".join(refs[ref] for ref in waiting)
                raise PeerTimeout(
                    f"{late} did not finish {method} within {timeout_s:.0f} s",
                    "isthmus doctor shows what is wrong with a node; or raise that deadline under timeouts",
                )
            for ref in done:
                answers[refs[ref]] = answer_of(ref, refs[ref])
        return tuple(answers[node] for node in nodes)

    def tell(self, nodes: Sequence[str], method: str, order: object) -> None:
        """Call a method of several nodes and wait for none of them."""
        for node in nodes:
            if node in self._actors:
                getattr(self._actors[node], method).remote(order)

    def stop(self) -> None:
        """End every actor of this run."""
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors.clear()

    def _launch(self) -> list[str]:
        """Create an actor on every slot that has none; return their nodes without waiting for them."""
        missing = [slot for slot in self._slots.values() if slot.node not in self._actors]
        for slot in missing:
            self._actors[slot.node] = (
                # Ray's types do not know this option.
                ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(NodeActor)  # pyright: ignore[reportCallIssue]
                .options(
                    name=self.actor_name(slot.node),
                    namespace=NAMESPACE,
                    num_cpus=0,
                    num_gpus=slot.num_gpus,
                    label_selector={"ray.io/node-id": slot.ray_node_id},
                )
                .remote(slot.node, slot.region, slot.num_threads, slot.price_per_hour, slot.num_sharing)
            )
        return [slot.node for slot in missing]

    def _forget_lost(self) -> None:
        """Drop the slots whose Ray node is gone, and the actors that do not answer."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node, slot in list(self._slots.items()):
            if slot.ray_node_id not in alive:
                self._forget(node)
            elif node in self._actors and not self._answers(node):
                ray.kill(self._actors.pop(node), no_restart=True)

    def _forget(self, node: str) -> None:
        del self._slots[node]
        self._cards.pop(node, None)
        actor = self._actors.pop(node, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def _take_in_new(self) -> None:
        """Add slots of Ray nodes that have come since, up to as many as the run began with."""
        used = {slot.ray_node_id for slot in self._slots.values()} | self._gone
        for slot in self._find_slots():
            if slot.ray_node_id not in used and len(self._slots) < self._num_wanted:
                name = next(name for name in map(_node_name, count()) if name not in self._slots)
                self._slots[name] = replace(slot, node=name)

    def _answers(self, node: str) -> bool:
        try:
            self.call([node], "ping", [None], self._timeouts.ack_s)
        except (PeerLost, PeerTimeout):
            return False
        return True

    def _probe_links(self, probe_bytes: int) -> tuple[LinkCard, ...]:
        """Measure the links, one after another so that they do not share a wire."""
        names = list(self._slots)
        if not probe_bytes:
            return ()
        if len(names) <= _MAX_ALL_PAIRS:
            pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        else:
            pairs = list(pairwise(names))
        cards: list[LinkCard] = []
        for source, target in pairs:
            order = LinkProbeOrder(
                target=target,
                actor_name=self.actor_name(target),
                size_bytes=probe_bytes,
                timeout_s=self._timeouts.ack_s,
            )
            cards += self.call([source], "probe_link", [order], self._timeouts.frame_s)
        return tuple(cards)


def answer_of(ref: Any, node: str) -> Any:
    """Return the answer of a call that `node` has ended, or raise Ray's error as ours."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, IsthmusError):
            raise error.cause from None
        raise StageError(f"{node} failed: {error.cause!r}", "its log has the traceback") from error
    except ray.exceptions.ActorUnavailableError as error:
        raise PeerTimeout(f"{node} cannot be reached", "check that node and its link") from error
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        raise PeerLost(f"{node} is gone: {first_line(error)}", "it is replaced where its machine lives") from error


@contextmanager
def open_ray(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start Ray on this machine; on leaving end what was started."""
    folder = _own_folder() if address is None else None
    try:
        with _keep_sigterm():
            _init_ray(address, folder)
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _own_folder() -> Path:
    """Return a new folder for Ray's files, and remove those of drivers that were killed.

    Under /tmp for a short path: the names of Unix sockets have a limit.
    """
    tmp = Path("/tmp")  # noqa: S108
    for folder in tmp.glob(f"{_FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=tmp))


@contextmanager
def open_fleet(config: FleetConfig, address: str | None, run: str, timeouts: TimeoutConfig) -> Iterator[Crew]:
    """Open Ray and put a crew on its nodes; on leaving end both."""
    with open_ray(address):
        crew = Crew(run, lambda: _slots(config, embedded=address is None), timeouts)
        if config.nodes is not None and len(crew.nodes) < config.nodes:
            raise FleetError(
                f"fleet.nodes is {config.nodes}; the cluster has {len(crew.nodes)} places",
                f"set fleet.nodes={len(crew.nodes)}, or add nodes",
            )
        try:
            crew.start()
            yield crew
        finally:
            crew.stop()


@contextmanager
def _keep_sigterm() -> Iterator[None]:
    """Give SIGTERM back to who handles it now; where nobody does, Ray's way of exiting at once ends what it started."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _init_ray(address: str | None, folder: Path | None) -> None:
    common = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **common)
        return
    try:
        _require_listener(address)
        ray.init(address=address, **common)
    except (OSError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        # All lines: where versions differ, the first one does not say which.
        text = " ".join(str(error).split())
        raise FleetError(
            f"no Ray cluster can be joined at {address}: {text}",
            "check --address and RAY_AUTH_TOKEN, or leave --address out to train on this machine",
        ) from error


def _require_listener(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray itself would try for a minute and more."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), min(int(port), _MAX_PORT)), _CONNECT_S).close()


def _slots(config: FleetConfig, *, embedded: bool) -> list[Slot]:
    """Return the places to train on: on this machine as many as asked, on a cluster one a GPU, or a CPU-only node."""
    found: list[tuple[Mapping[str, Any], int, int, int]] = []
    for ray_node in sorted(ray.nodes(), key=lambda node: node["NodeID"]):
        resources = ray_node["Resources"]
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        if not ray_node["Alive"] or (num_gpus == 0 and num_cpus == 0):
            continue
        places = num_gpus or ((config.nodes or _EMBEDDED_NODES) if embedded else 1)
        threads = config.threads or max(1, num_cpus // places)
        found += [(ray_node, min(1, num_gpus), threads, 1 if num_gpus else places)] * places
    return [_slot(config, _node_name(i), *place) for i, place in enumerate(found[: config.nodes])]


def _node_name(number: int) -> str:
    return f"node-{number}"


def _slot(
    config: FleetConfig, name: str, ray_node: Mapping[str, Any], num_gpus: int, num_threads: int, num_sharing: int
) -> Slot:
    region, price_per_hour = region_and_price(config, ray_node["Labels"])
    return Slot(
        node=name,
        ray_node_id=ray_node["NodeID"],
        region=region,
        price_per_hour=price_per_hour,
        num_gpus=num_gpus,
        num_threads=num_threads,
        num_sharing=num_sharing,
    )


def region_and_price(config: FleetConfig, labels: Mapping[str, str]) -> tuple[str, float]:
    """Return where a node is and its dollars an hour, by its Ray labels, else by the configuration."""
    region = labels.get("region", "local")
    price = labels.get("price", config.region_prices.get(region, config.price_per_hour))
    try:
        return region, float(price)
    except ValueError as error:
        raise FleetError(f"a node's Ray label price is {price!r}", "make it dollars an hour") from error


def first_line(error: Exception) -> str:
    """Return what an error of Ray's says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
