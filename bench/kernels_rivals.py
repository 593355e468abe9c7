"""Others' block quantisers on the CPU, where they are installed: what bench.kernels holds ours against.

None is a dependency. They make no payload: codes and scales stay apart, without a checksum.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from actors.kernels.layout import BLOCK

NOT_INSTALLED = "not installed"


def rivals(source_N: torch.Tensor) -> dict[str, dict[str, Callable[[], object]] | str]:
    """Return the calls of each library, by name, or that it is not installed."""
    calls: dict[str, dict[str, Callable[[], object]] | str] = {}
    for name, module, calls_of in (
        ("bitsandbytes", "bitsandbytes.functional", _bitsandbytes),
        ("torchao", "torchao.quantization.quant_primitives", _torchao),
    ):
        try:
            calls[name] = calls_of(importlib.import_module(module), source_N)
        except ImportError:
            calls[name] = NOT_INSTALLED
    return calls


def _bitsandbytes(functional: ModuleType, source_N: torch.Tensor) -> dict[str, Callable[[], object]]:
    codes8, state8 = functional.quantize_blockwise(source_N, blocksize=BLOCK)
    codes4, state4 = functional.quantize_4bit(source_N, blocksize=BLOCK, quant_type="nf4")
    return {
        "8 bits encode": lambda: functional.quantize_blockwise(source_N, blocksize=BLOCK),
        "8 bits decode": lambda: functional.dequantize_blockwise(codes8, state8),
        "4 bits encode": lambda: functional.quantize_4bit(source_N, blocksize=BLOCK, quant_type="nf4"),
        "4 bits decode": lambda: functional.dequantize_4bit(codes4, state4),
    }


def _torchao(primitives: ModuleType, source_N: torch.Tensor) -> dict[str, Callable[[], object]]:
    blocks_CB, shape = source_N.view(-1, BLOCK), (1, BLOCK)

    def encode() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        step, zero = primitives.choose_qparams_affine(blocks_CB, primitives.MappingType.SYMMETRIC, shape, torch.int8)
        return primitives.quantize_affine(blocks_CB, shape, step, zero, torch.int8), step, zero

    codes, step, zero = encode()
    return {
        "8 bits encode": encode,
        "8 bits decode": lambda: primitives.dequantize_affine(codes, shape, step, zero, torch.int8),
    }
