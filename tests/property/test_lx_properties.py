"""What holds of lx for every sequence of bits, with and without a base, and of every blob that someone may send."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.codecs.lx import Lx, decode_lossless, encode_lossless
from actors.errors import FrameError
from actors.packing import form_of, hold_unit, pack_unit, unpack_unit, unpack_whole

CPU = torch.device("cpu")
# Machines that run tests are slow at times.
relaxed = settings(deadline=None)

dtypes = st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int64])
# Runs of one byte beside noise, so that some planes compress and some do not.
contents = st.lists(st.tuples(st.binary(min_size=1, max_size=24), st.integers(1, 40)), max_size=8).map(
    lambda runs: b"".join(part * count for part, count in runs)
)


def tensor_of(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    whole = content[: len(content) // dtype.itemsize * dtype.itemsize]
    return torch.frombuffer(bytearray(whole), dtype=dtype) if whole else torch.empty(0, dtype=dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.uint8).tolist()


@relaxed
@given(dtypes, contents)
def test_any_bits_come_back_and_take_no_more_than_said(dtype: torch.dtype, content: bytes) -> None:
    tensor = tensor_of(content, dtype)
    payload = encode_lossless(tensor)
    assert len(payload) <= Lx().size_bytes(tensor.numel(), dtype)
    assert bits(decode_lossless(memoryview(payload), tuple(tensor.shape), dtype, CPU)) == bits(tensor)


@relaxed
@given(dtypes, contents, st.integers(0, 2**32 - 1))
def test_any_bits_come_back_whatever_the_base(dtype: torch.dtype, content: bytes, seed: int) -> None:
    tensor = tensor_of(content, dtype)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8).view(dtype)
    payload = memoryview(encode_lossless(tensor, base))
    assert bits(decode_lossless(payload, tuple(tensor.shape), dtype, CPU, base)) == bits(tensor)


@relaxed
@given(st.data())
def test_a_blob_with_any_byte_changed_is_refused_or_says_the_same(data: st.DataObject) -> None:
    tensors = {"w": torch.linspace(-1, 1, 300), "v": torch.zeros(200, dtype=torch.bfloat16)}
    base = hold_unit({name: tensor + 0.25 for name, tensor in tensors.items()})
    blob = bytearray(pack_unit(tensors, base))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    forms = {name: form_of(tensor) for name, tensor in tensors.items()}
    try:
        unpacked = unpack_unit(bytes(blob), forms, {base.sha256: base.tensors})
    except FrameError:
        return
    # zstd has bits that mean nothing; the content hash sees to the rest.
    assert all(bits(unpacked[name]) == bits(tensors[name]) for name in tensors)


@relaxed
@given(st.binary(max_size=400))
def test_noise_is_no_blob(noise: bytes) -> None:
    for prefix in (b"", pack_unit({"w": torch.ones(3)})[:12]):
        try:
            unpack_whole(prefix + noise, 100)
        except FrameError:
            continue
        raise AssertionError("noise was taken for a unit")
