"""The lab is what it says: delays, rates, losses, cuts and shares are those asked for, and nothing is left.

The machine may be shared, so bounds are one-sided where load can only push one way: load adds to a round
trip and takes from a rate, but nothing makes a path faster than asked.
"""

import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path as File

import pytest

from tests.lab.raycluster import RayCluster
from tests.lab.wanlab import (
    FOLDERS,
    NAMESPACES,
    Host,
    LabError,
    Path,
    WanLab,
    congestion_controls,
    missing_for_cpus,
)

pytestmark = pytest.mark.wan

PORT = 9000
TIMEOUT_S = 10.0
ETHERNET_IP_UDP_BYTES = 14 + 20 + 8


class Datagrams:
    """Traffic from host 1 to host 0, and the answers to it."""

    def __init__(self, lab: WanLab, server: socket.socket, client: socket.socket) -> None:
        self._server, self._client = server, client
        self._server.bind((lab.address(0), PORT))
        self._client.connect((lab.address(0), PORT))
        self.await_path()

    def await_path(self) -> None:
        """Send until something comes through: a first frame also waits for the address to be resolved."""
        deadline_s = time.monotonic() + TIMEOUT_S
        self.send(b"first")
        while not self.arrivals():
            assert time.monotonic() < deadline_s, "host 1 does not reach host 0"
            self.send(b"first")

    def send(self, payload: bytes) -> None:
        self._client.send(payload)

    def arrivals(self, wait_s: float = 0.2) -> Counter[bytes]:
        """The payloads that arrive until none has for `wait_s`."""
        self._server.settimeout(wait_s)
        payloads: Counter[bytes] = Counter()
        with suppress(TimeoutError):
            while True:
                payloads[self._server.recv(2048)] += 1
        return payloads

    def round_trip_ms(self) -> float:
        """The fastest of five round trips: load delays single ones by tens of milliseconds."""
        self._server.settimeout(TIMEOUT_S)
        self._client.settimeout(TIMEOUT_S)
        times_ms: list[float] = []
        for _ in range(5):
            start_s = time.perf_counter()
            self.send(b"ping")
            payload, sender = self._server.recvfrom(2048)
            self._server.sendto(payload, sender)
            self._client.recv(2048)
            times_ms.append(1e3 * (time.perf_counter() - start_s))
        return min(times_ms)


@contextmanager
def datagrams(lab: WanLab) -> Iterator[Datagrams]:
    kind = socket.SOCK_DGRAM
    with lab.open_socket(0, kind) as server, lab.open_socket(1, kind) as client:
        yield Datagrams(lab, server, client)


def tcp_mbps(lab: WanLab, source: int, target: int) -> float:
    """What TCP carries from source to target once it has found the rate, in payload Mbit/s."""
    warm_up_s, measured_s, size_bytes = 0.5, 1.5, 0
    with lab.open_socket(target) as listener, lab.open_socket(source) as sender:
        listener.bind((lab.address(target), PORT))
        listener.listen()
        sender.settimeout(TIMEOUT_S)
        sender.connect((lab.address(target), PORT))
        sender.setblocking(False)
        receiver, _ = listener.accept()
        with receiver:
            start_s = time.monotonic()
            while (elapsed_s := time.monotonic() - start_s) < warm_up_s + measured_s:
                readable, writable, _ = select.select([receiver], [sender], [], TIMEOUT_S)
                assert readable or writable, "the connection has stalled"
                if writable:
                    sender.send(bytes(65536))
                if readable:
                    size_bytes += len(receiver.recv(1 << 20)) * (elapsed_s > warm_up_s)
    return size_bytes * 8e-6 / measured_s


def test_a_round_trip_takes_the_delay_both_ways() -> None:
    with WanLab([Host()] * 2, Path(delay_ms=25)) as lab, datagrams(lab) as traffic:
        assert 50 <= traffic.round_trip_ms() < 56


def test_a_path_changes_while_in_use() -> None:
    with WanLab([Host()] * 2, Path(delay_ms=5)) as lab, datagrams(lab) as traffic:
        assert 10 <= traffic.round_trip_ms() < 16
        lab.set_path(0, 1, Path(delay_ms=40))
        assert 80 <= traffic.round_trip_ms() < 86
        lab.set_path(0, 1, Path(delay_ms=10), both=False)
        assert 50 <= traffic.round_trip_ms() < 56


