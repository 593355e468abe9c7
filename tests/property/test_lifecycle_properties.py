"""What holds of every sequence of outcomes and failures."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import DataError, IsthmusError, PeerLost, PeerTimeout
from actors.optim import OptimConfig, lr_at
from orchestrator.lifecycle import (
    CommitStep,
    GuardConfig,
    Rebuild,
    Retry,
    RunState,
    StepFailed,
    StepOutcome,
    Stop,
    on_checkpoint,
    on_step_done,
    on_step_failed,
)

OPTIM = OptimConfig()
NUM_STEPS = 50
# Machines that run tests are slow at times.
relaxed = settings(deadline=None)

guards = st.builds(
    GuardConfig,
    max_norm_ratio=st.sampled_from([0.0, 2.0, 20.0]),
    max_loss_rise=st.sampled_from([0.0, 1.0]),
    history_steps=st.integers(2, 6),
    max_skips=st.integers(0, 3),
    max_retries=st.integers(0, 3),
    max_rebuilds=st.integers(0, 3),
)
outcomes = st.builds(
    StepOutcome,
    loss=st.one_of(st.floats(0.0, 20.0), st.sampled_from([math.nan, math.inf])),
    grad_norm=st.one_of(st.floats(0.0, 1e6), st.sampled_from([math.nan, math.inf])),
    num_targets=st.integers(0, 1000),
    nonfinite=st.one_of(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 7))),
)
errors = st.sampled_from([PeerTimeout("late"), PeerLost("gone"), DataError("torn")])
failures = st.builds(StepFailed, error=errors, lost=st.booleans())
events = st.lists(st.one_of(outcomes, failures, st.just("checkpoint")), max_size=40)


@relaxed
@given(guards, events)
def test_a_run_only_goes_forward_and_counts_what_it_skips(
    guard: GuardConfig, events: list[StepOutcome | StepFailed | str]
) -> None:
    state = RunState(step=0, generation=1)
    committed = skipped = failed = 0
    for event in events:
        before = state
        if isinstance(event, StepOutcome):
            state, decision = on_step_done(state, event, guard, OPTIM, NUM_STEPS)
            # PURE: asked again, it says the same again. By repr, since no two errors are equal.
            assert repr(on_step_done(before, event, guard, OPTIM, NUM_STEPS)) == repr((state, decision))
        elif isinstance(event, StepFailed):
            state, decision = on_step_failed(state, event, guard)
            assert repr(on_step_failed(before, event, guard)) == repr((state, decision))
        else:
            state = on_checkpoint(state)
            assert state == RunState(
                step=before.step, generation=before.generation, retries=before.retries, history=before.history
            )
            continue
        assert state.step >= before.step
        assert state.generation >= before.generation
        if isinstance(decision, Stop):
            assert state == before
            assert isinstance(decision.error, IsthmusError)
            break
        if isinstance(decision, CommitStep):
            assert isinstance(event, StepOutcome)
            commit = decision.commit
            assert (commit.step, state.step, state.generation) == (committed, committed + 1, before.generation)
            assert commit.lr == lr_at(OPTIM, committed, NUM_STEPS)
            assert commit.skip == bool(decision.skip_reason)
            assert commit.skip or (math.isfinite(event.loss) and event.grad_norm * commit.clip_scale <= 1.0 + 1e-9)
            committed += 1
            skipped += commit.skip
        else:
            failed += 1
            assert state.step == before.step
            assert isinstance(decision, Retry | Rebuild)
        assert state.generation == 1 + failed
        assert state.history.num_skipped == skipped
        assert state.history.skips_in_a_row <= min(guard.max_skips, skipped)
        assert state.retries <= guard.max_retries
        assert state.rebuilds <= guard.max_rebuilds
        assert len(state.history.recent_losses) == len(state.history.recent_norms) <= guard.history_steps
        assert all(map(math.isfinite, state.history.recent_losses + state.history.recent_norms))


@relaxed
@given(guards, st.lists(failures.filter(lambda failure: failure.error.exit_code != 2), min_size=1))
def test_failures_without_progress_come_to_an_end(guard: GuardConfig, failures: list[StepFailed]) -> None:
    state = RunState(step=0, generation=1)
    most = (guard.max_retries + 1) * (guard.max_rebuilds + 1)
    for number in range(most):
        state, decision = on_step_failed(state, failures[number % len(failures)], guard)
        if isinstance(decision, Stop):
            return
    raise AssertionError("the run would try for ever")
