"""The stages of a run as one thing to command: every order goes to all of them, every answer comes back in order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from actors.spec import Assignment, EvalOrder, EvalReport, LoadOrder, Plan, SaveReport, StepOrder, StepReport
from orchestrator.config import RunConfig
from orchestrator.fleet import Crew


@dataclass(frozen=True)
class Stages:
    """A plan's stages on their nodes."""

    crew: Crew
    plan: Plan
    config: RunConfig
    # Of the data's manifest, as the driver reads it.
    data_sha256: str

    @property
    def nodes(self) -> list[str]:
        """Every node that holds a stage, or several, in the order of its first."""
        return list(dict.fromkeys(stage.node for stage in self.plan.stages))

    def assign(self, generation: int) -> None:
        """Make each node its stages."""
        config = self.config
        assignments = [
            Assignment(
                run=config.name,
                generation=generation,
                plan=self.plan,
                stage=stage.stage,
                peers=tuple(self.crew.actor_name(other.node) for other in self.plan.stages),
                model=config.model,
                batch=config.batch,
                optim=config.optim,
                timeouts=config.timeouts,
                data=config.data,
                data_sha256=self.data_sha256,
                seed=config.seed,
                activation_checkpointing=config.train.activation_checkpointing,
                canary_every=config.wire.canary_every,
            )
            for stage in self.plan.stages
        ]
        orders = [tuple(own for own in assignments if own.own.node == node) for node in self.nodes]
        self.crew.call(self.nodes, "assign", orders, config.timeouts.place_s)

    def load(self, order: LoadOrder) -> None:
        """Give each stage its weights."""
        self._all_nodes("load", order, self.config.timeouts.transfer_s)

    def run(self, order: StepOrder) -> tuple[StepReport, ...]:
        """Commit the step before and run this one."""
        return self._all_stages("step", order)

    def evaluate(self, order: EvalOrder) -> tuple[EvalReport, ...]:
        """Run held-out microbatches forward."""
        return self._all_stages("evaluate", order)

    def abort(self, generation: int) -> None:
        """End a generation on every node that still answers, without waiting."""
        self.crew.tell(self.nodes, "abort", generation)

    def flush(self) -> tuple[SaveReport, ...]:
        """Wait for checkpoints that are being written; return their reports."""
        timeout_s = self.config.timeouts.transfer_s
        saves = self._all_nodes("flush", timeout_s, 2 * timeout_s)
        return tuple(save for of_node in saves for save in of_node)

    def _all_stages(self, method: str, order: object) -> tuple:
        """Return what every node reports of each of its stages, in stage order."""
        reports = self._all_nodes(method, order, self.config.timeouts.step_s)
        return tuple(sorted(chain.from_iterable(reports), key=lambda report: report.stage))

    def _all_nodes(self, method: str, order: object, timeout_s: float) -> tuple:
        return self.crew.call(self.nodes, method, [order] * len(self.nodes), timeout_s)
