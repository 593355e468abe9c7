"""Codecs: exact sizes, exact values, refusals, and which tensors each suits."""

import math

import pytest
import torch

from actors.codecs import CODECS, Codec, codec_for
from actors.errors import ConfigError, FrameCorrupt, NonFinite
from actors.spec import TensorRole

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((0,), (1,), (7,), (2, 3, 5), (1, 128, 3), (2, 4, 512))
# Of a codec that keeps every element: relative L2 error of Gaussian values at most, with some room for small tensors.
MOST_ERROR = {"none": 0.0, "bf16": 0.004, "q8": 0.01, "hq4": 0.16, "hq4-stochastic": 0.23, "q4": 0.16}
MOST_ERROR["q4-stochastic"] = 0.23
DENSE = [codec for codec in CODECS.values() if codec.has_fixed_size and not codec.name.startswith("tk2")]
FIXED = [codec for codec in CODECS.values() if codec.has_fixed_size]
QUANTISING = [codec for codec in FIXED if codec.name not in ("none", "bf16")]


def named(codecs: list[Codec]) -> dict[str, object]:
    return {"argvalues": codecs, "ids": [codec.name for codec in codecs]}


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def payload_of(codec: Codec, tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(codec.encode(tensor, seed=5).numpy().tobytes()))


def through(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    return codec.decode(payload_of(codec, tensor), tuple(tensor.shape), tensor.dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", **named(FIXED))
def test_sizes_shapes_and_types_are_as_announced(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = gaussian(shape, dtype)
    payload = codec.encode(tensor, seed=5)
    assert (payload.dtype, payload.shape) == (torch.uint8, (codec.size_bytes(tensor.numel(), dtype),))
    decoded = through(codec, tensor)
    assert (decoded.shape, decoded.dtype) == (tensor.shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", **named(DENSE))
def test_error_is_what_the_bits_allow(codec: Codec, dtype: torch.dtype) -> None:
    tensor = gaussian((64, 512), dtype)
    error = (through(codec, tensor).float() - tensor.float()).norm() / tensor.float().norm()
    assert error <= MOST_ERROR[codec.name]


@pytest.mark.parametrize("codec", **named(FIXED))
def test_decode_add_adds_what_decode_gives(codec: Codec) -> None:
    tensor, sum_so_far = gaussian((5, 1000)), torch.full((5, 1000), 2.0)
    expected = sum_so_far + through(codec, tensor)
    codec.decode_add(payload_of(codec, tensor), sum_so_far)
    assert torch.equal(sum_so_far, expected)


@pytest.mark.parametrize("codec", **named(FIXED))
def test_a_tensor_is_encoded_as_it_is_seen_not_as_it_lies(codec: Codec) -> None:
    base = gaussian((600, 14))
    for view in (base.t(), base[::2], base[:, 1:]):
        contiguous = view.clone(memory_format=torch.contiguous_format)
        assert torch.equal(codec.encode(view, seed=5), codec.encode(contiguous, seed=5))


@pytest.mark.parametrize("codec", **named(QUANTISING))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_a_codec_cannot_carry_is_said_and_never_sent(codec: Codec, bad: float) -> None:
    tensor = gaussian((3, 5000))
    tensor[1, 77] = bad
    payload = payload_of(codec, tensor)
    sum_so_far = torch.ones_like(tensor)
    with pytest.raises(NonFinite, match=codec.name):
        codec.decode_add(payload, sum_so_far)
    assert torch.equal(sum_so_far, torch.ones_like(tensor))


@pytest.mark.parametrize("codec", **named(QUANTISING))
def test_a_payload_with_any_bit_flipped_is_refused_and_nothing_is_added(codec: Codec) -> None:
    tensor = gaussian((200,))
    payload = payload_of(codec, tensor)
    sum_so_far = torch.ones_like(tensor)
    for bit in range(8 * len(payload)):
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FrameCorrupt, NonFinite)):
            codec.decode_add(payload, sum_so_far)
        payload[bit // 8] ^= 1 << bit % 8
    assert torch.equal(sum_so_far, torch.ones_like(tensor))
    codec.decode_add(payload, sum_so_far)
    assert not torch.equal(sum_so_far, torch.ones_like(tensor))


@pytest.mark.parametrize("codec", **named(FIXED))
@pytest.mark.parametrize("extra", [-1, 1, 64])
def test_a_payload_of_another_size_is_refused(codec: Codec, extra: int) -> None:
    payload = bytes(payload_of(codec, gaussian((300,))))
    altered = memoryview(bytearray((payload + bytes(64))[: len(payload) + extra]))
    with pytest.raises(FrameCorrupt, match="bytes"):
        codec.decode(altered, (300,), torch.float32, CPU)


@pytest.mark.parametrize("codec", **named([codec for codec in FIXED if codec.is_stochastic]))
def test_stochastic_rounding_is_a_function_of_the_seed(codec: Codec) -> None:
    tensor = gaussian((4096,))
    assert torch.equal(codec.encode(tensor, seed=7), codec.encode(tensor, seed=7))
    assert not torch.equal(codec.encode(tensor, seed=7), codec.encode(tensor, seed=8))


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


@pytest.mark.parametrize("name", ["bf16", "q8", "hq4", "q4"])
def test_what_was_rounded_to_nearest_once_does_not_change_again(name: str) -> None:
    codec = CODECS[name]
    tensor = gaussian((40, 128))
    once = through(codec, tensor)
    assert torch.equal(through(codec, once), once)
    assert bytes(payload_of(codec, once)) == bytes(payload_of(codec, tensor))


def test_names_codes_and_options_are_one_to_one() -> None:
    assert all(CODECS[codec.name] is codec for codec in CODECS.values())
    assert len({(codec.code, codec.options) for codec in CODECS.values()}) == len(CODECS)
    # What is on the wire or in a config keeps its meaning.
    codes = {"none": 1, "bf16": 2, "q8": 3, "hq4": 4, "hq4-stochastic": 4, "tk2": 5}
    assert {name: CODECS[name].code for name in codes} == codes


def test_a_codec_is_refused_where_it_does_not_suit_and_others_are_offered() -> None:
    assert codec_for("bf16", TensorRole.GRADIENT, "wire.backward") is CODECS["bf16"]
    for name, role in (("zip", TensorRole.GRADIENT), ("tk2", TensorRole.GRADIENT), ("bf16", TensorRole.WEIGHT)):
        with pytest.raises(ConfigError, match=f"wire.backward={name} is no codec") as caught:
            codec_for(name, role, "wire.backward")
        assert "none" in caught.value.remedy
