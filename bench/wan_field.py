"""Where a case of bench.wan runs: a lab with Ray and torch's ranks on the same hosts, one of them at work at a time.

A host's cores bind what computes: Isthmus's node actors and torch's ranks. Ray's daemons, the driver and the switch
run beside them, and what they take is reported.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any

from actors.fleet_spec import Fleet
from actors.probe_cache import cache_file
from actors.spec import Plan
from bench.wan_cases import BATCH, Case, Route
from orchestrator.config import RunConfig, parse_config
from orchestrator.environment import RAY_SETTINGS
from orchestrator.events import History, decode, read_history
from orchestrator.planner.problem import even_sizes
from orchestrator.runfolder import RunFolder
from tests.lab.cpushare import cpu_s
from tests.lab.raycluster import REPOSITORY, RayCluster
from tests.lab.wanlab import NAMESPACES, Host, LabError, WanLab

START_TIMEOUT_S = 240.0
SAMPLE_S = 0.5
# Ray's daemons go on loading after they answer. Hosts are settled once they take less than this of a core, for so long.
SETTLED_SHARE, SETTLED_FOR_S, SETTLE_TIMEOUT_S = 0.25, 3.0, 120.0
# For what a driver that has ended still has to say.
LAST_WORDS_S = 30.0
TORCH_PORT = 29_500
# Under the folder with the data: kernels and probes of these runs alone.
CACHE = "cache"
# What Ray names a process whose actor is one of ours.
ACTOR_TITLE = b"ray::NodeActor"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run of Isthmus left, and what its processes took of the cores, as shares of one."""

    history: History
    plan: Plan
    fleet: Fleet
    config: RunConfig
    # Zeros of a run that was only read.
    driver_share: float = 0.0
    actors_share: float = 0.0
    # Ray's own processes on all hosts, and whatever else runs there.
    daemons_share: float = 0.0
    # What others on the same machine took of its cores, in cores, as its hypervisor says.
    stolen_share: float = 0.0


def read_run(folder: RunFolder) -> Run:
    """Return what a run left in its folder."""
    return Run(
        history=read_history(folder.events),
        plan=decode(Plan, json.loads(folder.plan.read_text())),
        fleet=decode(Fleet, json.loads(folder.fleet.read_text())),
        config=parse_config(folder.config.read_text()),
    )


def run_folder(folder: File, case: Case, name: str) -> RunFolder:
    """Return where a run of a case lies, under the folder with the data."""
    return RunFolder(folder / "runs" / f"{case.name}-{name}")


