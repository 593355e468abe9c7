"""Payloads of every registered codec: what the specification refuses is refused, the rest decodes to its very bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import torch

from actors.codecs import CODECS, Codec
from actors.codecs.blocks import BlockCodec
from actors.codecs.tk2 import TopK
from actors.errors import FrameCorrupt, NonFinite
from actors.kernels import reference
from actors.kernels.layout import BlockForm, Fault
from tests.fuzz.choices import Choices, patch

_CPU = torch.device("cpu")
_SIZES = (1, 127, 128, 300, 4095, 4096, 4120, 8500)
_DTYPES = (torch.float32, torch.bfloat16)
# What sources hold: Gaussian values times this; NaN makes them unfit for a quantising codec.
_SCALES = (1.0, 0.0, 1e-36, 1e36, math.nan)
# Of lx, whose sizes follow from what it encodes, units.py sees.
_CODECS = tuple(codec for codec in CODECS.values() if codec.has_fixed_size)


@cache
def good_payload(name: str, num_elements: int, dtype: torch.dtype, scale: float) -> bytes:
    """Return what a codec makes of Gaussian values times `scale`."""
    values_N = torch.randn(num_elements, generator=torch.Generator().manual_seed(1)) * scale
    return CODECS[name].encode(values_N.to(dtype), seed=5).numpy().tobytes()


def reseal(payload: bytearray, codec: Codec, num_elements: int) -> None:
    """Make the checksum of a quantising codec's payload of the right size right."""
    if not isinstance(codec, BlockCodec | TopK):
        return
    form = codec.form
    payload_N = torch.frombuffer(payload, dtype=torch.uint8)
    if isinstance(form, BlockForm):
        num_units, unit_bytes = form.num_blocks(num_elements), form.codes_bytes
        steps_start = form.steps_offset(num_elements)
        steps_C = payload_N[steps_start : steps_start + 2 * num_units].clone().view(torch.int16).long() & 0xFFFF
    else:
        num_units, unit_bytes = form.num_chunks(num_elements), form.record_bytes
        steps_C = torch.zeros(num_units, dtype=torch.int64)
    words_CW = payload_N[: num_units * unit_bytes].view(num_units, unit_bytes).view(torch.int32).long() & 0xFFFFFFFF
    total = reference.checksum(words_CW, steps_C)
    payload_N[form.trailer_offset(num_elements) :][:8] = total.view(1).view(torch.uint8)


def check(data: bytes) -> None:
    """Decode one payload that the input describes, in every way, and compare with the specification."""
    choices = Choices(data)
    codec, num_elements, dtype = choices.pick(_CODECS), choices.pick(_SIZES), choices.pick(_DTYPES)
    how = choices.number() % 4
    if how == 3:
        payload = bytearray(choices.rest())
    else:
        payload = bytearray(good_payload(codec.name, num_elements, dtype, choices.pick(_SCALES)))
        patch(payload, choices)
        if how != 1:
            reseal(payload, codec, num_elements)
        if how == 2:
            payload = bytearray((payload + choices.take(32))[: choices.number(2)])
    _check_payload(codec, payload, num_elements, dtype)


def _check_payload(codec: Codec, payload: bytearray, num_elements: int, dtype: torch.dtype) -> None:
    expected_N = _specified(codec, payload, num_elements, dtype)
    decoded_N = None
    with suppress(FrameCorrupt, NonFinite):
        decoded_N = codec.decode(memoryview(bytearray(payload)), (num_elements,), dtype, _CPU)
    _require_same(decoded_N, expected_N, f"{codec.name} decodes")

    before_N = torch.arange(num_elements, dtype=torch.float32)
    added_N = before_N.clone()
    if dtype is not torch.float32:
        expected_N = _specified(codec, payload, num_elements, torch.float32)
    try:
        codec.decode_add(memoryview(payload), added_N)
    except (FrameCorrupt, NonFinite):
        assert torch.equal(added_N, before_N), f"{codec.name} refuses a payload, but has added of it"
        assert expected_N is None, f"{codec.name} refuses to add what the specification decodes"
    else:
        assert expected_N is not None, f"{codec.name} adds what the specification refuses"
        _require_same(added_N, before_N + expected_N, f"{codec.name} adds")


def _specified(codec: Codec, payload: bytearray, num_elements: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Return what the specification decodes; None where it refuses."""
    if len(payload) != codec.size_bytes(num_elements, dtype):
        return None
    payload_N = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    if isinstance(codec, BlockCodec):
        decoded_N = torch.empty(num_elements)
        if reference.verify_blocks(payload_N, num_elements, codec.form) is not Fault.NONE:
            return None
        reference.decode_blocks(payload_N, decoded_N, codec.form, accumulate=False)
    elif isinstance(codec, TopK):
        decoded_N = torch.zeros(num_elements)
        if reference.verify_chunks(payload_N, num_elements, codec.form) is not Fault.NONE:
            return None
        reference.add_chunks(payload_N, decoded_N, codec.form)
    else:
        return payload_N.view(dtype if codec.name == "none" else torch.bfloat16).to(dtype)
    assert decoded_N.isfinite().all(), f"the specification decodes a {codec.name} payload to what is not finite"
    return decoded_N.to(dtype)


def _require_same(ours_N: torch.Tensor | None, theirs_N: torch.Tensor | None, what: str) -> None:
    """Compare bits, but for the sign of zeros, which sums lose, and of NaN."""
    if ours_N is None or theirs_N is None:
        assert ours_N is theirs_N, f"{what} what the specification refuses, or the other way round"
        return
    assert (ours_N.shape, ours_N.dtype) == (theirs_N.shape, theirs_N.dtype), f"{what} to another form"
    assert torch.equal(ours_N.nan_to_num(7.0), theirs_N.nan_to_num(7.0)), f"{what} otherwise than the specification"


def seeds() -> Iterator[bytes]:
    """Yield good, cut and raw payloads of every codec."""
    for codec in range(len(_CODECS)):
        for size in range(len(_SIZES)):
            yield bytes([codec, size, 0, 0, 0])
        yield bytes([codec, 3, 0, 2, 0, 0, *range(32), 100, 1])
        yield bytes([codec, 3, 0, 3]) + good_payload(_CODECS[codec].name, _SIZES[3], torch.float32, 1.0)
        yield bytes([codec, 3, 1, 0, 0, 2, 17, 0, 0, 0x91, 90, 0, 1, 1, 2])
