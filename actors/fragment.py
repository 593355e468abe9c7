"""Where a stage's parameters lie in one flat buffer, so that a pseudo-gradient is one codec call and one frame.

PURE. Each parameter starts on a chunk of its own: a top-k chunk never straddles two. The gaps are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels.layout import CHUNK


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one parameter lies."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Some of a stage's parameters, in order, in one flat buffer of `num_elements`, a multiple of 4096."""

    places: tuple[Place, ...]
    num_elements: int


def fragment_of(params: Mapping[str, Tensor]) -> Fragment:
    """Return the layout of parameters in the order given, which is the same on every replica of a stage."""
    places: list[Place] = []
    offset = 0
    for name, param in params.items():
        places.append(Place(name=name, shape=tuple(param.shape), offset=offset))
        offset += -(-param.numel() // CHUNK) * CHUNK
    return Fragment(places=tuple(places), num_elements=offset)


def views_of(flat_N: Tensor, fragment: Fragment) -> dict[str, Tensor]:
    """Return each parameter as a view of the flat buffer: what is written to one is written to the other."""
    assert flat_N.shape == (fragment.num_elements,)
    return {
        place.name: flat_N[place.offset : place.offset + place.num_elements].view(place.shape)
        for place in fragment.places
    }


def flatten(tensors: Mapping[str, Tensor], fragment: Fragment, device: torch.device) -> Tensor:
    """Return the fragment's tensors, by parameter, in one new float32 buffer: shape (fragment.num_elements,)."""
    flat_N = torch.zeros(fragment.num_elements, dtype=torch.float32, device=device)
    for name, view in views_of(flat_N, fragment).items():
        view.copy_(tensors[name].detach())
    return flat_N
