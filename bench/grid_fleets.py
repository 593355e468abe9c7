"""What the seat search is measured on: stored cases, the same with noisy links, and random fleets.

A case is a JSON file of DT-FM (arXiv 2206.01288): `delay_ms` and `bandwidth_gbps`, each a square matrix, and `name`.
`best_known.json` beside them has `{name: {"total": seconds}}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import UserError
from orchestrator.planner.grid_cost import GridObjective

# DT-FM's sizes, of float32 gradients of 3 of the 24 layers of 1.3 billion parameters and of a replica's share of the
# batch in float16, with a slip of its published code kept (2024 for 2048). It takes 8 / Gbit/s seconds for each of its
# "GB", of which the second is 2^30 bytes.
SYNC_BYTES = 1e9 * 1.3 * 4 * 3 / 24
HOP_BYTES = 1e9 * 2024 * 2048 * 2 * (1.25e5 / 2048) / 2**30
# Of the logarithm of each pair's delay and of its rate.
NOISE_SIGMA = 0.35

# What a file may hold at most.
_MOST_BYTES, _MOST_NODES, _MOST_CASES = 2**22, 256, 100

Floats = NDArray[np.float64]


class GridCasesError(UserError):
    """A folder of cases lacks something, or a file in it is none of its format."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stored fleet, and what is the least known for it."""

    name: str
    objective: GridObjective
    best_known_s: float


def read_cases(cases_dir: Path) -> list[Case]:
    """Return the cases of a folder, by name; raises GridCasesError where it holds none or one is not as it should."""
    paths = sorted(cases_dir.glob("case*.json"))[: _MOST_CASES + 1]
    if not 1 <= len(paths) <= _MOST_CASES:
        raise GridCasesError(
            f"{cases_dir} holds no case*.json, or over {_MOST_CASES}", "give the folder of cases by --cases"
        )
    best_known = _read(cases_dir / "best_known.json")
    cases: list[Case] = []
    for path in paths:
        document = _read(path)
        name = str(document.get("name", path.stem))
        known = best_known.get(name)
        total_s = known.get("total") if isinstance(known, dict) else None
        if not isinstance(total_s, int | float):
            raise GridCasesError(f"best_known.json says nothing of {name}", "add its total, in seconds")
        delay_ms_NN, rate_gbps_NN = (_matrix(path, document, key) for key in ("delay_ms", "bandwidth_gbps"))
        cases.append(
            Case(name=name, objective=_objective(delay_ms_NN / 1e3, rate_gbps_NN * 1e3), best_known_s=float(total_s))
        )
    return cases


def noisy(objective: GridObjective, seed: int) -> GridObjective:
    """Return the fleet with each pair's delay and rate times a factor of its own, lognormal around 1."""
    rng = np.random.default_rng(seed)
    delay_NN, rate_NN = (_noise(rng, objective.num_nodes) for _ in range(2))
    return _objective(objective.delay_s_NN * delay_NN, objective.rate_mbps_NN * rate_NN)


def random_regions(seed: int, num_nodes: int, num_regions: int = 8) -> GridObjective:
    """Return nodes in regions at random places, uneven in size, with noisy links.

    5 ms one way and 150 ms more for each side of the square that they lie in; a single stream's rate, which falls as
    delay grows, from 2 Gbit/s.
    """
    rng = np.random.default_rng([seed, num_nodes])
    place_P2 = rng.uniform(size=(num_regions, 2))
    region_N = rng.integers(num_regions, size=num_nodes)
    distance_PP = np.linalg.norm(place_P2[:, None] - place_P2[None], axis=2)
    delay_s_NN = (0.005 + 0.15 * distance_PP)[region_N][:, region_N]
    rate_mbps_NN = 2400.0 / (1.0 + delay_s_NN / 0.025)
    return _objective(delay_s_NN * _noise(rng, num_nodes), rate_mbps_NN * _noise(rng, num_nodes))


def random_links(seed: int, num_nodes: int) -> GridObjective:
    """Return nodes whose links have nothing in common, and differ by direction: 1-200 ms, 100 Mbit/s to 10 Gbit/s."""
    rng = np.random.default_rng([seed, num_nodes])
    delay_s_NN, rate_mbps_NN = (
        np.exp(rng.uniform(np.log(low), np.log(high), (num_nodes, num_nodes)))
        for low, high in ((0.001, 0.2), (100.0, 10_000.0))
    )
    return _objective(delay_s_NN, rate_mbps_NN)


def _objective(delay_s_NN: Floats, rate_mbps_NN: Floats) -> GridObjective:
    return GridObjective(delay_s_NN=delay_s_NN, rate_mbps_NN=rate_mbps_NN, sync_bytes=SYNC_BYTES, hop_bytes=HOP_BYTES)


def _noise(rng: np.random.Generator, num_nodes: int) -> Floats:
    """Return one factor for each unordered pair, 1 on the diagonal."""
    upper_NN = np.triu(rng.normal(0.0, NOISE_SIGMA, (num_nodes, num_nodes)), 1)
    return np.exp(upper_NN + upper_NN.T)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise GridCasesError(f"{path} is over {_MOST_BYTES} bytes", "give a smaller one")
        document = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise GridCasesError(f"{path} cannot be read: {error}", "give the folder of cases by --cases") from error
    if not isinstance(document, dict):
        raise GridCasesError(f"{path} is not a JSON object", "write it anew, or take the file away")
    return document


def _matrix(path: Path, document: dict[str, Any], key: str) -> Floats:
    rows = document.get(key)
    size = len(rows) if isinstance(rows, list) else 0
    if (
        not isinstance(rows, list)
        or not 1 <= size <= _MOST_NODES
        or any(not isinstance(row, list) or len(row) != size for row in rows)
        or any(isinstance(value, bool) or not isinstance(value, int | float) for row in rows for value in row)
    ):
        raise GridCasesError(
            f"{path} has no square matrix {key} of numbers, up to {_MOST_NODES} wide",
            "write it anew, or take the file away",
        )
    return np.array(rows, dtype=np.float64)
