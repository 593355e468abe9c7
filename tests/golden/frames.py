"""Golden payloads: small tensors made by integer arithmetic, and the bytes that every backend must make of them.

`python -m tests.golden.frames` writes frames.json anew, from the specification. A changed byte is a changed format:
give it another codec number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.kernels import reference
from actors.kernels.dispatch import Kernels
from actors.kernels.layout import BlockForm, ChunkForm, Fault

FILE = Path(__file__).with_name("frames.json")
SEED = 20250101
BETA = 0.95


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """What is encoded, and how."""

    name: str
    form: BlockForm | ChunkForm
    num_elements: int
    dtype: torch.dtype = torch.float32
    # Puts a NaN among the elements.
    is_bad: bool = False

    def source(self) -> torch.Tensor:
        """Return the tensor: ties, zeros, powers of two, a run of tiny values, outliers."""
        return _tensor(self.num_elements, 7919, is_bad=self.is_bad).to(self.dtype)

    def residual(self) -> torch.Tensor:
        return _tensor(self.num_elements, 104729, is_bad=False)


def _tensor(num_elements: int, factor: int, *, is_bad: bool) -> torch.Tensor:
    index = torch.arange(num_elements)
    # 17 bits and a sign, over exponents that vary with the element: exact in float32.
    whole = (index * index * factor + index) % 131071 - 65535
    exponent = (index * 31) % 3 - 17
    exponent = torch.where(index % 97 == 5, exponent + 3, exponent)
    exponent = torch.where((index >= 200) & (index < 240), exponent - 100, exponent)
    values = torch.ldexp(whole.float(), exponent)
    values = torch.where(index % 13 == 7, 0.375, values)
    values = torch.where(index % 17 == 3, 0.0, values)
    return torch.where(index == 150, torch.nan, values) if is_bad else values


_BLOCK_FORMS = {
    "q8": BlockForm(bits=8),
    "q8-hadamard": BlockForm(bits=8, hadamard=True),
    "q8-stochastic": BlockForm(bits=8, stochastic=True),
    "q4": BlockForm(bits=4),
    "q4-stochastic": BlockForm(bits=4, stochastic=True),
    "hq4": BlockForm(bits=4, hadamard=True),
    "hq4-stochastic": BlockForm(bits=4, hadamard=True, stochastic=True),
}
_CHUNK_FORMS = {
    "tk2-32": ChunkForm(k=32),
    "tk2": ChunkForm(k=64),
    "tk2-128": ChunkForm(k=128),
    "tk2-sign": ChunkForm(k=64, bits=1),
}
CASES = (
    *(GoldenCase(name=name, form=form, num_elements=300) for name, form in _BLOCK_FORMS.items()),
    GoldenCase(name="q8 of bfloat16", form=_BLOCK_FORMS["q8"], num_elements=300, dtype=torch.bfloat16),
    GoldenCase(name="hq4 of bfloat16", form=_BLOCK_FORMS["hq4"], num_elements=300, dtype=torch.bfloat16),
    GoldenCase(name="hq4 of a NaN", form=_BLOCK_FORMS["hq4"], num_elements=300, is_bad=True),
    *(GoldenCase(name=name, form=form, num_elements=4096 + 100) for name, form in _CHUNK_FORMS.items()),
    GoldenCase(name="tk2 of a NaN", form=_CHUNK_FORMS["tk2"], num_elements=4096 + 100, is_bad=True),
)


def produced(kernels: Kernels, case: GoldenCase, device: torch.device) -> dict[str, str]:
    """Return what a backend makes of a case: the payload in hex, and hashes of what it decodes to and leaves over."""
    source_N = case.source().to(device)
    decoded_N = torch.zeros(case.num_elements, device=device)
    hashes = {}
    if isinstance(case.form, BlockForm):
        payload_N = kernels.encode_blocks(source_N, case.form, SEED)
        if kernels.verify_blocks(payload_N, case.num_elements, case.form) is Fault.NONE:
            kernels.decode_blocks(payload_N, decoded_N, case.form, accumulate=False)
    else:
        residual_N = case.residual().to(device)
        payload_N = kernels.encode_chunks(source_N, residual_N, BETA, case.form)
        hashes["residual"] = _sha256(residual_N)
        if kernels.verify_chunks(payload_N, case.num_elements, case.form) is Fault.NONE:
            kernels.add_chunks(payload_N, decoded_N, case.form)
    return {"payload": payload_N.cpu().numpy().tobytes().hex(), "decoded": _sha256(decoded_N), **hashes}


def _sha256(values_N: torch.Tensor) -> str:
    return hashlib.sha256(values_N.cpu().numpy().tobytes()).hexdigest()


def golden() -> Mapping[str, dict[str, str]]:
    """Return what each case, by its name, must give."""
    return json.loads(FILE.read_text())


def main() -> None:
    frames = {case.name: produced(reference, case, torch.device("cpu")) for case in CASES}
    FILE.write_text(json.dumps(frames, indent=1) + "\n")


if __name__ == "__main__":
    main()
