"""One rank of torch.distributed.pipelining over gloo, for bench.wan: what people would use instead.

    python -m bench.wan_torch '{"rank": 0, ...}'

The stage, its layers, its optimizer and its microbatches are Isthmus's own, so that only the pipeline differs. Orders
come on standard input, one JSON object a line; each answer is a line on standard output. Times are of the machine's
monotonic clock, which all hosts of a lab share.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from actors.data import TokenSource
from actors.model.decoder import DecoderStage, token_losses
from actors.model.init import initialise
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig, build_optimizer
from actors.settings import BatchSpec, DataConfig

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """Everything that a rank is made from."""

    rank: int
    # Layers of each stage, in order.
    split: tuple[int, ...]
    address: str
    port: int
    timeout_s: float
    model: ModelSpec
    batch: BatchSpec
    data: str
    seed: int = 1


class Rank:
    """A stage of the pipeline."""

    def __init__(self, spec: RankSpec) -> None:
        """Build the stage and meet the others."""
        torch.set_num_threads(1)
        self._spec = spec
        self._device = torch.device("cpu")
        layer_start = sum(spec.split[: spec.rank])
        self._model = DecoderStage(spec.model, layer_start, layer_start + spec.split[spec.rank])
        initialise(self._model, spec.seed)
        self._optimizer = build_optimizer(self._model, OptimConfig())
        self._source = TokenSource(
            DataConfig(path=spec.data, document_mask=False),
            "train",
            spec.batch,
            seed=spec.seed,
            vocab_size=spec.model.vocab_size,
        )
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{spec.address}:{spec.port}",
            rank=spec.rank,
            world_size=len(spec.split),
            timeout=timedelta(seconds=spec.timeout_s),
        )

    def step(self, schedule: str, step: int, num_microbatches: int) -> dict[str, Any]:
        """Run one step of the schedule with its optimizer's, and return when it began and ended."""
        spec = self._spec
        is_first, is_last = spec.rank == 0, spec.rank == len(spec.split) - 1
        batches = [self._source.microbatch(step, m) for m in range(num_microbatches)] if is_first or is_last else []
        num_targets = spec.batch.microbatch_tokens * num_microbatches
        stage = PipelineStage(self._model, spec.rank, len(spec.split), self._device)
        pipeline = SCHEDULES[schedule](
            stage,
            num_microbatches,
            loss_fn=lambda logits, targets: token_losses(logits, targets) / num_targets,
            # The losses are sums already.
            scale_grads=False,
        )
        losses: list[torch.Tensor] = []
        torch.distributed.barrier()
        began_s, cpu_began_s = time.monotonic(), time.process_time()
        if is_first:
            pipeline.step(torch.cat([batch.tokens_BT for batch in batches]))
        elif is_last:
            pipeline.step(target=torch.cat([batch.targets_BT for batch in batches]), losses=losses)
        else:
            pipeline.step()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {
            "began_s": began_s,
            "ended_s": time.monotonic(),
            "cpu_s": time.process_time() - cpu_began_s,
            "loss": sum(loss.item() for loss in losses) if is_last else None,
        }


def main() -> int:
    values = json.loads(sys.argv[1])
    values |= {"model": ModelSpec(**values["model"]), "batch": BatchSpec(**values["batch"])}
    rank = Rank(RankSpec(**values | {"split": tuple(values["split"])}))
    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(rank.step(**json.loads(line))) + "\n")
        sys.stdout.flush()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
