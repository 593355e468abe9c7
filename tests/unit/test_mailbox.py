"""The mailbox: what it takes, what it refuses, and who it wakes."""

import random
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.codecs import CODECS
from actors.codecs.raw import Raw
from actors.errors import FrameCorrupt, PeerLost, PeerTimeout, StepAborted
from actors.frame import FrameHeader, WireDtype, pack_chunk, parse_chunk, run_id, split_frame
from actors.mailbox import Expectation, Mailbox, Verdict
from actors.spec import Kind

STAGE, BEFORE, AFTER, NUM_MICROBATCHES, WINDOW = 1, 0, 2, 6, 2
# 4 KiB of float32: large enough to be cut into chunks.
SHAPE = (2, 16, 32)
CHUNK_BYTES = 1024


def expectation(kind: Kind, source: int, **fields: object) -> Expectation:
    base = Expectation(kind=kind, source=source, codec="none", dtype=WireDtype.FLOAT32, shape=SHAPE, window=WINDOW)
    return replace(base, **fields)


EXPECTED = (
    expectation(Kind.ACTIVATION, BEFORE),
    expectation(Kind.GRADIENT, AFTER),
    expectation(Kind.EVAL_ACTIVATION, BEFORE),
)


@pytest.fixture
def mailbox() -> Mailbox:
    """One that has step 4 open, in generation 2."""
    box = Mailbox("demo", STAGE, NUM_MICROBATCHES, EXPECTED)
    box.open(2, 4)
    return box


def tensor_of(microbatch: int, step: int = 4, kind: Kind = Kind.ACTIVATION) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * step + 10 * microbatch + kind)
    return torch.randn(SHAPE, generator=generator)


def header_of(microbatch: int = 0, *, step: int = 4, kind: Kind = Kind.ACTIVATION, **fields: object) -> FrameHeader:
    base = FrameHeader(
        codec=CODECS["none"].code,
        kind=kind,
        dtype=WireDtype.FLOAT32,
        shape=SHAPE,
        run=run_id("demo"),
        generation=2,
        step=step,
        microbatch=microbatch,
        source=AFTER if kind is Kind.GRADIENT else BEFORE,
        target=STAGE,
        frame_bytes=4096,
    )
    return replace(base, **fields)


