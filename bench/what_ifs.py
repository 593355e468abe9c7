"""What Isthmus would do with three fleets that nobody here has, and what that would cost: planned and simulated.

    python -m bench.what_ifs [--quick] [--check]

Each setting is a fleet file of conf/fleet and a recipe; each way of running it is planned, and the plan's step is
played by the simulator. Nothing is measured: times come from conf/fleet/catalogue.yaml. `--check` asks that every
setting has a plan and that plan and simulation agree within a third. The page goes to docs/what-ifs.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from actors.errors import PlanError
from actors.spec import Plan
from bench.record import parse_arguments, save
from orchestrator.config import load_config
from orchestrator.fleetfile import CATALOGUE, load_catalogue, load_fleet
from orchestrator.recipe import plan_ahead, workload
from orchestrator.simulator.overheads import MEASURED_ON_CUDA
from orchestrator.simulator.step import simulate_plan

CONF = Path(__file__).parents[1] / "conf"
PAGE = Path(__file__).parents[1] / "docs" / "what-ifs.md"
MOST_DIFFERENCE = 1 / 3
# A multiply and an add for each parameter and token forward, twice that backward.
_FLOPS_PER_PARAM_TOKEN = 6
_RECIPE = ("batch.microbatch_size=1", "train.activation_checkpointing=true")
# Ways to run: in words, and the settings.
PLAIN = ("1F1B", ("plan.schedule=1f1b",))
SMALLER = ("1F1B, codecs within 4% of loss", ("plan.schedule=1f1b", "plan.quality_budget=0.04"))
COVERED = ("delays covered by bdp", ("plan.schedule=bdp",))
BOTH = ("bdp and codecs within 4%", ("plan.schedule=bdp", "plan.quality_budget=0.04"))
REPLICAS = (
    "with replicas, not yet run",
    ("plan.schedule=bdp", "plan.quality_budget=0.04", "plan.max_replicas=4"),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A fleet, what it is to train, and what else is known of it."""

    name: str
    fleet: str
    model: str
    seq_len: int
    num_microbatches: int
    ways: tuple[tuple[str, tuple[str, ...]], ...]
    note: str


