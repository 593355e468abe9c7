"""What a node refuses to measure: a model whose parts alone do not fit."""

import pytest

from actors.errors import PlanError
from actors.model.spec import ModelSpec
from actors.probe import require_probe_memory
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
