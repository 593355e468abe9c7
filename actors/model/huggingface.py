"""Hugging Face folders: read a shape and a stage's weights from one, and write one that `transformers` loads.

Only Llama, which is what `DecoderStage` computes: a config.json that asks for anything else is refused by key.
A folder is outside bytes: JSON is bounded and checked, weights are safetensors only, and the file names in an
index cannot lead out of the folder.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from actors.errors import ConfigError, DiskFull, ModelError
from actors.model.decoder import DecoderStage
from actors.model.spec import ModelSpec, RopeScaling

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 24
MAX_TOKENIZER_BYTES = 1 << 28
# Above any published model's sizes.
MAX_SIZE = 1 << 26
MAX_NUMBER = 1e12
# What transformers takes where a config.json states none, as Llama 1 and 2 did not.
UNSTATED_ROPE_THETA = 10_000.0

SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
# safetensors' names of the types that become float32 without a scale of their own.
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})

ANOTHER_MODEL = "name a folder with a plain Llama model"
ANOTHER_COPY = "download the model again, or name another folder"


def read_spec(folder: Path, *, untie: bool = False) -> ModelSpec:
    """Return the shape of the model in a folder, with `init_from` naming the folder.

    Raises ModelError, naming the key, where config.json cannot be read, asks for anything but a plain Llama, or
    ties the head to the embedding while `untie` is false.
    """
    config = _read_config(folder)
    config.require("model_type", "llama")
    config.require("architectures", ["LlamaForCausalLM"], None)
    config.require("hidden_act", "silu")
    config.require("attention_bias", False, None)
    config.require("mlp_bias", False, None)
    config.require("quantization_config", None)
    if config.is_tied and not untie:
        config.refuse("tie_word_embeddings", "set model.untie=true to train the head as a copy of its own")
    num_heads = config.size("num_attention_heads")
    try:
        rope_theta, rope_scaling = _read_rope(config)
        spec = ModelSpec(
            vocab_size=config.size("vocab_size"),
            hidden_size=config.size("hidden_size"),
            num_layers=config.size("num_hidden_layers"),
            num_heads=num_heads,
            # Unstated before there was grouped-query attention.
            num_kv_heads=config.size("num_key_value_heads") if config.has("num_key_value_heads") else num_heads,
            ffn_size=config.size("intermediate_size"),
            max_positions=config.size("max_position_embeddings"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=config.number("rms_norm_eps"),
            init_from=str(folder),
            untie=untie,
        )
    except ConfigError as error:
        raise ModelError(f"{config.path}: {error.message}", ANOTHER_MODEL) from error
    config.require("head_dim", spec.head_size, None)
    return spec


@torch.no_grad()
def load_weights(stage: DecoderStage, folder: Path) -> None:
    """Fill a stage's parameters from a folder's safetensors: this stage's tensors only, one at a time.

    float64, float32, float16 and bfloat16 all become the parameter's own type. Raises ModelError, naming file and
    tensor, where one is missing, of another shape or type, or unreadable.
    """
    tied = _read_config(folder).is_tied
    parameters = stage.named_global_parameters()
    stored_names = {name: EMBEDDING if tied and name == HEAD else name for name in parameters}
    files = _weight_files(folder, stored_names.values())
    reads: dict[Path, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in parameters.items():
        reads[files[stored_names[name]]].append((stored_names[name], parameter))
    for path, targets in reads.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                held = frozenset(file.keys())
                for name, parameter in targets:
                    if name not in held:
                        raise ModelError(f"{path} holds no tensor {name}", ANOTHER_COPY)
                    stored = file.get_slice(name)
                    _check_stored(path, name, stored.get_shape(), stored.get_dtype(), list(parameter.shape))
                    parameter.copy_(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}", ANOTHER_COPY) from error


def export(
    folder: Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    tokenizer_path: Path | None,
    eos: int | None,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Write a folder that `transformers`' AutoModelForCausalLM and AutoTokenizer load: whole, or not at all.

    `tensors` yields each global parameter once, in any order; one shard of them is held at a time.
    `tokenizer_path` is a tokenizer.json, and `eos` the id of its token that ends a document. Raises ModelError
    where the folder holds anything already or cannot be written, or a tensor is missing, surplus or misshapen;
    DiskFull where its disk has too little space.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not an empty folder", "name another folder, or remove this one")
    companions = {
        CONFIG_FILE: config_values(spec, dtype, eos),
        "generation_config.json": {"bos_token_id": None, "eos_token_id": eos},
    }
    if tokenizer_path is not None:
        companions["tokenizer_config.json"] = _tokenizer_config(tokenizer_path, spec, eos)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        needed_bytes = spec.num_params * dtype.itemsize
        if shutil.disk_usage(folder.parent).free < needed_bytes:
            raise DiskFull(
                f"{folder} needs {needed_bytes / 1e9:.1f} GB, more than its disk has free",
                "free some space, or name a folder on another disk",
            )
        # Built beside the folder, so that the last rename stays within one file system.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            built = Path(scratch) / folder.name
            built.mkdir()
            _write_weights(built, _whole_model(spec, tensors, dtype), max_shard_bytes)
            for name, values in companions.items():
                _write_json(built / name, values)
            if tokenizer_path is not None:
                shutil.copyfile(tokenizer_path, built / TOKENIZER_FILE)
            built.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be written: {error}", "name a folder that you may write to") from error


def config_values(spec: ModelSpec, dtype: torch.dtype, eos: int | None) -> dict[str, Any]:
    """Return what config.json holds; rotary settings and dtype under their names before transformers 5 too."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if spec.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_max_positions,
        }
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": {"rope_theta": spec.rope_theta, **rope},
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if spec.rope_scaling is None else rope,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # Null rather than absent, for which transformers would put ids of its own.
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": None,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """A JSON object of a file, whose values are taken by key, with type and bounds checked; null is absent."""

    path: Path
    values: Mapping[str, Any]

    @property
    def is_tied(self) -> bool:
        self.require("tie_word_embeddings", False, True, None)
        return bool(self.values.get("tie_word_embeddings"))

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, remedy: str) -> NoReturn:
        shown = repr(self.values.get(key))[:80]
        raise ModelError(f"{self.path} has {key}: {shown}, which Isthmus does not run", remedy)

    def require(self, key: str, *allowed: object) -> None:
        if self.values.get(key) not in allowed:
            self.refuse(key, ANOTHER_MODEL)

    def size(self, key: str) -> int:
        value = self.values.get(key)
        # A bool is an int too, and not a size.
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIZE:
            self.refuse(key, ANOTHER_MODEL)
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or not 0 < value <= MAX_NUMBER:
            self.refuse(key, ANOTHER_MODEL)
        return float(value)

    def section(self, key: str) -> _Fields | None:
        if not self.has(key):
            return None
        if not isinstance(self.values[key], dict):
            self.refuse(key, ANOTHER_MODEL)
        return _Fields(path=self.path, values=self.values[key])


def _read_config(folder: Path) -> _Fields:
    path = folder / CONFIG_FILE
    return _Fields(path=path, values=_read_json(path, MAX_CONFIG_BYTES))


def _read_rope(config: _Fields) -> tuple[float, RopeScaling | None]:
    """Return the rotary base and scaling, from transformers 5's one section or the keys before it."""
    # Where both are given, transformers takes the old key.
    rope = config.section("rope_scaling") or config.section("rope_parameters") or config
    holder = rope if rope.has("rope_theta") else config
    theta = holder.number("rope_theta") if holder.has("rope_theta") else UNSTATED_ROPE_THETA
    for fields in (rope, config):
        fields.require("partial_rotary_factor", 1.0, None)
    type_key = "rope_type" if rope.has("rope_type") else "type"
    rope.require(type_key, "default", "llama3", None)
    if rope.values.get(type_key) != "llama3":
        return theta, None
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.size("original_max_position_embeddings"),
    )
    return theta, scaling


