"""`isthmus doctor`: what of this machine, a cluster, a store and prepared data is fit to train with, and what to do.

    this machine    looked at here, in a moment
    what may hang   Ray, a cluster, a store, shards: each tried in a process of its own, all at once, under a deadline

A check that fails never keeps others from running. No secret is ever part of a finding.
"""

from __future__ import annotations

import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from actors.errors import IsthmusError
from orchestrator import machine
from orchestrator.environment import REQUIRED_SETTINGS, prepare_environment, unmet_settings
from orchestrator.machine import Finding

_TRIAL_S = 30.0
# Within a trial: what a worker's start may take on a node, one call, all links, and the hashing of shards.
_WORKER_S, _CALL_S, _LINKS_S, _HASHING_S = 12.0, 3.0, 8.0, 10.0
# After a trial has answered, or was told to end.
_END_S = 5.0

# A call of this size rides inlined where Ray's settings hold.
_CALL_BYTES = 200_000
# How much is encoded to see how fast codecs are.
_CODEC_ELEMENTS, _CODEC_ROUNDS = 1 << 20, 8

Check = Callable[..., tuple[Finding, ...]]


def examine(*, address: str | None, store_url: str | None, data_path: str | None) -> tuple[Finding, ...]:
    """Check this machine, and the cluster, store and prepared data that are named; takes less than a minute."""
    trials: list[tuple[str, Check, tuple[str, ...]]] = [
        ("Ray on this machine", try_ray, ()),
        ("codecs", try_codecs, ()),
    ]
    if address is not None:
        trials.append(("cluster", try_cluster, (address,)))
    if store_url is not None:
        trials.append(("store", try_store, (store_url,)))
    if data_path is not None:
        trials.append(("data", try_data, (data_path,)))
    checks: list[tuple[str, Check]] = [
        ("versions", machine.versions),
        ("device", machine.device),
        ("memory", machine.memory),
        ("disks", machine.disks),
        ("cores", machine.cores),
        ("congestion control", machine.tcp),
        ("Ray's settings", machine.settings),
        ("W&B", machine.tracking),
    ]
    with ThreadPoolExecutor(len(trials)) as pool:
        tried = [pool.submit(in_child, name, trial, *arguments) for name, trial, arguments in trials]
        findings = [finding for name, check in checks for finding in _examined(name, check)]
        return (*findings, *(finding for trial in tried for finding in trial.result()))


def render(findings: Iterable[Finding]) -> RenderableType:
    """Return the findings for a rich console, each on a line, with what to do below it."""
    findings = tuple(findings)
    width = max(len(finding.name) for finding in findings)
    lines: list[Text] = []
    for finding in findings:
        mark = ("pass", "green") if finding.passed else ("FAIL", "bold red")
        lines.append(Text.assemble(mark, f"  {finding.name:<{width}}  {finding.found}"))
        first, *others = finding.remedy.splitlines() or [""]
        if first:
            lines.append(Text(f"        {'note' if finding.passed else 'remedy'}: {first}", style="dim"))
        lines += [Text(f"          {line}", style="dim") for line in others]
    num_failed = sum(not finding.passed for finding in findings)
    verdict = f"{num_failed} of {len(findings)} checks failed" if num_failed else f"all {len(findings)} checks passed"
    return Group(*lines, Text(verdict, style="bold red" if num_failed else "bold green"))


def _examined(name: str, check: Check, *arguments: str) -> tuple[Finding, ...]:
    """Return a check's findings, or that it could not be made."""
    try:
        return check(*arguments)
    except IsthmusError as error:
        return (Finding(name=name, passed=False, found=error.message, remedy=error.remedy),)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        remedy = "mend what it names, or install Isthmus anew: pip install -e ."
        first_line = str(error).partition("\n")[0]
        return (Finding(name=name, passed=False, found=f"{type(error).__name__}: {first_line}", remedy=remedy),)


