"""The mailbox: what it takes and what it refuses."""

import random
import zlib
from dataclasses import replace

import pytest
import torch

from actors.codecs import CODECS
from actors.codecs.raw import Raw
from actors.errors import FrameCorrupt
from actors.frame import WireDtype, parse_chunk, run_id, split_frame
from actors.mailbox import Mailbox, Verdict
from actors.spec import Kind
from tests.mailbox_frames import (
    ACCEPTED,
    AFTER,
    NUM_MICROBATCHES,
    STAGE,
    WINDOW,
    chunks_of,
    expectation,
    forge,
    header_of,
    offer_all,
    open_box,
    take_now,
    tensor_of,
    waits_for,
)


@pytest.fixture
def mailbox() -> Mailbox:
    """One that has step 4 open, in generation 2."""
    return open_box()


def test_a_frame_is_taken_as_it_was_sent(mailbox: Mailbox) -> None:
    for kind in Kind:
        assert offer_all(mailbox, header_of(kind=kind)) == ACCEPTED
        assert torch.equal(take_now(mailbox, 0, kind), tensor_of(0, kind=kind))


def test_chunks_may_come_in_any_order_and_more_than_once(mailbox: Mailbox) -> None:
    chunks = [*chunks_of(header_of(0)), *chunks_of(header_of(1))] * 2
    random.Random(3).shuffle(chunks)
    verdicts = [mailbox.offer(chunk).verdict for chunk in chunks]
    assert verdicts.count(Verdict.ACCEPTED) == verdicts.count(Verdict.DUPLICATE) == 8
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))
    assert torch.equal(take_now(mailbox, 1), tensor_of(1))


def test_what_was_taken_is_not_taken_again(mailbox: Mailbox) -> None:
    offer_all(mailbox, header_of(0))
    take_now(mailbox, 0)
    assert offer_all(mailbox, header_of(0)) == [Verdict.DUPLICATE] * 4
    assert waits_for(mailbox, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"run": run_id("other")}, "run"),
        ({"target": 2}, "target 2 is not 1"),
        ({"source": AFTER}, "source 2 is not 0"),
        ({"codec": CODECS["bf16"].code}, "codec"),
        ({"dtype": WireDtype.BFLOAT16}, "dtype"),
        ({"shape": (2, 32, 16)}, "shape"),
        ({"microbatch": NUM_MICROBATCHES}, "the plan has 6"),
        ({"kind": Kind.GRADIENT}, "source"),
        ({"flags": 1}, "flags 1 is not 0"),
        ({"seed": 7}, "seed 7 is not 0"),
        ({"kept": 64}, "kept 64 is not 0"),
    ],
)
def test_what_the_plan_does_not_foresee_is_refused(mailbox: Mailbox, fields: dict[str, object], named: str) -> None:
    for chunk in chunks_of(replace(header_of(), **fields)):
        receipt = mailbox.offer(chunk)
        assert receipt.verdict is Verdict.REFUSED
        assert named in receipt.reason
    assert offer_all(mailbox, header_of()) == ACCEPTED
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_a_frame_of_another_size_is_refused(mailbox: Mailbox) -> None:
    for size in (4, 4095, 4097, 8192):
        chunk = next(split_frame(header_of(), memoryview(bytes(size)), 1 << 20))
        assert f"frame size {size} is not 4096" in mailbox.offer(chunk).reason


def test_a_frame_of_another_release_is_refused(mailbox: Mailbox) -> None:
    body = bytearray(chunks_of(header_of())[0])
    body[4] += 1
    body[100:104] = zlib.crc32(body[:100]).to_bytes(4, "little")
    receipt = mailbox.offer(bytes(body))
    assert receipt.verdict is Verdict.REFUSED
    assert "same release" in receipt.reason


def test_more_chunks_than_the_frame_could_need_are_refused(mailbox: Mailbox) -> None:
    header, _ = parse_chunk(chunks_of(header_of())[0])
    huge = [replace(header, num_chunks=number) for number in (6, 2**32 - 1)]
    assert [mailbox.offer(forge(header)).verdict for header in huge] == [Verdict.REFUSED] * 2


def test_a_kind_that_no_neighbour_sends_is_refused() -> None:
    first = Mailbox("demo", STAGE, NUM_MICROBATCHES, (expectation(Kind.GRADIENT, AFTER),))
    first.open(2, 4)
    receipt = first.offer(chunks_of(header_of())[0])
    assert receipt.verdict is Verdict.REFUSED
    assert "takes no ACTIVATION" in receipt.reason


def test_damage_is_told_apart_from_what_is_wrong(mailbox: Mailbox) -> None:
    chunk = bytearray(chunks_of(header_of())[0])
    chunk[-1] ^= 1
    receipt = mailbox.offer(bytes(chunk))
    assert receipt.verdict is Verdict.CORRUPT
    assert "checksum" in receipt.reason
    assert mailbox.offer(b"").verdict is Verdict.CORRUPT
    assert offer_all(mailbox, header_of()) == ACCEPTED


