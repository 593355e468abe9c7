"""What the pipeline costs: Isthmus against a plain loop and against torch's own pipeline, on this machine's cores.

    python -m bench.overhead [--quick] [--check]

The same model, tokens and optimizer in three ways: (a) one process with a thread a core, no pipeline; (b)
torch.distributed.pipelining, 1F1B over gloo, a process a stage; (c) Isthmus, 1F1B, an actor a stage. There is a stage
a core, up to one a layer; of more cores each stage gets an equal share of threads. They take turns, a step each, so
that noise hits all alike; ratios are of medians. Links are this machine's own.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from orchestrator.environment import prepare_environment

prepare_environment(None)  # before anything imports ray

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # noqa: E402
from torch.nn import functional  # noqa: E402

from actors.data import TokenSource  # noqa: E402
from actors.model.decoder import DecoderStage  # noqa: E402
from actors.model.init import initialise  # noqa: E402
from actors.optim import build_optimizer  # noqa: E402
from actors.spec import Commit, LoadOrder, StepOrder  # noqa: E402
from actors.token_shards import DataManifest  # noqa: E402
from bench.random_tokens import write_random_tokens  # noqa: E402
from bench.record import parse_arguments, save  # noqa: E402
from orchestrator.config import RunConfig, load_config  # noqa: E402
from orchestrator.fleet import open_fleet  # noqa: E402
from orchestrator.lifecycle import CommitStep, RunState, on_step_done, summarise  # noqa: E402
from orchestrator.planner.plan import even_split  # noqa: E402
from orchestrator.recipe import plan_run  # noqa: E402
from orchestrator.stages import Stages  # noqa: E402

BOUNDS = {"over_plain": 0.9, "over_torch_pipeline": 1.0}
ANSWER_S = 300.0
NUM_LAYERS = 8
RunStep = Callable[[int], None]


def bench_config(folder: Path, num_cores: int, *, quick: bool) -> RunConfig:
    """Return the run that all three do: 8 blocks of width 512, sequences of 256, float32 all the way."""
    num_stages = min(NUM_LAYERS, num_cores)
    data = str(folder / "data")
    write_random_tokens(Path(data), 4096)
    return load_config(
        [
            "name=overhead",
            f"runs_dir={folder / 'runs'}",
            f"data.path={data}",
            "data.document_mask=false",
            "model.vocab_size=4096",
            "model.hidden_size=512",
            f"model.num_layers={NUM_LAYERS}",
            "model.num_heads=8",
            "model.num_kv_heads=8",
            "model.ffn_size=1408",
            "batch.seq_len=256",
            "batch.microbatch_size=2",
            f"batch.num_microbatches={8 if quick else 16}",
            "train.steps=1000",
            "wire.forward=none",
            "wire.backward=none",
            "plan.schedule=1f1b",
            f"plan.split={[stop - start for start, stop in even_split(NUM_LAYERS, num_stages)]}",
            f"fleet.nodes={num_stages}",
            f"fleet.threads={num_cores // num_stages}",
        ]
    )


def _clip(params: list[nn.Parameter], norm: float, clip_norm: float) -> None:
    if norm > clip_norm:
        torch._foreach_mul_([p.grad for p in params], clip_norm / norm)  # pyright: ignore


def _grad_sq(params: list[nn.Parameter]) -> float:
    norms = torch._foreach_norm([p.grad for p in params])  # pyright: ignore
    return float(torch.stack(norms).double().square().sum())


def _serve(pipe, run_step: RunStep) -> None:
    """Run steps as they are asked for, and answer each; an empty message ends it."""
    while (step := pipe.recv()) is not None:
        run_step(step)
        pipe.send(step)


def plain_loop(config: RunConfig, pipe) -> None:
    """(a): the whole model in one process."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = DecoderStage(config.model, 0, config.model.num_layers)
    initialise(model, config.seed)
    optimizer = build_optimizer(model, config.optim)
    params = list(model.parameters())
    source = TokenSource(config.data, "train", config.batch, seed=1, vocab_size=config.model.vocab_size)

    def run_step(step: int) -> None:
        for microbatch in range(config.batch.num_microbatches):
            batch = source.microbatch(step, microbatch)
            logits = model(batch.tokens_BT)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
            (loss / config.batch.step_tokens).backward()
        _clip(params, _grad_sq(params) ** 0.5, config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    _serve(pipe, run_step)


def torch_pipeline(rank: int, config: RunConfig, port: int, pipes: list) -> None:
    """(b): one rank of torch's pipeline."""
    split, num_threads = config.plan.split, config.fleet.threads
    assert split is not None
    assert num_threads is not None
    torch.set_num_threads(num_threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(split))
    model = DecoderStage(config.model, sum(split[:rank]), sum(split[: rank + 1]))
    initialise(model, config.seed)
    optimizer = build_optimizer(model, config.optim)
    params = list(model.parameters())
    source = TokenSource(config.data, "train", config.batch, seed=1, vocab_size=config.model.vocab_size)
    stage = PipelineStage(model, rank, len(split), torch.device("cpu"))

    def loss_fn(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    schedule = Schedule1F1B(stage, config.batch.num_microbatches, loss_fn=loss_fn)

    def run_step(step: int) -> None:
        batches = [source.microbatch(step, m) for m in range(config.batch.num_microbatches)]
        # A model in one stage is both first and last.
        inputs = [torch.cat([b.tokens_BT for b in batches])] if model.is_first else []
        if model.is_last:
            losses: list[Tensor] = []
            schedule.step(*inputs, target=torch.cat([b.targets_BT for b in batches]), losses=losses)
        else:
            schedule.step(*inputs)
        norm_sq = torch.tensor(_grad_sq(params), dtype=torch.float64)
        dist.all_reduce(norm_sq)
        _clip(params, float(norm_sq) ** 0.5, config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    _serve(pipes[rank], run_step)
    dist.destroy_process_group()


@contextmanager
def processes(target: Callable[..., None], arguments: Callable[[int, list], tuple], count: int) -> Iterator[RunStep]:
    """Start `count` processes and yield what makes all of them run one step."""
    context = mp.get_context("spawn")
    ours, theirs = zip(*(context.Pipe() for _ in range(count)), strict=True)
    started = [context.Process(target=target, args=arguments(i, list(theirs)), daemon=True) for i in range(count)]
    for process in started:
        process.start()

    def run_step(step: int) -> None:
        for pipe in ours:
            pipe.send(step)
        for pipe in ours:
            if not pipe.poll(ANSWER_S):
                raise TimeoutError(f"a process did not finish step {step} within {ANSWER_S:.0f} s")
            pipe.recv()

    try:
        yield run_step
    finally:
        for pipe in ours:
            pipe.send(None)
        for process in started:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


@contextmanager
def isthmus(config: RunConfig) -> Iterator[RunStep]:
    """(c): the product's own stages on Ray, driven as the controller does, one commit a step."""
    with open_fleet(config.fleet, None, config.name, config.timeouts) as crew:
        plan = plan_run(config, crew, None, None).plan
        stages = Stages(crew, plan, config, DataManifest.load(config.data.path).sha256)
        stages.assign(1)
        stages.load(LoadOrder(run=config.name, generation=1, step=0))
        state = RunState(step=0, generation=1)
        commit: Commit | None = None

        def run_step(step: int) -> None:
            nonlocal state, commit
            reports = stages.run(StepOrder(run=config.name, generation=1, step=state.step, commit=commit))
            state, decision = on_step_done(state, summarise(reports), config.guard, config.optim, config.train.steps)
            assert isinstance(decision, CommitStep)
            commit = decision.commit

        yield run_step


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    num_rounds = 5 if arguments.quick else 12
    times: dict[str, list[float]] = {"plain": [], "torch_pipeline": [], "isthmus": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = bench_config(folder, os.cpu_count() or 1, quick=arguments.quick)
        num_stages = len(config.plan.split or ())
        port = free_port()
        contenders: dict[str, RunStep] = {
            "plain": stack.enter_context(processes(plain_loop, lambda i, pipes: (config, pipes[i]), 1)),
            "torch_pipeline": stack.enter_context(
                processes(torch_pipeline, lambda i, pipes: (i, config, port, pipes), num_stages)
            ),
            "isthmus": stack.enter_context(isthmus(config)),
        }
        for round_number in range(-1, num_rounds):
            for name, run_step in contenders.items():
                began_s = time.perf_counter()
                run_step(round_number + 1)
                if round_number >= 0:  # the first round warms up
                    times[name].append(time.perf_counter() - began_s)
                    print(f"round {round_number + 1}/{num_rounds} {name:15} {times[name][-1]:6.2f} s", flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {
        "over_plain": medians["plain"] / medians["isthmus"],
        "over_torch_pipeline": medians["torch_pipeline"] / medians["isthmus"],
    }
    per_round = {
        "over_plain": [a / b for a, b in zip(times["plain"], times["isthmus"], strict=True)],
        "over_torch_pipeline": [a / b for a, b in zip(times["torch_pipeline"], times["isthmus"], strict=True)],
    }
    tokens = config.batch.step_tokens
    path = save(
        "overhead",
        arguments,
        {
            "stages": num_stages,
            "step_tokens": tokens,
            "step_s": times,
            "tokens_per_s": {name: tokens / seconds for name, seconds in medians.items()},
            "ratios": ratios,
            "ratios_by_round": per_round,
            "bounds": BOUNDS,
        },
    )
    for name, seconds in medians.items():
        print(f"{name:15} {tokens / seconds:8,.0f} tokens/s")
    print(f"saved {path}")
    missed = [key for key, bound in BOUNDS.items() if ratios[key] < bound]
    spread = {key: f"{min(values):.2f}-{max(values):.2f}" for key, values in per_round.items()}
    print(
        "isthmus "
        + ", ".join(f"{key} {ratios[key]:.3f} (rounds {spread[key]}, goal {BOUNDS[key]})" for key in BOUNDS)
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
