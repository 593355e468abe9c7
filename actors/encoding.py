"""Encoding and decoding off the compute stream: on CUDA on side streams, through pinned memory that is used again.

On the CPU there are no streams: encoding simply runs in the outbox thread, decoding in the thread that brings a frame.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from actors.canary import compare
from actors.codecs import Codec


def mark_ready(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """Return an event after which the tensor's values are there; called on the thread that computed it."""
    return _event_of(torch.cuda.current_stream(tensor.device)) if tensor.device.type == "cuda" else None


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A decoded tensor, and on CUDA when its values are there."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None = None

    def use(self) -> torch.Tensor:
        """Return the tensor to the current stream, which waits for the values; the host does not."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.ready)
            # It was made on a side stream: its memory may not be handed out there while this stream reads it.
            self.tensor.record_stream(stream)
        return self.tensor


class Encoder:
    """Encodes tensors one after another, beside the compute that goes on; used by one thread."""

    def __init__(self) -> None:
        self._side_stream: torch.cuda.Stream | None = None
        self._pinned_N = torch.empty(0, dtype=torch.uint8)

    def encode(self, codec: Codec, tensor: torch.Tensor, ready: torch.cuda.Event | None, seed: int) -> memoryview:
        """Return the payload of a tensor once `ready`, on the host; it is overwritten by the next one.

        On CUDA waits for the side stream only.
        """
        if ready is None:
            return codec.encode(tensor, seed).numpy().data
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(tensor.device)
        with torch.cuda.stream(self._side_stream):
            self._side_stream.wait_event(ready)
            # The allocator must not hand the tensor's memory out again while this stream still reads it.
            tensor.record_stream(self._side_stream)
            payload_N = codec.encode(tensor, seed)
            if len(self._pinned_N) < len(payload_N):
                self._pinned_N = torch.empty(len(payload_N), dtype=torch.uint8, pin_memory=True)
            on_host_N = self._pinned_N[: len(payload_N)]
            on_host_N.copy_(payload_N, non_blocking=True)
            _event_of(self._side_stream).synchronize()
        return on_host_N.numpy().data

    def compare(self, codec: Codec, payload: memoryview, tensor: torch.Tensor) -> tuple[float, float]:
        """Return how far the payload that `encode` gave last is from its tensor: relative error and cosine.

        On CUDA on the side stream, so that compute is neither delayed nor waited for.
        """
        with nullcontext() if self._side_stream is None else torch.cuda.stream(self._side_stream):
            return compare(codec, payload, tensor)


class Decoder:
    """Decodes payloads onto a device, for any number of threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._side_stream: torch.cuda.Stream | None = None
        # Pinned memory, each piece with the event after which it may be written to again.
        self._pinned: list[tuple[torch.cuda.Event, torch.Tensor]] = []

    def decode(self, codec: Codec, payload: bytearray, shape: tuple[int, ...], dtype: torch.dtype) -> Arrival:
        """Return the tensor; on CUDA its copy and kernel are only queued. Raises what `Codec.decode` does."""
        if self._device.type != "cuda":
            return Arrival(tensor=codec.decode(memoryview(payload), shape, dtype, self._device))
        with self._lock:
            if self._side_stream is None:
                self._side_stream = torch.cuda.Stream(self._device)
            pinned_N = self._pinned_memory(len(payload))
            pinned_N.copy_(torch.frombuffer(payload, dtype=torch.uint8))
            with torch.cuda.stream(self._side_stream):
                tensor = codec.decode(pinned_N.numpy().data, shape, dtype, self._device)
            ready = _event_of(self._side_stream)
            self._pinned.append((ready, pinned_N))
        return Arrival(tensor=tensor, ready=ready)

    def _pinned_memory(self, size_bytes: int) -> torch.Tensor:
        """Return pinned memory of this size that no copy reads from any more; the lock is held."""
        for index, (event, pinned_N) in enumerate(self._pinned):
            if len(pinned_N) == size_bytes and event.query():
                del self._pinned[index]
                return pinned_N
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


def _event_of(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
