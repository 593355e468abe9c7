"""A stage's part of a checkpoint: bit-exact over any split, and verified before it is parsed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from actors.errors import CheckpointCorrupt, CheckpointError
from actors.packing import hold_unit, pack_unit
from actors.shards import (
    read_units,
    read_weights,
    restore,
    snapshot,
    unit_limits,
    unit_names,
    unit_of,
)
from actors.spec import SavedFile
from actors.store import LocalStore
from tests.shard_stages import (
    VOCAB,
    WIDTH,
    Stage,
    assert_bit_equal,
    load,
    saved,
    state,
    tensors_of,
    trained,
)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.3.self_attn.q_proj.weight", "layer-00003"),
        ("model.layers.12345.mlp.up_proj.weight", "layer-12345"),
        ("model.norm.weight", "head"),
        ("lm_head.weight", "head"),
    ],
)
def test_each_parameter_has_its_unit(name: str, unit: str):
    assert unit_of(name) == unit


@pytest.mark.parametrize(
    "name", ["weight", "model.layers.x.weight", "model.layers.-1.weight", "xmodel.norm.weight", ""]
)
def test_a_strange_parameter_has_none(name: str):
    with pytest.raises(CheckpointError, match="belongs to no part"):
        unit_of(name)


def test_the_units_of_a_model_are_in_its_order():
    assert unit_names(2) == ("embedding", "layer-00000", "layer-00001", "head")


@pytest.mark.parametrize("cuts", [[(0, 5)], [(0, 1), (1, 3), (3, 5)], [(0, 4), (4, 5)]])
def test_any_stages_read_what_other_stages_wrote(tmp_path, cuts: list[tuple[int, int]]):
    writers = trained((0, 2), (2, 5))
    files = saved(store := LocalStore(tmp_path), writers)
    readers = [Stage(*cut, seed=99) for cut in cuts]
    for stage in readers:
        load(store, files, stage)
    assert_bit_equal(state(readers), state(writers))


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    (writer,) = trained((0, 5))
    files = saved(store := LocalStore(tmp_path), [writer])
    reader = Stage(0, 5, seed=99)
    load(store, files, reader)
    writer.train_step(12)
    reader.train_step(12)
    assert_bit_equal(state([reader]), state([writer]))


def test_the_same_state_gives_the_same_files_whatever_the_split(tmp_path):
    (whole,) = trained((0, 5))
    files = saved(store := LocalStore(tmp_path / "a"), [whole])
    parts = [Stage(0, 2), Stage(2, 5)]
    for stage in parts:
        load(store, files, stage)
    assert saved(LocalStore(tmp_path / "b"), parts) == files


def test_a_snapshot_does_not_change_when_training_goes_on():
    (stage,) = trained((0, 5))
    before = state([stage])
    copy = {name: tensor.clone() for name, tensor in before.items()}
    stage.train_step(12)
    assert_bit_equal(before, copy)


def test_what_was_restored_is_not_shared_with_what_was_read(tmp_path):
    (writer,) = trained((0, 5))
    units = tensors_of(writer)
    reader = Stage(0, 5)
    restore(reader.named, reader.optimizer, units)
    reader.train_step(12)
    assert_bit_equal(
        {name: tensor for unit in units.values() for name, tensor in unit.items()},
        state([writer]),
    )


def test_bfloat16_weights_keep_their_bits(tmp_path):
    stage = Stage(0, 5).to(torch.bfloat16)
    files = saved(store := LocalStore(tmp_path), [stage])
    assert_bit_equal(
        read_weights(store, "step-00000002", files, unit_limits(stage.named)),
        {name: param.detach() for name, param in stage.named.items()},
    )


def test_a_compact_checkpoint_is_the_same_checkpoint(tmp_path):
    (writer,) = trained((0, 5))
    files = saved(store := LocalStore(tmp_path), [writer], "lx")
    assert {Path(name).suffix for name in files} == {".lx"}
    load(store, files, reader := Stage(0, 5, seed=99))
    assert_bit_equal(state([reader]), state([writer]))


def test_stages_may_write_one_checkpoint_in_different_ways(tmp_path):
    writers = trained((0, 2), (2, 5))
    store = LocalStore(tmp_path)
    files = saved(store, writers[:1], "lx") | saved(store, writers[1:], "none")
    load(store, files, reader := Stage(0, 5, seed=99))
    assert_bit_equal(state([reader]), state(writers))


def test_a_compact_checkpoint_of_real_size_is_smaller(tmp_path):
    stage = Stage(0, 5, width=256)
    sizes = [
        sum(file.size_bytes for file in saved(LocalStore(tmp_path), [stage], codec).values())
        for codec in ("none", "lx")
    ]
    assert sizes[1] < 0.87 * sizes[0]


def test_weights_alone_can_be_read_and_restored(tmp_path):
    (writer,) = trained((0, 5))
    files = saved(store := LocalStore(tmp_path), [writer])
    weights = read_weights(store, "step-00000002", files, unit_limits(writer.named))
    assert_bit_equal(weights, {name: param.detach() for name, param in writer.named.items()})
    reader = Stage(0, 5, seed=99)
    restore(reader.named, None, read_units(store, "step-00000002", files, unit_limits(reader.named)))
    assert torch.equal(reader.weights[0], writer.weights[0])
    assert not reader.optimizer.state


def test_a_checkpoint_of_untrained_weights_starts_the_optimizer_afresh(tmp_path):
    files = saved(store := LocalStore(tmp_path), [Stage(0, 5, seed=3)])
    (reader,) = trained((0, 5))
    load(store, files, reader)
    assert_bit_equal(state([reader]), state([Stage(0, 5, seed=3)]))


def test_state_that_the_layout_does_not_hold_is_refused():
    stage = Stage(0, 5)
    stage.optimizer = torch.optim.AdamW(stage.parameters(), amsgrad=True)
    stage.train_step(1)
    with pytest.raises(CheckpointError, match="max_exp_avg_sq"):
        snapshot(stage.named, stage.optimizer)


# Hostile and broken files.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [(truncate, "bytes, not"), (flip_a_byte, "SHA-256 differs"), (Path.unlink, "is missing")],
)
def test_a_harmed_file_is_named_before_it_is_parsed(tmp_path, monkeypatch, harm: Callable[[Path], None], words: str):
    (stage,) = trained((0, 5))
    files = saved(store := LocalStore(tmp_path), [stage])
    harm(tmp_path / "step-00000002" / "layer-00003.safetensors")

    parsed: list[bytes] = []
    load_bytes = safetensors.torch.load
    monkeypatch.setattr(safetensors.torch, "load", lambda data: parsed.append(data) or load_bytes(data))
    with pytest.raises(CheckpointCorrupt, match=rf"step-00000002/layer-00003\.safetensors .*{words}.*: resume"):
        read_units(store, "step-00000002", files, {"layer-00003": 1000})
    assert not parsed


def test_a_unit_that_the_manifest_lacks_is_named(tmp_path):
    with pytest.raises(CheckpointCorrupt, match=r"step-00000002/head .*not in its checkpoint's manifest"):
        read_units(LocalStore(tmp_path), "step-00000002", {}, {"head": 1000})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not safetensors at all",
        b"\xff" * 16,
        len(b'{"a":1}').to_bytes(8, "little") + b'{"a":1}',
        # A dtype that torch has no name for, and offsets past the end.
        *(
            len(header).to_bytes(8, "little") + header + b"\0" * 4
            for header in (
                b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}',
                b'{"w":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}',
            )
        ),
    ],
)
def test_bytes_that_match_their_hash_but_are_no_tensors_are_corrupt(tmp_path, data: bytes):
    store = LocalStore(tmp_path)
    store.put("step-00000002/head.safetensors", data)
    file = SavedFile(name="head.safetensors", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(CheckpointCorrupt, match="not a safetensors file"):
        read_units(store, "step-00000002", {file.name: file}, {"head": 1000})


def compact_file(store: LocalStore, data: bytes) -> dict[str, SavedFile]:
    store.put("step-00000002/head.lx", data)
    return {"head.lx": SavedFile(name="head.lx", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}


ZEROS = {"weight/lm_head.weight": torch.zeros(1000)}


@pytest.mark.parametrize(
    ("pack", "max_bytes", "words"),
    [
        (lambda: b"", 4000, "less than its prefix"),
        (lambda: pack_unit(ZEROS)[:-1], 4000, "its payloads have"),
        (lambda: pack_unit(ZEROS), 3999, "take 4000 bytes, more than the 3999 of this model"),
        (lambda: pack_unit(ZEROS, base=hold_unit(ZEROS)), 4000, "difference to another"),
    ],
    ids=["empty", "cut", "larger than the model", "a difference"],
)
def test_a_compact_file_that_does_not_fit_is_corrupt(tmp_path, pack: Callable[[], bytes], max_bytes: int, words: str):
    files = compact_file(store := LocalStore(tmp_path), pack())
    with pytest.raises(CheckpointCorrupt, match=rf"step-00000002/head\.lx in .* no compact file .*{words}.*: resume"):
        read_units(store, "step-00000002", files, {"head": max_bytes})


def test_no_unit_needs_more_than_its_limit():
    (stage,) = trained((0, 5))
    sizes = {unit: sum(t.nbytes for t in tensors.values()) for unit, tensors in tensors_of(stage).items()}
    assert unit_limits(stage.named) == sizes


def test_misfits_are_all_named_and_nothing_is_changed():
    (writer,) = trained((0, 5))
    units = tensors_of(writer)
    del units["head"]["weight/lm_head.weight"]
    del units["layer-00002"]["exp_avg/model.layers.2.input_layernorm.weight"]
    units["embedding"]["weight/model.embed_tokens.weight"] = torch.zeros(VOCAB, WIDTH + 1)
    norm = "model.norm.weight"
    units["head"][f"exp_avg_sq/{norm}"] = units["head"][f"exp_avg_sq/{norm}"].double()
    reader = Stage(0, 5, seed=99)
    before = state([reader])
    with pytest.raises(CheckpointError) as raised:
        restore(reader.named, reader.optimizer, units)
    text = str(raised.value)
    assert "weight/lm_head.weight is missing" in text
    assert "exp_avg/model.layers.2.input_layernorm.weight is missing" in text
    assert f"embed_tokens.weight is torch.float32 [{VOCAB}, {WIDTH + 1}], not torch.float32 [{VOCAB}, {WIDTH}]" in text
    assert f"exp_avg_sq/{norm} is torch.float64" in text
    assert_bit_equal(state([reader]), before)
