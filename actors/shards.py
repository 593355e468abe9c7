"""What one stage writes and reads of a checkpoint, in a layout that does not depend on the plan.

A checkpoint has one file a unit: `embedding`, `layer-00017`, `head` (the final norm and lm_head). A file holds each
parameter under its Hugging Face name as `weight/<name>` and, once the optimizer has stepped, AdamW's state as
`exp_avg/<name>`, `exp_avg_sq/<name>` and `step/<name>`. So any stages, however cut, read what any others wrote. A file
is plain `.safetensors`, or a compact `.lx` (actors/packing.py); its name says which, and either is read.

    snapshot -> write_units -> SavedFile ... -> read_units -> restore
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from actors.errors import CheckpointCorrupt, CheckpointError, FrameCorrupt, IsthmusError, StoreError
from actors.packing import pack_unit, unpack_whole
from actors.spec import CheckpointCodec, SavedFile, SaveOrder, SaveReport
from actors.store import BlobMissing, BlobStore, open_store

# Unit -> tensor's name in the file ("exp_avg/model.norm.weight") -> tensor.
Units = dict[str, dict[str, Tensor]]

_WEIGHT = "weight"
_STATE = ("exp_avg", "exp_avg_sq", "step")
_SUFFIXES: dict[CheckpointCodec, str] = {"none": ".safetensors", "lx": ".lx"}
_LAYER = re.compile(r"model\.layers\.([0-9]{1,5})\.")
_ENDS = {"model.embed_tokens.": "embedding", "model.norm.": "head", "lm_head.": "head"}


def unit_of(name: str) -> str:
    """Return the unit that holds a parameter, given its global name; CheckpointError where none does."""
    if layer := _LAYER.match(name):
        return _layer_unit(int(layer[1]))
    for prefix, unit in _ENDS.items():
        if name.startswith(prefix):
            return unit
    raise CheckpointError(
        f"parameter {name!r} belongs to no part of a decoder",
        "name it as Hugging Face does: model.embed_tokens, model.layers.N, model.norm, lm_head",
    )


def unit_names(num_layers: int) -> tuple[str, ...]:
    """Return all units of a model, in the model's own order."""
    return ("embedding", *map(_layer_unit, range(num_layers)), "head")


def file_name(unit: str, codec: CheckpointCodec) -> str:
    """Return the name of a unit's file under its checkpoint."""
    return unit + _SUFFIXES[codec]


def unit_of_file(name: str) -> str | None:
    """Return whose file it is, under a checkpoint; None for a name that no unit's file has."""
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES.values() if name.endswith(suffix)), None)