def chunks_of(header: FrameHeader, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    tensor = tensor_of(header.microbatch, header.step, header.kind)
    return list(split_frame(header, memoryview(CODECS["none"].encode(tensor, seed=0).numpy()), chunk_bytes))


def forge(header: FrameHeader) -> bytes:
    """The chunk of zeros that this header describes, its checksums right."""
    payload = bytes(header.payload_bytes)
    return pack_chunk(replace(header, payload_crc=zlib.crc32(payload)), memoryview(payload))


def offer_all(mailbox: Mailbox, header: FrameHeader) -> list[Verdict]:
    return [mailbox.offer(chunk).verdict for chunk in chunks_of(header)]


def take_now(mailbox: Mailbox, microbatch: int, kind: Kind = Kind.ACTIVATION) -> torch.Tensor:
    return mailbox.take(kind, microbatch, timeout_s=0.0, monotonic=time.monotonic)


def waits_for(mailbox: Mailbox, microbatch: int) -> bool:
    """Whether nothing can be taken yet."""
    try:
        take_now(mailbox, microbatch)
    except PeerTimeout:
        return True
    return False


ACCEPTED = [Verdict.ACCEPTED] * 4


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


class Waiting:
    """A take in a thread of its own, known to have begun to wait."""

    def __init__(self, mailbox: Mailbox, microbatch: int = 0) -> None:
        self._waits = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._taken = self._pool.submit(
            mailbox.take, Kind.ACTIVATION, microbatch, timeout_s=20.0, monotonic=self._monotonic
        )
        assert self._waits.wait(5)

    def result(self) -> torch.Tensor:
        try:
            return self._taken.result(timeout=5)
        finally:
            self._pool.shutdown()

    def _monotonic(self) -> float:
        # Called with the mailbox's lock held, which is given up only by waiting.
        self._waits.set()
        return time.monotonic()


def test_a_take_waits_for_its_frame(mailbox: Mailbox) -> None:
    waiting = Waiting(mailbox)
    assert offer_all(mailbox, header_of(0)) == ACCEPTED
    assert torch.equal(waiting.result(), tensor_of(0))


def test_abort_wakes_a_take(mailbox: Mailbox) -> None:
    waiting = Waiting(mailbox)
    mailbox.abort(2)
    with pytest.raises(StepAborted, match="stage 1: generation 2 has ended"):
        waiting.result()


def test_an_aborted_generation_is_over(mailbox: Mailbox) -> None:
    offer_all(mailbox, header_of(0))
    offer_all(mailbox, header_of(0, step=5))
    mailbox.abort(2)
    with pytest.raises(StepAborted):
        take_now(mailbox, 0)
    with pytest.raises(StepAborted):
        mailbox.open(2, 5)
    assert offer_all(mailbox, header_of(1)) == [Verdict.STALE] * 4
    assert offer_all(mailbox, header_of(0, generation=3)) == ACCEPTED
    mailbox.open(3, 4)
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_an_old_abort_ends_nothing_new(mailbox: Mailbox) -> None:
    mailbox.abort(1)
    mailbox.abort(0)
    assert offer_all(mailbox, header_of(0)) == ACCEPTED
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_a_failed_link_fails_the_take_and_only_that_step(mailbox: Mailbox) -> None:
    waiting = Waiting(mailbox)
    mailbox.fail(2, PeerLost("stage 2 on node-2 is gone"))
    with pytest.raises(PeerLost, match="node-2"):
        waiting.result()
    with pytest.raises(PeerLost, match="node-2"):
        take_now(mailbox, 0)
    mailbox.open(3, 4)
    # Of frames that the new generation has done with.
    mailbox.fail(2, PeerLost("stage 2 on node-2 is gone"))
    assert waits_for(mailbox, 0)
    offer_all(mailbox, header_of(0, generation=3))
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


def test_the_deadline_names_the_peer_the_frame_and_the_remedy(mailbox: Mailbox) -> None:
    seconds = count(0, 60)
    with pytest.raises(PeerTimeout) as caught:
        mailbox.take(Kind.GRADIENT, 3, timeout_s=45.0, monotonic=lambda: next(seconds))
    assert caught.value.message == (
        "stage 1 waited 45 s for GRADIENT of microbatch 3, step 4, generation 2 from stage 2"
    )
    assert "timeouts.frame_s" in caught.value.remedy


def test_whatever_comes_first_ends_a_wait_for_several(mailbox: Mailbox) -> None:
    wanted = [(Kind.ACTIVATION, 0), (Kind.GRADIENT, 0)]
    assert not mailbox.has(Kind.GRADIENT, 0)
    begun = threading.Event()

    def monotonic() -> float:
        begun.set()
        return time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mailbox.wait_for_any, wanted, timeout_s=20.0, monotonic=monotonic)
        assert begun.wait(20)
        # Not wanted yet.
        offer_all(mailbox, header_of(1))
        assert offer_all(mailbox, header_of(0, kind=Kind.GRADIENT)) == ACCEPTED
        waiting.result(20)
    assert mailbox.has(Kind.GRADIENT, 0)
    assert not mailbox.has(Kind.ACTIVATION, 0)
    assert torch.equal(take_now(mailbox, 0, Kind.GRADIENT), tensor_of(0, kind=Kind.GRADIENT))


def test_a_wait_for_several_names_them_all_and_ends_with_the_step(mailbox: Mailbox) -> None:
    seconds = count(0, 60)
    wanted = [(Kind.ACTIVATION, 2), (Kind.GRADIENT, 1)]
    with pytest.raises(PeerTimeout, match=r"ACTIVATION of microbatch 2.* from stage 0 and for GRADIENT .*from stage 2"):
        mailbox.wait_for_any(wanted, timeout_s=45.0, monotonic=lambda: next(seconds))
    mailbox.fail(2, PeerLost("stage 2 on node-2 is gone"))
    with pytest.raises(PeerLost, match="node-2"):
        mailbox.has(Kind.ACTIVATION, 0)
    mailbox.abort(2)
    with pytest.raises(StepAborted):
        mailbox.wait_for_any(wanted, timeout_s=45.0, monotonic=time.monotonic)


