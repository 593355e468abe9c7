"""The lossless codec: byte-exact, no larger than said, and what is not its own is refused."""

import struct

import pytest
import torch
from torch import Tensor

from actors.codecs.lx import PIECE_WORDS, Lx, decode_lossless, encode_lossless, prefers_base
from actors.errors import CheckpointError, FrameCorrupt, FrameUnexpected
from actors.packing import (
    MAX_HEADER_BYTES,
    TensorForm,
    content_sha256,
    form_of,
    hold_unit,
    pack_unit,
    unpack_unit,
    unpack_whole,
)

CPU = torch.device("cpu")
FLOATS = (torch.bfloat16, torch.float32)
each_float = pytest.mark.parametrize("dtype", FLOATS)


def weights(num_elements: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(num_elements, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drifted(tensor: Tensor) -> Tensor:
    return (tensor * (1 + 0.01 * weights(tensor.numel(), seed=1).view_as(tensor))).to(tensor.dtype)


def decoded(payload: bytes | bytearray, like: Tensor, base: Tensor | None = None) -> Tensor:
    return decode_lossless(memoryview(payload), tuple(like.shape), like.dtype, CPU, base)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    as_bytes = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(*as_bytes)


# The codec


@each_float
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (33, 7)])
def test_any_shape_comes_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert same_bits(decoded(encode_lossless(tensor), tensor), tensor)
    assert same_bits(decoded(encode_lossless(tensor, tensor), tensor, tensor), tensor)


def test_every_bfloat16_comes_back_whatever_its_base() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    for base in (None, every.flip(0), torch.full_like(every, float("nan")), torch.full_like(every, -0.0)):
        assert same_bits(decoded(encode_lossless(every, base), every, base), every)


def test_more_than_one_piece_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.codecs.lx.PIECE_WORDS", 1000)
    tensor = weights(2500)
    base = drifted(tensor)
    assert same_bits(decoded(encode_lossless(tensor, base), tensor, base), tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.uint8])
def test_other_dtypes_travel_as_they_are(dtype: torch.dtype) -> None:
    tensor = torch.arange(200).to(dtype)
    payload = encode_lossless(tensor, tensor)
    assert len(payload) == tensor.nbytes
    assert same_bits(decoded(payload, tensor), tensor)


@each_float
def test_weights_take_less_and_a_difference_to_near_ones_less_still(dtype: torch.dtype) -> None:
    tensor = weights(100_000, dtype)
    plain = len(encode_lossless(tensor))
    assert plain < {torch.bfloat16: 0.72, torch.float32: 0.87}[dtype] * tensor.nbytes
    assert len(encode_lossless(tensor, drifted(tensor))) < 0.7 * plain
    assert prefers_base(tensor, drifted(tensor))
    assert not prefers_base(tensor, weights(100_000, dtype, seed=2))


@each_float
def test_noise_takes_no_more_than_said(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (40_000,), generator=generator, dtype=torch.uint8).view(dtype)
    assert len(encode_lossless(noise)) == Lx().size_bytes(noise.numel(), dtype)
    assert Lx().size_bytes(PIECE_WORDS + 1, dtype) == (PIECE_WORDS + 1 + 8) * dtype.itemsize


def test_the_protocol_adds_what_it_decodes() -> None:
    tensor = weights(300)
    payload = Lx().encode(tensor, 0)
    into = torch.ones(300)
    Lx().decode_add(memoryview(payload.numpy()), into)
    assert torch.equal(into, 1 + tensor)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: b"", "ends before"),
        (lambda p: p[:-1], "are there"),
        (lambda p: p + b"\0", "bytes follow"),
        (lambda p: struct.pack("<I", 1 << 31) + p[4:], "is said to take 2147483648"),
        (lambda p: p[:4] + bytes(8) + p[12:], "does not decompress"),
    ],
    ids=["empty", "cut", "longer", "huge plane", "no zstd"],
)
def test_a_payload_of_no_encoder_is_corrupt(spoil, words: str) -> None:
    tensor = weights(1000)
    with pytest.raises(FrameCorrupt, match=words):
        decoded(spoil(bytes(encode_lossless(tensor))), tensor)


def test_a_plane_that_decompresses_to_another_length_is_corrupt() -> None:
    longer, shorter = torch.zeros(2000), torch.zeros(500)
    for other in (longer, shorter):
        with pytest.raises(FrameCorrupt, match="a plane of 1000 bytes does not decompress"):
            decoded(encode_lossless(other), torch.zeros(1000))


# A unit in one blob


def unit() -> dict[str, Tensor]:
    return {
        "weight/model.norm.weight": weights(300),
        "exp_avg/model.norm.weight": weights(300, torch.bfloat16).view(3, 100),
        "step/model.norm.weight": torch.tensor(7.0),
        "count": torch.arange(5),
    }


def forms(tensors: dict[str, Tensor]) -> dict[str, TensorForm]:
    return {name: form_of(tensor) for name, tensor in tensors.items()}


