"""Edges without limit carry whatever their neighbours let through."""

import numpy as np
import pytest

from orchestrator.planner.flow import max_flow


def test_an_edge_without_limit_stays_without_limit_after_some_flow() -> None:
    edges = [(0, 2, np.inf), (2, 3, 1.0), (2, 4, 2.0), (3, 5, np.inf), (4, 5, np.inf), (5, 1, np.inf)]
    tails, heads, capacities = zip(*edges, strict=True)
    value, flows = max_flow(6, np.array(tails, np.int32), np.array(heads, np.int32), np.array(capacities), 0, 1)
    assert value == pytest.approx(3.0)
    assert flows == pytest.approx([3.0, 1.0, 2.0, 1.0, 2.0, 3.0])
