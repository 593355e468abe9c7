"""What frames take at the socket: bytes that Ray's calls put on the network, beside the bytes handed to the link.

    python -m bench.wire [--quick] [--check]

Two actors on this machine, a link and a mailbox as in training; the loopback's byte counters are read before and after
each codec's frames, less what an idle Ray says in the same time. Both ways: acknowledgements are counted too.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from actors.codecs import CODECS
from actors.frame import wire_bytes
from actors.link import Link, LinkSettings
from actors.mailbox import WIRE_DTYPES, Expectation, Mailbox, Receipt, Verdict
from actors.settings import WireConfig
from actors.spec import Kind, LinkSizes
from bench.record import parse_arguments, save
from orchestrator.environment import prepare_environment

# One microbatch of 1 M elements.
SHAPE_BTD = (4, 256, 1024)
CODEC_NAMES = ("none", "bf16", "q8", "hq4", "hq4-stochastic")
REPLY_SHAPE_BTD = (1, 1, 1)
TIMEOUT_S = 60.0
# What Ray may add to a frame's bytes at the socket.
MOST_OVERHEAD = 0.02


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One codec's frames of SHAPE_BTD, in bytes each."""

    raw_bytes: float
    frame_bytes: float
    socket_bytes: float
    # Of the socket's over the frame's.
    overhead: float
    times_smaller_than_bf16: float


class End:
    """One end: takes frames of one codec and answers each with one element, or sends them."""

    def __init__(self, stage: int) -> None:
        torch.set_num_threads(1)
        self._stage = stage
        self._mailbox: Mailbox | None = None
        self._link: Link | None = None

    def open(self, codec: str, num_frames: int, peer: Any) -> None:
        from actors.node import RayCarrier

        if self._link is not None:
            self._link.close()
        other = 1 - self._stage
        kind, name, shape = Kind.ACTIVATION, codec, SHAPE_BTD
        if self._stage == 0:
            kind, name, shape = Kind.GRADIENT, "none", REPLY_SHAPE_BTD
        expected = Expectation(
            kind=kind, source=other, codec=name, dtype=WIRE_DTYPES[torch.float32], shape=shape, window=num_frames
        )
        self._mailbox = Mailbox(codec, self._stage, num_frames, (expected,))
        self._mailbox.open(generation=1, step=0)
        wire = WireConfig()
        settings = LinkSettings(
            run=codec,
            source=self._stage,
            target=other,
            sizes=LinkSizes(chunk_bytes=wire.max_chunk_bytes, window_bytes=wire.max_window_bytes),
            ack_s=TIMEOUT_S / 2,
            give_up_s=TIMEOUT_S,
        )
        self._link = Link(settings, RayCarrier(f"stage {other}", peer), self._mailbox.fail)

    def receive(self, chunk: bytes) -> Receipt:
        return self._mailbox.offer(chunk) if self._mailbox is not None else Receipt(Verdict.BUSY)

    def send_all(self, codec: str, num_frames: int) -> None:
        tensor_BTD = torch.randn(SHAPE_BTD, generator=torch.Generator().manual_seed(0))
        for microbatch in range(num_frames):
            self._send(tensor_BTD, codec, Kind.ACTIVATION, microbatch)
        for microbatch in range(num_frames):
            self._take(Kind.GRADIENT, microbatch)

    def take_all(self, num_frames: int) -> None:
        for microbatch in range(num_frames):
            self._take(Kind.ACTIVATION, microbatch)
            self._send(torch.zeros(REPLY_SHAPE_BTD), "none", Kind.GRADIENT, microbatch)

    def _send(self, tensor: torch.Tensor, codec: str, kind: Kind, microbatch: int) -> None:
        assert self._link is not None
        self._link.send(tensor, CODECS[codec], kind, generation=1, step=0, microbatch=microbatch)

    def _take(self, kind: Kind, microbatch: int) -> torch.Tensor:
        assert self._mailbox is not None
        return self._mailbox.take(kind, microbatch, timeout_s=TIMEOUT_S, monotonic=time.monotonic)


def loopback_bytes() -> int:
    """Return what this machine has received over its loopback since it started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("/proc/net/dev has no loopback")


def idle_bytes_per_s(seconds: float) -> float:
    """Return what an idle Ray says to itself."""
    before, began_s = loopback_bytes(), time.monotonic()
    time.sleep(seconds)
    return (loopback_bytes() - before) / (time.monotonic() - began_s)


def measure(codec: str, num_frames: int, ends: list[Any], idle_per_s: float) -> Measured:
    """Send frames of one codec from the first end to the second; the counters do the rest."""
    import ray

    ray.get([end.open.remote(codec, num_frames, ends[1 - i]) for i, end in enumerate(ends)], timeout=TIMEOUT_S)
    before, began_s = loopback_bytes(), time.monotonic()
    calls = [ends[1].take_all.remote(num_frames), ends[0].send_all.remote(codec, num_frames)]
    ray.get(calls, timeout=TIMEOUT_S)
    socket_bytes = loopback_bytes() - before - idle_per_s * (time.monotonic() - began_s)
    num_elements = torch.Size(SHAPE_BTD).numel()
    frame_bytes = wire_bytes(CODECS[codec].size_bytes(num_elements, torch.float32), WireConfig().max_chunk_bytes)
    return Measured(
        raw_bytes=4 * num_elements,
        frame_bytes=frame_bytes,
        socket_bytes=socket_bytes / num_frames,
        overhead=socket_bytes / num_frames / frame_bytes - 1,
        times_smaller_than_bf16=2 * num_elements / (socket_bytes / num_frames),
    )


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    prepare_environment(None)
    import ray

    from actors.node import CONCURRENCY_GROUPS
    from orchestrator.fleet import open_ray

    num_frames = 8 if arguments.quick else 32
    with open_ray(None):
        # As a node's: chunks come in beside the calls that send and take. Ray reads its settings when it is imported.
        End.receive = ray.method(concurrency_group="inbox")(End.receive)  # pyright: ignore[reportAttributeAccessIssue]
        ray_end = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(End)  # pyright: ignore[reportCallIssue]
        ends = [ray_end.options(num_cpus=0).remote(stage) for stage in range(2)]
        # The first frames open the connections.
        measure("none", 2, ends, 0.0)
        idle_per_s = idle_bytes_per_s(2.0 if arguments.quick else 10.0)
        measured = {codec: measure(codec, num_frames, ends, idle_per_s) for codec in CODEC_NAMES}
    for codec, result in measured.items():
        print(
            f"{codec}: {result.frame_bytes:,.0f} bytes a frame, {result.socket_bytes:,.0f} at the socket "
            f"(+{result.overhead:.2%}), {result.times_smaller_than_bf16:.3f} times less than bf16's elements"
        )
    save("wire", arguments, {"idle_bytes_per_s": idle_per_s, "frames": {c: asdict(m) for c, m in measured.items()}})
    worst = max(measured, key=lambda codec: measured[codec].overhead)
    met = measured[worst].overhead <= MOST_OVERHEAD
    print(f"Ray adds {measured[worst].overhead:.2%} at most ({worst}); bound {MOST_OVERHEAD:.0%}: {met}")
    return 1 if arguments.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
