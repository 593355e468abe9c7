"""The centralised run as a Ray Train job: who gets which cores, what each worker does, and how it is told.

    driver -> fit (a Ray task) -> TorchTrainer -> work, on each worker
       ^------------- messages: a Ray queue -------------'

Records go through a queue of our own, as they are made: `ray.train.report` is a barrier of all workers and reaches
Train's controller, not the driver. Errors leave this module as ours.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util.queue import Queue

from actors.centralised import CentralisedWorker, WorkerSpec
from actors.errors import FleetError, IsthmusError, StageError
from actors.fleet_spec import NodeCard
from actors.probe import device_name, free_memory_bytes, require_probe_memory, time_parts
from actors.spec import EvalReport, StepReport
from orchestrator.config import RunConfig, TrainConfig
from orchestrator.lifecycle import RunState, Stop, on_step_done, summarise
from orchestrator.runfolder import write_atomic
from orchestrator.slots import region_and_offer


class Act(Enum):
    """What a worker has done when it sends a message."""

    PLACE = "start"
    PROBE = "probe"
    LOAD = "load"
    STEP = "step"
    EVALUATE = "evaluate"


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a worker says after each act: placed, probed, loaded, then those of the program, in its order."""

    worker: int
    act: Act
    step: int
    # How long the act took there.
    seconds: float
    body: NodeCard | StepReport | EvalReport | None = None


