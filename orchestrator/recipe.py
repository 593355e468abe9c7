"""What a run is made from, before its first step: its model, its data, its plan, and where its checkpoints lie."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from actors.errors import DataError, PlanError
from actors.fleet_spec import Fleet, ProbeOrder
from actors.model.huggingface import read_spec
from actors.settings import BatchSpec
from actors.spec import Plan
from actors.store import open_store
from actors.token_shards import DataManifest
from orchestrator.canary import StepDown
from orchestrator.config import RunConfig
from orchestrator.events import decode, encode
from orchestrator.fleet import Crew
from orchestrator.planner.build import Workload
from orchestrator.planner.choices import CHOSEN_SCHEDULES, PlanConfig
from orchestrator.planner.explain import explained_plan
from orchestrator.planner.plan import make_plan
from orchestrator.retune import Tuning
from orchestrator.runfolder import RunFolder, write_atomic


def resolve(config: RunConfig) -> RunConfig:
    """Return the configuration as every node understands it: with the shape of the model that training starts from,
    and local paths absolute, because nodes run in folders of their own.
    """
    model, url = config.model, config.checkpoints.url
    if model.init_from is not None:
        model = read_spec(Path(model.init_from).expanduser().absolute(), untie=model.untie)
    return replace(
        config,
        model=model,
        data=replace(config.data, path=open_store(config.data.path).url),
        checkpoints=replace(config.checkpoints, url=None if url is None else open_store(url).url),
    )


def require_data(config: RunConfig) -> DataManifest:
    """Return the manifest of the data; DataError where its vocabulary is not the model's."""
    data = DataManifest.load(config.data.path)
    if data.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{config.data.path} has a vocabulary of {data.vocab_size} tokens, the model of {config.model.vocab_size}",
            f"set model.vocab_size={data.vocab_size}",
        )
    return data


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A fleet, the plan for it, and the configuration with a step cut into microbatches as the plan does."""

    config: RunConfig
    fleet: Fleet
    plan: Plan


def plan_run(config: RunConfig, crew: Crew, began_with: BatchSpec | None, before: Plan | None) -> Planned:
    """Probe the fleet on this model and plan a run for it; as `before`, unless that is worse by more than noise.

    A run that goes on keeps the microbatches that it `began_with`: others would sum in another order. PlanError where
    the plan is of a kind that stages do not run.
    """
    require_executed(config.plan)
    if began_with is not None and config.plan.microbatch_sizes is not None:
        plan_config = replace(config.plan, microbatch_sizes=(began_with.microbatch_size,))
        config = replace(config, batch=began_with, plan=plan_config)
    fleet = probe_fleet(config, crew)
    return _planned(config, fleet, make_plan(fleet, workload(config), config.wire, config.plan, before))


def plan_ahead(config: RunConfig, fleet: Fleet) -> Planned:
    """Plan for a fleet that was measured before, or never, with what a person wants to know of it."""
    return _planned(config, fleet, explained_plan(fleet, workload(config), config.wire, config.plan))


def probe_fleet(config: RunConfig, crew: Crew) -> Fleet:
    """Measure the crew's nodes on this model, and their links."""
    order = ProbeOrder(
        model=config.model,
        batch=config.batch,
        document_mask=config.data.document_mask,
        microbatch_sizes=config.plan.microbatch_sizes or (),
    )
    return crew.probe(order, config.fleet.probe_bytes)


def workload(config: RunConfig) -> Workload:
    """Return what the run asks of its nodes."""
    return Workload(
        model=config.model,
        batch=config.batch,
        schedule=config.plan.searched.schedule or CHOSEN_SCHEDULES[0],
        activation_checkpointing=config.train.activation_checkpointing,
        document_mask=config.data.document_mask,
    )


def tuning_of(config: RunConfig, step_downs: tuple[StepDown, ...]) -> Tuning:
    """Return what a run's plan is made by again when its links change."""
    return Tuning(
        work=workload(config), wire=config.wire, plan=config.plan, retune=config.retune, step_downs=step_downs
    )


def require_executed(config: PlanConfig) -> None:
    """Raise PlanError for what can be planned and simulated, but not run."""
    if config.max_replicas > 1:
        raise PlanError(
            f"a stage runs on one node yet, and plan.max_replicas is {config.max_replicas}; isthmus plan and isthmus "
            "simulate know replicas",
            "leave out plan.max_replicas, plan.copies and plan.domains to train",
        )


def with_batch_of(config: RunConfig, plan: Plan) -> RunConfig:
    """Return the configuration with a step's sequences cut into microbatches as the plan has them."""
    if not plan.microbatch_size:
        return config
    batch = replace(config.batch, microbatch_size=plan.microbatch_size, num_microbatches=plan.num_microbatches)
    return replace(config, batch=batch)


def _planned(config: RunConfig, fleet: Fleet, plan: Plan) -> Planned:
    return Planned(config=with_batch_of(config, plan), fleet=fleet, plan=plan)


def save_plan(folder: RunFolder, plan: Plan, fleet: Fleet) -> None:
    """Write the plan, and the fleet that it was made for, into the run's folder."""
    write_atomic(folder.plan, json.dumps(encode(plan), indent=1))
    write_atomic(folder.fleet, json.dumps(encode(fleet), indent=1))


def saved_plan(folder: RunFolder) -> Plan | None:
    """Return the plan that a run goes by; None where there is none that this release can read."""
    try:
        return decode(Plan, json.loads(folder.plan.read_text()))
    except (OSError, ValueError, RecursionError):
        return None


def keep_plan(planned: Planned) -> str:
    """Write a plan that was made ahead into its run's folder, and return where; a plan that a run goes by stays."""
    folder = RunFolder.open(Path(planned.config.runs_dir), planned.config.name)
    if folder.events.exists():
        write_atomic(folder.plan_preview, json.dumps(encode(planned.plan), indent=1))
        return f"{folder.plan_preview}; the run's own plan stays {folder.plan}"
    with folder.lock():
        save_plan(folder, planned.plan, planned.fleet)
    return f"{folder.plan}, the fleet in {folder.fleet}"


def checkpoint_url(config: RunConfig) -> str:
    """Return where the run's checkpoints lie: its own folder, or its own place under checkpoints.url."""
    if config.checkpoints.url is None:
        return str(RunFolder(Path(config.runs_dir) / config.name).checkpoints.resolve())
    return f"{config.checkpoints.url.rstrip('/')}/{config.name}"
