"""Decisions: which steps are committed, skipped or run again, and when a run ends."""

import math
from dataclasses import replace

import pytest

from actors.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    IsthmusError,
    NonFinite,
    PeerLost,
    PeerTimeout,
    StageError,
)
from actors.optim import OptimConfig, lr_at
from actors.spec import StepReport
from orchestrator.lifecycle import (
    CommitStep,
    GuardConfig,
    History,
    Rebuild,
    Retry,
    RunState,
    StepFailed,
    StepOutcome,
    Stop,
    on_checkpoint,
    on_step_done,
    on_step_failed,
    summarise,
)

OPTIM = OptimConfig(lr=0.5, clip_norm=1.0)
GUARD = GuardConfig(history_steps=4, max_norm_ratio=10.0, max_loss_rise=2.0, max_skips=2, max_retries=2, max_rebuilds=1)
SETTLED = RunState(
    step=10, generation=3, history=History(recent_losses=(2.0, 3.0, 4.0, 5.0), recent_norms=(1.0, 2.0, 2.0, 9.0))
)
GOOD = StepOutcome(loss=3.0, grad_norm=0.5, num_targets=100, nonfinite=None)


def done(
    state: RunState, outcome: StepOutcome, guard: GuardConfig = GUARD, optim: OptimConfig = OPTIM
) -> tuple[RunState, CommitStep]:
    after, decision = on_step_done(state, outcome, guard, optim, num_steps=100)
    assert isinstance(decision, CommitStep)
    return after, decision


def failed(state: RunState, error: IsthmusError, *, lost: bool = False) -> tuple[RunState, Retry | Rebuild | Stop]:
    return on_step_failed(state, StepFailed(error=error, lost=lost), GUARD)


def report(stage: int, *grad_sq: float, loss_sum: float = 0.0, num_targets: int = 0, bad: int = -1) -> StepReport:
    return StepReport(
        run="demo",
        generation=1,
        step=0,
        stage=stage,
        ran_step=True,
        loss_sum=loss_sum,
        num_targets=num_targets,
        grad_sq=tuple((f"p{number}", value) for number, value in enumerate(grad_sq)),
        nonfinite_microbatch=bad,
        compute_s=0.0,
        wait_s=0.0,
        step_s=0.0,
        actions=(),
        links=(),
        canaries=(),
        saves=(),
        peak_memory_bytes=0,
    )


def test_a_good_step_is_committed_at_its_learning_rate() -> None:
    after, decision = done(SETTLED, GOOD)
    assert decision.commit.step == 10
    assert decision.commit.lr == lr_at(OPTIM, 10, 100)
    assert (decision.commit.clip_scale, decision.commit.skip, decision.skip_reason) == (1.0, False, "")
    assert (after.step, after.generation) == (11, 3)
    assert after.history.recent_losses == (3.0, 4.0, 5.0, 3.0)
    assert after.history.recent_norms == (2.0, 2.0, 9.0, 0.5)


@pytest.mark.parametrize(
    ("norm", "clip_norm", "scale"),
    [(4.0, 1.0, 0.25), (1.0, 1.0, 1.0), (0.1, 1.0, 1.0), (4.0, 0.0, 1.0), (4.0, 2.0, 0.5)],
)
def test_gradients_are_clipped_to_the_global_norm(norm: float, clip_norm: float, scale: float) -> None:
    _, decision = done(SETTLED, replace(GOOD, grad_norm=norm), optim=OptimConfig(clip_norm=clip_norm))
    assert decision.commit.clip_scale == scale


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"nonfinite": (2, 5), "loss": math.nan}, "stage 2 gave an infinity or NaN in microbatch 5"),
        ({"loss": math.inf}, "the loss is inf"),
        ({"loss": math.nan}, "the loss is nan"),
        ({"grad_norm": math.nan}, "the gradient norm is nan"),
        ({"grad_norm": math.inf}, "the gradient norm is inf"),
        ({"grad_norm": 20.1}, "the gradient norm is 20.1, usually 2"),
        ({"loss": 5.51}, "the loss is 5.510, usually 3.500"),
    ],
)
def test_a_step_that_would_do_harm_is_skipped_and_says_why(fields: dict, reason: str) -> None:
    after, decision = done(SETTLED, replace(GOOD, **fields))
    assert decision.skip_reason == reason
    assert decision.commit.skip
    assert decision.commit.clip_scale == 1.0
    assert after.step == 11
    # What was skipped is not what later steps are measured by.
    assert after.history == replace(SETTLED.history, num_skipped=1, skips_in_a_row=1)


@pytest.mark.parametrize("fields", [{"grad_norm": 20.0}, {"loss": 5.5}])
def test_just_within_the_limits_is_not_skipped(fields: dict) -> None:
    assert not done(SETTLED, replace(GOOD, **fields))[1].commit.skip


def test_limits_of_zero_are_no_limits_but_infinities_are_never_applied() -> None:
    off = replace(GUARD, max_norm_ratio=0.0, max_loss_rise=0.0)
    assert not done(SETTLED, replace(GOOD, grad_norm=1e9, loss=1e9), off)[1].commit.skip
    assert done(SETTLED, replace(GOOD, grad_norm=math.inf), off)[1].commit.skip


def test_nothing_is_judged_unusual_before_half_the_history_is_there() -> None:
    state = RunState(step=0, generation=1)
    for loss, norm in ((2.0, 1.0), (9.0, 900.0)):
        state, decision = done(state, replace(GOOD, loss=loss, grad_norm=norm))
        assert not decision.commit.skip
    assert done(state, replace(GOOD, loss=9.0))[1].commit.skip


