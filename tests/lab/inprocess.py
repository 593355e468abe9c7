"""A pipeline in one process: real stages, links and mailboxes, each node on its own thread, no Ray.

Frames go straight from a link to the neighbour's mailbox. What a cluster test shows with processes, this shows in a
fraction of a second, for every split and schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from actors.fleet_spec import Fleet as FleetCards
from actors.fleet_spec import NodeCard
from actors.link import Carrier
from actors.mailbox import Receipt
from actors.node_stages import NodeStages
from actors.spec import (
    Assignment,
    CanaryReading,
    CheckpointRef,
    Commit,
    EvalOrder,
    EvalReport,
    LinkCodecs,
    LinkCount,
    LinkSizes,
    LoadOrder,
    StepOrder,
    StepReport,
)
from actors.stage import Stage
from actors.token_shards import DataManifest
from orchestrator.canary import readings_of
from orchestrator.config import RunConfig
from orchestrator.lifecycle import CommitStep, RunState, on_step_done, summarise
from orchestrator.planner.build import Workload
from orchestrator.planner.plan import make_plan
from tests.part_times import part_times


@dataclass
class DirectCarrier:
    """Hands a chunk to the neighbour's node in the sender's own thread."""

    peer: str
    # The node of each stage.
    stages: list[NodeStages]
    target: int

    def push(self, chunk: bytes) -> Future[Receipt]:
        answer: Future[Receipt] = Future()
        answer.set_result(self.stages[self.target].receive(chunk))
        return answer


def equal_nodes(count: int) -> FleetCards:
    """Return a fleet of `count` equal nodes with plenty of memory."""
    sizes = range(1, 9)
    times = tuple(part_times(b, layer_forward_s=0.1, layer_backward_s=0.2, embedding_s=0.01, head_s=0.1) for b in sizes)
    return FleetCards(
        nodes=tuple(
            NodeCard(
                node=f"node-{i}",
                host="here",
                region="local",
                device="CPU",
                boundary_bytes=4,
                memory_bytes=10**12,
                times=times,
            )
            for i in range(count)
        ),
        links=(),
    )


class Pipeline:
    """The stages of `config` with the commit decisions of a real run."""

    def __init__(self, config: RunConfig, split: Sequence[int], pool: ThreadPoolExecutor) -> None:
        self._config = config
        self._pool = pool
        work = Workload(model=config.model, batch=config.batch, schedule="1f1b", activation_checkpointing=False)
        chunks = config.plan.chunks
        plan_config = type(config.plan)(split=tuple(split), schedule=config.plan.schedule, chunks=chunks)
        self.plan = make_plan(equal_nodes(len(split) // (chunks or 1)), work, config.wire, plan_config)
        data_sha256 = DataManifest.load(config.data.path).sha256
        by_stage: list[NodeStages] = []

        def carrier_to(stage: int) -> Carrier:
            return DirectCarrier(f"stage {stage}", by_stage, stage)

        def assignment(stage: int) -> Assignment:
            return Assignment(
                run=config.name,
                generation=0,
                plan=self.plan,
                stage=stage,
                peers=tuple(card.node for card in self.plan.stages),
                model=config.model,
                batch=config.batch,
                optim=config.optim,
                timeouts=config.timeouts,
                data=config.data,
                data_sha256=data_sha256,
                seed=config.seed,
                activation_checkpointing=config.train.activation_checkpointing,
                canary_every=config.wire.canary_every,
            )

        num_nodes = self.plan.num_nodes
        self.nodes = [
            NodeStages([assignment(stage) for stage in range(first, len(split), num_nodes)], carrier_to)
            for first in range(num_nodes)
        ]
        by_stage += self.nodes * (len(split) // num_nodes)
        self.state = RunState(step=0, generation=1)
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.canaries: list[CanaryReading] = []
        # What each stage sent in the last step.
        self.counts: list[tuple[LinkCount, ...]] = []
        # What the next steps' orders say of the links' codecs and sizes, and of what is in flight.
        self.codecs: tuple[LinkCodecs, ...] | None = None
        self.link_sizes: tuple[LinkSizes, ...] | None = None
        self.in_flight: tuple[int, ...] | None = None
        self.reports: list[StepReport] = []
        self._commit: Commit | None = None

    def load(self, checkpoint: CheckpointRef | None = None, step: int = 0) -> None:
        order = LoadOrder(run=self._config.name, generation=1, step=step, checkpoint=checkpoint)
        self._all("load", order)
        self.state = RunState(step=step, generation=1)

    def run(self, num_steps: int) -> None:
        """Run steps, then commit the last one."""
        for _ in range(num_steps):
            reports = self._all("step", self._order(run_step=True))
            outcome = summarise(tuple(reports))
            self.state, decision = on_step_done(
                self.state, outcome, self._config.guard, self._config.optim, self._config.train.steps
            )
            assert isinstance(decision, CommitStep)
            self._commit = decision.commit
            self.canaries += readings_of(reports)
            self.reports = reports
            self.counts = [report.links for report in reports]
            self.losses.append(outcome.loss)
            self.grad_norms.append(outcome.grad_norm)
        self._all("step", self._order(run_step=False))
        self._commit = None

    def evaluate(self, num_microbatches: int) -> list[EvalReport]:
        order = EvalOrder(
            run=self._config.name,
            generation=self.state.generation,
            step=self.state.step,
            num_microbatches=num_microbatches,
        )
        return self._all("evaluate", order)

    @property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        stages = {number: stage for node in self.nodes for number, stage in node._stages.items()}
        return [stages[number] for number in sorted(stages)]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for node in self.nodes for name, p in node.parameters.items()}

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def _order(self, *, run_step: bool) -> StepOrder:
        return StepOrder(
            run=self._config.name,
            generation=self.state.generation,
            step=self.state.step,
            commit=self._commit,
            codecs=self.codecs,
            link_sizes=self.link_sizes,
            in_flight=self.in_flight,
            run_step=run_step,
        )

    def _all(self, method: str, order: object) -> list:
        """Return what each stage reports, in stage order."""
        calls = [self._pool.submit(getattr(node, method), order) for node in self.nodes]
        reports = [report for call in calls for report in call.result(timeout=60) or ()]
        return sorted(reports, key=lambda report: report.stage)


@contextmanager
def open_pipeline(config: RunConfig, split: Sequence[int]) -> Iterator[Pipeline]:
    """Build the stages of a run in this process; each call of a method runs them on a thread each."""
    with ThreadPoolExecutor(len(split)) as pool:
        pipeline = Pipeline(config, split, pool)
        try:
            yield pipeline
        finally:
            pipeline.close()
