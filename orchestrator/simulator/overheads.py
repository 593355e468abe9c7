"""What a step costs besides compute and links: codecs, frames, orders, commits. Figures of the runtime as it is.

PURE. `python -m bench.simulator` fits what is here to its two calibrating runs and judges it by the others; its result
file has the raw numbers. Figures are of a whole core: a node with a share of one takes longer by as much (`scaled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class CodecTimes:
    """Seconds for each byte of the raw tensor."""

    encode_byte_s: float
    decode_byte_s: float


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Seconds of one node's processor, where not said."""

    # A frame's sender and receiver: Python, Ray, headers and checksums; for the frame and for each byte on the wire.
    send_frame_s: float = 0.0
    receive_frame_s: float = 0.0
    send_byte_s: float = 0.0
    receive_byte_s: float = 0.0
    # By codec; one that is not here takes no time.
    codecs: Mapping[str, CodecTimes] = field(default_factory=dict[str, CodecTimes])
    # Whether a node's frames and codecs take its processor from compute (a CPU) or run beside it (a GPU).
    codec_computes: bool = True
    # What layers take in a run, of what a probe said: a CPU's probes find all nodes of a machine at work at once.
    probe_share: float = 1.0
    # What a forward or backward takes beyond its layers: reading tokens, the loss, autograd's own work.
    action_s: float = 0.0
    # The driver, from one step's last report to the next one's first order, and a node's report at a step's end.
    step_s: float = 0.0
    report_s: float = 0.0
    # The optimizer's step, for each byte of weight, gradient and moments.
    commit_byte_s: float = 0.0
    # TCP's window at first, and again where a connection was idle: RFC 6928 has 10 segments. 0: at the link's rate at
    # once. Idle is what is longer than a round trip and this.
    initial_window_bytes: float = 0.0
    idle_s: float = 0.2
    # TCP where packets are lost: the share that is, connections side by side, the payload of a segment.
    loss_share: float = 0.0
    num_streams: int = 1
    segment_bytes: int = 1448

    def scaled(self, factor: float) -> Overheads:
        """Return these on a node that takes `factor` times as long for everything."""
        codecs = {
            name: CodecTimes(encode_byte_s=times.encode_byte_s * factor, decode_byte_s=times.decode_byte_s * factor)
            for name, times in self.codecs.items()
        }
        return replace(
            self,
            codecs=codecs,
            send_frame_s=self.send_frame_s * factor,
            receive_frame_s=self.receive_frame_s * factor,
            send_byte_s=self.send_byte_s * factor,
            receive_byte_s=self.receive_byte_s * factor,
            action_s=self.action_s * factor,
            step_s=self.step_s * factor,
            report_s=self.report_s * factor,
            commit_byte_s=self.commit_byte_s * factor,
        )


# Compute and links alone.
NO_OVERHEADS = Overheads()
_TEN_SEGMENTS = 14_480.0
MEASURED_ON_CPU = Overheads(
    send_frame_s=0.0006,
    receive_frame_s=0.0006,
    send_byte_s=9e-9,
    receive_byte_s=9e-9,
    # Of bench/results/kernels.json, on AVX2.
    codecs={
        "q8": CodecTimes(encode_byte_s=1.1e-10, decode_byte_s=6e-11),
        "hq4": CodecTimes(encode_byte_s=1.3e-10, decode_byte_s=7.4e-11),
        "hq4-stochastic": CodecTimes(encode_byte_s=1.8e-10, decode_byte_s=7.4e-11),
    },
    step_s=0.008,
    commit_byte_s=1.7e-10,
    initial_window_bytes=_TEN_SEGMENTS,
)
# Not measured: frames and codecs run beside compute, and are taken to cost nothing.
MEASURED_ON_CUDA = Overheads(initial_window_bytes=_TEN_SEGMENTS, codec_computes=False)
