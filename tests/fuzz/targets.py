"""The Python code that parses bytes from outside, as fuzz targets: a check that any bytes pass, and good starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.fuzz import frames, manifests, payloads, planted, units


@dataclass(frozen=True)
class Target:
    """`check` raises, whatever it is, where its input shows a mistake."""

    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


TARGETS = {
    "frames": Target(frames.check, frames.seeds),
    "payloads": Target(payloads.check, payloads.seeds),
    "units": Target(units.check, units.seeds),
    "manifests": Target(manifests.check, manifests.seeds),
    # Not hunted by `make fuzz`: it has a mistake, which a test sees found.
    "planted": Target(planted.check, planted.seeds),
}
