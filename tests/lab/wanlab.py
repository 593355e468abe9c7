"""A wide-area network on one machine: hosts in network namespaces, joined by shaped paths.

    with WanLab([Host(cpus=0.5)] * 3, Path(rate_mbps=80, delay_ms=25)) as lab:
        server = lab.popen(0, ["python3", "-m", "http.server"])
        lab.run(1, ["curl", lab.address(0) + ":8000"], timeout_s=10)
        lab.set_path(0, 1, Path(rate_mbps=10, delay_ms=100))  # a link that degrades
        lab.cut({2})  # a partition; heal() mends it

Every host is a namespace of its own, so labs side by side, and hosts of one lab, may use the same ports; commands on it
see its own host name.
The shaping is done by wanswitch.c beside this file, in user space: the kernel needs namespaces and TUN,
not netem. One core of it carries about 0.5 Gbit/s of 1,500-byte frames, which bounds unlimited paths.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path as File
from types import TracebackType
from typing import Any

from actors.errors import IsthmusError
from tests.lab.cpushare import PROCESSES, cgroup, cpu_share, join

SWITCH_SOURCE = File(__file__).with_name("wanswitch.c")
TUN_DEVICE = File("/dev/net/tun")
NAMESPACES = File("/run/netns")
FOLDERS = File("/tmp")  # not TMPDIR: what lies inside holds unix sockets, whose paths end at 107 characters
SYSCTLS = File("/proc/sys/net/ipv4")
TIMEOUT_S = 10.0  # for every wait on the switch, the kernel or a killed process: each takes milliseconds
POLL_S = 0.02


class LabError(IsthmusError):
    """The lab, or something in it, did not do as asked."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """One direction of a path: Mbit/s (0: unlimited), one-way milliseconds, lost share of frames."""

    rate_mbps: float = 0.0
    delay_ms: float = 0.0
    loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host: its link to the network (0: unlimited), its cores (0: all), its TCP congestion control.

    `cpus` is a share of this machine's cores, 0.25 for a quarter of one; it binds all that runs on the host, or
    without `binds_all` only what `WanLab.bind` names. An empty `congestion_control` keeps the kernel's default. With
    `idle_restart`, as Linux has it, a connection that pauses starts slowly again (tcp_slow_start_after_idle).
    """

    uplink_mbps: float = 0.0
    downlink_mbps: float = 0.0
    cpus: float = 0.0
    congestion_control: str = ""
    idle_restart: bool = True
    binds_all: bool = True


def missing() -> str:
    """What this machine lacks for a lab, as the reason for a skip; empty where a lab can start."""
    if os.geteuid() != 0:
        return "root is missing"
    for tool in ("ip", "gcc", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is missing"
    try:
        os.close(os.open(TUN_DEVICE, os.O_RDWR))
    except OSError as error:
        return f"{TUN_DEVICE} is missing: {error.strerror}"
    probe = _probe_name()
    added = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=TIMEOUT_S)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=TIMEOUT_S)
    return f"the right to add network namespaces is missing: {added.stderr}" if added.returncode else ""


def missing_for_cpus() -> str:
    """What this machine lacks for `Host.cpus`, as the reason for a skip; empty where shares are enforced."""
    probe = cgroup(_probe_name())
    try:
        with cpu_share(probe, 0.5):
            return ""
    except OSError as error:
        return f"a writable cpu cgroup is missing: {error}"


def congestion_controls() -> list[str]:
    """The TCP congestion controls that this kernel has at hand."""
    return (SYSCTLS / "tcp_available_congestion_control").read_text().split()


