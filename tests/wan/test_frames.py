"""Frames cross a thin link about as fast as its rate and delay allow, alone and in a row, at little cost.

The whole way is timed: encode, chunks, Ray's actor call, TCP, mailbox, decode. Physics here is what the lab's path
carries: its delay, and its rate over every byte of the frame's Ethernet frames, our chunk headers included. TCP is
warm, as it is while training: the first frame on a new connection is shown, not judged.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass

import pytest

from orchestrator.environment import RAY_SETTINGS
from tests.lab.raycluster import RayCluster
from tests.lab.wanlab import Host, Path, WanLab

pytestmark = [pytest.mark.wan, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

RATE_MBPS, DELAY_MS = 50.0, 25.0
DRIVER_TIMEOUT_S = 120.0
# An MTU of 1,500 holds 1,448 bytes of a stream beside IP's and TCP's headers and timestamps; Ethernet adds 14.
ETHERNET_SHARE = 1514 / 1448


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One case, as tests.wan.frame_driver prints it."""

    name: str
    codec: str
    payload_bytes: int
    num_frames: int
    chunk_bytes: int
    window_bytes: int
    one_by_one: bool
    wire_bytes: int
    one_way_s: list[float]
    first_to_last_s: float
    send_s: float
    cpu_s: float

    @property
    def on_link_s(self) -> float:
        """What one frame occupies the link for."""
        return self.wire_bytes * ETHERNET_SHARE * 8e-6 / RATE_MBPS

    @property
    def slowdown(self) -> float:
        """The median one-way time over what physics asks."""
        return statistics.median(self.one_way_s) / (DELAY_MS * 1e-3 + self.on_link_s)

    @property
    def link_share(self) -> float:
        """The share of the link's rate that frames in a row got."""
        return (self.num_frames - 1) * self.on_link_s / self.first_to_last_s

    @property
    def cpu_ms_per_mb(self) -> float:
        """CPU time of both ends' processes, all threads."""
        return self.cpu_s * 1e9 / (self.payload_bytes * self.num_frames)

    def row(self) -> str:
        median_ms = statistics.median(self.one_way_s) * 1e3
        physics_ms = DELAY_MS + self.on_link_s * 1e3
        timed = (
            f"one way {median_ms:6.1f} ms, physics {physics_ms:6.1f} ms, {self.slowdown:4.2f}x"
            if self.one_by_one
            else f"{self.num_frames} frames in a row: {self.link_share:.0%} of the link's rate"
        )
        return f"{self.name:8}{self.codec:5}{self.payload_bytes:>10,} B  {timed:51} CPU {self.cpu_ms_per_mb:5.1f} ms/MB"


@pytest.fixture(scope="module")
def timed() -> list[Timed]:
    # Cubic is the usual default, so a host need not be tuned for these times.
    hosts = [Host(congestion_control="cubic")] * 3
    with WanLab(hosts, Path(rate_mbps=RATE_MBPS, delay_ms=DELAY_MS)) as lab, RayCluster(lab, env=RAY_SETTINGS) as ray:
        addresses = [lab.address(host) for host in range(len(hosts))]
        done = ray.run_driver(["-m", "tests.wan.frame_driver", str(RATE_MBPS), *addresses], timeout_s=DRIVER_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return [Timed(**json.loads(line)) for line in done.stdout.splitlines()]


def test_frames_take_what_the_link_takes(timed: list[Timed], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        title = f"\n\n{RATE_MBPS:.0f} Mbit/s, {DELAY_MS:.0f} ms one way, chunks of {timed[0].chunk_bytes:,} B\n"
        sys.stdout.write(title + "".join(f"{case.row()}\n" for case in timed))
    warm = [case for case in timed if case.name == "warm"]
    assert {(case.codec, case.payload_bytes) for case in warm} == {
        (codec, size) for codec in ("none", "bf16") for size in (200_000, 1_000_000, 4_000_000)
    }
    # Nothing beats physics: a frame that did would show that the lab or the clocks are not what they seem.
    assert all(0.99 < case.slowdown < 1.15 for case in warm), [case.row() for case in warm]


def test_frames_in_a_row_fill_the_link_without_holding_up_the_sender(timed: list[Timed]) -> None:
    streams = [case for case in timed if case.name == "stream"]
    assert len(streams) == 2
    for stream in streams:
        assert 0.85 < stream.link_share < 1.01, stream.row()
        # Queueing all of them takes next to none of the time that the link needs: compute goes on meanwhile.
        assert stream.send_s < 0.05 * stream.first_to_last_s
        # Measured: 20 to 50, most of it the kernel's and gRPC's work on single packets.
        assert stream.cpu_ms_per_mb < 120