def in_child(name: str, check: Check, *arguments: str) -> tuple[Finding, ...]:
    """Return a check's findings from a process that is ended at the deadline, whatever it hangs in."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, name, check, *arguments))
    child.start()
    assert child.pid is not None
    sender.close()
    try:
        if receiver.poll(_TRIAL_S):
            findings = receiver.recv()
            child.join(_END_S)
            return findings
        found = f"no answer within {_TRIAL_S:.0f} s"
    except EOFError:
        child.join(_END_S)
        found = f"the check died with exit code {child.exitcode}; what it said is above"
    finally:
        # With all that it started: a Ray that hangs in its start ends nothing itself.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join(_END_S)
    remedy = "check the address or URL, the link and the firewall to it; or this machine, if it is busy"
    return (Finding(name=name, passed=False, found=found, remedy=remedy),)


def _answer(sender: Connection, name: str, check: Check, *arguments: str) -> None:
    os.setsid()
    sender.send(_examined(name, check, *arguments))


class Observer:
    """An actor that says what its node runs with, and how far others are."""

    def look(self) -> dict[str, str]:
        """Return the versions and Ray's settings of this node's worker processes."""
        return {
            "Python": platform.python_version(),
            **{name: machine.installed(name) for name in machine.PINS},
            "TCP": machine.congestion_control() + (", slow after idle" if machine.starts_slowly_after_idle() else ""),
            **{name: os.environ.get(name, "") for name in REQUIRED_SETTINGS},
        }

    def take(self, payload: bytes) -> int:
        """Take bytes, as a node takes a frame."""
        return len(payload)

    def round_trips_s(self, other: Any) -> tuple[float, float]:
        """Return what the quickest of a few calls of another observer takes: an empty one, and one with a frame."""
        return _quickest_call_s(other, 0), _quickest_call_s(other, _CALL_BYTES)


def _observer() -> Any:
    import ray

    return ray.remote(num_cpus=0)(Observer)


def _quickest_call_s(observer: Any, num_bytes: int) -> float:
    import ray

    def call_s() -> float:
        began_s = time.perf_counter()
        ray.get(observer.take.remote(bytes(num_bytes)), timeout=_CALL_S)
        return time.perf_counter() - began_s

    return min(call_s() for _ in range(3))


def try_ray() -> tuple[Finding, ...]:
    """Does Ray start here, and how long does a call with a frame take?"""
    prepare_environment(None)
    import ray
    import ray.exceptions

    from orchestrator.fleet import first_line, open_ray

    name = "Ray on this machine"
    began_s = time.monotonic()
    try:
        with open_ray(None):
            observer = _observer().remote()
            ray.get(observer.look.remote(), timeout=_WORKER_S)
            ready_s = time.monotonic() - began_s
            call_s = _quickest_call_s(observer, _CALL_BYTES)
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        remedy = "free memory and space in /tmp; see what Ray says to: ray start --head"
        return (Finding(name=name, passed=False, found=first_line(error), remedy=remedy),)
    found = f"an actor after {ready_s:.1f} s, a call of {_CALL_BYTES // 1000} kB in {call_s * 1e3:.1f} ms"
    return (Finding(name=name, passed=True, found=found),)


def try_codecs() -> tuple[Finding, ...]:
    """Do the codecs' kernels build here, and does each make the bytes that the specification says?"""
    import torch

    from actors.codecs.blocks import HQ4
    from actors.kernels import reference
    from actors.kernels.dispatch import host_kernels, kernels_for

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host_kernels()
    sample_N = torch.randn(_CODEC_ELEMENTS, generator=torch.Generator().manual_seed(0))
    expected_N = reference.encode_blocks(sample_N, HQ4.form, 0)
    findings: list[Finding] = []
    for device in devices:
        kernels = kernels_for(device)
        on_device_N = sample_N.to(device)
        is_right = torch.equal(kernels.encode_blocks(on_device_N, HQ4.form, 0).cpu(), expected_N)
        began_s = time.monotonic()
        for _ in range(_CODEC_ROUNDS):
            kernels.encode_blocks(on_device_N, HQ4.form, 0).cpu()
        rate = _CODEC_ROUNDS * _CODEC_ELEMENTS * 4 / (time.monotonic() - began_s) / 1e9
        found = f"{kernels.name}, hq4 at {rate:.1f} GB/s of float32" if is_right else f"{kernels.name}: other bytes"
        slow = "install g++ and start again: codecs run in plain torch" if caught and device.type == "cpu" else ""
        remedy = slow if is_right else "report this; until then set wire.forward=bf16 and wire.backward=bf16"
        findings.append(Finding(name=f"codecs on {device.type}", passed=is_right, found=found, remedy=remedy))
    return tuple(findings)


def try_cluster(address: str) -> tuple[Finding, ...]:
    """Which nodes does the cluster have, do they run what Isthmus needs, and do they reach each other?"""
    import ray

    from orchestrator.fleet import open_ray

    with open_ray(address):
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        num_gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes.values())
        found = f"{len(nodes)} nodes alive at {address}, {num_gpus} GPUs"
        observers = {
            node_id: _observer().options(label_selector={"ray.io/node-id": node_id}).remote() for node_id in nodes
        }
        answers = _ended({observer.look.remote(): node_id for node_id, observer in observers.items()}, _WORKER_S)
        cluster = Finding(name="cluster", passed=True, found=found)
        findings = [_node(node, answers.get(node_id)) for node_id, node in nodes.items()]
        ready = [node_id for node_id, finding in zip(nodes, findings, strict=True) if finding.passed]
        return (cluster, *findings, *_links([(_node_name(nodes[i]), observers[i]) for i in ready]))