class WanLab:
    """The hosts and the network between them, from `with` to its end; not for several threads at once.

    `path` is that of every ordered pair of hosts, or a function of (source, target).
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        path: Path | Callable[[int, int], Path] = Path(),
    ) -> None:
        self.hosts = tuple(hosts)
        pairs = [(i, j) for i in range(len(hosts)) for j in range(len(hosts)) if i != j]
        self._paths = {pair: path if isinstance(path, Path) else path(*pair) for pair in pairs}
        self._cut: frozenset[int] = frozenset()
        self._processes: list[subprocess.Popen[Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> WanLab:
        sweep()
        with ExitStack() as stack:
            self.folder = File(tempfile.mkdtemp(prefix=f"wanlab-{os.getpid()}-", dir=FOLDERS))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.netns = [f"{self.folder.name}-{host}" for host in range(len(self.hosts))]
            # Networks of two labs never meet; subnets differ so that logs and captures tell them apart.
            mark = zlib.crc32(self.folder.name.encode())
            self._subnet = f"10.{mark >> 8 & 255}.{mark & 255}"
            for name, host in zip(self.netns, self.hosts, strict=True):
                if host.cpus:
                    stack.enter_context(cpu_share(cgroup(name), host.cpus))
                _ip("netns", "add", name)
                stack.callback(_delete_netns, name)
            self._switch = self._start_switch()
            stack.callback(self._end_switch)
            self._read_until("ready\n")  # every host has its device
            for index in range(len(self.hosts)):
                self._bring_up(index)
            stack.callback(self._end_processes)
            self._shape()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def address(self, host: int) -> str:
        """The IPv4 address of a host."""
        return f"{self._subnet}.{host + 1}"

    def hostname(self, host: int) -> str:
        """The name that a host gives itself."""
        return f"host-{host}"

    def popen(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a host, in a session of its own; it ends with the lab at the latest."""
        process = subprocess.Popen(self._inside(host, command), start_new_session=True, **options)
        self._processes.append(process)
        return process

    def run(
        self, host: int, command: Sequence[str], *, timeout_s: float, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command on a host; raises `subprocess.TimeoutExpired` past the deadline."""
        return subprocess.run(self._inside(host, command), timeout=timeout_s, **options)

    def open_socket(self, host: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """An IPv4 socket of this process that lives on a host's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as home, open(NAMESPACES / self.netns[host]) as there:
            # A socket stays in the namespace where it is made, and only this thread moves.
            if libc.setns(there.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns into the host's network")
            try:
                return socket.socket(socket.AF_INET, kind)
            finally:
                if libc.setns(home.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns back home")

    def pids(self, host: int) -> list[int]:
        """Every process on a host, daemons included."""
        return _pids(self.netns[host])

    def bind(self, host: int, pid: int) -> None:
        """Let a process, with all its threads and whatever it starts from now on, have the host's cores only."""
        join(cgroup(self.netns[host]), pid)

    def power_off(self, host: int) -> None:
        """Kill every process on a host at once; cut it first where peers are to see silence, not resets."""
        _kill(lambda: self.pids(host), f"host {host}")

    def end(self, host: int, process: subprocess.Popen[Any]) -> None:
        """Kill what `popen` started on a host with all its descendants there, orphans included."""

        def session() -> Iterator[int]:
            for pid in self.pids(host):
                with suppress(ProcessLookupError):
                    if os.getsid(pid) == process.pid:
                        yield pid

        _end(process)
        _kill(session, f"{process.args} on host {host}")

    def set_path(self, source: int, target: int, path: Path, *, both: bool = True) -> None:
        """Change a path, by default in both directions; it holds for all frames after the return."""
        self._paths[source, target] = path
        if both:
            self._paths[target, source] = path
        self._shape()

    def cut(self, hosts: Iterable[int]) -> None:
        """Cut these hosts off from all others, frames on their way included; they still reach one another."""
        self._cut = frozenset(hosts)
        self._shape()

    def heal(self) -> None:
        """Undo the cut."""
        self.cut(())

    def delivered(self) -> Mapping[tuple[int, int], int]:
        """Bytes delivered so far on each path that has had traffic, Ethernet headers included."""
        counts: dict[tuple[int, int], int] = {}
        for line in self._ask(["report"]).splitlines():
            _, source, target, _, _, _, size_bytes, _, _ = line.split()
            counts[int(source), int(target)] = int(size_bytes)
        return counts

    def _inside(self, host: int, command: Sequence[str]) -> list[str]:
        # A name of its own, as a machine has: of one name are what shares its cores.
        name = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
        inside = ["ip", "netns", "exec", self.netns[host], "unshare", "--uts", "sh", "-c", name, self.hostname(host)]
        inside += command
        if not self.hosts[host].cpus or not self.hosts[host].binds_all:
            return inside
        # The shell joins the cgroup, then becomes the command: nothing runs outside its share.
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(cgroup(self.netns[host]) / PROCESSES), *inside]

    def _start_switch(self) -> subprocess.Popen[bytes]:
        program = self.folder / "wanswitch"
        subprocess.run(["gcc", "-O2", "-o", program, SWITCH_SOURCE], check=True, timeout=60)
        pipe = subprocess.PIPE
        switch = subprocess.Popen([program, *self.netns], bufsize=0, stdin=pipe, stdout=pipe)
        with suppress(PermissionError):
            # Before all else on this machine, where that is allowed: a switch that comes late is a slower network.
            os.sched_setscheduler(switch.pid, os.SCHED_RR, os.sched_param(1))
        return switch

    def _end_switch(self) -> None:
        _end(self._switch)
        for pipe in (self._switch.stdin, self._switch.stdout):
            assert pipe is not None
            pipe.close()

    def _bring_up(self, host: int) -> None:
        inside = ("-n", self.netns[host])
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "link", "set", "wan0", "address", f"02:00:00:00:00:{host + 1:02x}")
        _ip(*inside, "addr", "add", f"{self.address(host)}/24", "dev", "wan0")
        _ip(*inside, "link", "set", "wan0", "txqueuelen", "1000", "up")
        if name := self.hosts[host].congestion_control:
            if name not in congestion_controls():
                raise LabError(
                    f"host {host} cannot have TCP congestion control {name}",
                    f"choose one of {', '.join(congestion_controls())}",
                )
            with _allowed(name):
                self._set(host, "tcp_congestion_control", name)
        self._set(host, "tcp_slow_start_after_idle", str(int(self.hosts[host].idle_restart)))

    def _set(self, host: int, sysctl: str, value: str) -> None:
        self.run(host, ["sh", "-c", f'echo "$0" > {SYSCTLS / sysctl}', value], timeout_s=TIMEOUT_S, check=True)

    def _shape(self) -> None:
        lines: list[str] = []
        for index, host in enumerate(self.hosts):
            lines += [f"up {index} {host.uplink_mbps}", f"down {index} {host.downlink_mbps}"]
        for (i, j), path in self._paths.items():
            if (i in self._cut) != (j in self._cut):
                path = replace(path, loss=1.0)
            lines.append(f"path {i} {j} {path.rate_mbps} {path.delay_ms} {path.loss}")
        self._ask(lines)

    def _ask(self, lines: Sequence[str]) -> str:
        """Has the switch obey these lines, and returns what it said."""
        assert self._switch.stdin is not None
        text = "".join(f"{line}\n" for line in [*lines, "sync"]).encode()
        with suppress(BrokenPipeError):  # reading tells that the switch has ended
            while text:
                text = text[self._switch.stdin.write(text) :]
        return self._read_until("done\n")

    def _read_until(self, end: str) -> str:
        assert self._switch.stdout is not None
        deadline_s, said = time.monotonic() + TIMEOUT_S, ""
        while not said.endswith(end):
            left_s = max(0.0, deadline_s - time.monotonic())
            ready, _, _ = select.select([self._switch.stdout], [], [], left_s)
            if not ready:
                raise LabError(
                    f"wanswitch did not say {end.strip()} in {TIMEOUT_S:.0f} s", "look at the load with `top`"
                )
            if not (more := self._switch.stdout.read(65536)):
                raise LabError("wanswitch has ended", "see its last words on standard error")
            said += more.decode()
        return said.removesuffix(end)

    def _end_processes(self) -> None:
        for process in self._processes:
            _end(process)


def sweep() -> None:
    """Remove what labs of dead processes left: a lab that was killed could not clean up after itself."""
    for path in [*NAMESPACES.glob("wanlab-*"), *FOLDERS.glob("wanlab-*")]:
        owner = re.fullmatch(r"wanlab-(\d+)-\w{8}(-\d+)?", path.name)
        if owner is None or File(f"/proc/{owner[1]}").exists():
            continue
        if path.parent == FOLDERS:
            shutil.rmtree(path, ignore_errors=True)
        else:
            _delete_netns(path.name)
            with suppress(OSError):  # it had none, or another lab is sweeping too
                cgroup(path.name).rmdir()


def _probe_name() -> str:
    """Named as a lab's host is, so that `sweep` knows it."""
    return f"wanlab-{os.getpid()}-00probe0-0"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}", "see what `missing()` says")


def _pids(netns: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True, timeout=TIMEOUT_S)
    return [int(pid) for pid in listed.stdout.split()]


def _delete_netns(netns: str) -> None:
    _kill(lambda: _pids(netns), netns)
    # Quiet where it is gone already: a lab beside this one may be sweeping too.
    subprocess.run(["ip", "netns", "del", netns], capture_output=True, timeout=TIMEOUT_S)


def _end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait(TIMEOUT_S)


def _kill(find: Callable[[], Iterable[int]], whose: str) -> None:
    """Kill what `find` finds, again and again, since what it finds may be forking, until it finds nothing."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while pids := list(find()):
        if time.monotonic() > deadline_s:
            raise LabError(f"processes {pids} of {whose} outlive SIGKILL", "look for them with `ps`")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        time.sleep(POLL_S)


@contextmanager
def _allowed(congestion_control: str) -> Iterator[None]:
    """Namespaces may choose only what the kernel allows everyone; once chosen it stays, allowed or not."""
    setting = SYSCTLS / "tcp_allowed_congestion_control"
    before = setting.read_text()
    if congestion_control in before.split():
        yield
        return
    setting.write_text(f"{before.strip()} {congestion_control}")
    try:
        yield
    finally:
        setting.write_text(before)
