"""A made-up run for the tests of what shows runs: a plan of a few stages, and steps whose loss falls."""

from __future__ import annotations

from actors.spec import ActionTime, LinkPlan, Plan, StagePlan
from orchestrator.records import LinkRecord, StageRecord, StepRecord


def make_plan(num_stages: int = 2) -> Plan:
    return Plan(
        stages=tuple(
            StagePlan(
                stage=stage,
                node=f"node-{stage}",
                layer_start=2 * stage,
                layer_stop=2 * stage + 2,
                memory_bytes=10**9,
                memory_limit_bytes=2 * 10**9,
                compute_s=0.5,
            )
            for stage in range(num_stages)
        ),
        links=tuple(
            LinkPlan(
                source_stage=stage,
                target_stage=stage + 1,
                forward_codec="hq4",
                backward_codec="q8",
                frame_elements=1000,
                raw_frame_bytes=4000,
                frame_bytes_forward=1000,
                frame_bytes_backward=2000,
                delay_s=0.04,
                rate_mbps=100.0,
                chunk_bytes=1000,
                window_bytes=4000,
            )
            for stage in range(num_stages - 1)
        ),
        schedule="1f1b",
        step_s=2.0,
        even_step_s=2.5,
        tokens_per_s=8000.0,
        dollars_per_hour=3.0,
        dollars_per_mtoken=0.1,
        binds="link 0 -> 1",
    )


def make_step(step: int, num_steps: int = 20, num_stages: int = 2, loss: float | None = None) -> StepRecord:
    """Step `step`: 1,000 tokens in 2 s for one cent; stage i computes 1 + i/10 s; each link saves half its bytes."""
    actions = (
        ActionTime(name="wF", microbatch=0, start_s=0.0, end_s=0.2),
        ActionTime(name="F", microbatch=0, start_s=0.2, end_s=0.7),
        ActionTime(name="B", microbatch=0, start_s=0.7, end_s=1.8),
        ActionTime(name="C", microbatch=-1, start_s=1.8, end_s=1.9),
    )
    pairs = [pair for a in range(num_stages - 1) for pair in ((a, a + 1), (a + 1, a))]
    return StepRecord(
        step=step,
        num_steps=num_steps,
        loss=8.0 - 0.1 * step if loss is None else loss,
        lr=1e-3,
        grad_norm=1.5,
        clip_scale=0.5,
        skipped=False,
        num_skipped=0,
        num_targets=1000,
        total_tokens=1000 * (step + 1),
        step_s=2.0,
        tokens_per_s=500.0,
        eta_s=2.0 * (num_steps - step - 1),
        dollars=0.01 * (step + 1),
        stages=tuple(
            StageRecord(
                stage=stage,
                compute_s=1.0 + stage / 10,
                wait_s=0.2,
                idle_share=0.25,
                peak_memory_bytes=10**9,
                actions=actions,
            )
            for stage in range(num_stages)
        ),
        links=tuple(
            LinkRecord(source_stage=a, target_stage=b, num_frames=4, raw_bytes=24_600_000, wire_bytes=12_300_000)
            for a, b in pairs
        ),
    )
