"""Which backend runs a tensor's codec: the GPU's kernels, the compiled CPU library, or plain torch.

All make the same bytes; they differ in speed only.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol

import torch

from actors.kernels import reference
from actors.kernels.cpu import NativeUnavailable, load_native
from actors.kernels.layout import BlockForm, ChunkForm, Fault


class Kernels(Protocol):
    """One backend; `actors.kernels.reference` specifies each function. Tensors are contiguous, on its device."""

    @property
    def name(self) -> str: ...

    def encode_blocks(self, source_N: torch.Tensor, form: BlockForm, seed: int) -> torch.Tensor: ...

    def verify_blocks(self, payload_N: torch.Tensor, num_elements: int, form: BlockForm) -> Fault: ...

    def decode_blocks(
        self, payload_N: torch.Tensor, into_N: torch.Tensor, form: BlockForm, *, accumulate: bool
    ) -> None: ...

    def encode_chunks(
        self, delta_N: torch.Tensor, residual_N: torch.Tensor, beta: float, form: ChunkForm
    ) -> torch.Tensor: ...

    def verify_chunks(self, payload_N: torch.Tensor, num_elements: int, form: ChunkForm) -> Fault: ...

    def add_chunks(self, payload_N: torch.Tensor, into_N: torch.Tensor, form: ChunkForm) -> None: ...

    def split_planes(self, words_N: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor: ...

    def merge_planes(self, planes: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor: ...


def kernels_for(device: torch.device) -> Kernels:
    """Return the fastest backend of a device that this machine can build."""
    return _cuda_kernels() if device.type == "cuda" else host_kernels()


def prepare_kernels(device: torch.device) -> None:
    """Build all that frames from and to this device need: its own backend, and the CPU's, which verifies what comes."""
    kernels_for(device)
    host_kernels()


@cache
def host_kernels() -> Kernels:
    """Return the CPU's backend: compiled once for this machine, plain torch with a warning where that cannot be."""
    try:
        return load_native()
    except NativeUnavailable as error:
        warnings.warn(
            f"codecs run in plain torch, ten times slower: {error}; install g++ and start again", stacklevel=2
        )
        return reference


@cache
def _cuda_kernels() -> Kernels:
    """Return CUDA's backend: compiled for the device, the CPU's with a warning where that cannot be."""
    # Only here: a machine without a GPU need not have cuda-core.
    from actors.kernels.cuda import CudaKernels, CudaUnavailable

    try:
        # Compiles, or finds out here that it cannot.
        return CudaKernels()
    except CudaUnavailable as error:
        warnings.warn(f"codecs of CUDA tensors run on the CPU: {error}", stacklevel=2)
        return _OnHost(host_kernels())


class _OnHost:
    """Runs another device's tensors through the CPU's backend: slow, and the same bytes."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.name = f"{kernels.name}, by way of the host"

    def encode_blocks(self, source_N: torch.Tensor, form: BlockForm, seed: int) -> torch.Tensor:
        return self._kernels.encode_blocks(source_N.cpu(), form, seed).to(source_N.device)

    def verify_blocks(self, payload_N: torch.Tensor, num_elements: int, form: BlockForm) -> Fault:
        return self._kernels.verify_blocks(payload_N.cpu(), num_elements, form)

    def decode_blocks(
        self, payload_N: torch.Tensor, into_N: torch.Tensor, form: BlockForm, *, accumulate: bool
    ) -> None:
        decoded_N = into_N.cpu()
        self._kernels.decode_blocks(payload_N.cpu(), decoded_N, form, accumulate=accumulate)
        into_N.copy_(decoded_N)

    def encode_chunks(
        self, delta_N: torch.Tensor, residual_N: torch.Tensor, beta: float, form: ChunkForm
    ) -> torch.Tensor:
        left_N = residual_N.cpu()
        payload_N = self._kernels.encode_chunks(delta_N.cpu(), left_N, beta, form)
        residual_N.copy_(left_N)
        return payload_N.to(delta_N.device)

    def verify_chunks(self, payload_N: torch.Tensor, num_elements: int, form: ChunkForm) -> Fault:
        return self._kernels.verify_chunks(payload_N.cpu(), num_elements, form)

    def add_chunks(self, payload_N: torch.Tensor, into_N: torch.Tensor, form: ChunkForm) -> None:
        sum_N = into_N.cpu()
        self._kernels.add_chunks(payload_N.cpu(), sum_N, form)
        into_N.copy_(sum_N)

    def split_planes(self, words_N: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        base_N = None if base_N is None else base_N.cpu()
        return self._kernels.split_planes(words_N.cpu(), base_N).to(words_N.device)

    def merge_planes(self, planes: torch.Tensor, base_N: torch.Tensor | None) -> torch.Tensor:
        base_N = None if base_N is None else base_N.cpu()
        return self._kernels.merge_planes(planes.cpu(), base_N).to(planes.device)
