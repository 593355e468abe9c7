"""Manifests: which step of a run is whole, what to resume from, and what to delete.

Stages write their files under `step-00000120/` (actors/shards.py says which). Once every stage has reported, the
manifest is written last, as `step-00000120/manifest.json`, and makes the checkpoint whole: no manifest, no checkpoint.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from actors.errors import CheckpointCorrupt, CheckpointError, CheckpointForeign, ConfigError
from actors.model.spec import ModelSpec
from actors.settings import BatchSpec
from actors.shards import unit_names, unit_of_file
from actors.spec import CheckpointCodec, SavedFile, SaveReport
from actors.store import BlobMissing, BlobStore
from orchestrator.lifecycle import History

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
# About 130 bytes a layer and the resolved config; what is larger was not written by us.
MAX_MANIFEST_BYTES = 4 * 2**20

_CHECKPOINT = re.compile(r"step-[0-9]{8}")
_MANIFEST_KEY = re.compile(rf"step-([0-9]{{8}})/{re.escape(MANIFEST_NAME)}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_STEP = 10**8 - 1
# Half of a UTF-16 pair: JSON can spell it, but no file or console can take it.
_SURROGATE = re.compile("[\ud800-\udfff]")
_USE_ANOTHER = "use another checkpoint, and check the disk or bucket that holds this one"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints go, how often, and how many stay."""

    # A folder that every node reaches, or s3://bucket/prefix; None: runs/<name>/checkpoints.
    url: str | None = None
    # 0: only when the run ends.
    every_steps: int = 100
    # The newest whole checkpoints that stay.
    keep: int = 3
    # lx writes smaller files without loss, which only Isthmus reads; none writes safetensors.
    codec: CheckpointCodec = "none"

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(
                f"checkpoints.every_steps is {self.every_steps}", "set checkpoints.every_steps to 0 or more"
            )
        if self.keep < 1:
            raise ConfigError(f"checkpoints.keep is {self.keep}", "set checkpoints.keep to 1 or more")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint that holds the weights after `step` committed steps."""
    return f"step-{step:08d}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What makes a checkpoint whole: its files by hash, and all that an exact resume needs beside the weights.

    CheckpointCorrupt where the values do not make sense together: files other than the model's own, a bad hash.
    CheckpointForeign where the version is not ours.
    """

    version: int = MANIFEST_VERSION
    run: str
    # The version of the weights: the number of steps committed.
    step: int
    generation: int
    files: tuple[SavedFile, ...]
    model: ModelSpec
    batch: BatchSpec
    # Of the data's own manifest: names the tokens and their order.
    data_sha256: str
    document_mask: bool
    seed: int
    tokens_trained: int
    # What later decisions to skip a step depend on.
    history: History
    dollars: float
    # The resolved YAML and its hash.
    config: str
    config_sha256: str
    wandb_id: str

    def __post_init__(self) -> None:
        if self.version != MANIFEST_VERSION:
            raise _foreign(f"is of version {self.version}, not {MANIFEST_VERSION}")
        if not 0 <= self.step <= _MAX_STEP:
            raise _corrupt(f"is of step {self.step}, which is not from 0 to {_MAX_STEP}")
        counts = (self.generation, self.tokens_trained, self.history.num_skipped, self.dollars)
        if min(counts) < 0 or any(file.size_bytes < 0 for file in self.files):
            raise _corrupt("holds a negative count")
        if any(not name.isprintable() or set(name) & set("/\\") for name in (self.run, self.wandb_id)):
            raise _corrupt("holds a run name or W&B id that is not a plain name")
        hashes = (self.data_sha256, self.config_sha256, *(file.sha256 for file in self.files))
        if not all(_SHA256.fullmatch(sha256) for sha256 in hashes):
            raise _corrupt("holds a hash that is not SHA-256")
        # The number first: a hostile number of layers must not be counted out.
        units = [unit_of_file(file.name) or "" for file in self.files]
        if len(units) != self.model.num_layers + 2 or sorted(units) != sorted(unit_names(len(units) - 2)):
            raise _corrupt(f"names {len(units)} files that are not those of a model of {self.model.num_layers} layers")

    @property
    def checkpoint(self) -> str:
        return checkpoint_name(self.step)

    @property
    def files_by_name(self) -> dict[str, SavedFile]:
        return {file.name: file for file in self.files}

    def to_json(self) -> bytes:
        """Return the manifest as `parse_manifest` reads it."""
        return json.dumps(asdict(self), indent=1, allow_nan=False).encode()