def assert_same_unit(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


def test_a_unit_moves_whole_or_as_a_difference_to_a_held_copy() -> None:
    new = unit() | {"weight/large": weights(50_000)}
    old = {name: drifted(tensor) for name, tensor in new.items() if tensor.is_floating_point()}
    whole, difference = pack_unit(new), pack_unit(new, hold_unit(old))
    assert len(difference) < 0.8 * len(whole)
    assert_same_unit(unpack_unit(whole, forms(new), {}), new)
    assert_same_unit(unpack_unit(difference, forms(new), {content_sha256(old): old}), new)


def test_tensors_that_the_base_lacks_or_has_otherwise_travel_whole() -> None:
    new = unit()
    old = {"count": torch.arange(6), "step/model.norm.weight": torch.tensor(6.0, dtype=torch.float64)}
    assert_same_unit(unpack_unit(pack_unit(new, hold_unit(old)), forms(new), {content_sha256(old): old}), new)


def test_a_difference_to_a_copy_that_is_not_held_is_refused_by_its_hash() -> None:
    held = hold_unit(unit())
    with pytest.raises(FrameUnexpected, match=f"does not hold, {held.sha256}: send it again without a base"):
        unpack_unit(pack_unit(unit(), held), forms(unit()), {"0" * 64: unit()})


def test_a_held_copy_that_has_changed_gives_nothing() -> None:
    new = {"w": weights(1000)}
    old = hold_unit({"w": drifted(new["w"])})
    with pytest.raises(FrameCorrupt, match="hash of their content differs"):
        unpack_unit(pack_unit(new, old), forms(new), {old.sha256: {"w": weights(1000, seed=5)}})
    with pytest.raises(FrameCorrupt, match="its base lacks"):
        unpack_unit(pack_unit(new, old), forms(new), {old.sha256: {}})


def test_tensors_other_than_expected_are_named() -> None:
    odd = [{"w": weights(5)}, {"v": weights(4)}, {"w": weights(4, torch.bfloat16)}, {}]
    for tensors in odd:
        with pytest.raises(FrameUnexpected, match=r"other tensors than this stage, among them '[vw]"):
            unpack_unit(pack_unit(tensors), forms({"w": weights(4)}), {})


def test_a_file_may_take_what_the_model_takes_and_no_more() -> None:
    blob = pack_unit({"w": torch.zeros(1000)})
    assert torch.equal(unpack_whole(blob, 4000)["w"], torch.zeros(1000))
    with pytest.raises(FrameCorrupt, match="take 4000 bytes, more than the 3999"):
        unpack_whole(blob, 3999)


def test_the_content_hash_is_of_names_forms_and_bits_alone() -> None:
    tensors = unit()
    sha256 = content_sha256(tensors)
    assert content_sha256(dict(reversed(tensors.items()))) == sha256
    name = "weight/model.norm.weight"
    others = [
        tensors[name].view(100, 3),
        tensors[name].view(torch.int32),
        tensors[name].clone().index_fill_(0, torch.tensor([0]), 1),
    ]
    assert sha256 not in {content_sha256(tensors | {name: other}) for other in others}
    assert content_sha256({"w": torch.tensor(0.0)}) != content_sha256({"w": torch.tensor(-0.0)})


def test_a_dtype_that_no_blob_holds_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"mask is torch\.bool.*checkpoints\.codec=none"):
        pack_unit({"mask": torch.ones(3, dtype=torch.bool)})


def test_a_header_that_is_too_long_is_not_parsed() -> None:
    prefix = struct.pack("<6sHI", b"ISTHLX", 1, MAX_HEADER_BYTES + 1)
    with pytest.raises(FrameCorrupt, match="its header has 1048577 bytes"):
        unpack_whole(prefix + b" " * (MAX_HEADER_BYTES + 1), 100)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (b'"delta": false', b'"delta": 10000', "describes no tensor"),
        (b"[10]", b"[-1]", "describes no tensor"),
        (b"[10]", b"true", "describes no tensor"),
        (b"[10]", b"[[]]", "describes no tensor"),
        (b'"tensors": [', b'"tensors": ["\\ud800", ', r"describes no tensor: '\\ud800'"),
        (b"[10]", b"[0, 99999999999999, 99999999999999]", "describes no tensor"),
        (b"float32", b"float3x", "describes no tensor"),
        (b'"base": null', b'"base": 1e99', "other keys"),
        (b'"base": null', b'"bose": null', "other keys"),
        (b'"content": "', b'"content": "X', "not SHA-256"),
        (b'"delta": false', b'"delta": true', "its base lacks"),
        (b'"content": "', b'"content": ["', "not JSON"),
    ],
)
def test_a_header_that_makes_no_sense_is_corrupt(before: bytes, after: bytes, words: str) -> None:
    blob = pack_unit({"w": weights(10)})
    (header_bytes,) = struct.unpack_from("<I", blob, 8)
    header = blob[12 : 12 + header_bytes].replace(before, after)
    assert before in blob
    with pytest.raises(FrameCorrupt, match=words):
        unpack_whole(blob[:8] + struct.pack("<I", len(header)) + header + blob[12 + header_bytes :], 40)


def test_another_version_is_named() -> None:
    blob = pack_unit({"w": weights(10)}).replace(b"ISTHLX\x01", b"ISTHLX\x02")
    with pytest.raises(FrameCorrupt, match="of version 2, not 1"):
        unpack_whole(blob, 40)