SETTINGS = (
    Setting(
        name="48 A100s in 5 sites, a model of 100B",
        fleet="a100-5-sites.yaml",
        model="100b.yaml",
        seq_len=4096,
        num_microbatches=512,
        ways=(PLAIN, SMALLER, COVERED, BOTH),
        note="A published run of a 100B model on such a fleet: 30.8% of peak, $1.85 a million tokens. Rates between "
        "sites are its own (856 and 1,322 Mbit/s); delays (40 ms), the model's shape and $1.79 an hour are assumed; "
        "at that run's implied $1.07 an hour the dollars here are 0.6 of what is said.",
    ),
    Setting(
        name="32 RTX 4090s at home, 80 to 200 Mbit/s up, a model of 8B",
        fleet="consumer-32.yaml",
        model="8b.yaml",
        seq_len=2048,
        num_microbatches=256,
        ways=(PLAIN, SMALLER, BOTH, REPLICAS),
        note="Each card alone behind its line; uplinks of 80, 120 and 200 Mbit/s, ten times that down, 20 ms one way.",
    ),
    Setting(
        name="2 H100, 4 A100, 4 L4, 4 RTX 4090 in four places, a model of 8B",
        fleet="mixed.yaml",
        model="8b.yaml",
        seq_len=4096,
        num_microbatches=256,
        ways=(PLAIN, SMALLER, COVERED, BOTH, REPLICAS),
        note="Rates and delays between the places as in the file: 300 to 1,000 Mbit/s, 12 to 60 ms.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of running one setting; NaN where it does not fit."""

    setting: str
    way: str
    settings: tuple[str, ...]
    stages: int
    nodes_used: int
    schedule: str
    codecs: str
    step_s: float
    simulated_step_s: float
    # The same where TCP starts slowly after each pause, as it does where nobody changed that.
    slow_start_step_s: float
    tokens_per_s: float
    dollars_per_mtoken: float
    # Of the peak of the cards that are used.
    share_of_peak: float
    loss_share: float
    bound_tokens_per_s: float
    binds: str
    advice: tuple[str, ...]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    rows: list[Row] = []
    for setting in SETTINGS:
        for way in setting.ways[:1] if arguments.quick else setting.ways:
            row = measure(setting, way)
            rows.append(row)
            print(
                f"{row.setting}; {row.way}: {row.tokens_per_s:,.0f} tokens/s, ${row.dollars_per_mtoken:.2f}/M, "
                f"{row.share_of_peak:.1%} of peak, step {row.step_s:.1f} s, simulated {row.simulated_step_s:.1f} s; "
                f"{row.binds}",
                flush=True,
            )
    print(save("what_ifs", arguments, {"simulated": True, "rows": [asdict(row) for row in rows]}))
    if not arguments.quick:
        PAGE.write_text(page(rows))
    missed = [row for row in rows if not abs(row.simulated_step_s / row.step_s - 1) <= MOST_DIFFERENCE]
    print(f"{len(missed)} of {len(rows)} without a plan, or simulated more than a third apart from it")
    return 1 if arguments.check and missed else 0


def measure(setting: Setting, way: tuple[str, tuple[str, ...]]) -> Row:
    """Plan a setting in one way, and play the plan's step."""
    words, settings = way
    batch = (f"batch.seq_len={setting.seq_len}", f"batch.num_microbatches={setting.num_microbatches}")
    config = load_config([str(CONF / "model" / setting.model), *_RECIPE, *batch, *settings])
    fleet = load_fleet(CONF / "fleet" / setting.fleet, workload(config), config.plan.batches(config.batch))
    try:
        plan = plan_ahead(config, fleet).plan
    except PlanError as error:
        print(error)
        return _nothing(setting, words, settings)
    cold = MEASURED_ON_CUDA
    warm = replace(cold, initial_window_bytes=0.0)
    steps_s = [
        simulate_plan(plan, fleet, workload(config), config.wire, overheads=overheads, sigma=0.0, seed=1)[1].step_s
        for overheads in (warm, cold)
    ]
    used = {node for stage in plan.stages for node in stage.nodes}
    catalogue = load_catalogue(CATALOGUE)
    peak = sum(1e12 * catalogue[card.device].peak_tflops for card in fleet.nodes if card.node in used)
    return Row(
        setting=setting.name,
        way=words,
        settings=settings,
        stages=len(plan.stages),
        nodes_used=len(used),
        schedule=plan.schedule,
        codecs=_codecs(plan),
        step_s=plan.step_s,
        simulated_step_s=steps_s[0],
        slow_start_step_s=steps_s[1],
        tokens_per_s=plan.tokens_per_s,
        dollars_per_mtoken=plan.dollars_per_mtoken,
        share_of_peak=_FLOPS_PER_PARAM_TOKEN * config.model.num_params * plan.tokens_per_s / peak,
        loss_share=plan.loss_share,
        bound_tokens_per_s=plan.bound_tokens_per_s,
        binds=plan.binds,
        advice=plan.advice,
    )


def page(rows: list[Row]) -> str:
    """Return the page: what was assumed, and a table for each setting."""
    lines = [_HEAD]
    for setting in SETTINGS:
        lines += [f"## {setting.name}", "", setting.note, ""]
        lines.append("| how | stages on nodes | codecs | tokens/s | $/M tokens | of peak | loss | step, s | binds |")
        lines.append("|---|---|---|---|---|---|---|---|---|")
        own = [row for row in rows if row.setting == setting.name]
        lines += [_line(row) for row in own]
        advised = next((row for row in own if row.advice), own[0])
        lines += ["", *(f"Would help ({advised.way}): {words}.  " for words in advised.advice), ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Row) -> str:
    if math.isnan(row.step_s):
        return f"| {row.way} | does not fit | | | | | | | |"
    loss = "" if math.isnan(row.loss_share) else f"+{row.loss_share:.2%}"
    return (
        f"| {row.way} | {row.stages} on {row.nodes_used}, {row.schedule} | {row.codecs} | {row.tokens_per_s:,.0f} "
        f"(bound {row.bound_tokens_per_s:,.0f}) | {row.dollars_per_mtoken:.2f} | {row.share_of_peak:.1%} | {loss} | "
        f"{row.step_s:.0f}, {row.simulated_step_s:.0f}, {row.slow_start_step_s:.0f} | {row.binds} |"
    )


def _codecs(plan: Plan) -> str:
    pairs = [f"{link.forward_codec}/{link.backward_codec}" for link in plan.links]
    return ", ".join(f"{pairs.count(pair)} x {pair}" for pair in dict.fromkeys(pairs))


def _nothing(setting: Setting, words: str, settings: tuple[str, ...]) -> Row:
    nothing = math.nan
    return Row(
        setting=setting.name,
        way=words,
        settings=settings,
        stages=0,
        nodes_used=0,
        schedule="",
        codecs="",
        step_s=nothing,
        simulated_step_s=nothing,
        slow_start_step_s=nothing,
        tokens_per_s=0.0,
        dollars_per_mtoken=nothing,
        share_of_peak=0.0,
        loss_share=nothing,
        bound_tokens_per_s=nothing,
        binds="does not fit",
        advice=(),
    )


_HEAD = """# What if: three fleets that nobody here has

**All of this is planned and simulated; no such hardware was used.** Made by `python -m bench.what_ifs`
(`bench/results/what_ifs.json`). What is assumed everywhere:

- A card sustains the share of its dense bf16 peak that `conf/fleet/catalogue.yaml` says (0.35 to 0.5), whatever the
  layer; the head counts, the embedding takes nothing. Weights, gradients and AdamW's moments take 16 bytes a parameter.
- Sequences of 4,096 tokens (2,048 at home, for memory), one a microbatch; blocks are computed again in the backward
  pass, which is work that the share of peak does not count.
- Links carry what the fleet file says, both ways at once, without loss; nothing fails. Dollars are for the nodes that
  are used, all the time; traffic out of a cloud costs nothing here, which is not so.
- Seconds a step are the plan's closed form, the simulator's, and the simulator's where TCP starts slowly after every
  pause (Linux does unless net.ipv4.tcp_slow_start_after_idle is 0: set it so on every node).
- What codecs do to the loss was measured on a model of 2 million parameters ([quality.md](quality.md)): a guide only.
- "Not yet run": replicas, which the planner and the simulator know, and stages do not run yet.
"""


if __name__ == "__main__":
    sys.exit(main())
