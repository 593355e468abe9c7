"""What to do next: state x event -> state, decision.

PURE: no clock, no Ray, no randomness. The controller acts on the decisions and makes none of its own.

    StepDone    -> CommitStep, applied or skipped | Stop
    StepFailed  -> Retry | Rebuild | Stop
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace

from actors.errors import ConfigError, DiskFull, IsthmusError, NonFinite, OutOfDeviceMemory
from actors.optim import OptimConfig, lr_at
from actors.spec import Commit, StepReport
from orchestrator.canary import StepDown


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step's gradients are dropped, and when a run gives up."""

    # A step is skipped when its gradient norm exceeds this many times the median of recent steps; 0: never.
    max_norm_ratio: float = 20.0
    # ... or when its loss exceeds the median of recent steps by this many nats; 0: never.
    max_loss_rise: float = 3.0
    # How many recent steps these medians are of; none is judged so before half of them have passed.
    history_steps: int = 32
    # Skipping more steps than this in a row stops the run at its last good commit.
    max_skips: int = 5
    # Trying the same step again more often than this stops the run.
    max_retries: int = 3
    # Rolling all stages back to the newest checkpoint more often than this, without a checkpoint between, stops it.
    max_rebuilds: int = 3

    def __post_init__(self) -> None:
        if self.history_steps < 2:
            raise ConfigError(f"guard.history_steps is {self.history_steps}", "set guard.history_steps to 2 or more")
        if min(self.max_norm_ratio, self.max_loss_rise, self.max_skips, self.max_retries, self.max_rebuilds) < 0:
            raise ConfigError("a limit under guard is negative", "set each guard.max_* to 0 or more")


