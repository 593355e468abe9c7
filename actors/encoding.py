"""Encoding off the compute stream: on CUDA a side stream waits for the tensor, encodes, and copies to the host.

On the CPU there are no streams, and encoding simply runs in the outbox thread.
"""

from __future__ import annotations

import torch

from actors.codecs import Codec


def mark_ready(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """Return an event after which the tensor's values are there; called on the thread that computed it."""
    if tensor.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


class Encoder:
    """Encodes tensors one after another, beside the compute that goes on."""

    def __init__(self) -> None:
        self._side_stream: torch.cuda.Stream | None = None

    def encode(self, codec: Codec, tensor: torch.Tensor, ready: torch.cuda.Event | None) -> memoryview:
        """Return the payload of a tensor once `ready`; waits for the side stream only."""
        if ready is None:
            return codec.encode(tensor)
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(tensor.device)
        with torch.cuda.stream(self._side_stream):
            self._side_stream.wait_event(ready)
            # The allocator must not hand the tensor's memory out again while this stream still reads it.
            tensor.record_stream(self._side_stream)
            return codec.encode(tensor)