def _corrupt(why: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(f"a checkpoint's manifest {why}", _USE_ANOTHER)


def _foreign(why: str) -> CheckpointForeign:
    return CheckpointForeign(
        f"a checkpoint's manifest {why}", "go on with the Isthmus that wrote it, or start afresh under another run name"
    )


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest in `data`.

    CheckpointCorrupt where it is too long, torn, or not of exactly our types; CheckpointForeign where it is of another
    version, or has other keys.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise _corrupt(f"has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"is not JSON: {error}") from error
    # Before the keys, which another version may name otherwise.
    if isinstance(document, dict) and document.get("version") != MANIFEST_VERSION:
        raise _foreign(f"is not of version {MANIFEST_VERSION}")
    return _read(Manifest, document, "manifest")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the type that its dataclass declares; nothing is converted but int to float."""
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if get_origin(kind) is types.UnionType:
        inner, _ = get_args(kind)  # `X | None`
        return None if value is None else _read(inner, value, where)
    if get_origin(kind) is tuple:
        inner, _ = get_args(kind)  # `tuple[X, ...]`
        if isinstance(value, list):
            return tuple(_read(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    elif kind is float:
        # 1e999 is a JSON number, but no float.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif type(value) is kind and not (kind is str and _SURROGATE.search(value)):
        return value
    raise _corrupt(f"holds a {type(value).__name__} as {where}")


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    if not isinstance(value, dict):
        raise _corrupt(f"holds a {type(value).__name__} as {where}")
    if odd := names.symmetric_difference(value):
        raise _foreign(f"lacks or adds keys in {where}: {', '.join(sorted(odd))[:200]!r}")
    try:
        return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in names})
    except ConfigError as error:
        raise _corrupt(f"holds a {where} that cannot be: {error.message}") from error


def require_compatible(
    manifest: Manifest, *, model: ModelSpec, batch: BatchSpec, data_sha256: str, document_mask: bool, seed: int
) -> None:
    """Raise CheckpointError, naming each difference, where resuming would not continue the same training.

    Free to change: stages, schedule, codecs, optimizer settings, checkpoint settings, the number of steps.
    """
    pairs = {
        **_pairs("model", _shape(manifest.model), _shape(model)),
        **_pairs("batch", manifest.batch, batch),
        "seed": (manifest.seed, seed),
        "data (SHA-256)": (manifest.data_sha256, data_sha256),
        "data.document_mask": (manifest.document_mask, document_mask),
    }
    changed = [f"{key}: checkpoint {theirs}, now {yours}" for key, (theirs, yours) in pairs.items() if theirs != yours]
    if changed:
        raise CheckpointError(
            f"{manifest.checkpoint} of run {manifest.run} cannot be continued with this configuration: "
            + "; ".join(changed),
            "set these back to the checkpoint's values, or start afresh under another run name",
        )


def _shape(model: ModelSpec) -> ModelSpec:
    """Return the spec without how its weights began, which does not matter once there are weights to resume from."""
    return replace(model, init_from=None, init_std=0.0, untie=False)


def _pairs(prefix: str, theirs: Any, yours: Any) -> dict[str, tuple[Any, Any]]:
    return {f"{prefix}.{f.name}": (getattr(theirs, f.name), getattr(yours, f.name)) for f in fields(theirs)}


@dataclass(frozen=True, kw_only=True)
class PendingSaves:
    """The reports of a checkpoint so far, of a run of `num_stages`. PURE: `add` returns the next value."""

    checkpoint: str
    num_stages: int
    reports: tuple[SaveReport, ...] = ()

    def add(self, report: SaveReport) -> PendingSaves:
        """Return this with one more report; one of another checkpoint, or told twice, changes nothing."""
        if report.checkpoint != self.checkpoint or report in self.reports:
            return self
        return replace(self, reports=(*self.reports, report))

    @property
    def failure(self) -> str:
        """What went wrong, stage by stage; empty while nothing has."""
        return "; ".join(report.error for report in self.reports if report.error)

    @property
    def is_settled(self) -> bool:
        """True once nothing more is worth waiting for: all stages have reported, or one has failed."""
        return bool(self.failure) or not self.missing_stages

    @property
    def missing_stages(self) -> tuple[int, ...]:
        """The stages that have not reported."""
        return tuple(sorted(set(range(self.num_stages)) - {report.stage for report in self.reports}))

    @property
    def files(self) -> tuple[SavedFile, ...]:
        """The files of all stages, by name: complete once settled without a failure."""
        return tuple(sorted((file for report in self.reports for file in report.files), key=lambda file: file.name))


class CheckpointLedger:
    """The checkpoints of one run in one store. StoreError passes through: a store that is away says nothing of them."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store

    def steps_newest_first(self) -> tuple[int, ...]:
        """Return the steps that have a manifest, whole or not."""
        found = map(_MANIFEST_KEY.fullmatch, self.store.list("step-"))
        return tuple(sorted((int(match[1]) for match in found if match), reverse=True))

    def read(self, step: int) -> Manifest:
        """Return a step's manifest.

        CheckpointCorrupt where it is missing, torn or another step's; CheckpointForeign where another release wrote it.
        """
        key = f"{checkpoint_name(step)}/{MANIFEST_NAME}"
        size_bytes = self.store.size(key)
        if size_bytes is not None and size_bytes > MAX_MANIFEST_BYTES:
            raise CheckpointCorrupt(
                f"{key} in {self.store.url} has {size_bytes} bytes, which is too many", _USE_ANOTHER
            )
        try:
            manifest = parse_manifest(self.store.get(key))
        except BlobMissing as error:
            raise CheckpointCorrupt(f"{key} in {self.store.url} is missing", _USE_ANOTHER) from error
        except (CheckpointCorrupt, CheckpointForeign) as error:
            raise type(error)(f"{key} in {self.store.url}: {error.message}", error.remedy) from error
        if manifest.step != step:
            raise CheckpointCorrupt(f"{key} in {self.store.url} is the manifest of step {manifest.step}", _USE_ANOTHER)
        return manifest

    def newest_whole(self, on_bad: Callable[[str, CheckpointError], None], below: int | None = None) -> Manifest | None:
        """Return the newest manifest whose files are all there in full; None where there is none.

        `on_bad` hears of each newer one that is not. With `below`, only older steps count: for when a stage found a
        file of that step altered, which sizes cannot show. CheckpointForeign passes through: who wrote that checkpoint
        can go on from it, so that falling back would throw its steps away.
        """
        for step in self.steps_newest_first():
            if below is not None and step >= below:
                continue
            try:
                return self._read_whole(step)
            except CheckpointCorrupt as error:
                on_bad(checkpoint_name(step), error)
        return None

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint whole; CheckpointCorrupt where its files are not in the store that this process sees."""
        self._require_files(manifest)
        self.store.put(f"{manifest.checkpoint}/{MANIFEST_NAME}", manifest.to_json())

    def set_aside(self, step: int) -> None:
        """Make a checkpoint that a load proved corrupt count as whole no more; its files stay until retention."""
        self.store.delete(f"{checkpoint_name(step)}/{MANIFEST_NAME}")

    def delete(self, step: int) -> None:
        """Delete a checkpoint: its manifest first, so that what is left half-way does not count as whole."""
        self._delete_keys(checkpoint_name(step), self.store.list(f"{checkpoint_name(step)}/"))

    def retain(self, keep: int) -> tuple[str, ...]:
        """Delete all but the `keep` newest whole checkpoints; return the names of those deleted.

        What lies before the newest whole one and is not whole is a save that failed, and goes too; what lies after it
        stays, since it may be a save under way. The newest whole one always stays. One of another release counts as
        whole.
        """
        kept: list[str] = []
        for step in self.steps_newest_first():
            if len(kept) == max(1, keep):
                break
            with suppress(CheckpointCorrupt):
                with suppress(CheckpointForeign):
                    self._read_whole(step)
                kept.append(checkpoint_name(step))
        keys = self.store.list("step-")
        folders = {key.partition("/")[0] for key in keys}
        older = {name for name in folders if kept and name < kept[0] and _CHECKPOINT.fullmatch(name)}
        doomed = sorted(older - set(kept))
        for name in doomed:
            self._delete_keys(name, [key for key in keys if key.startswith(f"{name}/")])
        return tuple(doomed)

    def _delete_keys(self, name: str, keys: list[str]) -> None:
        manifest = f"{name}/{MANIFEST_NAME}"
        for key in sorted(keys, key=lambda key: key != manifest):
            self.store.delete(key)

    def _read_whole(self, step: int) -> Manifest:
        manifest = self.read(step)
        self._require_files(manifest)
        return manifest

    def _require_files(self, manifest: Manifest) -> None:
        sizes = self.store.sizes(f"{manifest.checkpoint}/")
        odd = [
            file.name for file in manifest.files if sizes.get(f"{manifest.checkpoint}/{file.name}") != file.size_bytes
        ]
        if odd:
            raise CheckpointCorrupt(
                f"{manifest.checkpoint} in {self.store.url} lacks, or has of another size, {', '.join(sorted(odd)[:5])}"
                + (f" and {len(odd) - 5} more" if len(odd) > 5 else ""),
                "where nodes are separate machines, set checkpoints.url to a folder they share or to s3://bucket/prefix",
            )
