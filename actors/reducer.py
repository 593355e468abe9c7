"""The mean of replicas' pseudo-gradients, the same bits wherever it is taken: by each replica, or by one for all.

PURE. What is added, in which order and with which weight follows from the set of frames alone, not from how they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.codecs.protocol import Codec
from actors.errors import FrameCorrupt, FrameError, FrameUnexpected, NonFinite, StageError

# More tokens than any round has.
_MAX_WEIGHT = 1 << 48


@dataclass(frozen=True, kw_only=True)
class ReplicaFrame:
    """What one replica sent: the payload of its pseudo-gradient, in float32 before its codec."""

    replica: int
    payload: memoryview
    # What its share of the mean is measured by: 1, or the tokens it trained on.
    weight: int = 1


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A replica whose frame did not count, and why."""

    replica: int
    error: FrameError | NonFinite


@dataclass(frozen=True, kw_only=True)
class Average:
    """The mean over the replicas that counted: float32 of shape (num_elements,)."""

    mean_N: Tensor
    counted: tuple[int, ...]
    refused: tuple[Refusal, ...]


def average_frames(frames: Sequence[ReplicaFrame], codec: Codec, num_elements: int, device: torch.device) -> Average:
    """Return the mean of what the replicas sent, each taken once, added in the order of their numbers.

    A frame that is corrupt, not finite, or contradicted by another of its replica is refused before any of it is
    added. StageError where none is left, NonFinite where the sum of those left overflows.
    """
    sum_N = torch.zeros(num_elements, dtype=torch.float32, device=device)
    total_weight = 0
    counted: list[int] = []
    refused: list[Refusal] = []
    is_weighted = any(frame.weight != 1 for frame in frames)
    for replica in sorted({frame.replica for frame in frames}):
        try:
            frame = _only_frame(frames, replica)
            _require_usable(frame, codec, num_elements)
            _add(frame, codec, sum_N, is_weighted=is_weighted)
        except (FrameError, NonFinite) as error:
            refused.append(Refusal(replica=replica, error=error))
        else:
            counted.append(replica)
            total_weight += frame.weight
    if not counted:
        reasons = "; ".join(f"replica {refusal.replica}: {refusal.error.message}" for refusal in refused)
        raise StageError(
            f"no replica's pseudo-gradient can be used: {reasons or 'none came'}",
            "check the replicas' logs; this round can be run again",
        )
    # By a tensor: CUDA multiplies by the reciprocal of a plain number, which rounds otherwise than the CPU.
    sum_N /= torch.tensor(float(total_weight), device=device)
    if not sum_N.isfinite().all():
        raise NonFinite(f"the mean of {len(counted)} replicas' pseudo-gradients overflows", "lower optim.lr")
    return Average(mean_N=sum_N, counted=tuple(counted), refused=tuple(refused))


def _only_frame(frames: Sequence[ReplicaFrame], replica: int) -> ReplicaFrame:
    """Return the one frame of a replica, however often it came; none of two that differ is better than the other."""
    first, *others = (frame for frame in frames if frame.replica == replica)
    if any(frame != first for frame in others):
        raise FrameUnexpected(
            f"replica {replica} sent frames of one round that differ", "start that replica again from a checkpoint"
        )
    return first


def _require_usable(frame: ReplicaFrame, codec: Codec, num_elements: int) -> None:
    size_bytes = codec.size_bytes(num_elements, torch.float32)
    if len(frame.payload) != size_bytes:
        raise FrameCorrupt(
            f"{num_elements} elements take {size_bytes} bytes with codec {codec.name}, not {len(frame.payload)}",
            "run the same release of Isthmus with the same settings on every replica",
        )
    if not 1 <= frame.weight <= _MAX_WEIGHT:
        raise FrameUnexpected(f"a weight of {frame.weight} has no part in a mean", "check what that replica counts")


def _add(frame: ReplicaFrame, codec: Codec, sum_N: Tensor, *, is_weighted: bool) -> None:
    """Add one frame, or raise FrameCorrupt or NonFinite before the sum is touched."""
    # A sparse payload's grammar leaves no room for infinities, and most of the sum need not be visited.
    if codec.options.kept and not is_weighted:
        codec.decode_add(frame.payload, sum_N)
        return
    decoded_N = codec.decode(frame.payload, tuple(sum_N.shape), torch.float32, sum_N.device)
    if not decoded_N.isfinite().all():
        raise NonFinite("a pseudo-gradient holds an infinity or NaN", "lower optim.lr if this goes on")
    # Apart, so that no device fuses the product with the sum.
    sum_N += decoded_N * frame.weight if is_weighted else decoded_N
