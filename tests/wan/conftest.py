"""Tests on the lab skip where this machine cannot hold one, and say what it lacks."""

import pytest

from tests.lab.wanlab import missing


@pytest.fixture(scope="session", autouse=True)
def _machine_for_a_lab() -> None:
    if lacking := missing():
        pytest.skip(f"no WAN lab here: {lacking}")
