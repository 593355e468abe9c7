"""Errors cross processes: each class keeps what it says and its remedy."""

import pickle
from collections.abc import Iterator

import pytest

import actors.store
from actors import errors


def subclasses(kind: type[errors.IsthmusError]) -> Iterator[type[errors.IsthmusError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


# Those defined elsewhere count once their module is imported.
ALL = sorted(set(subclasses(errors.IsthmusError)), key=lambda kind: kind.__name__)


def test_the_tree_is_all_there() -> None:
    assert {kind for kind in vars(errors).values() if isinstance(kind, type)} <= set(ALL)
    assert actors.store.BlobMissing in ALL


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_an_error_survives_a_pickle_round_trip(kind: type[errors.IsthmusError], protocol: int) -> None:
    error = kind("stage 2 on node-2 is gone", "start it again")
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert (copy.message, copy.remedy) == ("stage 2 on node-2 is gone", "start it again")
    assert str(copy) == "stage 2 on node-2 is gone: start it again"
    assert copy.exit_code == kind.exit_code


@pytest.mark.parametrize("kind", ALL)
def test_the_remedy_may_be_left_out(kind: type[errors.IsthmusError]) -> None:
    assert str(pickle.loads(pickle.dumps(kind("it stopped")))) == "it stopped"


@pytest.mark.parametrize("kind", ALL)
def test_each_error_says_what_it_stands_for(kind: type[errors.IsthmusError]) -> None:
    assert kind.__doc__
    assert kind.exit_code == (2 if issubclass(kind, errors.UserError) else 1)