def test_many_senders_and_one_taker(mailbox: Mailbox) -> None:
    """Four threads send all chunks of a step, each in an order of its own, until none is BUSY."""
    chunks = [chunk for microbatch in range(NUM_MICROBATCHES) for chunk in chunks_of(header_of(microbatch))]
    accepted = [0] * 4

    def send(thread: int) -> None:
        left = chunks.copy()
        random.Random(thread).shuffle(left)
        deadline_s = time.monotonic() + 20
        while left:
            assert time.monotonic() < deadline_s
            verdicts = [mailbox.offer(chunk).verdict for chunk in left]
            accepted[thread] += verdicts.count(Verdict.ACCEPTED)
            assert set(verdicts) <= {Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.BUSY}
            left = [chunk for chunk, verdict in zip(left, verdicts, strict=True) if verdict is Verdict.BUSY]

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send, thread) for thread in range(4)]
        for microbatch in range(NUM_MICROBATCHES):
            frame = mailbox.take(Kind.ACTIVATION, microbatch, timeout_s=20, monotonic=time.monotonic)
            assert torch.equal(frame, tensor_of(microbatch))
        for sender in senders:
            sender.result()
    assert sum(accepted) == len(chunks)


def test_a_hostile_peer_cannot_fill_memory(mailbox: Mailbox) -> None:
    """It sends what looks right, of every moment that might come, whole frames and first chunks."""
    frame_bytes = EXPECTED[0].frame_bytes
    bound = 2 * WINDOW * len(EXPECTED) * frame_bytes
    moments = product((*range(2, 40), 2**32 - 1), (4, 5, 6, 2**64 - 1), range(NUM_MICROBATCHES), Kind)
    headers = [header_of(mb, step=step, kind=kind, generation=generation) for generation, step, mb, kind in moments]
    assert len(headers) * frame_bytes > 100 * bound
    tracemalloc.start()
    try:
        for header in headers:
            mailbox.offer(forge(replace(header, num_chunks=4, payload_bytes=1024)))
            mailbox.offer(forge(replace(header, payload_bytes=frame_bytes)))
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert WINDOW * frame_bytes < held_bytes < 2 * bound


def test_whatever_the_bytes_an_offer_answers(mailbox: Mailbox) -> None:
    rng = random.Random(7)
    honest = [chunk for microbatch in range(3) for chunk in chunks_of(header_of(microbatch))]
    for _ in range(500):
        chunk = bytearray(rng.choice(honest))
        for _ in range(rng.randrange(1, 4)):
            chunk[rng.randrange(len(chunk))] = rng.randrange(256)
        mailbox.offer(bytes(chunk[: rng.choice((len(chunk), rng.randrange(len(chunk))))]))
    # What got in was honest: a byte replaced by itself.
    for chunk in honest:
        mailbox.offer(chunk)
    assert torch.equal(take_now(mailbox, 0), tensor_of(0))


operations = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(0, 4), st.integers(3, 6), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("damage"), st.integers(0, 4), st.integers(3, 6), st.integers(0, 3), st.integers(0, 1100)),
        st.tuples(st.just("send"), st.integers(0, 4), st.integers(3, 6), st.integers(0, 3)),
        st.tuples(st.just("take")),
        st.tuples(st.just("open"), st.integers(0, 1), st.integers(0, 1)),
        st.tuples(st.just("abort"), st.integers(0, 3)),
    ),
    max_size=40,
)


@given(operations)
@settings(deadline=None)
def test_whatever_the_order_each_frame_is_the_one_that_was_sent(operations: list[tuple]) -> None:
    """Takes go in order of the microbatches, and opens forward; chunks come as they like."""
    box = Mailbox("demo", STAGE, NUM_MICROBATCHES, EXPECTED)
    generation, step, needed = 2, 4, 0
    box.open(generation, step)
    for name, *numbers in operations:
        if name in ("offer", "damage", "send"):
            theirs, their_step, microbatch, *last = numbers
            chunks = chunks_of(header_of(microbatch, step=their_step, generation=theirs))
            if name == "send":
                for chunk in chunks:
                    box.offer(chunk)
            elif name == "offer":
                box.offer(chunks[last[0]])
            else:
                damaged = bytearray(chunks[0])
                damaged[last[0]] ^= 0x10
                assert box.offer(bytes(damaged)).verdict is Verdict.CORRUPT
        elif name == "take":
            try:
                assert torch.equal(take_now(box, needed), tensor_of(needed, step))
                needed += 1
            except (PeerTimeout, StepAborted):
                pass
        elif name == "open" and any(numbers):
            later = (generation + numbers[0], step + numbers[1])
            with suppress(StepAborted):
                box.open(*later)
                (generation, step), needed = later, 0
        elif name == "abort":
            box.abort(numbers[0])
    # Another generation always works.
    box.open(9, step)
    assert offer_all(box, header_of(0, step=step, generation=9)) == ACCEPTED
    assert torch.equal(take_now(box, 0), tensor_of(0, step))