def test_history_keeps_the_last_steps_only() -> None:
    state = RunState(step=0, generation=1)
    for step in range(10):
        state, _ = done(state, replace(GOOD, loss=2.0 + step / 10, grad_norm=1.0 + step / 10))
    assert state.history.recent_losses == (2.6, 2.7, 2.8, 2.9)
    assert state.history.recent_norms == (1.6, 1.7, 1.8, 1.9)


def test_too_many_skips_in_a_row_stop_the_run_where_it_is() -> None:
    bad = replace(GOOD, loss=math.nan)
    state = SETTLED
    for _ in range(2):
        state, _ = done(state, bad)
    after, decision = on_step_done(state, bad, GUARD, OPTIM, 100)
    assert isinstance(decision, Stop)
    assert isinstance(decision.error, NonFinite)
    assert "3 steps in a row could not be used, up to step 12: the loss is nan" in str(decision.error)
    assert "optim.lr" in decision.error.remedy
    assert after == state


def test_one_good_step_ends_a_row_of_skips() -> None:
    state = SETTLED
    for outcome in (replace(GOOD, loss=math.nan), replace(GOOD, loss=math.nan), GOOD, replace(GOOD, loss=math.nan)):
        state, _ = done(state, outcome)
    assert (state.history.num_skipped, state.history.skips_in_a_row) == (3, 1)


def test_a_failed_step_is_run_again_under_a_new_generation_until_the_stages_are_rebuilt() -> None:
    late = PeerTimeout("stage 1 waited 120 s")
    state, first = failed(SETTLED, late)
    assert first == Retry(reason="stage 1 waited 120 s")
    assert (state.step, state.generation, state.retries, state.rebuilds) == (10, 4, 1, 0)
    state, second = failed(state, late)
    assert isinstance(second, Retry)
    state, third = failed(state, late)
    assert third == Rebuild(reason="stage 1 waited 120 s")
    assert (state.generation, state.retries, state.rebuilds) == (6, 0, 1)


def test_a_lost_node_rebuilds_at_once_and_stops_once_that_is_used_up() -> None:
    gone = PeerLost("node-1 is gone", "start it")
    state, decision = failed(SETTLED, gone, lost=True)
    assert decision == Rebuild(reason="node-1 is gone: start it")
    assert (state.generation, state.rebuilds) == (4, 1)
    after, decision = failed(state, gone, lost=True)
    assert decision == Stop(error=gone)
    assert after == state


def test_a_checkpoint_earns_new_rebuilds_and_a_step_new_retries() -> None:
    gone, late = PeerLost("gone"), PeerTimeout("late")
    state, _ = failed(SETTLED, gone, lost=True)
    state, decision = failed(on_checkpoint(state), gone, lost=True)
    assert isinstance(decision, Rebuild)
    state, _ = failed(SETTLED, late)
    state, _ = failed(state, late)
    state, _ = done(state, GOOD)
    assert state.retries == 0
    assert isinstance(failed(state, late)[1], Retry)


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
@pytest.mark.parametrize("lost", [True, False])
def test_what_only_the_user_can_mend_stops_at_once(kind: type[IsthmusError], lost: bool) -> None:
    error = kind("the data are gone", "bring them back")
    assert failed(SETTLED, error, lost=lost) == (SETTLED, Stop(error=error))


def test_the_stages_of_a_step_are_summed_in_the_models_order() -> None:
    # In any other order of sums the small ones would be lost.
    first, second = report(0, 1e-20, 1e-20), report(1, 1.0, loss_sum=30.0, num_targets=12)
    outcome = summarise((first, second))
    assert outcome.loss == 2.5
    assert outcome.num_targets == 12
    assert outcome.grad_norm == math.sqrt(1e-20 + 1e-20 + 1.0)
    assert outcome.nonfinite is None
    cut_elsewhere = (report(0, 0.1), report(1, 0.2, 0.3), report(2, 0.7))
    assert summarise(cut_elsewhere).grad_norm == summarise((report(0, 0.1, 0.2, 0.3, 0.7),)).grad_norm


def test_the_first_stage_that_broke_is_the_one_named() -> None:
    assert summarise((report(0), report(1, bad=3), report(2, bad=0))).nonfinite == (1, 3)


def test_a_step_without_targets_is_skipped_and_not_divided_by_zero() -> None:
    outcome = summarise((report(0), report(1)))
    assert math.isnan(outcome.loss)
    assert done(SETTLED, outcome)[1].skip_reason == "the loss is nan"


@pytest.mark.parametrize("fields", [{"history_steps": 1}, {"max_skips": -1}, {"max_norm_ratio": -0.1}])
def test_limits_that_make_no_sense_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError, match="guard"):
        GuardConfig(**fields)


def test_stage_errors_cost_no_more_than_their_rebuilds() -> None:
    state, decision = failed(SETTLED, StageError("stage 1 failed"), lost=True)
    assert isinstance(decision, Rebuild)
    assert isinstance(failed(state, StageError("stage 1 failed"), lost=True)[1], Stop)


def test_a_gradient_that_is_no_number_is_named_with_the_stage_where_it_began() -> None:
    reports = (report(0, 1.0, math.nan), report(1, math.inf), report(2, 1.0, loss_sum=3.0, num_targets=1))
    _, decision = done(SETTLED, summarise(reports))
    assert decision.commit.skip
    # Gradients flow from the last stage to the first.
    assert decision.skip_reason == "stage 1 has a gradient that is infinite or NaN"