@dataclass(frozen=True, kw_only=True)
class CoreShare:
    """What each worker asks of its node; all get the same."""

    # CPUs that Ray sets aside, maybe a fraction of one.
    num_cpus: float
    num_gpus: int
    # Threads that torch computes with.
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that Ray Train needs to run a baseline."""

    name: str
    config: RunConfig
    share: CoreShare
    # Ray Train's own folder; `failure.txt` in it has the traceback of a worker that failed.
    storage: Path


def program(train: TrainConfig) -> Iterator[tuple[Act, int]]:
    """Yield what every loaded worker does, in order: steps, and evaluations before the steps that a run has them at."""
    for step in range(train.steps):
        if train.eval_every > 0 and step > 0 and step % train.eval_every == 0:
            yield Act.EVALUATE, step
        yield Act.STEP, step
    yield Act.EVALUATE, train.steps


def share_cores(nodes: Sequence[tuple[float, int]], num_workers: int, threads: int | None) -> CoreShare:
    """Return the equal share of a worker, on nodes given as (CPUs, GPUs): all cores, split among a node's workers.

    With GPUs in the cluster a worker takes one, and its part of that node's cores; without, the workers are spread over
    the largest nodes. `threads` overrides the threads alone. Raises FleetError where there is no place for all.
    """
    gpu_nodes = [(cpus, gpus) for cpus, gpus in nodes if gpus > 0]
    num_gpus = sum(gpus for _, gpus in gpu_nodes)
    if gpu_nodes:
        if num_gpus < num_workers:
            raise FleetError(
                f"{num_workers} workers need a GPU each; the cluster has {num_gpus}",
                f"set fleet.baseline_workers to {num_gpus} or fewer, or add GPUs",
            )
        num_cpus = min(cpus / gpus for cpus, gpus in gpu_nodes)
    else:
        largest = sorted((cpus for cpus, _ in nodes if cpus > 0), reverse=True)[:num_workers]
        if not largest:
            raise FleetError("no node of the cluster has a CPU or a GPU", "start its nodes with --num-cpus")
        num_cpus = largest[-1] / math.ceil(num_workers / len(largest))
    # Whole cores, or where there is less than one each a fraction that Ray can count.
    num_cpus = math.floor(num_cpus) if num_cpus >= 1 else math.floor(num_cpus * 100) / 100
    return CoreShare(num_cpus=num_cpus, num_gpus=min(1, num_gpus), num_threads=threads or max(1, math.floor(num_cpus)))


def fit(job: TrainJob, messages: Queue) -> None:
    """Run the job to its end, in a process of its own: Train takes signals and the working directory for itself.

    Raises the first worker's own error where it is one of ours, else StageError.
    """
    share = job.share
    trainer = ray.train.torch.TorchTrainer(
        partial(work, job, messages),
        torch_config=ray.train.torch.TorchConfig(timeout_s=math.ceil(job.config.timeouts.step_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.config.fleet.baseline_workers,
            use_gpu=share.num_gpus > 0,
            resources_per_worker={"CPU": share.num_cpus, "GPU": share.num_gpus},
            placement_strategy="PACK" if share.num_gpus else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=str(job.storage),
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise failure_of(error, job) from None


def work(job: TrainJob, messages: Queue) -> None:
    """Train on one of Ray Train's workers, and send a message after each act.

    Every worker decides on every step by itself, from sums that are the same on all; the driver, which decides the same
    again from the first worker's report, ends a run that must stop.
    """
    config = job.config
    context = ray.train.get_context()
    number = context.get_world_rank()
    torch.set_num_threads(job.share.num_threads)
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)

    def say(act: Act, step: int, seconds: float = 0.0, body: NodeCard | StepReport | EvalReport | None = None) -> None:
        messages.put(Message(worker=number, act=act, step=step, seconds=seconds, body=body))

    say(Act.PLACE, 0)
    # Before there is a model in its memory.
    say(Act.PROBE, 0, body=_card(config, number, device, 1 if job.share.num_gpus else context.get_local_world_size()))
    spec = WorkerSpec(
        run=job.name,
        worker=number,
        num_workers=context.get_world_size(),
        model=config.model,
        batch=config.batch,
        optim=config.optim,
        data=config.data,
        seed=config.seed,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    worker = CentralisedWorker(spec, device, torch.distributed.all_reduce)
    worker.load()
    say(Act.LOAD, 0)
    state, commit = RunState(step=0, generation=0), None
    for act, step in program(config.train):
        began_s = time.monotonic()
        if act is Act.EVALUATE:
            evaluated = worker.evaluate(step, commit, config.train.eval_microbatches)
            say(act, step, time.monotonic() - began_s, evaluated)
            continue
        report = worker.step(step, commit)
        say(act, step, time.monotonic() - began_s, report)
        state, decision = on_step_done(state, summarise((report,)), config.guard, config.optim, config.train.steps)
        if isinstance(decision, Stop):
            return
        commit = decision.commit


def failure_of(error: ray.train.TrainingFailedError, job: TrainJob) -> IsthmusError:
    """Return what to raise for a failed job: a worker's own IsthmusError before what it made of the others."""
    causes: list[tuple[str, Exception]] = []
    if isinstance(error, ray.train.WorkerGroupError):
        causes = [(f"worker-{worker}", cause) for worker, cause in sorted(error.worker_failures.items())]
    elif isinstance(error, ray.train.ControllerError):
        causes = [("Ray Train", error.controller_failure)]
    for _, cause in causes:
        if isinstance(cause, IsthmusError):
            return cause
    trace = job.storage / "failure.txt"
    job.storage.mkdir(parents=True, exist_ok=True)
    write_atomic(trace, str(error))
    who, cause = causes[0] if causes else ("Ray Train", error)
    # Of Ray Train's own errors the second line has the reason.
    what = " ".join(str(cause).strip().splitlines()[:2]) or type(cause).__name__
    return StageError(f"{who} of baseline {job.name} failed: {what}", f"{trace} has the traceback")


def _card(config: RunConfig, worker: int, device: torch.device, num_sharing: int) -> NodeCard:
    """Measure this worker, one of `num_sharing` that share their machine's memory, as a node of a fleet is measured."""
    # Text by name; its annotation says otherwise.
    labels: Any = ray.get_runtime_context().get_node_labels()
    region, offer = region_and_offer(config.fleet, labels)
    node = f"worker-{worker}"
    memory_bytes = free_memory_bytes(device) // num_sharing
    require_probe_memory(config.model, config.batch, memory_bytes, node)
    return NodeCard(
        node=node,
        host=socket.gethostname(),
        region=region,
        device=device_name(device),
        boundary_bytes=2 if device.type == "cuda" else 4,
        memory_bytes=memory_bytes,
        times=(
            time_parts(config.model, config.batch, device, time.perf_counter, document_mask=config.data.document_mask),
        ),
        price_per_hour=offer.price_per_hour,
    )
