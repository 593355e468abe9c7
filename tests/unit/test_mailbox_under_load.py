"""The mailbox under many senders at once, hostile ones and any order of things."""

import random
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import PeerTimeout, StepAborted
from actors.mailbox import Mailbox, Verdict
from actors.spec import Kind
from tests.mailbox_frames import (
    ACCEPTED,
    EXPECTED,
    NUM_MICROBATCHES,
    STAGE,
    WINDOW,
    chunks_of,
    forge,
    header_of,
    offer_all,
    open_box,
    take_now,
    tensor_of,
)


@pytest.fixture
def mailbox() -> Mailbox:
    """One that has step 4 open, in generation 2."""
    return open_box()


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