class Field:
    """The hosts of a case with everything that runs on them."""

    def __init__(self, case: Case, num_microbatches: int, folder: File, lab: WanLab, cluster: RayCluster) -> None:
        self.case = case
        self.num_microbatches = num_microbatches
        self._folder = folder
        self.lab = lab
        self._cluster = cluster
        self._split = case.split or even_sizes(case.num_layers, case.num_stages)
        self._torch: TorchRanks | None = None

    @property
    def data(self) -> File:
        return self._folder / "data"

    def route(self, route: Route | None) -> None:
        """Join hosts of different regions by this route; None: everything is unlimited."""
        for source in range(self.case.num_stages):
            for target in range(self.case.num_stages):
                if source < target:
                    is_same = self.case.regions[source] == self.case.regions[target]
                    self.lab.set_path(source, target, self.case.near if is_same or route is None else route)

    def run(
        self,
        name: str,
        words: Sequence[str],
        *,
        num_steps: int,
        timeout_s: float,
        reroute: tuple[int, Route | None] | None = None,
    ) -> Run:
        """Run Isthmus, and return what it left; raises LabError where it fails.

        `reroute` gives hosts another route once so many steps have ended.
        """
        # What another run's probe measured holds within 15%: too rough to be held against.
        (self._folder / CACHE / cache_file().name).unlink(missing_ok=True)
        # A run of this name that is there would be gone on with.
        folder = run_folder(self._folder, self.case, name)
        name = folder.path.name
        command = [
            *("-m", "orchestrator.cli", "train", "--address", self._cluster.address),
            *self._common_words(),
            *(f"name={name}", f"train.steps={num_steps}"),
            *words,
        ]
        driver = self._cluster.start_driver(command)
        watch = Watch(self.lab, driver.pid, folder.events)
        deadline_s = time.monotonic() + timeout_s
        try:
            while driver.poll() is None and time.monotonic() < deadline_s:
                watch.look()
                if reroute is not None and watch.num_steps >= reroute[0]:
                    self.route(reroute[1])
                    reroute = None
                time.sleep(watch.pause_s)
            is_late = driver.poll() is None
        finally:
            driver.kill()
        said = driver.communicate(timeout=LAST_WORDS_S)
        if driver.returncode:
            how = f"was not done within {timeout_s:.0f} s" if is_late else "failed"
            raise LabError(f"{name} {how}: {' '.join(said)[-1500:].strip()}", "run it again")
        return replace(read_run(folder), **watch.shares())

    def torch_step(self, schedule: str, step: int, num_microbatches: int, timeout_s: float) -> dict[str, Any]:
        """Run one step over torch's ranks; its seconds are from the first rank's start to the last one's end."""
        if self._torch is None:
            self._torch = TorchRanks(self.lab, self.case, self._split, self.data)
        order = {"schedule": schedule, "step": step, "num_microbatches": num_microbatches}
        answers = self._torch.ask(order, timeout_s)
        return {
            "step_s": [max(a["ended_s"] for a in answers) - min(a["began_s"] for a in answers)],
            "cpu_s": [a["cpu_s"] for a in answers],
            "loss": answers[-1]["loss"],
        }

    def _common_words(self) -> list[str]:
        return [
            *(f"runs_dir={self._folder / 'runs'}", f"data.path={self.data}", "data.document_mask=false"),
            *(f"model.{key}={value}" for key, value in asdict(self.case.model).items() if value is not None),
            *(f"batch.{key}={value}" for key, value in (BATCH | {"num_microbatches": self.num_microbatches}).items()),
            *("train.eval_every=0", "train.eval_microbatches=1", "checkpoints.every_steps=0"),
            *("fleet.threads=1", "wire.canary_every=0", f"plan.stages={self.case.num_stages}"),
            *("tracking.wandb=disabled", "tracking.picture_every=1"),
        ]


@contextmanager
def open_field(case: Case, num_microbatches: int, folder: File) -> Iterator[Field]:
    """Start the hosts of a case and Ray on them; `folder` has the data and gets the runs."""
    hosts = [
        Host(
            cpus=cpus,
            congestion_control=case.congestion_control,
            idle_restart=case.idle_restart,
            binds_all=False,
        )
        for cpus in case.cpus
    ]
    env = {**RAY_SETTINGS, "ISTHMUS_CACHE": str(folder / CACHE)}
    regions = {host: {"region": f"region-{region}"} for host, region in enumerate(case.regions)}
    with (
        WanLab(hosts) as lab,
        RayCluster(lab, labels=regions, env=env, start_timeout_s=START_TIMEOUT_S) as cluster,
    ):
        settle(lab)
        yield Field(case, num_microbatches, folder, lab, cluster)


def settle(lab: WanLab) -> None:
    """Wait until what runs on the hosts leaves their cores to what is measured; LabError where it does not."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        before_s, began_s = _hosts_cpu_s(lab), time.monotonic()
        time.sleep(SETTLED_FOR_S)
        # What ended meanwhile would count as less than nothing.
        taken_s = sum(max(0.0, seconds - before_s.get(pid, 0.0)) for pid, seconds in _hosts_cpu_s(lab).items())
        if taken_s < SETTLED_SHARE * (time.monotonic() - began_s):
            return
    raise LabError(f"hosts are still busy after {SETTLE_TIMEOUT_S:.0f} s", "see what runs on this machine with `top`")


def _hosts_cpu_s(lab: WanLab) -> dict[int, float]:
    return {pid: _cpu_s(pid) for host in range(len(lab.hosts)) for pid in lab.pids(host)}


class TorchRanks:
    """A rank of torch.distributed.pipelining on each host; they wait for orders."""

    def __init__(self, lab: WanLab, case: Case, split: Sequence[int], data: File) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        for rank in range(case.num_stages):
            spec = {
                "rank": rank,
                "split": split,
                "address": lab.address(0),
                "port": TORCH_PORT,
                "timeout_s": 3600.0,
                "model": asdict(case.model),
                "batch": BATCH,
                "data": str(data),
            }
            command = [sys.executable, "-m", "bench.wan_torch", json.dumps(spec)]
            pipe = subprocess.PIPE
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "wan0", "PYTHONPATH": str(REPOSITORY)}
            self._processes.append(lab.popen(rank, command, stdin=pipe, stdout=pipe, env=env, text=True))
        # They build their stages with all of the machine's cores, and work with their host's.
        self._answers(START_TIMEOUT_S)
        for rank, process in enumerate(self._processes):
            lab.bind(rank, process.pid)

    def ask(self, order: Mapping[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        """Give all ranks an order and return their answers; LabError where one does not come."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        return self._answers(timeout_s)

    def _answers(self, timeout_s: float) -> list[dict[str, Any]]:
        deadline_s = time.monotonic() + timeout_s
        answers: list[dict[str, Any]] = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
            line = process.stdout.readline() if ready else ""
            if not line:
                raise LabError(f"rank {rank} of torch did not answer within {timeout_s:.0f} s", "see its errors above")
            answers.append(json.loads(line))
        return answers


