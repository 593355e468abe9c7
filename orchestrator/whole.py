"""A whole model from a run's newest checkpoint, in this process: to sample from, or to export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from actors.errors import CheckpointError, UserError
from actors.model.decoder import DecoderStage
from actors.model.huggingface import export
from actors.model.sample import generate
from actors.shards import read_weights, unit_limits
from actors.store import BlobStore, open_store
from actors.token_shards import TOKENIZER, DataManifest
from orchestrator.checkpoints import CheckpointLedger, Manifest
from orchestrator.config import RunConfig, parse_config
from orchestrator.recipe import checkpoint_url
from orchestrator.runfolder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """A run with a whole checkpoint."""

    config: RunConfig
    store: BlobStore
    manifest: Manifest

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight by name, one file of the checkpoint after another."""
        spec, manifest = self.manifest.model, self.manifest
        shapes = DecoderStage(spec, 0, spec.num_layers, device="meta").named_global_parameters()
        for unit, limit in unit_limits(shapes).items():
            yield from read_weights(self.store, manifest.checkpoint, manifest.files_by_name, {unit: limit}).items()

    def tokenizer_bytes(self) -> bytes:
        """Return the tokenizer.json of the data that the run was trained on."""
        return open_store(self.config.data.path).get(TOKENIZER)


def open_trained(run: Path) -> TrainedRun:
    """Return the run in a folder with its newest whole checkpoint; UserError where there is none."""
    folder = RunFolder(run)
    if not folder.config.exists():
        raise UserError(f"there is no run in {run}", "list the runs with `isthmus status`")
    config = parse_config(folder.config.read_text())
    # A run folder may have moved since, with the checkpoints in it.
    store = open_store(checkpoint_url(config) if config.checkpoints.url else str(folder.checkpoints.resolve()))
    bad: list[CheckpointError] = []
    manifest = CheckpointLedger(store).newest_whole(lambda _, error: bad.append(error))
    if manifest is None:
        why = f"; the newest is bad: {bad[0]}" if bad else ""
        raise CheckpointError(f"run {config.name} has no whole checkpoint in {store.url}{why}", "train it further")
    return TrainedRun(config, store, manifest)


def load_model(trained: TrainedRun) -> DecoderStage:
    """Return all layers with their trained weights, on the CPU."""
    spec = trained.manifest.model
    model = DecoderStage(spec, 0, spec.num_layers)
    params = model.named_global_parameters()
    with torch.no_grad():
        for name, tensor in trained.weights():
            params[name].copy_(tensor)
    return model.eval()


def sample_text(
    trained: TrainedRun, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> str:
    """Return the prompt and what the model writes after it, up to the end of a document."""
    tokenizer = Tokenizer.from_buffer(trained.tokenizer_bytes())
    eos_id = DataManifest.load(trained.config.data.path).eos_id
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [eos_id]
    ids_T = generate(
        load_model(trained),
        torch.tensor(prompt_ids),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos=eos_id,
    )
    return tokenizer.decode(ids_T.tolist())


def export_run(trained: TrainedRun, out: Path, dtype: torch.dtype, scratch: Path) -> None:
    """Write a Hugging Face folder that transformers loads; `scratch` is a folder for the tokenizer's copy."""
    tokenizer_path = scratch / TOKENIZER
    tokenizer_path.write_bytes(trained.tokenizer_bytes())
    export(
        out,
        trained.manifest.model,
        trained.weights(),
        dtype=dtype,
        tokenizer_path=tokenizer_path,
        eos=DataManifest.load(trained.config.data.path).eos_id,
    )