def _weight_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the file that should hold each tensor; like transformers, a single file goes before an index."""
    if (folder / WEIGHTS_FILE).is_file():
        return dict.fromkeys(names, folder / WEIGHTS_FILE)
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        raise ModelError(
            f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            "name a folder whose weights are safetensors: formats that can run code on loading are not read",
        )
    weight_map = _read_json(index_path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index_path} has no weight_map", ANOTHER_COPY)
    files: dict[str, Path] = {}
    for name in names:
        file_name = weight_map.get(name)
        if not isinstance(file_name, str):
            raise ModelError(f"{index_path} names no file for the tensor {name}", ANOTHER_COPY)
        if not SHARD_NAME.fullmatch(file_name):
            raise ModelError(f"{index_path} puts {name} into {file_name[:80]!r}, no file of its folder", ANOTHER_COPY)
        files[name] = folder / file_name
    return files


def _check_stored(path: Path, name: str, shape: list[int], dtype: str, expected_shape: list[int]) -> None:
    if shape != expected_shape:
        raise ModelError(f"{path} holds {name} as {shape}, and its model has {expected_shape}", ANOTHER_COPY)
    if dtype not in FLOAT_TYPES:
        raise ModelError(f"{path} holds {name} in {dtype}", "name a copy of the model in float32 or bfloat16")


def _whole_model(
    spec: ModelSpec, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors as they are written, having checked that they are the whole model and no more."""
    expected = DecoderStage(spec, 0, spec.num_layers, device="meta").named_global_parameters()
    for name, tensor in tensors:
        parameter = expected.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            raise ModelError(
                f"{name} of shape {list(tensor.shape)} is surplus or misshapen", "export with the run's own model keys"
            )
        yield name, tensor.detach().to("cpu", dtype).contiguous()
    if expected:
        raise ModelError(f"the weights to export lack {next(iter(expected))}", "export from a whole checkpoint")


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write safetensors shards, with an index where there is more than one."""
    names_of: list[list[str]] = []
    total_bytes = 0
    for shard in _shards(tensors, max_shard_bytes):
        # "pt" is how transformers tells torch's layout.
        save_file(shard, folder / f"{len(names_of)}.unnumbered", metadata={"format": "pt"})
        names_of.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(names_of) == 1:
        (folder / "0.unnumbered").rename(folder / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for k, names in enumerate(names_of):
        file_name = f"model-{k + 1:05d}-of-{len(names_of):05d}.safetensors"
        (folder / f"{k}.unnumbered").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Group tensors, in order, into shards of at most `max_shard_bytes`, or of one larger tensor."""
    shard: dict[str, Tensor] = {}
    shard_bytes = 0
    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
    yield shard


def _tokenizer_config(tokenizer_path: Path, spec: ModelSpec, eos: int | None) -> dict[str, Any]:
    """Return tokenizer_config.json's content, with the text of the `eos` token from the tokenizer's own list."""
    added = _read_json(tokenizer_path, MAX_TOKENIZER_BYTES).get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    text_of = {entry.get("id"): entry.get("content") for entry in entries}
    if eos is not None and not isinstance(text_of.get(eos), str):
        raise ModelError(
            f"{tokenizer_path} has no special token of id {eos}",
            "export with the tokenizer that the data was made with",
        )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.max_positions,
        "clean_up_tokenization_spaces": False,
        "eos_token": text_of.get(eos),
    }


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise ModelError(f"{path} is larger than {max_bytes} bytes", ANOTHER_COPY)
        values = json.loads(raw)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", ANOTHER_COPY) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", ANOTHER_COPY) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object", ANOTHER_COPY)
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
