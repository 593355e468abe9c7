"""Replicas that take local steps and exchange pseudo-gradients, in one process.

Each round every replica starts from the same weights, takes its local steps on tokens of its own, and sends how far it
came. The mean of what was sent is the gradient of the outer optimizer: DiLoCo (Douillard et al., arXiv 2311.08105) has
Nesterov momentum there, SparseLoCo (arXiv 2508.15706) error feedback in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.codecs import CODECS
from actors.codecs.tk2 import TopK
from actors.fragment import flatten, fragment_of, views_of
from actors.reducer import ReplicaFrame, average_frames
from bench.quality_trainer import Trainer

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class OuterMethod:
    """How pseudo-gradients are coded and applied."""

    name: str
    codec: str
    lr: float
    # Nesterov's; 0: none.
    momentum: float
    # The decay of error feedback; 0: what a codec does not carry is lost.
    beta: float = 0.0


class OuterLoop:
    """The common weights with their optimizer, and what each replica has not sent yet."""

    def __init__(self, method: OuterMethod, replicas: Sequence[Trainer]) -> None:
        self._replicas = replicas
        self._codec = CODECS[method.codec]
        self._beta = method.beta
        self._fragment = fragment_of(replicas[0].parameters)
        self._weights_N = flatten(replicas[0].parameters, self._fragment, _CPU)
        self._residuals = [torch.zeros_like(self._weights_N) for _ in replicas]
        self._optimizer = torch.optim.SGD(
            [self._weights_N], lr=method.lr, momentum=method.momentum, nesterov=method.momentum > 0
        )

    def round(self, num_local_steps: int) -> None:
        """Run one round, after which every replica holds the new common weights."""
        for replica in self._replicas:
            for _ in range(num_local_steps):
                replica.step()
        frames = [ReplicaFrame(replica=index, payload=self._encode(index)) for index in range(len(self._replicas))]
        average = average_frames(frames, self._codec, self._fragment.num_elements, _CPU)
        assert not average.refused, average.refused
        self._weights_N.grad = average.mean_N
        self._optimizer.step()
        for replica in self._replicas:
            self._load(replica)

    def _encode(self, index: int) -> memoryview:
        """Return the payload of a replica's pseudo-gradient: the weights before its local steps less those after."""
        delta_N = self._weights_N - flatten(self._replicas[index].parameters, self._fragment, _CPU)
        if isinstance(self._codec, TopK):
            payload_N = self._codec.encode_with_feedback(delta_N, self._residuals[index], self._beta)
        else:
            payload_N = self._codec.encode(delta_N, seed=0)
        return payload_N.numpy().data

    @torch.no_grad()
    def _load(self, replica: Trainer) -> None:
        views = views_of(self._weights_N, self._fragment)
        for name, parameter in replica.parameters.items():
            parameter.copy_(views[name])
