"""The parts of a baseline that need no Ray: cores, the program, the plan, and workers that share a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray.train
import torch
from rich.console import Console

from actors.centralised import CentralisedWorker, WorkerSpec, ring_bytes
from actors.errors import ConfigError, DataError, FleetError, PlanError, RunBusy, StageError
from actors.fleet_spec import NodeCard
from actors.spec import EvalReport, StepReport
from orchestrator.baseline import plan_baseline, train_baseline
from orchestrator.baseline_job import Act, CoreShare, TrainJob, failure_of, program, share_cores
from orchestrator.config import RunConfig, TrainConfig
from orchestrator.lifecycle import CommitStep, RunState, on_step_done, summarise
from orchestrator.runfolder import RunFolder
from tests.part_times import part_times
from tests.reference import train_plainly
from tests.small_run import small_config

STEPS = 4


@pytest.mark.parametrize(
    ("nodes", "num_workers", "threads", "expected"),
    [
        ([(2.0, 0)], 1, None, CoreShare(num_cpus=2, num_gpus=0, num_threads=2)),
        ([(5.0, 0)], 2, None, CoreShare(num_cpus=2, num_gpus=0, num_threads=2)),
        ([(2.0, 0)], 3, None, CoreShare(num_cpus=0.66, num_gpus=0, num_threads=1)),
        ([(2.0, 0)], 1, 7, CoreShare(num_cpus=2, num_gpus=0, num_threads=7)),
        # The largest nodes, and what the smallest of these can give.
        ([(2.0, 0), (8.0, 0), (4.0, 0)], 1, None, CoreShare(num_cpus=8, num_gpus=0, num_threads=8)),
        ([(2.0, 0), (8.0, 0), (4.0, 0)], 2, None, CoreShare(num_cpus=4, num_gpus=0, num_threads=4)),
        ([(2.0, 0), (2.0, 0)], 4, None, CoreShare(num_cpus=1, num_gpus=0, num_threads=1)),
        # A head without a GPU does not count.
        ([(64.0, 0), (16.0, 2), (16.0, 4)], 6, None, CoreShare(num_cpus=4, num_gpus=1, num_threads=4)),
    ],
)
def test_workers_share_all_cores_equally(
    nodes: list[tuple[float, int]], num_workers: int, threads: int | None, expected: CoreShare
) -> None:
    assert share_cores(nodes, num_workers, threads) == expected


def test_too_few_gpus_or_none_at_all_is_said_with_a_remedy() -> None:
    with pytest.raises(FleetError, match=r"the cluster has 2.*fleet\.baseline_workers to 2"):
        share_cores([(8.0, 2)], 3, None)
    with pytest.raises(FleetError, match="num-cpus"):
        share_cores([(0.0, 0)], 1, None)


def test_program_evaluates_when_a_run_does() -> None:
    acts = [(act, step) for act, step in program(TrainConfig(steps=5, eval_every=2)) if act is Act.EVALUATE]
    assert acts == [(Act.EVALUATE, 2), (Act.EVALUATE, 4), (Act.EVALUATE, 5)]
    # An evaluation that falls on the end is done once, and 0 leaves only that.
    assert list(program(TrainConfig(steps=2, eval_every=2)))[-3:] == [(Act.STEP, 0), (Act.STEP, 1), (Act.EVALUATE, 2)]
    assert [act for act, _ in program(TrainConfig(steps=9, eval_every=0))].count(Act.EVALUATE) == 1


def test_workers_must_share_the_microbatches(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divisor of batch"):
        small_config(tmp_path, "fleet.baseline_workers=4")
    with pytest.raises(ConfigError, match="baseline_workers to 1 or more"):
        small_config(tmp_path, "fleet.baseline_workers=0")


def card(worker: int, layer_s: float, memory_bytes: int = 10**10) -> NodeCard:
    times = part_times(2, layer_forward_s=layer_s, layer_backward_s=layer_s, embedding_s=0.0, head_s=0.0)
    return NodeCard(
        node=f"worker-{worker}",
        host="here",
        region="local",
        device="CPU x1",
        boundary_bytes=4,
        memory_bytes=memory_bytes,
        times=(times,),
        price_per_hour=3.0,
    )


def test_plan_has_the_whole_model_on_every_worker_and_the_pace_of_the_slowest(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    alone = plan_baseline([card(0, 0.01)], config)
    pair = plan_baseline([card(0, 0.01), card(1, 0.02)], config)
    assert [(stage.stage, stage.layer_start, stage.layer_stop) for stage in pair.stages] == [(0, 0, 4), (1, 0, 4)]
    assert pair.binds == "stage 1 (worker-1)"
    # Half the microbatches, at half the speed.
    assert pair.tokens_per_s == pytest.approx(alone.tokens_per_s)
    assert (alone.dollars_per_hour, pair.dollars_per_hour) == (3.0, 6.0)
    assert pair.dollars_per_mtoken == pytest.approx(2 * alone.dollars_per_mtoken)


def test_a_model_too_large_for_one_worker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="worker-0"):
        plan_baseline([card(0, 0.01, memory_bytes=1000)], small_config(tmp_path))


class Sum:
    """An all-reduce among threads: each gives a tensor, and all get the sum in the order of the workers."""

    def __init__(self, num_workers: int) -> None:
        self._barrier = threading.Barrier(num_workers, timeout=20)
        self._given: dict[int, torch.Tensor] = {}

    def of(self, worker: int) -> Callable[[torch.Tensor], None]:
        def all_reduce(tensor: torch.Tensor) -> None:
            self._given[worker] = tensor.clone()
            self._barrier.wait()
            total = torch.stack([self._given[other] for other in sorted(self._given)]).sum(0)
            self._barrier.wait()
            tensor.copy_(total)

        return all_reduce


def make_worker(config: RunConfig, worker: int, num_workers: int, total: Sum) -> CentralisedWorker:
    spec = WorkerSpec(
        run="small-baseline",
        worker=worker,
        num_workers=num_workers,
        model=config.model,
        batch=config.batch,
        optim=config.optim,
        data=config.data,
        seed=config.seed,
        activation_checkpointing=False,
    )
    made = CentralisedWorker(spec, torch.device("cpu"), total.of(worker))
    made.load()
    return made


def train_worker(config: RunConfig, worker: CentralisedWorker) -> tuple[list[StepReport], EvalReport]:
    """Train one worker for the steps of its configuration; return what it said."""
    torch.set_num_threads(1)
    state, commit, reports = RunState(step=0, generation=0), None, []
    for step in range(config.train.steps):
        reports.append(worker.step(step, commit))
        state, decision = on_step_done(state, summarise((reports[-1],)), config.guard, config.optim, config.train.steps)
        assert isinstance(decision, CommitStep)
        commit = decision.commit
    return reports, worker.evaluate(config.train.steps, commit, config.train.eval_microbatches)


def losses_of(reports: list[StepReport]) -> list[float]:
    return [report.loss_sum / report.num_targets for report in reports]


def test_one_worker_equals_the_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = small_config(tmp_path, f"train.steps={STEPS}")
    reference = train_plainly(config)
    worker = make_worker(config, 0, 1, Sum(1))
    reports, _ = train_worker(config, worker)
    assert losses_of(reports) == reference.losses
    assert all(report.links == () for report in reports)
    for name, parameter in worker.engine.params.items():
        assert torch.equal(parameter, reference.weights[name]), name


def test_two_workers_equal_one_to_rounding_and_each_other_to_the_bit(tmp_path: Path) -> None:
    config = small_config(tmp_path, f"train.steps={STEPS}", "train.eval_microbatches=3")
    one = make_worker(config, 0, 1, Sum(1))
    reports, evaluation = train_worker(config, one)
    total = Sum(2)
    two = [make_worker(config, worker, 2, total) for worker in range(2)]
    with ThreadPoolExecutor(2) as pool:
        (left, left_eval), (right, right_eval) = pool.map(lambda worker: train_worker(config, worker), two)

    assert losses_of(left) == losses_of(right)
    assert losses_of(left) == pytest.approx(losses_of(reports), rel=1e-6)
    for name, parameter in two[0].engine.params.items():
        assert torch.equal(parameter, two[1].engine.params[name]), name
        torch.testing.assert_close(parameter, one.engine.params[name], rtol=0, atol=1e-5)
    # Each evaluates its share: 2 of the 3 microbatches, and 1.
    assert left_eval.num_targets + right_eval.num_targets == evaluation.num_targets
    assert left_eval.loss_sum + right_eval.loss_sum == pytest.approx(evaluation.loss_sum, rel=1e-5)
    # A ring of two sends every gradient once each way.
    (link,) = left[0].links
    assert (link.source_stage, link.target_stage) == (0, 1)
    assert link.wire_bytes == 4 * config.model.num_params


def test_a_bad_microbatch_of_one_worker_is_known_to_all_by_its_own_number(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    total = Sum(2)
    two = [make_worker(config, worker, 2, total) for worker in range(2)]
    with torch.no_grad():
        next(iter(two[1].engine.params.values())).fill_(float("nan"))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda worker: worker.step(0, None), two))
    assert [report.nonfinite_microbatch for report in reports] == [1, 1]


@pytest.mark.parametrize(("size_bytes", "num_workers", "sent"), [(1000, 1, 0), (1000, 2, 1000), (1000, 4, 1500)])
def test_a_ring_sends_twice_the_buffer_at_most(size_bytes: int, num_workers: int, sent: int) -> None:
    assert ring_bytes(size_bytes, num_workers) == sent


def make_job(tmp_path: Path) -> TrainJob:
    share = CoreShare(num_cpus=1, num_gpus=0, num_threads=1)
    return TrainJob(name="small-baseline", config=small_config(tmp_path), share=share, storage=tmp_path)


def test_a_workers_own_error_comes_before_what_it_did_to_the_others(tmp_path: Path) -> None:
    own = DataError("shard 3 is torn", "prepare the data again")
    failed = ray.train.WorkerGroupError("a traceback", {0: RuntimeError("connection closed by peer"), 1: own})
    assert failure_of(failed, make_job(tmp_path)) is own


def test_any_other_failure_names_the_worker_and_keeps_the_traceback(tmp_path: Path) -> None:
    failed = ray.train.WorkerGroupError("line 7, in work", {1: ValueError("no such thing\nand more\nand more")})
    error = failure_of(failed, make_job(tmp_path))
    assert isinstance(error, StageError)
    assert error.message == "worker-1 of baseline small-baseline failed: no such thing and more"
    assert str(tmp_path / "failure.txt") in error.remedy
    assert "line 7, in work" in (tmp_path / "failure.txt").read_text()


def test_a_second_baseline_of_the_same_name_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    folder = RunFolder.open(Path(config.runs_dir), "small-baseline")
    folder.events.write_text("what the first one recorded\n")
    with folder.lock(), pytest.raises(RunBusy, match="small-baseline"):
        train_baseline(config, address=None, console=Console())
    assert folder.events.exists()
