"""The configuration of a run: YAML overlays, then dotlist, into frozen dataclasses that live beside their owners.

The one importer of omegaconf. After `load_config` only frozen dataclasses travel. Secrets never come from here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.codecs import codec_for
from actors.errors import ConfigError
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.settings import BatchSpec, DataConfig, TimeoutConfig, WireConfig
from actors.spec import TensorRole
from orchestrator.checkpoints import CheckpointConfig
from orchestrator.lifecycle import GuardConfig
from orchestrator.link_watch import RetuneConfig
from orchestrator.planner.choices import PlanConfig
from orchestrator.runfolder import check_run_name
from orchestrator.tracking import TrackingConfig

# What rides inside a call and not in Ray's object store is limited: see RAY_SETTINGS in orchestrator/environment.py.
_MAX_PROBE_BYTES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and when to look at the held-out loss."""

    steps: int = 100
    # Keep only each block's input for backward, and compute the rest again.
    activation_checkpointing: bool = False
    # Steps from one evaluation to the next; the last step is always followed by one. 0: only there.
    eval_every: int = 50
    eval_microbatches: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eval_microbatches < 1 or self.eval_every < 0:
            raise ConfigError(
                "train.steps and train.eval_microbatches must be 1 or more, train.eval_every 0 or more",
                "set them so",
            )


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Which nodes to train on."""

    # Node actors; on this machine alone 4 where not set, on a cluster one for each GPU, or for each node without.
    nodes: int | None = None
    # CPU threads of each node actor; None: a machine's cores shared out equally, at least one each.
    threads: int | None = None
    # Dollars an hour of one node, where its Ray label `price` says nothing; and by its Ray label `region`.
    price_per_hour: float = 0.0
    region_prices: dict[str, float] = field(default_factory=dict[str, float])
    # How many bytes each link is probed with; 0: links are taken as near.
    probe_bytes: int = 1_000_000
    # Equal workers of `isthmus baseline`, each with the whole model and an equal part of each step's microbatches.
    baseline_workers: int = 1

    def __post_init__(self) -> None:
        if (self.nodes is not None and self.nodes < 1) or (self.threads is not None and self.threads < 1):
            raise ConfigError("fleet.nodes and fleet.threads must be 1 or more", "set them so, or leave them out")
        if self.price_per_hour < 0 or self.probe_bytes < 0:
            raise ConfigError("fleet.price_per_hour and fleet.probe_bytes must be 0 or more", "set them so")
        if self.probe_bytes > _MAX_PROBE_BYTES:
            raise ConfigError(
                f"fleet.probe_bytes is {self.probe_bytes}, more than fits into one call of Ray's",
                f"set fleet.probe_bytes to {_MAX_PROBE_BYTES} or less",
            )
        if self.baseline_workers < 1:
            raise ConfigError(
                f"fleet.baseline_workers is {self.baseline_workers}", "set fleet.baseline_workers to 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is made from."""

    name: str = "run"
    seed: int = 1
    runs_dir: str = "runs"
    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchSpec = field(default_factory=BatchSpec)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    retune: RetuneConfig = field(default_factory=RetuneConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_run_name(self.name)
        if self.batch.seq_len > self.model.max_positions:
            raise ConfigError(
                f"batch.seq_len={self.batch.seq_len} exceeds model.max_positions={self.model.max_positions}",
                "lower batch.seq_len or raise model.max_positions",
            )
        if self.batch.num_microbatches % self.fleet.baseline_workers:
            raise ConfigError(
                f"fleet.baseline_workers={self.fleet.baseline_workers} do not share "
                f"batch.num_microbatches={self.batch.num_microbatches} equally",
                "set fleet.baseline_workers to a divisor of batch.num_microbatches",
            )
        codec_for(self.wire.forward, TensorRole.ACTIVATION, "wire.forward")
        codec_for(self.wire.backward, TensorRole.GRADIENT, "wire.backward")
        for link, codecs in self.wire.links.items():
            forward, _, backward = codecs.partition("/")
            codec_for(forward, TensorRole.ACTIVATION, f"the first of wire.links.{link}")
            codec_for(backward, TensorRole.GRADIENT, f"the second of wire.links.{link}")
        for forward, backward in self.wire.thin_pairs:
            codec_for(forward, TensorRole.ACTIVATION, "the first of a pair in wire.thin")
            codec_for(backward, TensorRole.GRADIENT, "the second of a pair in wire.thin")

    @property
    def yaml(self) -> str:
        """The resolved configuration."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.yaml.encode()).hexdigest()


def load_config(words: Sequence[str]) -> RunConfig:
    """Return the configuration that the command line gives: *.yaml files, left to right, then a.b=c.

    Raises ConfigError for an unknown key, with the nearest name; for a value of the wrong type; for a missing file.
    """
    merged = OmegaConf.structured(RunConfig)
    # One by one, so that what cannot be merged can be named.
    for word in sorted(words, key=lambda word: "=" in word):
        try:
            merged = OmegaConf.merge(merged, _read_dotlist(word) if "=" in word else _read_overlay(word))
        # TypeError: a list where keys are wanted.
        except (OmegaConfBaseException, TypeError) as error:
            line = _first_line(error)
            named = line.startswith(word.partition("=")[0] or "=")
            raise ConfigError(line if named else f"{word}: {line}", _SEE_KEYS) from error
    _require_no_interpolation(OmegaConf.to_container(merged, resolve=False))
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error), _SEE_KEYS) from error
    assert isinstance(config, RunConfig)
    _require_finite(asdict(config))
    return config


def parse_config(text: str) -> RunConfig:
    """Return the configuration whose resolved YAML a run folder or a manifest holds."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(text)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"a saved configuration cannot be read: {_first_line(error)}", _OTHER_RELEASE) from error
    assert isinstance(config, RunConfig)
    return config


_OTHER_RELEASE = "use the release of Isthmus that wrote it"
_SEE_KEYS = "correct it; conf/demo.yaml shows the usual keys, RunConfig in orchestrator/config.py has all of them"


def _read_dotlist(word: str) -> object:
    try:
        return OmegaConf.from_dotlist([word])
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {word!r} is not YAML: {_first_line(error)}", "quote it, or mend it") from error


def _read_overlay(word: str) -> object:
    if not word.endswith((".yaml", ".yml")):
        raise ConfigError(f"{word!r} is neither a *.yaml file nor key=value", "see `isthmus train --help`")
    try:
        return OmegaConf.load(word)
    except OSError as error:
        raise ConfigError(f"{word} cannot be read: {error.strerror}", "name a file under conf/, or your own") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{word} is not YAML: {_first_line(error)}", "mend that line") from error


def _require_no_interpolation(values: object, key: str = "") -> None:
    """Refuse ${...}: it could carry a secret of the environment into the run's folder, and to W&B."""
    if isinstance(values, dict):
        for name, value in values.items():
            _require_no_interpolation(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, str) and "${" in values:
        raise ConfigError(f"{key} is {values!r}", "write the value itself; secrets belong in the environment")


def _require_finite(values: dict[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _require_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{key} is {value}", f"set {prefix}{key} to a finite number")


def _first_line(error: Exception) -> str:
    """Return what went wrong and where, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    # OmegaConf leaves its own placeholders in what it says of an element of a list.
    text = str(error).replace("'$VALUE' of type '$VALUE_TYPE' ", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    return f"{keys[0]}: {lines[0]}" if keys else lines[0]


def _plain(value: object) -> object:
    """Return nested dicts and lists, as YAML writes them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
