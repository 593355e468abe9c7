"""What a run is made from, before its first step: its model, its data, its plan, and where its checkpoints lie."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from actors.errors import DataError
from actors.model.huggingface import read_spec
from actors.spec import Fleet, Plan, ProbeOrder
from actors.store import open_store
from actors.token_shards import DataManifest
from orchestrator.config import RunConfig
from orchestrator.events import encode
from orchestrator.fleet import Crew
from orchestrator.planner.cost import Workload
from orchestrator.planner.plan import make_plan
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


def plan_fleet(config: RunConfig, crew: Crew) -> tuple[Fleet, Plan]:
    """Probe the fleet on this model and plan for it."""
    order = ProbeOrder(model=config.model, batch=config.batch, document_mask=config.data.document_mask)
    fleet = crew.probe(order, config.fleet.probe_bytes)
    work = Workload(
        model=config.model,
        batch=config.batch,
        schedule=config.plan.schedule,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    return fleet, make_plan(fleet, work, config.wire, config.plan)


def save_plan(folder: RunFolder, plan: Plan, fleet: Fleet) -> None:
    """Write the plan, and the fleet that it was made for, into the run's folder."""
    write_atomic(folder.plan, json.dumps(encode(plan), indent=1))
    write_atomic(folder.fleet, json.dumps(encode(fleet), indent=1))


def checkpoint_url(config: RunConfig) -> str:
    """Return where the run's checkpoints lie: its own folder, or its own place under checkpoints.url."""
    if config.checkpoints.url is None:
        return str(RunFolder(Path(config.runs_dir) / config.name).checkpoints.resolve())
    return f"{config.checkpoints.url.rstrip('/')}/{config.name}"
