"""One flat buffer for a stage's parameters: each on chunks of its own, nothing lost, gaps of zeros."""

import torch

from actors.fragment import flatten, fragment_of, views_of
from actors.kernels.layout import CHUNK

CPU = torch.device("cpu")


def params() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"matrix": (70, 100), "exact": (CHUNK,), "norm": (3,), "scalar": (), "none": (0,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_each_parameter_starts_on_a_chunk_of_its_own() -> None:
    fragment = fragment_of(params())
    assert [place.offset // CHUNK for place in fragment.places] == [0, 2, 3, 4, 5]
    assert all(place.offset % CHUNK == 0 for place in fragment.places)
    assert fragment.num_elements == 5 * CHUNK


def test_what_is_flattened_is_seen_again_in_its_views() -> None:
    tensors = params()
    fragment = fragment_of(tensors)
    flat_N = flatten(tensors, fragment, CPU)
    views = views_of(flat_N, fragment)
    assert views.keys() == tensors.keys()
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    assert flat_N.count_nonzero() == sum(int(tensor.count_nonzero()) for tensor in tensors.values())
    views["norm"].fill_(7)
    assert (flat_N == 7).nonzero().flatten().tolist() == [3 * CHUNK, 3 * CHUNK + 1, 3 * CHUNK + 2]


def test_bfloat16_is_flattened_to_float32_and_gradients_do_not_follow() -> None:
    tensors = {"w": torch.ones(5, dtype=torch.bfloat16, requires_grad=True)}
    flat_N = flatten(tensors, fragment_of(tensors), CPU)
    assert flat_N.dtype == torch.float32
    assert not flat_N.requires_grad
    assert flat_N.sum() == 5


def test_a_stage_without_parameters_has_an_empty_fragment() -> None:
    assert flatten({}, fragment_of({}), CPU).shape == (0,)
