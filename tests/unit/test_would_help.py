"""What would help most, in words: each cause by itself, with the setting that is there for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.spec import Plan
from orchestrator.causes import Cause
from orchestrator.records import LinkRecord
from orchestrator.where import where_time_went
from orchestrator.would_help import where_rows, would_help
from tests.played_frames import Line, Rig, played_step
from tests.unit.synthetic_run import make_plan

EVEN = Rig(forward_s=(1.0, 1.0), backward_s=(2.0, 2.0), num_microbatches=40)
SLOW_LINK = Line(rate_mbps=8.0, frame_bytes=9_000_000)


def said(rig: Rig, plan: Plan | None = None) -> tuple[str, ...]:
    record = played_step(rig)
    links = (LinkRecord(source_stage=0, target_stage=1, num_frames=40, raw_bytes=10**9, wire_bytes=360_000_000),)
    record = replace(record, links=links)
    return would_help(where_time_went([record] * 2, rig.figures()), [record] * 2, plan)


def test_where_nothing_is_lost_only_compute_would_help() -> None:
    (words,) = said(EVEN)
    assert words == "stages compute 98% of the time: only faster nodes or less to compute would help"


def test_a_bubble_wants_more_microbatches_and_says_what_they_would_bring() -> None:
    rig = Rig(forward_s=(1.0,) * 4, backward_s=(2.0,) * 4, num_microbatches=6)
    (words,) = said(rig)
    assert words == (
        "filling and draining the pipeline takes 33% of the time, with 6 microbatches in 4 stages: "
        "batch.num_microbatches=12 (a step of twice the tokens) would make that about 20%"
    )
    # It would.
    (doubled,) = said(replace(rig, num_microbatches=12))
    assert "takes 20% of the time" in doubled


def test_a_slower_stage_is_named_with_how_much_slower_it_is() -> None:
    rig = Rig(forward_s=(1.0, 3.0, 1.0), backward_s=(2.0, 6.0, 2.0), num_microbatches=40)
    words = said(rig, make_plan(3))[0]
    assert words.startswith("stage 1 (node-1) computes 360.00 s a step, 3.0 times as long as the others, and stages")
    assert "plan.split" in words
    assert said(rig)[0].startswith("stage 1 computes")


@pytest.mark.parametrize(
    ("codec", "help_text"),
    [
        ("none", "wire.forward=q8 in place of none sends 3.9 times fewer bytes"),
        ("q8", "wire.forward=hq4 in place of q8 sends 2.0 times fewer bytes, at a higher loss (docs/quality.md)"),
        ("hq4", "hq4 is small already, so a faster link, or a cut that sends less over it"),
        ("q4", "q4 is small already, so a faster link, or a cut that sends less over it"),
    ],
)
def test_a_busy_link_wants_the_next_smaller_codec(codec: str, help_text: str) -> None:
    plan = make_plan(2)
    link = replace(plan.links[0], forward_codec=codec, frame_elements=1 << 20, raw_frame_bytes=4 << 20)
    words = said(replace(EVEN, lines={(0, 1): SLOW_LINK}), replace(plan, links=(link,)))[0]
    assert "of the time for link 0 -> 1, which carries 360.0 MB a step at 100 Mbit/s: " in words
    assert words.endswith(help_text)


def test_gradients_have_codecs_of_their_own() -> None:
    words = said(replace(EVEN, lines={(1, 0): SLOW_LINK}), make_plan(2))[0]
    assert "link 1 -> 0" in words
    assert "wire.backward=hq4-stochastic in place of q8" in words
    # Without a plan there is still something to say; a codec of another release is not weighed.
    assert "a smaller codec (wire.backward) or a faster link" in said(replace(EVEN, lines={(1, 0): SLOW_LINK}))[0]
    plan = make_plan(2)
    unknown = replace(plan, links=(replace(plan.links[0], backward_codec="of-tomorrow"),))
    assert "of-tomorrow is small already" in said(replace(EVEN, lines={(1, 0): SLOW_LINK}), unknown)[0]


@pytest.mark.parametrize(
    ("schedule", "help_text"),
    [
        ("1f1b", "plan.schedule=bdp"),
        ("gpipe", "batch.num_microbatches"),
        ("bdp", "batch.microbatch_size"),
        (None, "plan.schedule=bdp"),
    ],
)
def test_long_delays_want_more_in_flight(schedule, help_text: str) -> None:
    plan = replace(make_plan(2), schedule=schedule) if schedule else None
    words = said(replace(EVEN, line=Line(delay_s=5.0)), plan)[0]
    assert words.startswith("stages wait 61% of the time for round trips, 44% for the links' delay alone: ")
    assert help_text in words


def test_windows_rooms_codecs_drivers_and_commits_have_their_settings() -> None:
    narrow = Line(rate_mbps=80.0, frame_bytes=1_000_000, chunk_bytes=100_000, delay_s=0.5, window_s=8.0)
    words = said(replace(EVEN, lines={(0, 1): narrow, (1, 0): Line(delay_s=0.5)}), make_plan(2))
    assert "the window of 4.0 kB of link 0 -> 1 is full: raise wire.window_s and wire.max_window_bytes" in words[0]
    words = said(replace(EVEN, lines={(0, 1): Line(room_s=9.0)}), make_plan(2))
    assert "frames that stage 1 (node-1) had no room for" in words[0]
    assert any("frames of link 0 -> 1 are encoded or decoded" in text for text in said(replace(EVEN, encode_s=3.0)))
    (words,) = said(replace(EVEN, trip_s=60.0))
    assert words.startswith("33% of the time, 60.00 s a step, passes between driver and nodes")
    (words,) = said(replace(EVEN, commit_s=60.0))
    assert words.startswith("commits take 33% of the time")


def test_time_in_no_action_is_said_of_the_stage_that_has_most_of_it() -> None:
    record = played_step(EVEN)
    first, second = record.stages
    # A step that goes on after its last action.
    second = replace(second, step_s=(second.step_s or 0.0) + 60.0)
    record = replace(record, step_s=record.step_s + 60.0, stages=(first, second))
    times = where_time_went([record], EVEN.figures())
    (words,) = would_help(times, [record], None)
    assert words.startswith("33% of the time of stage 1 is in no action")
    assert times[1].seconds(Cause.OTHER) == pytest.approx(60.0)


def test_two_sentences_at_most_and_the_worse_one_first() -> None:
    rig = replace(EVEN, num_microbatches=4, commit_s=9.0, trip_s=7.0, line=Line(delay_s=6.0))
    words = said(rig)
    assert len(words) == 2
    assert "round trips" in words[0]
    assert would_help((), [], None) == ()


def test_the_table_has_a_row_a_stage_and_only_causes_that_there_are() -> None:
    rig = Rig(forward_s=(1.0,) * 4, backward_s=(2.0,) * 4, num_microbatches=6, trip_s=3.0)
    record = played_step(rig)
    rows = where_rows(where_time_went([record], rig.figures()), make_plan(4))
    assert rows[0] == ("stage", "step", "forward", "backward", "fill and drain", "driver")
    assert rows[1] == ("stage 0 (node-0)", "30.000 s", "20.0%", "40.0%", "30.0%", "10.0%")
    assert [row[1:] for row in rows[1:]] == 4 * [rows[1][1:]]
    assert where_rows((), None) == []
