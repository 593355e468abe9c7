"""What this machine's probes measured before, so that the next plan need not wait for them.

Kept by hardware, threads, software, model and microbatch. A stored result is taken only while it is young and while the
model's block still takes about as long as it did: a machine that has become slower is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from actors.fleet_spec import PartTimes
from actors.kernels.cache import cache_folder
from actors.model.spec import ModelSpec
from actors.probe import device_name, layer_s, time_parts
from actors.settings import BatchSpec

_MAX_AGE_S = 86_400.0
_SAME_WITHIN = 0.15
_MAX_BYTES, _MAX_ENTRIES = 1 << 20, 200


def cache_file() -> Path:
    """Return where a user's probes are kept."""
    return cache_folder() / "probes.json"


def cached_time_parts(
    file: Path,
    spec: ModelSpec,
    batch: BatchSpec,
    device: torch.device,
    clock: Callable[[], float],
    now_s: float,
    *,
    document_mask: bool,
) -> PartTimes:
    """Return what `time_parts` returns, from `file` where it still holds; `now_s` is the time of day in seconds.

    A file that cannot be read or written costs nothing but the time to measure.
    """
    key = _key(spec, batch, device, document_mask)
    entries = _read(file)
    known = _times(entries.get(key), now_s)
    if known is not None:
        seconds = layer_s(spec, batch, device, clock, document_mask=document_mask)
        if abs(seconds / (known.layer_forward_s + known.layer_backward_s) - 1) < _SAME_WITHIN:
            return known
    times = time_parts(spec, batch, device, clock, document_mask=document_mask)
    entries[key] = {"measured_at_s": now_s, **asdict(times)}
    _write(file, entries)
    return times


def _key(spec: ModelSpec, batch: BatchSpec, device: torch.device, document_mask: bool) -> str:
    shape = (asdict(spec), batch.seq_len, batch.microbatch_size, document_mask)
    made_of = (device_name(device), torch.get_num_threads(), torch.__version__, shape)
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def _times(entry: object, now_s: float) -> PartTimes | None:
    """Return an entry's times; None where it is too old, or anything about it is not as written."""
    if not isinstance(entry, dict):
        return None
    values: dict[str, Any] = {field.name: entry.get(field.name) for field in fields(PartTimes)}
    age_s: Any = now_s - entry["measured_at_s"] if _is_amount(entry.get("measured_at_s")) else -1.0
    if not all(map(_is_amount, values.values())) or not 0 <= age_s < _MAX_AGE_S:
        return None
    times = PartTimes(**values)
    return times if times.layer_forward_s + times.layer_backward_s > 0 else None


def _is_amount(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # pyright: ignore[reportOperatorIssue]


def _read(file: Path) -> dict[str, object]:
    try:
        if file.stat().st_size > _MAX_BYTES:
            return {}
        entries = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(file: Path, entries: dict[str, object]) -> None:
    """Replace the file whole, with the newest entries; another process's at the same time may be lost, never torn."""
    kept = dict(list(entries.items())[-_MAX_ENTRIES:])
    mine = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(json.dumps(kept))
        mine.replace(file)
    except OSError:
        with suppress(OSError):
            mine.unlink()