def unit_limits(params: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the units of parameters, given by global name, each with the most bytes that its tensors may take."""
    limits: dict[str, int] = {}
    for name, param in params.items():
        # The weight, two moments and the step; of float32, unless the parameter is wider.
        limit = 3 * param.numel() * max(4, param.element_size()) + 4
        limits[unit_of(name)] = limits.get(unit_of(name), 0) + limit
    return limits


def _layer_unit(layer: int) -> str:
    return f"layer-{layer:05d}"


def snapshot(named_params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Units:
    """Return a copy in CPU memory of the weights and the optimizer's state; training may go on at once."""
    units: Units = {}
    for name, param in named_params.items():
        tensors = units.setdefault(unit_of(name), {})
        tensors[f"{_WEIGHT}/{name}"] = _cpu_copy(param)
        state = optimizer.state.get(param, {})
        if state and set(state) != set(_STATE):
            raise CheckpointError(
                f"the optimizer keeps {', '.join(sorted(state))} of {name}, but a checkpoint holds {', '.join(_STATE)}",
                "use AdamW without amsgrad",
            )
        for key, value in state.items():
            tensors[f"{key}/{name}"] = _cpu_copy(value)
    return units


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_units(store: BlobStore, checkpoint: str, units: Units, codec: CheckpointCodec) -> tuple[SavedFile, ...]:
    """Write one file a unit under `checkpoint`; StoreError or DiskFull where the store refuses."""
    files: list[SavedFile] = []
    for unit, tensors in units.items():
        data = pack_unit(tensors) if codec == "lx" else safetensors.torch.save(tensors)
        saved = SavedFile(name=file_name(unit, codec), size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        store.put(f"{checkpoint}/{saved.name}", data)
        files.append(saved)
    return tuple(files)


def read_units(store: BlobStore, checkpoint: str, files: Mapping[str, SavedFile], limits: Mapping[str, int]) -> Units:
    """Return the tensors of some units, as `snapshot` made them.

    `files` maps a file's name to what the manifest says of it, `limits` a unit to the most bytes its tensors may take
    once they are decompressed (`unit_limits`). Size and hash are checked before a byte is parsed; CheckpointCorrupt
    names the file that is missing, torn or altered.
    """
    return {unit: _read_unit(store, checkpoint, files, unit, limit) for unit, limit in limits.items()}


def read_weights(
    store: BlobStore, checkpoint: str, files: Mapping[str, SavedFile], limits: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the weights alone of some units, by global name, checked as `read_units` does."""
    return {
        name.removeprefix(f"{_WEIGHT}/"): tensor
        for tensors in read_units(store, checkpoint, files, limits).values()
        for name, tensor in tensors.items()
        if name.startswith(f"{_WEIGHT}/")
    }


def _read_unit(
    store: BlobStore, checkpoint: str, files: Mapping[str, SavedFile], unit: str, max_bytes: int
) -> dict[str, Tensor]:
    saved = next((files[name] for codec in _SUFFIXES if (name := file_name(unit, codec)) in files), None)
    key = f"{checkpoint}/{saved.name if saved else unit}"

    def corrupt(why: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(
            f"{key} in {store.url} {why}",
            "resume from the checkpoint before it, and check the disk or bucket that holds it",
        )

    if saved is None:
        raise corrupt("is not in its checkpoint's manifest")
    # The size first: what is larger than the manifest says is not even read.
    size_bytes = store.size(key)
    if size_bytes is None:
        raise corrupt("is missing")
    if size_bytes != saved.size_bytes:
        raise corrupt(f"has {size_bytes} bytes, not {saved.size_bytes}")
    try:
        data = store.get(key)
    except BlobMissing as error:
        raise corrupt("is missing") from error
    if hashlib.sha256(data).hexdigest() != saved.sha256:
        raise corrupt("is not what was written: its SHA-256 differs")
    if saved.name == file_name(unit, "lx"):
        try:
            return unpack_whole(data, max_bytes)
        except FrameCorrupt as error:
            raise corrupt(f"is no compact file that this model can hold: {error.message}") from error
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        # KeyError: a dtype that torch lacks; the others: shapes and bytes that do not agree.
        raise corrupt(f"is not a safetensors file that torch can hold: {error}") from error


def restore(named_params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, units: Units) -> None:
    """Put weights, and with an optimizer its state, back in place; CheckpointError, before any change, names misfits.

    Where the units hold no optimizer state at all (saved before the first step), the optimizer starts afresh.
    """
    tensors = {name: tensor for unit in units.values() for name, tensor in unit.items()}
    has_state = any(not name.startswith(f"{_WEIGHT}/") for name in tensors)
    stateful = _stateful_names(named_params, optimizer) if optimizer is not None and has_state else []
    expected = [(_WEIGHT, name) for name in named_params] + [(kind, name) for name in stateful for kind in _STATE]
    misfits = [
        misfit for kind, name in expected if (misfit := _misfit(tensors, kind, name, named_params[name])) is not None
    ]
    if misfits:
        raise CheckpointError(
            f"the checkpoint does not fit this model: {_shortened(misfits)}",
            "resume with the model the checkpoint was made with, or start under another run name",
        )
    with torch.no_grad():
        for name, param in named_params.items():
            param.copy_(tensors[f"{_WEIGHT}/{name}"])
    if optimizer is not None:
        index = {id(param): i for i, param in enumerate(_params_of(optimizer))}
        # `load_state_dict` knows which state AdamW wants on which device.
        optimizer.load_state_dict(
            {
                "state": {
                    index[id(named_params[name])]: {kind: tensors[f"{kind}/{name}"].clone() for kind in _STATE}
                    for name in stateful
                },
                "param_groups": optimizer.state_dict()["param_groups"],
            }
        )


def _params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _stateful_names(named_params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[str]:
    optimized = {id(param) for param in _params_of(optimizer)}
    return [name for name, param in named_params.items() if id(param) in optimized]


def _misfit(tensors: Mapping[str, Tensor], kind: str, name: str, param: nn.Parameter) -> str | None:
    """Say how the tensor of this kind and parameter is not what is needed; None where it is."""
    tensor = tensors.get(f"{kind}/{name}")
    if tensor is None:
        return f"{kind}/{name} is missing"
    shape, dtype = (torch.Size(()), torch.float32) if kind == "step" else (param.shape, param.dtype)
    if (tensor.shape, tensor.dtype) == (shape, dtype):
        return None
    return f"{kind}/{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"


def _shortened(misfits: list[str]) -> str:
    most = 5
    rest = f"; and {len(misfits) - most} more" if len(misfits) > most else ""
    return "; ".join(misfits[:most]) + rest


@dataclass(frozen=True, kw_only=True)
class _Save:
    order: SaveOrder
    units: Units
    stage: int

    def dropped(self, why: str) -> SaveReport:
        checkpoint = self.order.checkpoint
        error = f"stage {self.stage} dropped {checkpoint}: {why}"
        return SaveReport(stage=self.stage, checkpoint=checkpoint, files=(), seconds=0.0, error=error)


class AsyncSaver:
    """Writes snapshots in a background thread, one at a time, while training goes on.

    A save asked for while another runs waits until a later call finds that one ended. One save may wait: a newer one
    takes its place, because the newest is worth most and each holds a copy of the stage in memory. A store's refusal
    is a report's `error`, never an exception here. Its methods are called from one thread. `clock` returns seconds;
    `open_url` opens the store.
    """

    def __init__(
        self,
        open_url: Callable[[str], BlobStore] = open_store,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_url = open_url
        self._clock = clock
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: tuple[_Save, Future[SaveReport]] | None = None
        self._waiting: _Save | None = None
        self._reports: list[SaveReport] = []

    def start(self, order: SaveOrder, units: Units, stage: int) -> None:
        """Write the units of one stage as ordered; returns at once."""
        self._collect()
        self._drop_waiting(f"{order.checkpoint} was due before its turn came; save less often, or to a faster store")
        self._waiting = _Save(order=order, units=units, stage=stage)
        self._collect()

    def finished(self) -> tuple[SaveReport, ...]:
        """Return the reports of the saves that ended since the last call; does not wait."""
        self._collect()
        reports, self._reports = tuple(self._reports), []
        return reports

    def wait(self, timeout_s: float) -> None:
        """Wait until no save runs or waits; StoreError names the one that is not done in time."""
        deadline = self._clock() + timeout_s
        while self._running is not None:
            save, future = self._running
            if not wait([future], timeout=max(0.0, deadline - self._clock())).done:
                raise StoreError(
                    f"stage {save.stage} did not finish {save.order.checkpoint} in {save.order.store_url} "
                    f"within {timeout_s:g} s",
                    "check the link to the store, or raise timeouts.transfer_s",
                )
            self._collect()

    def close(self, timeout_s: float) -> None:
        """Drop the save that waits and take no more; wait so long for the one that runs, then leave it to itself."""
        self._drop_waiting("the stage was closed before its turn came; wait for saves first")
        self._executor.shutdown(wait=False)
        if self._running is not None:
            wait([self._running[1]], timeout=timeout_s)

    def _collect(self) -> None:
        """Take the report of the save that ended, if one did, and begin the one that waits, if it may."""
        if self._running is not None and self._running[1].done():
            _, future = self._running
            self._running = None
            self._reports.append(future.result())
        if self._running is None and self._waiting is not None:
            save, self._waiting = self._waiting, None
            self._running = save, self._executor.submit(self._write, save)

    def _drop_waiting(self, why: str) -> None:
        if self._waiting is not None:
            self._reports.append(self._waiting.dropped(why))
            self._waiting = None

    def _write(self, save: _Save) -> SaveReport:
        started_s = self._clock()
        order = save.order
        files: tuple[SavedFile, ...] = ()
        error = ""
        try:
            files = write_units(self._open_url(order.store_url), order.checkpoint, save.units, order.codec)
        except IsthmusError as refusal:
            error = f"stage {save.stage} could not save {order.checkpoint}: {refusal}"
        return SaveReport(
            stage=save.stage,
            checkpoint=order.checkpoint,
            files=files,
            seconds=self._clock() - started_s,
            error=error,
        )
