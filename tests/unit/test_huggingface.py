"""Hugging Face folders, judged by `transformers`: the same logits both ways, and typed refusals of the rest."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from actors.errors import DiskFull, ModelError
from actors.model import huggingface
from actors.model.decoder import DecoderStage
from actors.model.huggingface import export, load_weights, read_spec
from actors.model.init import initialise
from actors.model.spec import ModelSpec, RopeScaling

PLAIN = ModelSpec(
    vocab_size=61,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    ffn_size=48,
    max_positions=64,
    rope_theta=7_000.0,
    norm_eps=1e-4,
    # Large enough that logits are of order 1.
    init_std=0.2,
)
GROUPED = replace(PLAIN, num_kv_heads=2)
SCALED = replace(GROUPED, rope_scaling=RopeScaling(factor=4.0, original_max_positions=16))
LOGIT_BOUND = 1e-5


def initialised(spec: ModelSpec) -> DecoderStage:
    stage = DecoderStage(spec, 0, spec.num_layers)
    initialise(stage, seed=3)
    return stage


def export_stage(stage: DecoderStage, folder: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {"dtype": torch.float32, "tokenizer_path": None, "eos": None} | changes
    export(folder, stage.spec, stage.named_global_parameters().items(), **settings)


def some_tokens() -> Tensor:
    return torch.randint(61, (2, 48), generator=torch.Generator().manual_seed(5))


def transformers_logits(model: Any, tokens_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens_BT).logits


def our_logits(stages: list[DecoderStage], tokens_BT: Tensor) -> Tensor:
    hidden = tokens_BT
    with torch.no_grad():
        for stage in stages:
            hidden = stage(hidden)
    return hidden


def saved_llama(folder: Path, *, max_shard_size: str = "1GB", **changes: Any) -> LlamaForCausalLM:
    """Save a small random Llama as transformers does, and return it."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )
    config.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    saved_llama(folder)
    return folder


