"""How far a run is and how fast: totals that go from step to step.

PURE: times are measured by the controller and come in as arguments.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.spec import StepReport
from orchestrator.lifecycle import CommitStep, StepOutcome
from orchestrator.records import StepRecord, link_records, stage_records

# The time of the steps to come is judged by the median of this many past ones.
_RECENT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The totals of a run up to its last step."""

    num_steps: int
    total_tokens: int = 0
    dollars: float = 0.0
    # At which step the held-out loss was last looked at.
    evaluated_step: int = -1
    recent_step_s: tuple[float, ...] = ()

    def timed(self, step_s: float) -> Progress:
        """Return this after a step that took so long."""
        return replace(self, recent_step_s=(*self.recent_step_s, step_s)[-_RECENT_STEPS:])

    def rewound(self, *, tokens: int, dollars: float) -> Progress:
        """Return this at a checkpoint; money that was spent stays spent."""
        return replace(self, total_tokens=tokens, dollars=max(dollars, self.dollars), evaluated_step=-1)

    def after(
        self,
        reports: Sequence[StepReport],
        outcome: StepOutcome,
        decision: CommitStep,
        *,
        num_skipped: int,
        dollars_per_hour: float,
        num_nodes: int | None = None,
    ) -> tuple[Progress, StepRecord]:
        """Return the totals with one more step, and the record of that step; `num_nodes` as for `stage_records`."""
        commit, step_s = decision.commit, self.recent_step_s[-1]
        after = replace(
            self,
            # What a skipped step saw changed no weight.
            total_tokens=self.total_tokens + (0 if commit.skip else outcome.num_targets),
            dollars=self.dollars + dollars_per_hour * step_s / 3600,
        )
        record = StepRecord(
            step=commit.step,
            num_steps=self.num_steps,
            loss=outcome.loss,
            lr=commit.lr,
            grad_norm=outcome.grad_norm,
            clip_scale=commit.clip_scale,
            skipped=commit.skip,
            num_skipped=num_skipped,
            num_targets=outcome.num_targets,
            total_tokens=after.total_tokens,
            step_s=step_s,
            tokens_per_s=outcome.num_targets / step_s,
            eta_s=(self.num_steps - commit.step - 1) * statistics.median(self.recent_step_s),
            dollars=after.dollars,
            stages=stage_records(reports, step_s, num_nodes),
            links=link_records(reports),
        )
        return after, record
