"""The cases of bench.wan: which hosts, which paths, which codecs, and what must be shown of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from actors.model.spec import ModelSpec

# What joins two hosts, each way.
from tests.lab.wanlab import Path as Route

MODEL = ModelSpec(
    vocab_size=4096, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=8, ffn_size=1408, max_positions=256
)
BATCH = {"seq_len": 256, "microbatch_size": 2, "num_microbatches": 32}
QUICK_MICROBATCHES = 8
EQUAL = (0.3, 0.3, 0.3, 0.3)
THIN_MBPS, FAST_MBPS = 4.0, 100.0

# What a link is allowed to lose: nothing but the rounding of q8; or what hq4 both ways costs.
Q8, HQ4 = ("q8", "q8"), ("hq4", "hq4-stochastic")
NONE = ("none", "none")
UNLIMITED = Route()
HQ4_Q8 = ("hq4", "q8")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    route: Route
    # Forward and backward codec of every link; the first is what the bounds are about.
    codecs: tuple[tuple[str, str], ...]
    cpus: tuple[float, ...] = EQUAL
    num_layers: int = MODEL.num_layers
    congestion_control: str = "cubic"
    # Whether TCP starts slowly after a pause: Linux does unless told otherwise, as `isthmus doctor` advises.
    idle_restart: bool = False
    # Hosts of one region are joined by `near` instead; by default each is one of its own.
    regions: tuple[int, ...] = (0, 1, 2, 3)
    near: Route = UNLIMITED
    # Layers of each stage; None: as the planner cuts.
    split: tuple[int, ...] | None = None
    # Also run with every link raw, and over torch.
    has_none: bool = True
    has_torch: bool = True
    # And torch on unshaped links besides.
    has_torch_unshaped: bool = False
    # Also run with layers cut evenly.
    has_even: bool = False
    # The route that hosts get in the middle of a run.
    then: Route | None = None
    # What each figure of bench.wan_judge is at least, or at most: see there.
    bounds: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def num_stages(self) -> int:
        return len(self.cpus)

    @property
    def model(self) -> ModelSpec:
        return replace(MODEL, num_layers=self.num_layers)

    def settings(self) -> dict[str, Any]:
        """Return what a result depends on: another of these is another result."""
        settings = {**asdict(self), "model": asdict(self.model)}
        # What is asked of it changes nothing that was measured.
        del settings["bounds"]
        return settings


CASES = (
    Case(
        name="unshaped", route=Route(), codecs=(NONE,), has_none=False, bounds={"of_torch": 1.0, "driver_share": 0.02}
    ),
    Case(
        name="20-25",
        route=Route(rate_mbps=20, delay_ms=25),
        codecs=(Q8,),
        bounds={"of_limit": 0.97, "of_unshaped": 0.95},
    ),
    # The same with TCP as Linux has it: what that costs.
    Case(
        name="20-25-idle-restart",
        route=Route(rate_mbps=20, delay_ms=25),
        codecs=(Q8,),
        idle_restart=True,
        has_none=False,
        has_torch=False,
    ),
    Case(
        name="4-25",
        route=Route(rate_mbps=THIN_MBPS, delay_ms=25),
        codecs=(HQ4, HQ4_Q8),
        has_torch_unshaped=True,
        bounds={"of_limit": 0.95, "of_unshaped": 0.88, "of_torch": 4.0, "driver_share": 0.02},
    ),
    Case(
        name="2-25",
        route=Route(rate_mbps=2, delay_ms=25),
        codecs=(HQ4,),
        bounds={"of_limit": 0.93, "of_torch": 6.0},
    ),
    Case(name="4-100", route=Route(rate_mbps=THIN_MBPS, delay_ms=100), codecs=(HQ4,), bounds={"of_limit": 0.93}),
    Case(
        name="20-25-loss-bbr",
        route=Route(rate_mbps=20, delay_ms=25, loss=0.01),
        codecs=(Q8,),
        congestion_control="bbr",
        has_none=False,
        has_torch=False,
        # Of the same without loss, which is run beside it.
        bounds={"of_lossless": 0.85},
    ),
    Case(
        name="20-25-loss-cubic",
        route=Route(rate_mbps=20, delay_ms=25, loss=0.01),
        codecs=(Q8,),
        has_none=False,
        has_torch=False,
    ),
    Case(
        name="two-regions",
        route=Route(rate_mbps=THIN_MBPS, delay_ms=25),
        codecs=(HQ4,),
        regions=(0, 0, 1, 1),
        # The thin link is that of 4-25, which shows raw links.
        has_none=False,
        # One of the links between stages is thin, no more.
        bounds={"of_limit": 0.95, "few_crossings": 1.0},
    ),
    Case(
        name="uneven",
        route=Route(rate_mbps=FAST_MBPS, delay_ms=5),
        codecs=(Q8,),
        cpus=(0.6, 0.4, 0.25, 0.15),
        num_layers=16,
        has_none=False,
        has_even=True,
        bounds={"of_certified": 0.90, "of_even": 1.5, "idle_as_planned": 0.90},
    ),
    Case(
        name="falls",
        route=Route(rate_mbps=FAST_MBPS, delay_ms=25),
        then=Route(rate_mbps=THIN_MBPS, delay_ms=25),
        codecs=(),
        # Of a run that was planned for the thin link; a step that was lost makes it nothing.
        bounds={"of_planned": 1 / 1.2},
    ),
)
# With fewer microbatches, one step each, and torch where it matters most.
QUICK_BOUNDS = {"20-25": {"of_limit": 0.85}, "4-25": {"of_limit": 0.85, "of_torch": 1.5}}


def quick(case: Case) -> Case:
    """Return a case as it is run in five minutes."""
    return replace(
        case, codecs=case.codecs[:1], has_none=False, has_torch=case.name == "4-25", bounds=QUICK_BOUNDS[case.name]
    )
