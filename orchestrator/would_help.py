"""Where time went, as a table and in a sentence or two: what would help most.

PURE. What is lost to a cause is the mean over stages of its share of their time: that is what a step would be shorter
by, at most, without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.filesize import decimal

from actors.codecs import CODECS
from actors.frame import WireDtype
from actors.mailbox import TORCH_DTYPES
from actors.spec import LinkPlan, Plan
from orchestrator.causes import Cause, Place, StageTime
from orchestrator.console import stage_text
from orchestrator.records import StepRecord

# What is lost to less than this is not worth a sentence, and nobody reads more of them.
_LEAST_SHARE = 0.05
_MOST_SENTENCES = 2
# What shows as 0.0% has no column.
_LEAST_SHOWN_SHARE = 5e-4
# Smaller codecs, next after next, for activations and for gradients (docs/quality.md).
_FORWARD, _BACKWARD = ("none", "q8", "hq4"), ("none", "q8", "hq4-stochastic")
_COMPUTE = (Cause.FORWARD, Cause.BACKWARD, Cause.WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """What one thing costs, and what to say of it."""

    share: float
    say: Callable[[], str]


def where_rows(times: Sequence[StageTime], plan: Plan | None) -> list[tuple[str, ...]]:
    """Return a header and a row a stage, shares of its time as text; causes that nobody loses to are left out."""
    causes = [cause for cause in Cause if any(time.share(cause) >= _LEAST_SHOWN_SHARE for time in times)]
    rows = [("stage", "step", *(cause.value for cause in causes))]
    for time in times:
        shares = (f"{time.share(cause):.1%}" for cause in causes)
        rows.append((stage_text(time.stage, plan), f"{time.total_s / time.num_steps:.3f} s", *shares))
    return rows if times else []


def would_help(times: Sequence[StageTime], steps: Sequence[StepRecord], plan: Plan | None) -> tuple[str, ...]:
    """Return what would make steps shorter, most first, in words; `steps` are those that `times` are of."""
    if not times:
        return ()
    losses = [loss for loss in _losses(times, steps, plan) if loss.share >= _LEAST_SHARE]
    losses.sort(key=lambda loss: -loss.share)
    compute = fmean(time.node_share(*_COMPUTE) for time in times)
    if not losses:
        return (f"stages compute {compute:.0%} of the time: only faster nodes or less to compute would help",)
    return tuple(loss.say() for loss in losses[:_MOST_SENTENCES])


def _losses(times: Sequence[StageTime], steps: Sequence[StepRecord], plan: Plan | None) -> list[_Loss]:
    def lost(*causes: Cause) -> float:
        return fmean(time.node_share(*causes) for time in times)

    def lost_at(place: Place, *causes: Cause) -> float:
        return fmean(
            time.num_on_node
            * sum(part.seconds for part in time.parts if part.cause in causes and part.place == place)
            / time.total_s
            if time.total_s > 0
            else 0.0
            for time in times
        )

    def places(*causes: Cause) -> set[Place]:
        return {part.place for time in times for part in time.parts if part.cause in causes}

    flight, delay = lost(Cause.IN_FLIGHT, Cause.DELAY), lost(Cause.DELAY)
    # The driver's part is the same for all stages of a node.
    bubble, driver = lost(Cause.BUBBLE), fmean(time.share(Cause.DRIVER) for time in times)
    losses = [
        _Loss(share=bubble, say=lambda: _bubble_text(bubble, steps, len(times))),
        _Loss(share=flight, say=lambda: _flight_text(flight, delay, plan)),
        _Loss(share=driver, say=lambda: _driver_text(driver, times)),
        _Loss(share=lost(Cause.COMMIT), say=lambda: _commit_text(lost(Cause.COMMIT))),
        _Loss(share=lost(Cause.OTHER), say=lambda: _other_text(times, plan)),
    ]

    def slower(stage: int) -> _Loss:
        share = lost_at((stage,), Cause.SLOWER)
        return _Loss(share=share, say=lambda: _slower_text(share, stage, times, plan))

    def on_link(ends: Place, cause: Cause, text: Callable[[float, Place], str]) -> _Loss:
        share = lost_at(ends, cause)
        return _Loss(share=share, say=lambda: text(share, ends))

    losses += [slower(stage) for (stage,) in places(Cause.SLOWER)]
    texts: dict[Cause, Callable[[float, Place], str]] = {
        Cause.BUSY: lambda share, ends: _busy_text(share, ends, steps, plan),
        Cause.WINDOW: lambda share, ends: _window_text(share, ends, plan),
        Cause.ROOM: lambda share, ends: _room_text(share, ends, plan),
        Cause.CODEC: _codec_text,
    }
    losses += [on_link(ends, cause, text) for cause, text in texts.items() for ends in places(cause)]
    return losses


def _bubble_text(share: float, steps: Sequence[StepRecord], num_stages: int) -> str:
    num = sum(action.name == "F" for action in steps[-1].stages[0].actions) if steps and steps[-1].stages else 0
    # As much to fill and drain, and twice as much of everything else.
    halved = share / (2 - share)
    return (
        f"filling and draining the pipeline takes {share:.0%} of the time, with {num} microbatches in {num_stages} "
        f"stages: batch.num_microbatches={2 * num} (a step of twice the tokens) would make that about {halved:.0%}"
    )


def _flight_text(share: float, delay: float, plan: Plan | None) -> str:
    schedule = plan.schedule if plan else None
    if schedule == "gpipe":
        more = "more microbatches a step (batch.num_microbatches) are more in flight"
    elif schedule in ("bdp", "bdp-split"):
        more = (
            "a smaller batch.microbatch_size or train.activation_checkpointing=true leaves memory for more in flight, "
            "and batch.num_microbatches bounds it"
        )
    else:
        more = "plan.schedule=bdp keeps as many in flight as a round trip needs, where memory allows"
    return f"stages wait {share:.0%} of the time for round trips, {delay:.0%} for the links' delay alone: {more}"


def _driver_text(share: float, times: Sequence[StageTime]) -> str:
    trip_s = fmean(time.seconds(Cause.DRIVER) / time.num_steps for time in times)
    return (
        f"{share:.0%} of the time, {trip_s:.2f} s a step, passes between driver and nodes: run the driver nearer to "
        "them, or let a step have more microbatches (batch.num_microbatches)"
    )


def _commit_text(share: float) -> str:
    return f"commits take {share:.0%} of the time: more microbatches a step (batch.num_microbatches) make them fewer"


def _other_text(times: Sequence[StageTime], plan: Plan | None) -> str:
    worst = max(times, key=lambda time: time.share(Cause.OTHER))
    return (
        f"{worst.share(Cause.OTHER):.0%} of the time of {stage_text(worst.stage, plan)} is in no action: see what else "
        "runs there, and how often checkpoints are taken (checkpoints.every_steps)"
    )


def _slower_text(share: float, stage: int, times: Sequence[StageTime], plan: Plan | None) -> str:
    compute_s = {time.stage: time.seconds(*_COMPUTE) / time.num_steps for time in times}
    others_s = fmean(seconds for other, seconds in compute_s.items() if other != stage)
    ratio = f", {compute_s[stage] / others_s:.1f} times as long as the others" if others_s > 0 else ""
    return (
        f"{stage_text(stage, plan)} computes {compute_s[stage]:.2f} s a step{ratio}, and stages wait {share:.0%} of "
        "the time for it: give it fewer layers or a faster node (a new run probes and cuts anew; plan.split sets a cut)"
    )


def _busy_text(share: float, ends: Place, steps: Sequence[StepRecord], plan: Plan | None) -> str:
    source, target = ends
    carried = [
        link.wire_bytes for step in steps for link in step.links if (link.source_stage, link.target_stage) == ends
    ]
    amount = f" {decimal(round(fmean(carried)))} a step" if carried else ""
    link = _link(ends, plan)
    rate = f" at {link.rate_mbps:,.0f} Mbit/s" if link and link.rate_mbps < 1e6 else ""
    key = "wire.forward" if target > source else "wire.backward"
    help_text = f"a smaller codec ({key}) or a faster link"
    if link is not None:
        codec = link.forward_codec if target > source else link.backward_codec
        smaller = _smaller(link, codec, _FORWARD if target > source else _BACKWARD)
        if smaller:
            help_text = f"{key}={smaller} in place of {codec} sends {_times_fewer(link, codec, smaller)}"
        else:
            help_text = f"{codec} is small already, so a faster link, or a cut that sends less over it"
    return (
        f"stages wait {share:.0%} of the time for link {source} -> {target}, which carries{amount}{rate}: {help_text}"
    )


def _window_text(share: float, ends: Place, plan: Plan | None) -> str:
    link = _link(ends, plan)
    size = f" of {decimal(link.window_bytes)}" if link else ""
    return (
        f"stages wait {share:.0%} of the time because the window{size} of link {ends[0]} -> {ends[1]} is full: raise "
        "wire.window_s and wire.max_window_bytes"
    )


def _room_text(share: float, ends: Place, plan: Plan | None) -> str:
    source, target = ends
    return (
        f"stages wait {share:.0%} of the time for frames that {stage_text(target, plan)} had no room for at once: it "
        f"takes as many as stage {min(source, target)} keeps in flight, so more in flight or fewer layers there"
    )


def _codec_text(share: float, ends: Place) -> str:
    return (
        f"stages wait {share:.0%} of the time while frames of link {ends[0]} -> {ends[1]} are encoded or decoded: "
        "leave those nodes a core for it (fleet.threads), or take a plainer codec where the link has bytes to spare"
    )


def _link(ends: Place, plan: Plan | None) -> LinkPlan | None:
    for link in plan.links if plan else ():
        if {link.source_stage, link.target_stage} == set(ends):
            return link
    return None


def _frame_bytes(link: LinkPlan, codec: str) -> int | None:
    """Return what a frame takes in a codec; None where this release does not know it."""
    dtype = TORCH_DTYPES[WireDtype.BFLOAT16 if link.raw_frame_bytes == 2 * link.frame_elements else WireDtype.FLOAT32]
    return CODECS[codec].size_bytes(link.frame_elements, dtype) if codec in CODECS else None


def _smaller(link: LinkPlan, codec: str, ladder: Sequence[str]) -> str | None:
    """Return the first codec of a ladder that sends less than three quarters of what this one does."""
    now_bytes = _frame_bytes(link, codec)
    for other in ladder:
        other_bytes = _frame_bytes(link, other)
        if now_bytes is not None and other_bytes is not None and other_bytes < 0.75 * now_bytes:
            return other
    return None


def _times_fewer(link: LinkPlan, codec: str, smaller: str) -> str:
    before, after = _frame_bytes(link, codec), _frame_bytes(link, smaller)
    price = ", at a higher loss (docs/quality.md)" if smaller.startswith("hq4") else ""
    return (f"{before / after:.1f} times fewer bytes" if before and after else "fewer bytes") + price