@dataclass(frozen=True, kw_only=True)
class History:
    """What later decisions depend on; a checkpoint keeps it, so that a resumed run decides the same."""

    recent_losses: tuple[float, ...] = ()
    recent_norms: tuple[float, ...] = ()
    num_skipped: int = 0
    skips_in_a_row: int = 0
    # Codecs that canaries replaced.
    step_downs: tuple[StepDown, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run is."""

    # The step to run next, or running; the weights are of this version.
    step: int
    # Rises with every try; frames and orders of an older one are refused.
    generation: int
    retries: int = 0
    rebuilds: int = 0
    history: History = field(default_factory=History)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """A finished step, summed over its stages."""

    loss: float
    grad_norm: float
    num_targets: int
    # The first stage and microbatch that gave an infinity or NaN, if any.
    nonfinite: tuple[int, int] | None
    # The stage whose gradients are the first, on their way back, that are not finite, if any.
    nonfinite_gradient: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepFailed:
    """A step that not every stage finished."""

    error: IsthmusError
    # Whether a node is gone, or a stage can no longer be trusted to hold its weights.
    lost: bool


@dataclass(frozen=True, kw_only=True)
class CommitStep:
    """Commit, and why if the step is skipped."""

    commit: Commit
    skip_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Run the same step again from the same weights, under the state's new generation."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """Place the stages anew and roll all of them back to the newest whole checkpoint."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End the run at its last good commit."""

    error: IsthmusError


def summarise(reports: tuple[StepReport, ...]) -> StepOutcome:
    """Return the outcome of a step from its stages' reports, in stage order.

    The norm sums the squares of parameters in the model's own order, so that it does not depend on the cut.
    """
    num_targets = sum(report.num_targets for report in reports)
    loss_sum = sum(report.loss_sum for report in reports)
    total_sq = 0.0
    nonfinite_gradient = None
    for report in reports:
        for _, grad_sq in report.grad_sq:
            total_sq += grad_sq
            if not math.isfinite(grad_sq):
                nonfinite_gradient = report.stage
    bad = [(report.stage, report.nonfinite_microbatch) for report in reports if report.nonfinite_microbatch >= 0]
    return StepOutcome(
        loss=loss_sum / num_targets if num_targets else math.nan,
        grad_norm=math.sqrt(total_sq),
        num_targets=num_targets,
        nonfinite=bad[0] if bad else None,
        nonfinite_gradient=nonfinite_gradient,
    )


def on_step_done(
    state: RunState, outcome: StepOutcome, guard: GuardConfig, optim: OptimConfig, num_steps: int
) -> tuple[RunState, CommitStep | Stop]:
    """Return the commit of a finished step: its gradients clipped to optim.clip_norm, or dropped."""
    reason = _skip_reason(state.history, outcome, guard)
    history = _after(state.history, outcome, guard, skipped=bool(reason))
    if history.skips_in_a_row > guard.max_skips:
        return state, Stop(
            error=NonFinite(
                f"{history.skips_in_a_row} steps in a row could not be used, up to step {state.step}: {reason}",
                "lower optim.lr, raise optim.warmup_steps, or check the data near that step; the run resumes from its "
                "last good commit",
            )
        )
    clip_scale = 1.0
    if not reason and 0 < optim.clip_norm < outcome.grad_norm:
        clip_scale = optim.clip_norm / outcome.grad_norm
    commit = Commit(step=state.step, lr=lr_at(optim, state.step, num_steps), clip_scale=clip_scale, skip=bool(reason))
    return replace(state, step=state.step + 1, retries=0, history=history), CommitStep(
        commit=commit, skip_reason=reason
    )


def on_step_failed(state: RunState, event: StepFailed, guard: GuardConfig) -> tuple[RunState, Retry | Rebuild | Stop]:
    """Return how to go on after a step that not every stage finished."""
    after = replace(state, generation=state.generation + 1, retries=state.retries + 1)
    # The same would come again: the user's errors, and devices and disks that are too small.
    if event.error.exit_code == 2 or isinstance(event.error, OutOfDeviceMemory | DiskFull):
        return state, Stop(error=event.error)
    if event.lost or after.retries > guard.max_retries:
        rebuilt = replace(after, retries=0, rebuilds=state.rebuilds + 1)
        if rebuilt.rebuilds > guard.max_rebuilds:
            return state, Stop(error=event.error)
        return rebuilt, Rebuild(reason=str(event.error))
    return after, Retry(reason=str(event.error))


def on_checkpoint(state: RunState) -> RunState:
    """Return the state once a new checkpoint is whole: what was rebuilt before it has paid off."""
    return replace(state, rebuilds=0)


def on_step_downs(state: RunState, step_downs: tuple[StepDown, ...]) -> RunState:
    """Return the state in which links have milder codecs, so that a resumed run has them too."""
    history = replace(state.history, step_downs=(*state.history.step_downs, *step_downs))
    return replace(state, history=history)


def _skip_reason(history: History, outcome: StepOutcome, guard: GuardConfig) -> str:
    """Return why a step's gradients must not be applied, or an empty string."""
    if outcome.nonfinite is not None:
        stage, microbatch = outcome.nonfinite
        return f"stage {stage} gave an infinity or NaN in microbatch {microbatch}"
    if outcome.nonfinite_gradient is not None:
        return f"stage {outcome.nonfinite_gradient} has a gradient that is infinite or NaN"
    if not math.isfinite(outcome.loss):
        return f"the loss is {outcome.loss}"
    if not math.isfinite(outcome.grad_norm):
        return f"the gradient norm is {outcome.grad_norm}"
    if len(history.recent_losses) < guard.history_steps // 2:
        return ""
    usual_norm = statistics.median(history.recent_norms)
    if guard.max_norm_ratio and outcome.grad_norm > guard.max_norm_ratio * usual_norm:
        return f"the gradient norm is {outcome.grad_norm:.3g}, usually {usual_norm:.3g}"
    usual_loss = statistics.median(history.recent_losses)
    if guard.max_loss_rise and outcome.loss > usual_loss + guard.max_loss_rise:
        return f"the loss is {outcome.loss:.3f}, usually {usual_loss:.3f}"
    return ""


def _after(history: History, outcome: StepOutcome, guard: GuardConfig, *, skipped: bool) -> History:
    if skipped:
        return replace(history, num_skipped=history.num_skipped + 1, skips_in_a_row=history.skips_in_a_row + 1)
    keep = guard.history_steps - 1
    return replace(
        history,
        recent_losses=(*history.recent_losses[-keep:], outcome.loss),
        recent_norms=(*history.recent_norms[-keep:], outcome.grad_norm),
        skips_in_a_row=0,
    )
