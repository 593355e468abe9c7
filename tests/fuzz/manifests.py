"""Checkpoints' manifests as a store may hold them: read in full, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator

from actors.errors import CheckpointCorrupt, CheckpointForeign
from actors.model.spec import ModelSpec, RopeScaling
from actors.settings import BatchSpec
from actors.shards import file_name, unit_names
from actors.spec import SavedFile
from orchestrator.checkpoints import Manifest, parse_manifest
from orchestrator.lifecycle import History
from tests.fuzz.choices import Choices, edit

_SHA256 = "0123456789abcdef" * 4


def _manifest() -> Manifest:
    model = ModelSpec(num_layers=2, rope_scaling=RopeScaling(), init_from="models/x")
    return Manifest(
        run="demo",
        step=120,
        generation=1,
        files=tuple(
            SavedFile(name=file_name(unit, "none"), size_bytes=4, sha256=_SHA256)
            for unit in unit_names(model.num_layers)
        ),
        model=model,
        batch=BatchSpec(),
        data_sha256=_SHA256,
        document_mask=True,
        seed=7,
        tokens_trained=1 << 20,
        history=History(recent_losses=(2.5, 0.1), recent_norms=(1.0, 3.0), num_skipped=1),
        dollars=0.25,
        config="run: demo\n",
        config_sha256=_SHA256,
        wandb_id="abc123",
    )


_GOOD = _manifest().to_json()


def check(data: bytes) -> None:
    """Read one manifest: raw bytes, or a good one edited."""
    choices = Choices(data)
    is_raw = choices.number() % 2
    document = choices.rest() if is_raw else json.dumps(edit(json.loads(_GOOD), choices)).encode()
    try:
        manifest = parse_manifest(document)
    except (CheckpointCorrupt, CheckpointForeign) as error:
        # What it says ends on a console.
        str(error).encode()
        return
    assert parse_manifest(manifest.to_json()) == manifest
    assert len(manifest.files_by_name) == manifest.model.num_layers + 2
    assert manifest.checkpoint.isascii()


def seeds() -> Iterator[bytes]:
    """Yield a good manifest, raw and edited at each key."""
    yield b"\1" + _GOOD
    yield b"\0\0"
    for key in range(len(json.loads(_GOOD))):
        yield bytes([0, 1, 4, key, 0, 4])
        yield bytes([0, 1, 4, key, 4, 1, 0, 9])
        yield bytes([0, 1, 2, key])
        yield bytes([0, 1, 4, key, 1, 3]) + b"abc"
