"""Codecs: exact sizes, exact values, and which tensors each suits."""

import math

import pytest
import torch

from actors.codecs import CODECS, Codec, codec_for
from actors.errors import ConfigError
from actors.spec import TensorRole

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1,), (7,), (2, 3, 5), (1, 128, 3))


def through(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    payload = memoryview(bytearray(codec.encode(tensor)))
    return codec.decode(payload, tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_sizes_shapes_and_types_are_as_announced(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    payload = codec.encode(tensor)
    assert payload.nbytes == codec.size_bytes(tensor.numel(), dtype)
    decoded = through(codec, tensor)
    assert decoded.shape == tensor.shape
    assert decoded.dtype == dtype
    # No codec here is coarser than 8 bits an element.
    assert (decoded - tensor).float().norm() <= 0.02 * tensor.float().norm()


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_tensor_is_encoded_as_it_is_seen_not_as_it_lies(codec: Codec) -> None:
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    for view in (base.t(), base[::2], base[:, 1:]):
        assert bytes(codec.encode(view)) == bytes(codec.encode(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_none_keeps_every_bit(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, math.inf, -math.inf, 1e-40, 3.4e38, 1 / 3]
    tensor = torch.tensor(special, dtype=torch.float32).to(dtype)
    decoded = through(CODECS["none"], tensor)
    assert torch.equal(decoded.view(torch.uint8), tensor.view(torch.uint8))
    assert math.isnan(through(CODECS["none"], torch.tensor([math.nan]))[0])


def test_bf16_rounds_to_nearest_with_ties_to_even() -> None:
    step = 2.0**-7
    given = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step, 1 + 0.51 * step, -1 - 0.5 * step, math.inf, 1e-40])
    expected = torch.tensor([1.0, 1 + 2 * step, 1 + step, -1.0, math.inf, 1e-40])
    decoded = through(CODECS["bf16"], given)
    assert torch.equal(decoded[:5], expected[:5])
    assert decoded[5] == pytest.approx(1e-40, rel=0.01)


def test_bf16_loses_nothing_of_what_is_bf16_already() -> None:
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(through(CODECS["bf16"], tensor), tensor)
    once = through(CODECS["bf16"], tensor.float() + 1e-3)
    assert torch.equal(through(CODECS["bf16"], once), once)


def test_names_and_codes_are_one_to_one() -> None:
    assert all(CODECS[codec.name] is codec for codec in CODECS.values())
    assert len({codec.code for codec in CODECS.values()}) == len(CODECS)
    # What is on the wire or in a config keeps its meaning.
    assert CODECS["none"].code == 1
    assert CODECS["bf16"].code == 2


def test_a_codec_is_refused_where_it_does_not_suit_and_others_are_offered() -> None:
    assert codec_for("bf16", TensorRole.GRADIENT, "wire.backward") is CODECS["bf16"]
    for name, role in (("zip", TensorRole.GRADIENT), ("bf16", TensorRole.WEIGHT)):
        with pytest.raises(ConfigError, match=f"wire.backward={name} is no codec") as caught:
            codec_for(name, role, "wire.backward")
        assert "none" in caught.value.remedy