def _node(ray_node: dict[str, Any], answer: Any) -> Finding:
    """Return whether a node's worker came up, and runs what a node of ours needs."""
    from orchestrator.fleet import answer_of

    name = _node_name(ray_node)
    if answer is None:
        remedy = "see its log, and `ray status`: it may have no room for one more process"
        return Finding(name=name, passed=False, found=f"no worker came up within {_WORKER_S:.0f} s", remedy=remedy)
    try:
        seen: dict[str, str] = answer_of(answer, name)
    except IsthmusError as error:
        remedy = "install the same Isthmus on it as here, then start Ray there again"
        return Finding(name=name, passed=False, found=error.message, remedy=remedy)
    wanted = {"Python": platform.python_version(), **machine.PINS}
    odd = [f"{key} {pin}" for key, pin in wanted.items() if seen[key].partition("+")[0] != pin]
    unmet = unmet_settings(seen)
    wrong = [*odd, *(f"{key}={needed}" for key, needed in unmet.items())]
    resources, labels = ray_node["Resources"], ray_node["Labels"]
    found = (
        f"region {labels.get('region', 'not labelled')}, {int(resources.get('GPU', 0))} GPUs, "
        f"{int(resources.get('CPU', 0))} CPUs, "
        + ", ".join(f"{key} {seen[key] or 'missing'}" for key in (*wanted, "TCP"))
        + (", " + ", ".join(f"{key}={seen[key] or 'unset'}" for key in unmet) if unmet else "")
    )
    remedy = f"start Ray on it with {', '.join(wrong)}" if wrong else ""
    return Finding(name=name, passed=not wrong, found=found, remedy=remedy)


def _node_name(ray_node: dict[str, Any]) -> str:
    return f"node {ray_node['NodeManagerAddress']}/{ray_node['NodeID'][:6]}"


def _links(observers: list[tuple[str, Any]]) -> tuple[Finding, ...]:
    """Return how far each node is from the next, and how long a call with a frame takes."""
    names = [f"{name} to {other.removeprefix('node ')}" for (name, _), (other, _) in pairwise(observers)]
    calls = [observer.round_trips_s.remote(other) for (_, observer), (_, other) in pairwise(observers)]
    answers = _ended(dict(zip(calls, names, strict=True)), _LINKS_S)
    return tuple(_link(name, answers.get(name)) for name in names)


def _link(name: str, answer: Any) -> Finding:
    from orchestrator.fleet import answer_of

    with suppress(IsthmusError):
        if answer is not None:
            empty_s, full_s = answer_of(answer, name)
            found = f"round trip {empty_s * 1e3:.1f} ms, with {_CALL_BYTES // 1000} kB {full_s * 1e3:.1f} ms"
            return Finding(name=name, passed=True, found=found)
    remedy = "open Ray's ports between the two, both ways"
    return Finding(name=name, passed=False, found="no call got through in time", remedy=remedy)


def _ended(calls: dict[Any, str], timeout_s: float) -> dict[str, Any]:
    """Return the calls that have ended in time, by their names; one that cannot be placed waits for ever."""
    import ray

    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    return {calls[call]: call for call in done}


def try_store(url: str) -> tuple[Finding, ...]:
    """Can a blob be written, read and deleted?"""
    from actors.store import check_store, open_store

    began_s = time.monotonic()
    store = open_store(url)
    check_store(store)
    found = f"{store.url}: written, read and deleted in {time.monotonic() - began_s:.2f} s"
    return (Finding(name="store", passed=True, found=found),)


def try_data(location: str) -> tuple[Finding, ...]:
    """Are the shards what their manifest says? As many are hashed as time allows."""
    from actors.spec import DataConfig
    from actors.token_shards import SPLITS, DataManifest, SplitTokens

    manifest = DataManifest.load(location)
    cache = Path(DataConfig().cache).expanduser()
    stop_s = time.monotonic() + _HASHING_S
    num_checked = 0
    for split in SPLITS:
        tokens = SplitTokens(location, manifest, split, cache=cache, vocab_size=manifest.vocab_size)
        start = 0
        for shard in manifest.split_shards(split):
            if time.monotonic() > stop_s:
                break
            # The first touch of a shard checks its size, its hash and its largest token.
            tokens.read(start, start + 1)
            start += shard.num_tokens
            num_checked += 1
    total = len(manifest.shards)
    sound = f"all {total} shards are sound" if num_checked == total else f"{num_checked} of {total} shards are sound"
    found = (
        f"{manifest.num_tokens('train'):,} training and {manifest.num_tokens('val'):,} held-out tokens, vocabulary "
        f"{manifest.vocab_size:,}; {sound}"
    )
    advice = "" if num_checked == total else "the others were not looked at, for want of time"
    return (Finding(name="data", passed=True, found=found, remedy=advice),)
