"""Totals of a run: tokens, money, time to go."""

from dataclasses import replace

import pytest

from actors.spec import Commit, Kind, LinkCount, StepReport
from orchestrator.lifecycle import CommitStep, StepOutcome
from orchestrator.progress import Progress
from orchestrator.records import LinkRecord, StepRecord

OUTCOME = StepOutcome(loss=2.5, grad_norm=3.0, num_targets=1000, nonfinite=None)


def decision(step: int, *, skip: bool = False) -> CommitStep:
    return CommitStep(commit=Commit(step=step, lr=0.1, clip_scale=0.5, skip=skip), skip_reason="odd" if skip else "")


def report(stage: int, *links: LinkCount, compute_s: float = 1.0) -> StepReport:
    return StepReport(
        run="demo",
        generation=1,
        step=0,
        stage=stage,
        ran_step=True,
        loss_sum=0.0,
        num_targets=0,
        grad_sq=(),
        nonfinite_microbatch=-1,
        compute_s=compute_s,
        wait_s=0.5,
        step_s=2.0,
        actions=(),
        links=links,
        canaries=(),
        saves=(),
        peak_memory_bytes=stage,
    )


def sent(source: int, target: int, kind: Kind, amount: int) -> LinkCount:
    return LinkCount(
        source_stage=source, target_stage=target, kind=kind, num_frames=amount, raw_bytes=4 * amount, wire_bytes=amount
    )


def after(progress: Progress, step: int, *reports: StepReport, skip: bool = False) -> tuple[Progress, StepRecord]:
    return progress.after(reports, OUTCOME, decision(step, skip=skip), num_skipped=int(skip), dollars_per_hour=7200.0)


def test_tokens_and_money_add_up_from_step_to_step() -> None:
    progress = Progress(num_steps=10)
    for step, step_s in enumerate((2.0, 4.0, 1.0)):
        progress, record = after(progress.timed(step_s), step)
        assert record.tokens_per_s == 1000 / step_s
        assert record.total_tokens == progress.total_tokens == 1000 * (step + 1)
        assert record.dollars == progress.dollars
    # $2 a second for 7 s.
    assert progress.dollars == pytest.approx(14.0)


def test_the_time_to_go_is_judged_by_the_median_of_recent_steps() -> None:
    progress = Progress(num_steps=100)
    for step_s in [1000.0] * 5 + [2.0] * 15 + [4.0] * 5:
        progress = progress.timed(step_s)
    assert len(progress.recent_step_s) == 20
    _, record = after(progress, 89)
    assert record.eta_s == 10 * 2.0
    _, last = after(progress, 99)
    assert last.eta_s == 0.0


def test_the_record_says_what_was_decided() -> None:
    _, record = after(Progress(num_steps=10).timed(2.0), 4, skip=True)
    assert (record.step, record.num_steps, record.skipped, record.num_skipped) == (4, 10, True, 1)
    assert (record.loss, record.grad_norm, record.lr, record.clip_scale) == (2.5, 3.0, 0.1, 0.5)


def test_what_a_skipped_step_saw_was_not_trained_on_but_was_paid_for() -> None:
    progress, _ = after(Progress(num_steps=10).timed(2.0), 0)
    progress, record = after(progress.timed(2.0), 1, skip=True)
    assert (progress.total_tokens, record.total_tokens, record.num_targets) == (1000, 1000, 1000)
    assert progress.dollars == pytest.approx(8.0)


def test_stages_and_links_are_summed_from_the_reports() -> None:
    reports = (
        report(1, sent(1, 0, Kind.GRADIENT, 5), compute_s=3.0),
        report(0, sent(0, 1, Kind.ACTIVATION, 7), sent(0, 1, Kind.EVAL_ACTIVATION, 2), compute_s=0.5),
    )
    _, record = after(Progress(num_steps=10).timed(2.0), 0, *reports)
    assert [stage.stage for stage in record.stages] == [0, 1]
    assert [stage.idle_share for stage in record.stages] == [0.75, 0.0]
    assert record.slowest.stage == 1
    assert record.links == (
        LinkRecord(source_stage=0, target_stage=1, num_frames=9, raw_bytes=36, wire_bytes=9),
        LinkRecord(source_stage=1, target_stage=0, num_frames=5, raw_bytes=20, wire_bytes=5),
    )
    assert (record.raw_bytes, record.wire_bytes) == (56, 14)


def test_back_at_a_checkpoint_tokens_are_its_own_but_money_is_spent() -> None:
    progress = replace(Progress(num_steps=10).timed(1.0), total_tokens=9000, dollars=5.0, evaluated_step=8)
    rewound = progress.rewound(tokens=4000, dollars=2.0)
    assert (rewound.total_tokens, rewound.dollars, rewound.evaluated_step) == (4000, 5.0, -1)
    assert Progress(num_steps=10).rewound(tokens=4000, dollars=2.0).dollars == 2.0
