"""Driver inside a lab that times frames between its hosts: `python -m tests.wan.frame_driver RATE_MBPS HOST...`.

A `Link` over Ray's actor calls into a `Mailbox`, as in training, but between ends that only send and take. The hosts
share this machine's monotonic clock, so one-way times are differences of two readings. Prints one JSON object a case.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import ray
import ray.actor
import torch

from actors.codecs import CODECS
from actors.frame import wire_bytes
from actors.link import Link, LinkSettings
from actors.mailbox import WIRE_DTYPES, Expectation, Mailbox, Receipt, Verdict
from actors.node import CONCURRENCY_GROUPS, RayCarrier
from actors.settings import WireConfig
from actors.spec import Kind, LinkSizes
from orchestrator.planner.assemble import chunk_and_window_bytes

TIMEOUT_S = 60.0
WIDTH = 100
REPLY_SHAPE_BTD = (1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """So many frames of one size and codec from one end to the other."""

    name: str
    codec: str
    payload_bytes: int
    num_frames: int
    chunk_bytes: int
    window_bytes: int
    # Whether each frame waits for the reply to the one before, or all are sent at once.
    one_by_one: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a boundary tensor that the codec makes into that many bytes."""
        num_elements = self.payload_bytes // CODECS[self.codec].size_bytes(1, torch.float32)
        return (1, num_elements // WIDTH, WIDTH)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one end saw: when it sent or took each frame, how long `send` held it up, its process's CPU time."""

    times_s: tuple[float, ...]
    send_s: float
    cpu_s: float


class End:
    """One end: a mailbox for what comes, a link for what goes; what `NodeActor` is to a stage."""

    def __init__(self, stage: int) -> None:
        torch.set_num_threads(1)
        self._stage = stage
        self._mailbox: Mailbox | None = None
        self._link: Link | None = None

    def open(self, case: Case, ends: Sequence[ray.actor.ActorHandle]) -> None:
        """Make ready for a case: frames go from stage 0 to stage 1, and a reply of one element comes back for each."""
        if self._link is not None:
            self._link.close()
        other = 1 - self._stage
        activations = (Kind.ACTIVATION, case.codec, case.shape)
        kind, codec, shape_BTD = activations if other == 0 else (Kind.GRADIENT, "none", REPLY_SHAPE_BTD)
        expected = Expectation(
            kind=kind,
            source=other,
            codec=codec,
            dtype=WIRE_DTYPES[torch.float32],
            shape=shape_BTD,
            window=case.num_frames,
        )
        self._mailbox = Mailbox(case.name, self._stage, case.num_frames, (expected,))
        self._mailbox.open(generation=1, step=0)
        settings = LinkSettings(
            run=case.name,
            source=self._stage,
            target=other,
            sizes=LinkSizes(chunk_bytes=case.chunk_bytes, window_bytes=case.window_bytes),
            ack_s=TIMEOUT_S / 2,
            give_up_s=TIMEOUT_S,
        )
        self._link = Link(settings, RayCarrier(f"stage {other}", ends[other]), self._mailbox.fail)

    @ray.method(concurrency_group="inbox")
    def receive(self, chunk: bytes) -> Receipt:
        """Take one chunk, as a node does."""
        return self._mailbox.offer(chunk) if self._mailbox is not None else Receipt(Verdict.BUSY)

    def send_all(self, case: Case) -> Seen:
        """Send every frame of a case and see the last one replied to."""
        tensor_BTD = torch.randn(case.shape)
        times_s: list[float] = []
        send_s = 0.0
        cpu_s = time.process_time()
        for microbatch in range(case.num_frames):
            times_s.append(time.monotonic())
            self._send(tensor_BTD, case.codec, Kind.ACTIVATION, microbatch)
            send_s += time.monotonic() - times_s[-1]
            if case.one_by_one or microbatch == case.num_frames - 1:
                self._take(Kind.GRADIENT, microbatch)
        return Seen(times_s=tuple(times_s), send_s=send_s, cpu_s=time.process_time() - cpu_s)

    def take_all(self, case: Case) -> Seen:
        """Take every frame of a case and reply to it."""
        reply_BTD = torch.zeros(REPLY_SHAPE_BTD)
        times_s: list[float] = []
        cpu_s = time.process_time()
        for microbatch in range(case.num_frames):
            self._take(Kind.ACTIVATION, microbatch)
            times_s.append(time.monotonic())
            self._send(reply_BTD, "none", Kind.GRADIENT, microbatch)
        return Seen(times_s=tuple(times_s), send_s=0.0, cpu_s=time.process_time() - cpu_s)

    def _send(self, tensor: torch.Tensor, codec: str, kind: Kind, microbatch: int) -> None:
        assert self._link is not None
        self._link.send(tensor, CODECS[codec], kind, generation=1, step=0, microbatch=microbatch)

    def _take(self, kind: Kind, microbatch: int) -> torch.Tensor:
        assert self._mailbox is not None
        return self._mailbox.take(kind, microbatch, timeout_s=TIMEOUT_S, monotonic=time.monotonic)


def place_ends(addresses: Sequence[str]) -> list[ray.actor.ActorHandle]:
    """Return an `End` on each of these hosts."""
    node_ids = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes()}
    # Ray takes this option here only; its type stubs do not know it.
    end = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(End)  # pyright: ignore[reportCallIssue]
    return [
        end.options(num_cpus=0, label_selector={"ray.io/node-id": node_ids[address]}).remote(stage)
        for stage, address in enumerate(addresses)
    ]


def run_case(ends: Sequence[ray.actor.ActorHandle], case: Case) -> None:
    """Run a case from the first end to the second and print what they saw."""
    ray.get([end.open.remote(case, ends) for end in ends], timeout=TIMEOUT_S)
    calls = [ends[1].take_all.remote(case), ends[0].send_all.remote(case)]
    taken, sent = ray.get(calls, timeout=TIMEOUT_S)
    result = asdict(case) | {
        "wire_bytes": wire_bytes(case.payload_bytes, case.chunk_bytes),
        "one_way_s": [end_s - start_s for start_s, end_s in zip(sent.times_s, taken.times_s, strict=True)],
        "first_to_last_s": taken.times_s[-1] - taken.times_s[0],
        "send_s": sent.send_s,
        "cpu_s": sent.cpu_s + taken.cpu_s,
    }
    sys.stdout.write(json.dumps(result) + "\n")


def main(rate_mbps: float, addresses: Sequence[str]) -> None:
    """Time each codec on a link of its own; chunks and window are the planner's for that rate."""
    ray.init(log_to_driver=False)
    chunk_bytes, window_bytes = chunk_and_window_bytes(rate_mbps, WireConfig())
    for codec, hosts in zip(("none", "bf16"), pairwise(addresses), strict=True):
        ends = place_ends(hosts)
        for name, payload_bytes, num_frames in (
            # The first frame of all also opens the connection, and finds out what the path carries.
            ("cold", 1_000_000, 1),
            ("warm-up", 4_000_000, 2),
            ("warm", 200_000, 9),
            ("warm", 1_000_000, 7),
            ("warm", 4_000_000, 3),
            ("stream", 1_000_000, 16),
        ):
            case = Case(
                name=name,
                codec=codec,
                payload_bytes=payload_bytes,
                num_frames=num_frames,
                chunk_bytes=chunk_bytes,
                window_bytes=window_bytes,
                one_by_one=name != "stream",
            )
            run_case(ends, case)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