@pytest.fixture
def copy_of(llama_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for source in llama_folder.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("spec", [PLAIN, GROUPED, SCALED], ids=["plain", "grouped", "scaled"])
@pytest.mark.parametrize("max_shard_bytes", [1_000_000_000, 20_000], ids=["one_file", "sharded"])
def test_transformers_computes_our_logits_from_our_export(
    spec: ModelSpec, max_shard_bytes: int, tmp_path: Path
) -> None:
    stage = initialised(spec)
    export_stage(stage, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    weights = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(weights) > 1) == (max_shard_bytes == 20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected_BTV = transformers_logits(model, some_tokens())
    torch.testing.assert_close(our_logits([stage], some_tokens()), expected_BTV, atol=LOGIT_BOUND, rtol=0)
    assert expected_BTV.std() > 0.5


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_stages_load_what_transformers_saved(max_shard_size: str, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = saved_llama(tmp_path, max_shard_size=max_shard_size, rope_parameters=rope)
    spec = read_spec(tmp_path)
    assert spec.rope_scaling == RopeScaling(original_max_positions=16)
    stages = [DecoderStage(spec, 0, 1), DecoderStage(spec, 1, 4)]
    for stage in stages:
        load_weights(stage, tmp_path)
    expected_BTV = transformers_logits(model, some_tokens())
    torch.testing.assert_close(our_logits(stages, some_tokens()), expected_BTV, atol=LOGIT_BOUND, rtol=0)


def test_rotary_settings_under_their_old_keys_are_read(copy_of: Path) -> None:
    config = json.loads((copy_of / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {
        "type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    (copy_of / "config.json").write_text(json.dumps(config | {"rope_theta": 9.0, "rope_scaling": scaling}))
    spec = read_spec(copy_of)
    assert (spec.rope_theta, spec.rope_scaling) == (9.0, RopeScaling(factor=32.0))
    (copy_of / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert (read_spec(copy_of).rope_theta, read_spec(copy_of).rope_scaling) == (10_000.0, None)


@pytest.mark.parametrize("spec", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_export_and_import_are_inverse(spec: ModelSpec, tmp_path: Path) -> None:
    stage = initialised(spec)
    export_stage(stage, tmp_path / "out")
    read = read_spec(tmp_path / "out")
    assert replace(read, init_from=None, init_std=spec.init_std) == spec
    loaded = DecoderStage(read, 0, 4)
    load_weights(loaded, tmp_path / "out")
    for (name, value), expected in zip(loaded.named_global_parameters().items(), stage.parameters(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exported_and_read_back_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    stage = initialised(PLAIN)
    export_stage(stage, tmp_path / "out", dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    loaded = DecoderStage(PLAIN, 0, 4)
    load_weights(loaded, tmp_path / "out")
    assert loaded.lm_head.weight.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, stage.lm_head.weight.to(dtype).float())


def test_a_tied_head_is_refused_until_untied(tmp_path: Path) -> None:
    model = saved_llama(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"tie_word_embeddings.*model\.untie=true"):
        read_spec(tmp_path)
    spec = read_spec(tmp_path, untie=True)
    stages = [DecoderStage(spec, 0, 2), DecoderStage(spec, 2, 4)]
    for stage in stages:
        load_weights(stage, tmp_path)
    expected_BTV = transformers_logits(model, some_tokens())
    torch.testing.assert_close(our_logits(stages, some_tokens()), expected_BTV, atol=LOGIT_BOUND, rtol=0)
    assert torch.equal(stages[1].lm_head.weight, stages[0].embed_tokens.weight)
    assert stages[1].lm_head.weight.data_ptr() != stages[0].embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"bits": 4}),
        ("head_dim", 16),
        ("tie_word_embeddings", "yes"),
        ("num_hidden_layers", 0),
        ("vocab_size", 1 << 40),
        ("hidden_size", True),
        ("intermediate_size", None),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("inf")),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", []),
        ("rope_theta", 10**400),
    ],
)
def test_what_we_do_not_run_is_refused_by_key(copy_of: Path, key: str, value: Any) -> None:
    changes = {key: value} | ({"rope_parameters": None} if key == "rope_theta" else {})
    edit_json(copy_of / "config.json", **changes)
    with pytest.raises(ModelError, match=f"config.json has {key}") as caught:
        read_spec(copy_of)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_type": "yarn"}, "rope_type"),
        ({"type": "linear"}, "type"),
        ({"rope_type": "llama3"}, "factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "low_freq_factor",
        ),
    ],
)
def test_rotary_settings_that_we_do_not_run_are_refused(copy_of: Path, changes: dict[str, Any], named: str) -> None:
    edit_json(copy_of / "config.json", rope_parameters=changes)
    with pytest.raises(ModelError, match=named):
        read_spec(copy_of)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{", b"[" * 100_000, b" " * (1 << 20) + b"{}"])
def test_a_config_that_is_not_a_small_json_object_is_refused(copy_of: Path, content: bytes) -> None:
    (copy_of / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_spec(copy_of)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent"):
        read_spec(tmp_path / "absent")


def reshape_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]


def drop_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def make_head_integer(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "named"),
    [(reshape_head, "lm_head"), (drop_norm, "model.norm"), (make_head_integer, "lm_head.*I8")],
)
def test_wrong_tensors_are_refused_by_file_and_name(
    copy_of: Path, damage: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    path = copy_of / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    spec = read_spec(copy_of)
    with pytest.raises(ModelError, match=rf"model\.safetensors holds.*{named}"):
        load_weights(DecoderStage(spec, 2, 4), copy_of)
    # The first stage holds none of these tensors, and so reads none of them.
    load_weights(DecoderStage(spec, 0, 2), copy_of)


@pytest.mark.parametrize("size_bytes", [0, 7, 100, 5000])
def test_torn_weights_are_refused(copy_of: Path, size_bytes: int) -> None:
    path = copy_of / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size_bytes])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_weights(DecoderStage(read_spec(copy_of), 0, 4), copy_of)


def test_pickled_weights_are_not_read(copy_of: Path) -> None:
    (copy_of / "model.safetensors").rename(copy_of / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_weights(DecoderStage(read_spec(copy_of), 0, 4), copy_of)


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", 7])
def test_an_index_cannot_lead_out_of_its_folder(copy_of: Path, target: Any) -> None:
    path = copy_of / "model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(path), target)}
    path.rename(copy_of.parent / "model.safetensors")
    (copy_of / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json"):
        load_weights(DecoderStage(read_spec(copy_of), 0, 4), copy_of)


def test_export_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not an empty folder"):
        export_stage(initialised(PLAIN), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    whole = dict(initialised(PLAIN).named_global_parameters())
    del whole["lm_head.weight"]
    settings: dict[str, Any] = {"dtype": torch.float32, "tokenizer_path": None, "eos": None}
    with pytest.raises(ModelError, match=r"lack lm_head\.weight"):
        export(tmp_path / "out", PLAIN, whole.items(), max_shard_bytes=20_000, **settings)
    with pytest.raises(ModelError, match=r"rotary.*surplus"):
        export(tmp_path / "out", PLAIN, [("rotary", torch.zeros(3))], **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_export_larger_than_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = huggingface.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(huggingface.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="out"):
        export_stage(initialised(PLAIN), tmp_path / "out")


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=61, special_tokens=["<end>"])
    tokenizer.train_from_iterator(["a thin strip of land between two seas"], trainer)
    tokenizer.save(str(tmp_path / "given.json"))
    stage = initialised(PLAIN)
    export_stage(stage, tmp_path / "out", tokenizer_path=tmp_path / "given.json", eos=0)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.encode("thin land") == tokenizer.encode("thin land").ids
    assert (loaded.eos_token, loaded.eos_token_id) == ("<end>", 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.generation_config.eos_token_id, model.config.bos_token_id) == (0, None)
    with pytest.raises(ModelError, match="no special token of id 60"):
        export_stage(stage, tmp_path / "other", tokenizer_path=tmp_path / "given.json", eos=60)
