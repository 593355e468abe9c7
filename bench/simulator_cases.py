"""The runs that bench.simulator makes: on which hosts, over which paths, in which order, with which codecs."""

from __future__ import annotations

from dataclasses import dataclass

from bench.wan_cases import HQ4, NONE, Q8, Case, Route
from orchestrator.planner.problem import even_sizes

NUM_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One real run on a group's hosts; the planner chooses what `words` leave open."""

    route: Route
    codecs: tuple[str, str]
    # None: the planner's choice.
    schedule: str | None
    # What costs are fitted to, and not judged by.
    calibrates: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        words = (f"wire.forward={self.codecs[0]}", f"wire.backward={self.codecs[1]}")
        return words if self.schedule is None else (*words, f"plan.schedule={self.schedule}")

    @property
    def name(self) -> str:
        rate, delay = f"{self.route.rate_mbps:g}", f"{self.route.delay_ms:g}"
        return f"{rate}-{delay}-{self.codecs[0]}-{self.schedule or 'chosen'}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Hosts with these shares of a core, which stay up for several runs."""

    cpus: tuple[float, ...]
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return "+".join(f"{share:g}" for share in self.cpus)

    @property
    def case(self) -> Case:
        """The hosts, as bench.wan opens them."""
        # A run is named after it.
        name = f"hosts-{self.name.replace('+', '-')}"
        return Case(name=name, route=Route(), codecs=(NONE,), cpus=self.cpus, num_layers=NUM_LAYERS)


def _trial(rate_mbps: float, delay_ms: float, codecs: tuple[str, str], schedule: str | None, **more: bool) -> Trial:
    return Trial(route=Route(rate_mbps=rate_mbps, delay_ms=delay_ms), codecs=codecs, schedule=schedule, **more)


GROUPS = (
    Group(
        cpus=(0.6, 0.6),
        trials=(
            _trial(100, 5, NONE, "1f1b", calibrates=True),
            _trial(50, 10, Q8, "gpipe", calibrates=True),
            _trial(20, 25, Q8, "1f1b"),
            _trial(4, 25, HQ4, "bdp"),
        ),
    ),
    Group(cpus=(0.6, 0.3), trials=(_trial(20, 50, Q8, "bdp"), _trial(10, 5, NONE, "zb-h1"))),
    Group(
        cpus=(0.4, 0.4, 0.4),
        trials=(
            _trial(20, 25, HQ4, "bdp"),
            _trial(50, 100, Q8, "bdp"),
            _trial(10, 50, NONE, "1f1b"),
            _trial(4, 100, HQ4, "bdp-split"),
        ),
    ),
    Group(
        cpus=(0.3, 0.3, 0.3, 0.3),
        trials=(
            _trial(4, 25, HQ4, "bdp"),
            _trial(20, 100, Q8, "1f1b"),
            _trial(50, 25, NONE, "bdp"),
            _trial(20, 25, Q8, "gpipe"),
        ),
    ),
    Group(cpus=(0.6, 0.4, 0.25, 0.15), trials=(_trial(100, 5, Q8, "bdp"),)),
)
QUICK = Group(cpus=(0.6, 0.6), trials=(_trial(20, 25, Q8, "1f1b"), _trial(4, 25, HQ4, "bdp")))

# What the planner's own choice is held against: the same hosts and paths, other cuts and other orders.
RIVALRY = Group(cpus=(0.6, 0.3, 0.15), trials=(_trial(20, 25, Q8, None),))


def rivals(chosen_split: tuple[int, ...], chosen_schedule: str) -> dict[str, tuple[str, ...]]:
    """Return at least eight other ways to run on the same hosts, by name: words for the planner."""
    split = list(chosen_split)
    found: dict[str, tuple[str, ...]] = {}

    def cut(sizes: list[int]) -> str:
        return f"plan.split=[{','.join(map(str, sizes))}]"

    for schedule in ("gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"):
        if schedule != chosen_schedule:
            found[schedule] = (f"plan.schedule={schedule}", cut(split))
    for source in range(len(split)):
        for target in range(len(split)):
            if source != target and split[source] > 1:
                moved = [size - (i == source) + (i == target) for i, size in enumerate(split)]
                found[f"{chosen_schedule}, {moved}"] = (f"plan.schedule={chosen_schedule}", cut(moved))
    even = list(even_sizes(NUM_LAYERS, len(split)))
    found.setdefault(f"{chosen_schedule}, {even}", (f"plan.schedule={chosen_schedule}", cut(even)))
    return found
