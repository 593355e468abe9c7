"""What a node refuses to measure: a model whose parts alone do not fit."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import PlanError
from actors.model.spec import ModelSpec
from actors.probe import cgroup_free_bytes, require_probe_memory, time_parts
from actors.spec import BatchSpec

LLAMA_8B = ModelSpec(
    vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336, max_positions=8192
)
BATCH = BatchSpec(seq_len=256, microbatch_size=1)


def test_a_model_whose_parts_do_not_fit_is_refused_before_it_is_made() -> None:
    with pytest.raises(PlanError, match=r"needs 12\.\d\d GB to be probed, node-3 has 5\.00 GB free: 7\.\d\d GB short"):
        require_probe_memory(LLAMA_8B, BATCH, 5 * 10**9, "node-3")


def test_a_model_whose_parts_fit_is_not() -> None:
    require_probe_memory(LLAMA_8B, BATCH, 14 * 10**9, "node-3")


def test_reclaimable_file_pages_of_a_container_are_free(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path) is None
    for name, text in (
        ("memory.max", "max\n"),
        ("memory.current", "900\n"),
        ("memory.stat", "anon 300\ninactive_file 500\nactive_file 100\n"),
    ):
        (tmp_path / name).write_text(text)
    assert cgroup_free_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert cgroup_free_bytes(tmp_path) == 600
    (tmp_path / "memory.max").write_text("300\n")
    assert cgroup_free_bytes(tmp_path) == 0


@pytest.mark.parametrize("document_mask", [True, False])
def test_attention_is_timed_with_the_mask_that_training_uses(
    document_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal: list[bool] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, is_causal: bool, **options: Any) -> torch.Tensor:
        causal.append(is_causal)
        return attend(*args, is_causal=is_causal, **options)

    monkeypatch.setattr("actors.model.decoder.functional.scaled_dot_product_attention", spy)
    spec = replace(LLAMA_8B, vocab_size=11, hidden_size=8, num_heads=2, num_kv_heads=1, ffn_size=8, max_positions=8)
    seconds = count()
    time_parts(
        spec,
        BatchSpec(seq_len=4, microbatch_size=1),
        torch.device("cpu"),
        lambda: float(next(seconds)),
        document_mask=document_mask,
    )
    assert set(causal) == {not document_mask}
