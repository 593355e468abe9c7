"""What was probed before is taken while it is young and still true."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from actors.fleet_spec import PartTimes
from actors.model.spec import ModelSpec
from actors.probe import fitting_sizes, time_parts
from actors.probe_cache import cached_time_parts
from actors.settings import BatchSpec

SPEC = ModelSpec(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=8, max_positions=8)
BATCH = BatchSpec(seq_len=4, microbatch_size=1)
CPU = torch.device("cpu")


class Clock:
    """Every look at it is one tick later."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s, self.looks = tick_s, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.looks * self.tick_s


def probe(file: Path, clock: Clock, now_s: float = 1000.0, batch: BatchSpec = BATCH) -> PartTimes:
    return cached_time_parts(file, SPEC, batch, CPU, clock, now_s, document_mask=False)


def test_what_is_young_and_still_true_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "isthmus" / "probes.json"
    first, again = Clock(0.01), Clock(0.0101)
    times = probe(file, first)
    assert times.layer_forward_s == pytest.approx(0.01)
    assert probe(file, again, now_s=1000.0 + 3600) == times
    assert again.looks < first.looks / 2


def test_a_slower_machine_an_old_entry_and_another_microbatch_are_measured_anew(tmp_path: Path) -> None:
    file = tmp_path / "probes.json"
    probe(file, Clock(0.01))
    assert probe(file, Clock(0.02)).layer_forward_s == pytest.approx(0.02)
    assert probe(file, Clock(0.0201), now_s=1000.0 + 90_000).layer_forward_s == pytest.approx(0.0201)
    assert probe(file, Clock(0.0202), now_s=500.0).layer_forward_s == pytest.approx(0.0202)
    larger = BatchSpec(seq_len=4, microbatch_size=2)
    assert probe(file, Clock(0.01), batch=larger).microbatch_size == 2
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "[" * 10_000])
def test_a_file_that_is_no_cache_costs_only_the_time_to_measure(tmp_path: Path, text: str) -> None:
    file = tmp_path / "probes.json"
    file.write_text(text)
    assert probe(file, Clock(0.01)).layer_forward_s == pytest.approx(0.01)
    assert probe(tmp_path / "probes.json" / "under-a-file", Clock(0.01)).head_forward_s == pytest.approx(0.01)


@pytest.mark.parametrize("value", ["NaN", "-1", '"x"', "null", "true", "1e999"])
def test_an_entry_with_a_value_that_cannot_be_is_passed_over(tmp_path: Path, value: str) -> None:
    file = tmp_path / "probes.json"
    probe(file, Clock(0.01))
    (key, entry), *_ = json.loads(file.read_text()).items()
    entry["layer_backward_s"] = "VALUE"
    file.write_text(json.dumps({key: entry}).replace('"VALUE"', value))
    assert probe(file, Clock(0.01)).layer_backward_s == pytest.approx(0.01)


def test_the_weights_part_of_a_backward_is_measured() -> None:
    seconds = count()
    spec = ModelSpec(
        vocab_size=64, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=4, ffn_size=1024, max_positions=64
    )
    flat = time_parts(spec, BATCH, CPU, lambda: float(next(seconds)), document_mask=False)
    # By this clock all things take a second, so nothing is left for the weights.
    assert flat.layer_weight_s == 0.0
    calls: list[float] = []

    def clock() -> float:
        calls.append(2.0 * len(calls) if len(calls) < 12 else 24.0 + (len(calls) - 12))
        return calls[-1]

    # The first 4 runs, of 3 looks each, are the whole backward at 2 s, what follows takes 1 s.
    assert time_parts(spec, BATCH, CPU, clock, document_mask=False).layer_weight_s == pytest.approx(1.0)


def test_sizes_that_do_not_fit_are_left_out_but_for_the_runs_own() -> None:
    spec = ModelSpec(vocab_size=50_000)
    batch = BatchSpec(seq_len=256, microbatch_size=4)
    assert fitting_sizes(spec, batch, (1, 2, 4, 64), 2 * 10**9) == (4, 1, 2)
    assert fitting_sizes(spec, batch, (1,), 10**6) == (4,)
