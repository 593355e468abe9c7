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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from actors.errors import FleetError, IsthmusError, PeerLost, PeerTimeout, RunBusy, StageError
from actors.fleet_spec import Fleet, LinkCard, LinkProbeOrder, NodeCard, ProbeOrder
from actors.node import CONCURRENCY_GROUPS, NAMESPACE, NodeActor
from actors.settings import TimeoutConfig
from orchestrator.config import FleetConfig
from orchestrator.environment import REQUIRED_SETTINGS, unmet_settings
from orchestrator.link_rounds import MAX_ALL_PAIRS, Spot, probe_rounds, region_links
from orchestrator.slots import Slot, node_name, slots_on

_FOLDER_PREFIX = "isthmus-"
# Which pairs of a large fleet are probed is drawn from it: the same ones each time.
_PROBE_SEED = 1
_CONNECT_S, _MAX_PORT = 10.0, 65535


class Crew:
    """The node actors of a run, by node name: on `num_wanted` of the slots that there are, or on all of them."""

    def __init__(
        self, run: str, find_slots: Callable[[], list[Slot]], num_wanted: int | None, timeouts: TimeoutConfig
    ) -> None:
        self._run = run
        self._timeouts = timeouts
        self._find_slots = find_slots
        self._slots = {slot.node: slot for slot in find_slots()[:num_wanted]}
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
        for error in self._launch().values():
            raise error

    def probe(self, order: ProbeOrder, probe_bytes: int) -> Fleet:
        """Measure every node that has not been, all at once, then the links; return what there is to plan with."""
        new = [node for node in self._slots if node not in self._cards]
        for card in self.call(new, "probe", [order for _ in new], self._timeouts.step_s):
            self._cards[card.node] = card
        nodes = tuple(self._cards[node] for node in self._slots)
        spots = [Spot(node=card.node, host=card.host, region=card.region) for card in nodes]
        cards = self._probe_links(spots, probe_bytes)
        if len(nodes) <= MAX_ALL_PAIRS:
            return Fleet(nodes=nodes, links=cards)
        return Fleet(nodes=nodes, links=(), regions=region_links(spots, cards))

    def revive(self) -> None:
        """Replace what is dead: an actor where its Ray node lives, else by a Ray node that has come since.

        FleetError where no node is left, with why the last ones could not be used.
        """
        self._forget_lost()
        self._take_in_new()
        unfit: list[str] = []
        while failures := self._launch():
            # Ray takes a node for alive for a while after it is gone: what does not come up is not there.
            unfit = [error.message for error in failures.values()]
            for node in failures:
                self._gone.add(self._slots[node].ray_node_id)
                self._forget(node)
            self._take_in_new()
        if not self._slots:
            raise FleetError(
                "; ".join(["no node of the cluster is left", *unfit]), "bring nodes back, then start the same run again"
            )

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

    def _launch(self) -> dict[str, FleetError]:
        """Put an actor on every slot that has none; return why, by node, where one cannot be used.

        RunBusy where another driver has actors of this run.
        """
        missing = [slot for slot in self._slots.values() if slot.node not in self._actors]
        for slot in missing:
            self._actors[slot.node] = self._create(slot)
        refs = {slot.node: self._actors[slot.node].settings.remote(REQUIRED_SETTINGS) for slot in missing}
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=self._timeouts.place_s)
        failures = {node: _unfitness(node, ref, self._timeouts.place_s) for node, ref in refs.items()}
        return {node: error for node, error in failures.items() if error is not None}

    def _create(self, slot: Slot) -> Any:
        actor_class = (
            # Ray's types do not know this option.
            ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(NodeActor).options(  # pyright: ignore[reportCallIssue]
                name=self.actor_name(slot.node),
                namespace=NAMESPACE,
                num_cpus=0,
                num_gpus=slot.num_gpus,
                label_selector={"ray.io/node-id": slot.ray_node_id},
            )
        )
        try:
            return actor_class.remote(slot.node, slot.region, slot.num_threads, slot.offer, slot.num_sharing)
        except ray.exceptions.ActorAlreadyExistsError as error:
            raise RunBusy(
                f"another process drives run {self._run}: the cluster has its actor {self.actor_name(slot.node)}",
                "stop that one, or pick another name=; after a crash, try again in a minute",
            ) from error

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
                name = next(name for name in map(node_name, count()) if name not in self._slots)
                self._slots[name] = replace(slot, node=name)

    def _answers(self, node: str) -> bool:
        try:
            self.call([node], "ping", [None], self._timeouts.ack_s)
        except (PeerLost, PeerTimeout):
            return False
        return True

    def _probe_links(self, spots: Sequence[Spot], probe_bytes: int) -> tuple[LinkCard, ...]:
        """Measure links, at the same time those that share no wire."""
        if not probe_bytes:
            return ()
        cards: list[LinkCard] = []
        for probes in probe_rounds(spots, _PROBE_SEED):
            orders = [
                LinkProbeOrder(
                    target=target,
                    actor_name=self.actor_name(target),
                    size_bytes=probe_bytes,
                    timeout_s=self._timeouts.ack_s,
                )
                for _, target in probes
            ]
            cards += self.call([source for source, _ in probes], "probe_link", orders, self._timeouts.frame_s)
        return tuple(cards)


def _unfitness(node: str, ref: Any, place_s: float) -> FleetError | None:
    """Return why a new actor cannot be used, from its answer to what Ray's settings are there; None where it can."""
    if not ray.wait([ref], timeout=0)[0]:
        return FleetError(
            f"no free place for a node actor: {node} did not come up within {place_s:.0f} s",
            "free a GPU or set fleet.nodes lower; `ray status` shows who holds what",
        )
    try:
        found = answer_of(ref, node)
    except IsthmusError as error:
        return FleetError(
            error.message,
            "install the same Isthmus there; isthmus doctor checks each node",
        )
    values: dict[str, str] = dict(zip(REQUIRED_SETTINGS, found, strict=True))
    for key, needed in unmet_settings(values).items():
        return FleetError(
            f"Ray on {node} runs with {key}={values[key] or 'unset'}",
            f"start Ray on every node with {key}={needed} (isthmus doctor prints all settings)",
        )
    return None


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
        if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
            raise PeerLost(
                f"{node} could not start: {creation_cause(error)}", "install the same Isthmus there"
            ) from error
        raise PeerLost(f"{node} is gone: {first_line(error)}", "it is replaced where its machine lives") from error
    except ray.exceptions.RayError as error:
        raise StageError(
            f"{node} could not be asked: {first_line(error)}", "isthmus doctor checks each node"
        ) from error


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
        crew = Crew(run, lambda: slots_on(ray.nodes(), config, embedded=address is None), config.nodes, timeouts)
        if not crew.nodes:
            raise FleetError("the cluster has no node with a GPU or a CPU", "start Ray on nodes that have one")
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
        try:
            ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **common)
        except Exception as error:  # Where one of its processes does not come up, Ray raises nothing narrower.
            raise FleetError(
                f"Ray does not start on this machine: {first_line(error)}",
                "free memory and space in /tmp; isthmus doctor shows what is wrong",
            ) from error
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


def creation_cause(error: Exception) -> str:
    """Return what the code said that failed in an actor's creation: what Ray quotes of its traceback, last line."""
    return str(error).strip().splitlines()[-1].strip()


def first_line(error: Exception) -> str:
    """Return what an error of Ray's says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
