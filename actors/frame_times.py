"""When frames were made, sent, held up and read, as a stage reports it with its step.

PURE. Seconds are from the step's start on the node that saw it, as in `actors.spec.ActionTime`; a frame that came while
the step before was still under way has times below zero. Only frames of training are here, not those of evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Why an outbox could not go on: as many bytes were under way as its window allows, or the peer said that it is BUSY.
BlockedBy = Literal["window", "room"]


@dataclass(frozen=True, kw_only=True)
class SentFrame:
    """One frame's way out of a stage; NaN is what had not happened when the stage reported."""

    target_stage: int
    is_gradient: bool
    microbatch: int
    # In the outbox's thread, cutting into chunks included; on CUDA from when the outbox began to wait for the tensor.
    encode_start_s: float
    encode_end_s: float
    # Its first chunk was pushed; its last receipt came.
    pushed_s: float
    settled_s: float
    # Headers included, repeats not.
    wire_bytes: int


@dataclass(frozen=True, kw_only=True)
class ArrivedFrame:
    """One frame's way into a stage."""

    source_stage: int
    is_gradient: bool
    microbatch: int
    # Its first chunk that was let in came; its last did, and decoding began; decoding ended. On CUDA decoding is only
    # queued by then.
    first_s: float
    whole_s: float
    decoded_s: float


@dataclass(frozen=True, kw_only=True)
class BlockedTime:
    """A while in which an outbox had chunks that it could not push, or that its peer did not let in."""

    target_stage: int
    why: BlockedBy
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class FrameTimes:
    """All frames of one stage in one step."""

    sent: tuple[SentFrame, ...] = ()
    arrived: tuple[ArrivedFrame, ...] = ()
    blocked: tuple[BlockedTime, ...] = ()

    def __len__(self) -> int:
        return len(self.sent) + len(self.arrived) + len(self.blocked)