class Watch:
    """Binds node actors to their hosts' cores as they appear, and adds up what each kind of process takes."""

    def __init__(self, lab: WanLab, driver_pid: int, events: File) -> None:
        self._lab = lab
        self._driver_pid = driver_pid
        self._events = events
        self._hosts = {os.stat(NAMESPACES / name).st_ino: host for host, name in enumerate(lab.netns)}
        self._bound: set[int] = set()
        self._torch = {p for host in range(len(lab.hosts)) for p in lab.pids(host) if _title(p).find(b"wan_torch") >= 0}
        # When, and CPU seconds of driver, actors, daemons and other machines, from the first step's end to the last's.
        self._samples: list[tuple[float, float, float, float, float]] = []
        self._size = 0
        self.num_steps = 0

    @property
    def pause_s(self) -> float:
        """How long to wait for the next look: little until all actors are bound."""
        return SAMPLE_S if len(self._bound) >= len(self._hosts) else SAMPLE_S / 10

    def shares(self) -> dict[str, float]:
        """Return what the driver, the actors and the daemons took of a core while steps ran, and what was stolen."""
        first, last = (self._samples[0], self._samples[-1]) if self._samples else ((0.0,) * 5, (0.0,) * 5)
        took_s = max(last[0] - first[0], 1e-9)
        names = ("driver_share", "actors_share", "daemons_share", "stolen_share")
        return {name: (last[i] - first[i]) / took_s for i, name in enumerate(names, start=1)}

    def look(self) -> None:
        """Bind what is new, and see whether a step has ended."""
        daemons = self._bind()
        size = self._events.stat().st_size if self._events.exists() else 0
        if size == self._size:
            return
        self._size = size
        num_steps = len(read_history(self._events).steps)
        if num_steps > self.num_steps:
            self.num_steps = num_steps
            with suppress(ProcessLookupError):
                driver_s = cpu_s(self._driver_pid)
                actors_s = sum(cpu_s(pid) for pid in self._bound)
                self._samples.append((time.monotonic(), driver_s, actors_s, sum(map(_cpu_s, daemons)), _stolen_s()))

    def _bind(self) -> list[int]:
        """Bind new actors; return the other processes of all hosts."""
        others: list[int] = []
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            with suppress(OSError):
                host = self._hosts.get(os.stat(f"/proc/{pid}/ns/net").st_ino)
                if host is None or pid in self._torch or pid == self._driver_pid:
                    continue
                if not _title(pid).startswith(ACTOR_TITLE):
                    others.append(pid)
                elif pid not in self._bound:
                    self._lab.bind(host, pid)
                    self._bound.add(pid)
        return others


def _stolen_s() -> float:
    """Return the CPU seconds that were wanted here and went to other machines on the same hardware, over all cores."""
    fields = File("/proc/stat").read_text().split("\n", 1)[0].split()
    # "cpu", user, nice, system, idle, iowait, irq, softirq, steal.
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def _title(pid: int) -> bytes:
    try:
        return File(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _cpu_s(pid: int) -> float:
    with suppress(ProcessLookupError):
        return cpu_s(pid)
    return 0.0
