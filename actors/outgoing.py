"""What an outbox holds: tensors to send, frames and chunks under way, and what the peer says of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actors.codecs import Codec
from actors.errors import IsthmusError
from actors.frame import FrameHeader
from actors.frame_log import SendMark
from actors.mailbox import Receipt
from actors.spec import Kind


@dataclass(frozen=True)
class Send:
    """A tensor to encode and send."""

    header: FrameHeader
    codec: Codec
    tensor: torch.Tensor
    # On CUDA: when the tensor's values are there.
    ready: torch.cuda.Event | None
    # How large its chunks are.
    chunk_bytes: int


@dataclass(frozen=True)
class Answer:
    """What came of one attempt to send a chunk."""

    chunk: int
    attempt: int
    answer: Receipt | IsthmusError
    # When it came.
    heard_s: float


@dataclass(eq=False)
class Frame:
    """A frame of which some chunks are not settled."""

    kind: Kind
    chunks_left: int
    mark: SendMark


@dataclass
class Pending:
    """A chunk that is under way or waits to be repeated."""

    frame: Frame
    chunk: bytes
    busy_retry_s: float
    # When it first went out; its last attempt's place among its sender's pushes; whether that one is unanswered.
    pushed_s: float = 0.0
    order: int = 0
    is_under_way: bool = False
    # When to give up on the peer, and when to act next.
    give_up_s: float = 0.0
    due_s: float = 0.0
    attempt: int = 0
    # The last answer, where it was not a good one.
    trouble: str = "it answers nothing"