@pytest.mark.parametrize("moment", [{"generation": 1}, {"step": 3}, {"generation": 1, "step": 9}])
def test_frames_of_the_past_are_stale(mailbox: Mailbox, moment: dict[str, int]) -> None:
    assert offer_all(mailbox, replace(header_of(), **moment)) == [Verdict.STALE] * 4


def test_beyond_the_window_is_busy_until_something_is_taken(mailbox: Mailbox) -> None:
    assert offer_all(mailbox, header_of(0)) == ACCEPTED
    assert offer_all(mailbox, header_of(1)) == ACCEPTED
    assert offer_all(mailbox, header_of(2)) == [Verdict.BUSY] * 4
    take_now(mailbox, 0)
    assert offer_all(mailbox, header_of(2)) == ACCEPTED
    assert offer_all(mailbox, header_of(3)) == [Verdict.BUSY] * 4


def test_an_evaluation_may_have_more_microbatches_than_a_step(mailbox: Mailbox) -> None:
    for microbatch in range(2 * NUM_MICROBATCHES):
        assert offer_all(mailbox, header_of(microbatch, kind=Kind.EVAL_ACTIVATION)) == ACCEPTED
        frame = take_now(mailbox, microbatch, Kind.EVAL_ACTIVATION)
        assert torch.equal(frame, tensor_of(microbatch, kind=Kind.EVAL_ACTIVATION))


def test_frames_of_the_next_step_are_kept_for_it(mailbox: Mailbox) -> None:
    assert offer_all(mailbox, header_of(0, step=5)) == ACCEPTED
    first, *rest = chunks_of(header_of(1, step=5))
    assert mailbox.offer(first).verdict is Verdict.ACCEPTED
    assert offer_all(mailbox, header_of(0, step=6)) == [Verdict.BUSY] * 4
    mailbox.open(2, 5)
    assert torch.equal(take_now(mailbox, 0), tensor_of(0, 5))
    assert [mailbox.offer(chunk).verdict for chunk in rest] == [Verdict.ACCEPTED] * 3
    assert torch.equal(take_now(mailbox, 1), tensor_of(1, 5))


def test_frames_ahead_do_not_take_the_room_of_the_open_step(mailbox: Mailbox) -> None:
    for microbatch in range(WINDOW):
        assert offer_all(mailbox, header_of(microbatch, step=5)) == ACCEPTED
    assert offer_all(mailbox, header_of(0)) == ACCEPTED
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_frames_ahead_are_kept_of_one_moment_only(mailbox: Mailbox) -> None:
    assert offer_all(mailbox, header_of(0, generation=3)) == ACCEPTED
    for generation in range(4, 60):
        assert offer_all(mailbox, header_of(0, generation=generation)) == [Verdict.BUSY] * 4
    mailbox.open(3, 4)
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))
    assert offer_all(mailbox, header_of(0, generation=4)) == ACCEPTED


def test_the_same_step_opened_again_goes_on(mailbox: Mailbox) -> None:
    offer_all(mailbox, header_of(0))
    take_now(mailbox, 0)
    offer_all(mailbox, header_of(1))
    mailbox.open(2, 4)
    assert torch.equal(take_now(mailbox, 1), tensor_of(1))


def test_a_new_generation_starts_from_the_first_microbatch(mailbox: Mailbox) -> None:
    offer_all(mailbox, header_of(0))
    take_now(mailbox, 0)
    offer_all(mailbox, header_of(1))
    mailbox.open(3, 4)
    assert offer_all(mailbox, header_of(1)) == [Verdict.STALE] * 4
    assert offer_all(mailbox, header_of(0, generation=3)) == ACCEPTED
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))
    assert waits_for(mailbox, 1)


@pytest.mark.parametrize("moved", [{"offset": 0}, {"offset": 512}, {"offset": 1536}, {"payload_bytes": 512}])
def test_chunks_that_overlap_or_leave_gaps_are_refused(mailbox: Mailbox, moved: dict[str, int]) -> None:
    first, second, *rest = chunks_of(header_of())
    forged = forge(replace(parse_chunk(second)[0], **moved))
    verdicts = [mailbox.offer(chunk).verdict for chunk in (first, forged, *rest)]
    assert verdicts == [*ACCEPTED[:3], Verdict.REFUSED]
    assert waits_for(mailbox, 0)
    # Nothing of it stays behind.
    assert offer_all(mailbox, header_of()) == ACCEPTED
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_a_frame_cut_in_two_ways_is_refused(mailbox: Mailbox) -> None:
    mailbox.offer(chunks_of(header_of())[0])
    assert mailbox.offer(chunks_of(header_of(), 2048)[1]).verdict is Verdict.REFUSED


def test_a_payload_that_is_no_encoding_is_refused(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(Raw):
        def decode(
            self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
        ) -> torch.Tensor:
            raise FrameCorrupt("no block has this step")

    with monkeypatch.context() as patch:
        patch.setitem(CODECS, "none", Strict())
        *_, last = [mailbox.offer(chunk) for chunk in chunks_of(header_of())]
    assert (last.verdict, last.reason) == (Verdict.REFUSED, "no block has this step")
    assert offer_all(mailbox, header_of()) == ACCEPTED