@pytest.mark.parametrize(
    ("hosts", "path"),
    [
        ([Host(), Host()], Path(rate_mbps=50, delay_ms=5)),
        ([Host(), Host(uplink_mbps=50)], Path(delay_ms=5)),
        ([Host(downlink_mbps=50), Host()], Path(delay_ms=5)),
    ],
    ids=["path", "uplink", "downlink"],
)
def test_tcp_gets_the_rate_of_the_narrowest_part(hosts: list[Host], path: Path) -> None:
    with WanLab(hosts, path) as lab:
        # Headers take 4.4% of a full frame, so 47.8 Mbit/s is the most that 50 can carry.
        assert 0.85 <= tcp_mbps(lab, 1, 0) / 50 <= 1.0


def test_a_cut_stops_all_traffic_and_healing_restores_it() -> None:
    with WanLab([Host()] * 3, Path(delay_ms=50)) as lab, datagrams(lab) as traffic:
        traffic.send(b"on its way")
        lab.cut({1})
        traffic.send(b"too late")
        assert not traffic.arrivals()
        lab.cut({0, 1})  # on the same side of a cut
        traffic.await_path()
        lab.cut({1})
        lab.heal()
        traffic.await_path()


def test_loss_drops_its_share() -> None:
    sent, loss = 2000, 0.2
    with WanLab([Host()] * 2) as lab, datagrams(lab) as traffic:
        lab.set_path(1, 0, Path(loss=loss), both=False)
        arrivals: Counter[bytes] = Counter()
        for _ in range(sent // 50):  # in bursts that no buffer on the way is too small for
            for _ in range(50):
                traffic.send(b"counted")
            arrivals += traffic.arrivals(wait_s=0.02)
        arrivals += traffic.arrivals()
        # Five standard deviations of a binomial of 2,000 at 0.2: 5 * sqrt(0.2 * 0.8 / 2000) = 0.045.
        assert abs(1 - arrivals[b"counted"] / sent - loss) < 0.045


def test_delivered_counts_bytes_by_path() -> None:
    with WanLab([Host()] * 2) as lab, datagrams(lab) as traffic:
        before = lab.delivered()
        for _ in range(20):
            traffic.send(bytes(1000))
        assert traffic.arrivals()[bytes(1000)] == 20
        after = lab.delivered()
        # The kernel's own neighbour discovery adds less than 1 kB to 20.8 kB, and all there is the other way.
        assert 0 <= after[1, 0] - before[1, 0] - 20 * (1000 + ETHERNET_IP_UDP_BYTES) < 1000
        assert after.get((0, 1), 0) - before.get((0, 1), 0) < 1000


def test_a_host_gets_its_share_of_a_core() -> None:
    if lacking := missing_for_cpus():
        pytest.skip(lacking)
    spin = (
        "import time\n"
        "wall_s, cpu_s = time.monotonic(), time.process_time()\n"
        "while time.monotonic() < wall_s + 1.5: pass\n"
        "print((time.process_time() - cpu_s) / 1.5)\n"
    )
    with WanLab([Host(cpus=0.25), Host()]) as lab:
        done = lab.run(0, [sys.executable, "-c", spin], timeout_s=30, capture_output=True, text=True)
    # A period of 20 ms more or less is 1% of the whole; other load can only take from the share.
    assert 0.15 < float(done.stdout) < 0.28


def test_hosts_have_names_of_their_own() -> None:
    here = socket.gethostname()
    with WanLab([Host(), Host(cpus=0.5)]) as lab:
        said = [lab.run(h, ["uname", "-n"], timeout_s=TIMEOUT_S, capture_output=True, text=True) for h in range(2)]
        assert [done.stdout.strip() for done in said] == [lab.hostname(0), lab.hostname(1)]
        assert lab.hostname(0) != lab.hostname(1)
    assert socket.gethostname() == here


def test_hosts_choose_their_congestion_control() -> None:
    names = congestion_controls()
    with WanLab([Host(congestion_control=name) for name in names] + [Host()]) as lab:
        for host, name in enumerate(names):
            with lab.open_socket(host) as connection:
                chosen = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            assert chosen.rstrip(b"\0").decode() == name


def test_a_lab_that_cannot_start_says_why_and_leaves_nothing() -> None:
    with pytest.raises(LabError, match="host 1 cannot have TCP congestion control nonesuch"):
        WanLab([Host(), Host(congestion_control="nonesuch")]).__enter__()
    assert _left_by(os.getpid()) == []


def test_labs_stand_side_by_side() -> None:
    with WanLab([Host()] * 2) as one, WanLab([Host()] * 2) as other:
        assert one.address(0) != other.address(0)
        with datagrams(one) as traffic_of_one, datagrams(other) as traffic_of_other:
            one.cut({0})
            traffic_of_one.send(b"one")
            traffic_of_other.send(b"other")
            assert traffic_of_other.arrivals() == {b"other": 1}
            assert not traffic_of_one.arrivals()


def test_powering_off_ends_the_processes_of_that_host_only() -> None:
    with WanLab([Host()] * 2) as lab:
        forking = ["sh", "-c", "sleep 60 & setsid sleep 60 & wait"]
        lost, kept = lab.popen(0, forking), lab.popen(1, forking)
        _await(lambda: len(lab.pids(0)) == len(lab.pids(1)) == 3)
        lab.power_off(0)
        assert lab.pids(0) == []
        assert lost.wait(TIMEOUT_S) == -9
        assert kept.poll() is None
    assert kept.poll() is not None
    assert _left_by(os.getpid()) == []


def test_ending_a_command_ends_its_orphans_and_nothing_else() -> None:
    with WanLab([Host()]) as lab:
        lab.popen(0, ["sleep", "60"])
        process = lab.popen(0, ["sh", "-c", "sleep 60 & exit"])
        assert process.wait(TIMEOUT_S) == 0
        _await(lambda: len(lab.pids(0)) == 2)
        lab.end(0, process)
        assert len(lab.pids(0)) == 1


def test_what_a_killed_lab_left_is_swept_by_the_next() -> None:
    killed = (
        "import os\n"
        "from tests.lab.wanlab import Host, WanLab\n"
        "with WanLab([Host()] * 2) as lab:\n"
        "    lab.popen(1, ['sleep', '60'])\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    repository = File(__file__).parents[2]
    done = subprocess.Popen([sys.executable, "-c", killed], env=os.environ | {"PYTHONPATH": str(repository)})
    assert done.wait(TIMEOUT_S) == -9
    assert len(_left_by(done.pid)) == 3
    with WanLab([Host()]):
        assert _left_by(done.pid) == []
        assert len(_left_by(os.getpid())) == 2  # the living keep theirs
        with WanLab([Host()]):
            assert len(_left_by(os.getpid())) == 4


ACTORS_ON_EVERY_NODE = """
import ray

@ray.remote(num_cpus=0)
class Where:
    def here(self):
        from tests.lab.wanlab import LabError  # workers find the repository's packages
        return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_labels().get("region")

ray.init(log_to_driver=False)
for node in ray.nodes():
    where = Where.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote()
    print(node["NodeManagerAddress"], *ray.get(where.here.remote(), timeout=30))
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_a_ray_cluster_spans_the_hosts_and_leaves_nothing(tmp_path: File) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(ACTORS_ON_EVERY_NODE)
    regions = {0: {"region": "eu"}, 1: {"region": "us"}, 2: {"region": "asia"}}
    with WanLab([Host()] * 3, Path(rate_mbps=100, delay_ms=5)) as lab:
        stranger = lab.popen(1, ["sleep", "60"])
        with RayCluster(lab, hosts=[0, 1], labels=regions) as cluster:
            cluster.start_node(2)
            cluster.await_nodes(3, timeout_s=60)
            done = cluster.run_driver([driver], timeout_s=60)
            assert done.returncode == 0, done.stderr
            address = [lab.address(host) for host in range(3)]
            expected = [f"{address[host]} {address[host]} {regions[host]['region']}" for host in range(3)]
            assert sorted(done.stdout.splitlines()) == sorted(expected)
            with pytest.raises(LabError, match="did not end in 1 s"):
                cluster.run_driver(["-c", "import time; time.sleep(60)"], timeout_s=1)
        assert [lab.pids(host) for host in range(3)] == [[], [stranger.pid], []]
    assert _left_by(os.getpid()) == []


@pytest.mark.cluster
def test_a_ray_cluster_that_comes_too_late_is_cleared_away() -> None:
    with WanLab([Host()] * 2) as lab:
        with pytest.raises(LabError, match="head is not listening"):
            RayCluster(lab, start_timeout_s=0.2).__enter__()
        assert [lab.pids(host) for host in range(2)] == [[], []]


def _left_by(pid: int) -> list[str]:
    """The namespaces and folders that labs of a process have."""
    return [path.name for place in (NAMESPACES, FOLDERS) for path in place.glob(f"wanlab-{pid}-*")]


def _await(holds: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "what the test waits for did not come"
        time.sleep(0.02)
