"""The mean of replicas' frames: the same bits in any order of arrival, and no bad frame in it."""

import itertools
import math

import pytest
import torch

from actors.codecs import CODECS, Codec
from actors.errors import FrameCorrupt, FrameUnexpected, NonFinite, StageError
from actors.reducer import Average, ReplicaFrame, average_frames

CPU = torch.device("cpu")
NUM_ELEMENTS = 3 * 4096 + 77
SENT = ("none", "bf16", "q8", "hq4-stochastic", "tk2", "tk2-sign")
each_codec = pytest.mark.parametrize("codec", [CODECS[name] for name in SENT], ids=SENT)


def delta_of(replica: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + replica)
    return 1e-3 * torch.randn(NUM_ELEMENTS, generator=generator) * (1 + replica)


def payload_of(codec: Codec, delta_N: torch.Tensor) -> memoryview:
    return memoryview(bytearray(codec.encode(delta_N, 7).numpy()))


def frame_of(codec: Codec, replica: int, weight: int = 1) -> ReplicaFrame:
    return ReplicaFrame(replica=replica, payload=payload_of(codec, delta_of(replica)), weight=weight)


def average(frames: list[ReplicaFrame], codec: Codec) -> Average:
    return average_frames(frames, codec, NUM_ELEMENTS, CPU)


def decoded(codec: Codec, frame: ReplicaFrame) -> torch.Tensor:
    return codec.decode(frame.payload, (NUM_ELEMENTS,), torch.float32, CPU)


@each_codec
def test_the_mean_is_that_of_the_decoded_frames(codec: Codec) -> None:
    frames = [frame_of(codec, replica) for replica in range(3)]
    result = average(frames, codec)
    assert (result.counted, result.refused) == ((0, 1, 2), ())
    assert torch.equal(result.mean_N, sum(decoded(codec, frame) for frame in frames) / torch.tensor(3.0))


@each_codec
def test_the_order_of_arrival_changes_no_bit(codec: Codec) -> None:
    frames = [frame_of(codec, replica) for replica in (3, 11, 2, 7)]
    means = [average(list(order), codec).mean_N for order in itertools.permutations(frames)]
    assert all(torch.equal(mean_N.view(torch.int32), means[0].view(torch.int32)) for mean_N in means)


@each_codec
def test_tokens_weigh(codec: Codec) -> None:
    frames = [frame_of(codec, 0, weight=1000), frame_of(codec, 1, weight=3000)]
    expected_N = (decoded(codec, frames[0]) + 3 * decoded(codec, frames[1])) / 4
    torch.testing.assert_close(average(frames, codec).mean_N, expected_N, rtol=1e-6, atol=1e-9)
    even = [frame_of(codec, replica, weight=512) for replica in range(2)]
    plain = [frame_of(codec, replica) for replica in range(2)]
    assert torch.equal(average(even, codec).mean_N, average(plain, codec).mean_N)


@each_codec
def test_a_frame_that_comes_twice_counts_once(codec: Codec) -> None:
    frames = [frame_of(codec, replica) for replica in (0, 1, 1, 0, 1)]
    result = average(frames, codec)
    assert result.counted == (0, 1)
    assert torch.equal(result.mean_N, average(frames[:2], codec).mean_N)


def test_a_replica_that_contradicts_itself_is_refused_whichever_came_first() -> None:
    codec = CODECS["tk2"]
    twice = [frame_of(codec, 1), ReplicaFrame(replica=1, payload=payload_of(codec, delta_of(9)))]
    for frames in ([frame_of(codec, 0), *twice], [*reversed(twice), frame_of(codec, 0)]):
        result = average(frames, codec)
        (refusal,) = result.refused
        assert refusal.replica == 1
        assert isinstance(refusal.error, FrameUnexpected)
        assert torch.equal(result.mean_N, decoded(codec, frame_of(codec, 0)))


def spoiled(frame: ReplicaFrame, at: int) -> ReplicaFrame:
    payload = memoryview(bytearray(frame.payload))
    payload[at] ^= 0x10
    return ReplicaFrame(replica=frame.replica, payload=payload)


@pytest.mark.parametrize("name", ["q8", "hq4-stochastic", "tk2", "tk2-sign"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_spoiled_frame_leaves_no_trace_and_its_replica_is_named(name: str, bad: int) -> None:
    codec = CODECS[name]
    frames = [frame_of(codec, replica) for replica in range(3)]
    good = [frame for frame in frames if frame.replica != bad]
    frames[bad] = spoiled(frames[bad], at=150)
    result = average(frames, codec)
    (refusal,) = result.refused
    assert (refusal.replica, type(refusal.error)) == (bad, FrameCorrupt)
    assert result.counted == tuple(frame.replica for frame in good)
    assert torch.equal(result.mean_N, average(good, codec).mean_N)


@each_codec
def test_a_frame_of_another_size_is_refused(codec: Codec) -> None:
    good = frame_of(codec, 0)
    frames = [
        good,
        ReplicaFrame(replica=1, payload=good.payload[:-1]),
        ReplicaFrame(replica=2, payload=memoryview(bytearray(good.payload) + b"\0")),
        ReplicaFrame(replica=3, payload=memoryview(bytearray())),
    ]
    result = average(frames, codec)
    assert result.counted == (0,)
    assert [(refusal.replica, type(refusal.error)) for refusal in result.refused] == [
        (replica, FrameCorrupt) for replica in (1, 2, 3)
    ]


@each_codec
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_replica_whose_values_are_not_finite_is_refused(codec: Codec, value: float) -> None:
    delta_N = delta_of(1)
    delta_N[5000] = value
    result = average([frame_of(codec, 0), ReplicaFrame(replica=1, payload=payload_of(codec, delta_N))], codec)
    (refusal,) = result.refused
    assert (refusal.replica, type(refusal.error)) == (1, NonFinite)
    assert result.mean_N.isfinite().all()


def test_a_weight_that_no_round_has_is_refused() -> None:
    codec = CODECS["q8"]
    frames = [frame_of(codec, replica, weight) for replica, weight in enumerate((1, 0, -5, 10**400))]
    assert average(frames, codec).counted == (0,)


def test_a_sum_that_overflows_is_an_error_and_no_mean() -> None:
    codec = CODECS["none"]
    frames = [ReplicaFrame(replica=i, payload=payload_of(codec, torch.full((4,), 3e38))) for i in range(2)]
    with pytest.raises(NonFinite, match="the mean of 2 replicas' pseudo-gradients overflows"):
        average_frames(frames, codec, 4, CPU)


def test_no_usable_frame_says_why_for_each() -> None:
    codec = CODECS["tk2"]
    with pytest.raises(StageError, match=r"can be used: replica 4: .*checksum.*; replica 9: .*bytes with codec tk2"):
        average([spoiled(frame_of(codec, 4), 100), ReplicaFrame(replica=9, payload=memoryview(b""))], codec)
    with pytest.raises(StageError, match="none came"):
        average([], codec)
