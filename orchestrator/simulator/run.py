"""A long run on nodes that come and go: how much is trained, what it costs, what is lost and why.

PURE. Steps are the grain: each placement is simulated once, then its steps follow one another until something
changes. What a lost node costs follows `orchestrator.lifecycle`: the stages are placed anew and all of them go back to
the newest whole checkpoint. Whatever else a run may do one day is off unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from actors.settings import WireConfig
from orchestrator.lifecycle import GuardConfig
from orchestrator.planner.problem import Placement, Problem
from orchestrator.simulator.crew import Crew
from orchestrator.simulator.outcome import EventName, RunEvent, RunPoint, RunRules, RunSimulation, RunStretch
from orchestrator.simulator.overheads import NO_OVERHEADS, Overheads
from orchestrator.simulator.step import StepSimulation, simulate_step
from orchestrator.simulator.trace import Change, Trace

# (problem, whether each node is there, the placement before) -> a placement of those that are; None: nothing fits.
Replan = Callable[[Problem, NDArray[np.bool_], Placement | None], Placement | None]

# Of float32 weight, gradient and two moments, all but the gradient are in a checkpoint.
_SAVED_SHARE = 0.75


def simulate_run(
    problem: Problem,
    trace: Trace,
    replan: Replan,
    wire: WireConfig,
    *,
    step_tokens: int,
    rules: RunRules | None = None,
    overheads: Overheads = NO_OVERHEADS,
    codecs: Sequence[tuple[str, str]] | None = None,
    guard: GuardConfig | None = None,
) -> RunSimulation:
    """Return what training comes to while nodes come and go as `trace` says.

    `problem` is of all nodes that ever are; `replan` chooses among those that are there. Where recovery is by rollback,
    a node that is lost while the stages are being placed starts that anew.
    """
    run = _Run(
        problem, trace, replan, wire, rules or RunRules(), overheads, codecs, guard or GuardConfig(), step_tokens
    )
    for change in trace.changes:
        run.go_on(min(change.time_s, trace.duration_s))
        run.take(change)
    run.go_on(trace.duration_s)
    return run.result()


class _Run:
    """The state of a run at a moment."""

    def __init__(
        self,
        problem: Problem,
        trace: Trace,
        replan: Replan,
        wire: WireConfig,
        rules: RunRules,
        overheads: Overheads,
        codecs: Sequence[tuple[str, str]] | None,
        guard: GuardConfig,
        step_tokens: int,
    ) -> None:
        self._problem, self._replan, self._wire, self._rules = problem, replan, wire, rules
        self._overheads, self._codecs, self._guard = overheads, codecs, guard
        self._step_tokens = step_tokens
        self._known: dict[Placement, StepSimulation] = {}
        self._here_N = np.zeros(problem.num_nodes, dtype=np.bool_)
        self._here_N[list(trace.first)] = True
        # -1: of no stage.
        self._stage_N = np.full(problem.num_nodes, -1, dtype=np.int64)
        self._placement: Placement | None = None
        self._crew: Crew | None = None
        self._now_s = 0.0
        self._down_until_s = rules.restart_s
        self._planned_s = 0.0
        self._has_changed = False
        self._step, self._into_s, self._saved_step = 0, 0.0, 0
        self._rebuilds, self._stops = 0, 0
        self._dollars, self._lost_steps, self._lost_s, self._down_s = 0.0, 0, 0.0, 0.0
        self._losses, self._replans = 0, 0
        self._points: list[RunPoint] = []
        self._events: list[RunEvent] = []
        self._stretches: list[RunStretch] = []
        self._last_step: StepSimulation | None = None

    def go_on(self, until_s: float) -> None:
        """Place what is to be placed and run steps until a moment."""
        while self._now_s < until_s:
            if self._now_s < self._down_until_s:
                self._wait(min(until_s, self._down_until_s))
            elif self._placement is None:
                self._place()
            else:
                self._steps(until_s)

    def take(self, change: Change) -> None:
        """Let a node come or go."""
        node = change.node
        if bool(self._here_N[node]) == change.joins:
            return
        self._here_N[node] = change.joins
        self._has_changed = True
        if change.joins:
            self._tell("node_joined", f"node {node}")
            if self._placement is None and math.isinf(self._down_until_s):
                self._down_until_s = self._now_s + self._rules.restart_s
        elif self._placement is None:
            if math.isfinite(self._down_until_s) and self._rules.recovery == "rollback":
                self._down_until_s = self._now_s + self._rules.notice_s + self._rules.restart_s
        elif self._stage_N[node] >= 0:
            self._lose(node)
        self._mark()

    def result(self) -> RunSimulation:
        """Return what it came to by now."""
        return RunSimulation(
            duration_s=self._now_s,
            steps=self._step,
            tokens=self._step * self._step_tokens,
            dollars=self._dollars,
            lost_steps=self._lost_steps,
            lost_s=self._lost_s,
            down_s=self._down_s,
            losses=self._losses,
            replans=self._replans,
            stops=self._stops,
            points=tuple(self._points),
            events=tuple(self._events),
            stretches=tuple(self._stretches),
            last_step=self._last_step,
        )

    def _steps(self, until_s: float) -> None:
        """Run whole steps, and a part of one, until a moment, or until it is time to plan anew."""
        assert self._crew is not None
        step_s = self._crew.step_s
        if self._has_changed and self._rules.replan_every_s < math.inf:
            due_s = max(self._now_s, self._planned_s + self._rules.replan_every_s)
            # At the end of the step that runs then.
            left = max(0, math.ceil((due_s - self._now_s + self._into_s) / step_s - 1e-9))
            end_s = self._now_s - self._into_s + left * step_s
            if end_s <= until_s:
                self._note_stretch(left)
                self._pass(end_s)
                self._step, self._into_s = self._step + left, 0.0
                self._move()
                return
        done, into_s = divmod(until_s - self._now_s + self._into_s, step_s)
        self._note_stretch(int(done))
        self._step, self._into_s = self._step + int(done), into_s
        self._pass(until_s)
        self._note_checkpoints()

    def _note_stretch(self, num_steps: int) -> None:
        assert self._crew is not None
        if num_steps:
            begin_s, dollars_per_s = self._now_s - self._into_s, self._dollars_per_s()
            self._stretches.append(
                RunStretch(
                    first_step=self._step,
                    num_steps=num_steps,
                    begin_s=begin_s,
                    step_s=self._crew.step_s,
                    dollars=self._dollars - dollars_per_s * self._into_s,
                    dollars_per_s=dollars_per_s,
                    nodes_used=int((self._stage_N >= 0).sum()),
                )
            )

    def _note_checkpoints(self) -> None:
        assert self._crew is not None
        # A checkpoint counts once it is written.
        written = self._step - math.ceil(max(0.0, self._rules.checkpoint_write_s - self._into_s) / self._crew.step_s)
        newest = written // self._rules.checkpoint_steps * self._rules.checkpoint_steps
        if newest > self._saved_step:
            self._saved_step, self._rebuilds = newest, 0

    def _lose(self, node: int) -> None:
        """Answer the loss of a node that holds a stage."""
        assert self._crew is not None
        assert self._placement is not None
        self._losses += 1
        stage = int(self._stage_N[node])
        self._note_checkpoints()
        self._stage_N[node] = -1
        if self._rules.recovery != "rollback" and self._crew.num_left(stage) > 1:
            self._heal(stage, node)
            return
        self._lost_s += self._into_s
        self._into_s = 0.0
        back = self._step - self._saved_step
        self._lost_steps += back
        self._lost_s += back * self._crew.step_s
        self._step = self._saved_step
        self._tell("node_lost", f"node {node} of stage {stage}; {back} steps are done again")
        self._rebuilds += 1
        if self._rebuilds > self._guard.max_rebuilds:
            self._stops, self._rebuilds = self._stops + 1, 0
            self._tell("stopped", f"more than {self._guard.max_rebuilds} rebuilds without a checkpoint; started again")
        self._unplace()
        self._down_until_s = self._now_s + self._rules.notice_s + self._rules.restart_s

    def _heal(self, stage: int, node: int) -> None:
        """Let the replicas of a lost node take over."""
        assert self._crew is not None
        share = self._crew.lose(stage, node)
        again_s = self._into_s
        if self._rules.recovery == "microbatches":
            # What it had added up of this step's gradients is gone with it; the others do its part of that again.
            again_s = min(again_s, again_s * share)
        else:
            self._down_until_s = self._now_s + self._rules.notice_s
        self._lost_s += again_s
        self._into_s -= again_s
        self._tell("healed", f"node {node} of stage {stage} is lost; its replicas take its microbatches")

    def _unplace(self) -> None:
        self._placement = self._crew = None
        self._stage_N[:] = -1

    def _place(self) -> None:
        """Choose a placement of what is there, and load it; where none fits, wait for another node."""
        self._replans += 1
        self._has_changed = False
        self._planned_s = self._now_s
        placement = self._replan(self._problem, self._here_N, None)
        if placement is None:
            self._down_until_s = math.inf
            self._tell("waiting", f"{int(self._here_N.sum())} nodes do not hold the model")
            self._mark()
            return
        self._settle(placement)
        self._down_until_s = self._now_s + self._load_s(placement)
        self._tell("placed", f"{placement.num_stages} stages on {len(placement.used)} nodes")

    def _move(self) -> None:
        """Plan anew between two steps, and move where that pays off before the next time."""
        assert self._crew is not None
        self._has_changed = False
        self._planned_s = self._now_s
        self._replans += 1
        before = self._crew.placement()
        placement = self._replan(self._problem, self._here_N, before)
        if placement is None or placement == before:
            return
        pause_s = self._rules.restart_s + self._load_s(placement)
        gained_s = self._rules.replan_every_s * (1 - self._simulated(placement).step_s / self._crew.step_s)
        if gained_s > pause_s:
            # What was committed is saved before the stages move: no step is lost.
            self._saved_step = self._step
            self._settle(placement)
            self._down_until_s = self._now_s + pause_s
            self._tell("moved", f"to {placement.num_stages} stages on {len(placement.used)} nodes")

    def _settle(self, placement: Placement) -> None:
        simulation = self._last_step = self._simulated(placement)
        self._placement = placement
        self._stage_N[:] = -1
        for stage, nodes in enumerate(placement.nodes):
            self._stage_N[list(nodes)] = stage
        self._crew = Crew(self._problem, placement, simulation.step_s, self._rules.exact_nodes, self._simulated)
        self._mark()

    def _simulated(self, placement: Placement) -> StepSimulation:
        """Return one step of a placement; each is played once."""
        if placement not in self._known:
            if len(placement.used) > self._rules.exact_nodes:
                # Of large ones only the newest is kept: no other comes again.
                self._known.clear()
            self._known[placement] = simulate_step(
                self._problem, placement, self._wire, overheads=self._overheads, codecs=self._codecs
            )
        return self._known[placement]

    def _load_s(self, placement: Placement) -> float:
        """Return how long the largest stage reads its part of a checkpoint: of its state all but the gradients."""
        problem = self._problem
        largest = max(
            (stop - start) * problem.layer_state_bytes
            + problem.first_state_bytes * (start == 0)
            + problem.last_state_bytes * (stop == problem.num_layers)
            for start, stop in pairwise(placement.bounds)
        )
        return _SAVED_SHARE * largest * 8e-6 / self._rules.load_mbps

    def _wait(self, until_s: float) -> None:
        self._down_s += until_s - self._now_s
        self._pass(until_s)
        if self._now_s >= self._down_until_s:
            self._mark()

    def _pass(self, until_s: float) -> None:
        """Let time pass, and pay for it."""
        self._dollars += self._dollars_per_s() * (until_s - self._now_s)
        self._now_s = until_s

    def _dollars_per_s(self) -> float:
        paid_N = self._here_N if self._rules.pays_idle else self._stage_N >= 0
        return float(self._problem.price_N[paid_N].sum()) / 3600

    def _mark(self) -> None:
        is_up = self._crew is not None and self._now_s >= self._down_until_s
        point = RunPoint(
            time_s=self._now_s,
            nodes_here=int(self._here_N.sum()),
            nodes_used=int((self._stage_N >= 0).sum()),
            tokens_per_s=self._step_tokens / self._crew.step_s if is_up and self._crew else 0.0,
        )
        if self._points and self._points[-1].time_s == point.time_s:
            self._points.pop()
        self._points.append(point)

    def _tell(self, name: EventName, text: str) -> None:
        self._events.append(RunEvent(time_s=self._now_s, step=self._step, name=name, text=text))
