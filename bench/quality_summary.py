"""What the results of all cases say together: the document that is saved, and that the report is written from.

PURE. The document holds values that JSON knows; losses are held-out ones in nats a token, in the order of seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, TypeVar

import torch

from actors.codecs import CODECS
from actors.fragment import fragment_of
from actors.model.decoder import DecoderStage
from actors.model.spec import ModelSpec
from actors.token_shards import DataManifest
from bench.quality_cases import (
    BASELINE_PAIR,
    CHECK_SEED,
    DENSE,
    DENSE_MEAN,
    EVAL_BATCH,
    Case,
    Measured,
    OuterCase,
    PipelineCase,
)
from bench.quality_statistics import differences

_AnyCase = TypeVar("_AnyCase", PipelineCase, OuterCase)


def summarise(results: Mapping[Case, Measured], manifest: DataManifest) -> dict[str, Any]:
    """Return losses, differences and intervals of both parts, and the recipes."""
    pairs = [case for case in results if isinstance(case, PipelineCase)]
    outer = [case for case in results if isinstance(case, OuterCase) and case.seed != CHECK_SEED]
    checks = [case for case in results if isinstance(case, OuterCase) and case.seed == CHECK_SEED]
    return {
        "data": {
            "source": manifest.source,
            "sha256": manifest.sha256,
            "vocab_size": manifest.vocab_size,
            "train_tokens": manifest.num_tokens("train"),
            "unigram_loss": manifest.unigram_loss,
        },
        "pipeline": _pipeline(pairs, results),
        "outer": _outer(outer, results),
        "outer_lr_check": {
            "seed": CHECK_SEED,
            "losses": {f"{case.method.lr:g}": results[case].final_loss for case in checks},
        },
    }


def _pipeline(cases: Sequence[PipelineCase], results: Mapping[Case, Measured]) -> dict[str, Any]:
    recipe = cases[0].recipe
    num_elements = recipe.batch.microbatch_tokens * recipe.model.hidden_size
    methods = _methods(cases, results)
    compared = differences({name: method["losses"] for name, method in methods.items()}, "/".join(BASELINE_PAIR))
    for name, of_seeds in _by_name(cases).items():
        first = of_seeds[0]
        methods[name] |= {
            "times_less_than_bf16": {
                "forward": 2 * num_elements / CODECS[first.forward].size_bytes(num_elements, torch.float32),
                "backward": 2 * num_elements / CODECS[first.backward].size_bytes(num_elements, torch.float32),
            },
            "codec_errors": _mean_errors([results[case].codec_errors for case in of_seeds]),
            "difference": asdict(compared[name]) if name in compared else None,
        }
    return {**_settings(cases), "num_boundaries": len(recipe.split) - 1, "methods": methods}


def _outer(cases: Sequence[OuterCase], results: Mapping[Case, Measured]) -> dict[str, Any]:
    first = cases[0]
    num_elements = _fragment_elements(first.recipe.model)
    methods = _methods(cases, results)
    losses = {name: method["losses"] for name, method in methods.items()}
    to_dense, to_mean = differences(losses, DENSE.name), differences(losses, DENSE_MEAN.name)
    for name, of_seeds in _by_name(cases).items():
        method = of_seeds[0].method
        methods[name] |= {
            "method": asdict(method),
            "times_less_than_float32": (
                4 * num_elements / CODECS[method.codec].size_bytes(num_elements, torch.float32)
            ),
            "difference": asdict(to_dense[name]) if name in to_dense else None,
            "difference_to_mean": asdict(to_mean[name]) if name in to_mean else None,
        }
    return {
        **_settings(cases),
        "num_replicas": first.num_replicas,
        "num_local_steps": first.num_local_steps,
        "num_rounds": first.num_rounds,
        "methods": methods,
    }


def _settings(cases: Sequence[Case]) -> dict[str, Any]:
    recipe = cases[0].recipe
    return {
        "recipe": asdict(recipe),
        "num_params": recipe.model.num_params,
        "held_out_tokens": recipe.num_final_microbatches * EVAL_BATCH.microbatch_tokens,
        "seeds": sorted({case.seed for case in cases}),
    }


def _methods(cases: Sequence[_AnyCase], results: Mapping[Case, Measured]) -> dict[str, dict[str, Any]]:
    """Return what each method's runs showed, seed by seed."""
    return {
        name: {
            "losses": [results[case].final_loss for case in of_seeds],
            "curves": [results[case].curve for case in of_seeds],
            "skipped_steps": [results[case].num_skipped for case in of_seeds],
        }
        for name, of_seeds in _by_name(cases).items()
    }


def _by_name(cases: Iterable[_AnyCase]) -> dict[str, list[_AnyCase]]:
    """Return the cases of each method in the order of seeds."""
    by_name: dict[str, list[_AnyCase]] = {}
    for case in sorted(cases, key=lambda case: case.seed):
        by_name.setdefault(case.name, []).append(case)
    return by_name


def _mean_errors(by_seed: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        kind: {figure: fmean(errors[kind][figure] for errors in by_seed) for figure in figures}
        for kind, figures in by_seed[0].items()
    }


def _fragment_elements(model: ModelSpec) -> int:
    whole = DecoderStage(model, 0, model.num_layers, device="meta")
    return fragment_of(whole.named_global_parameters()).num_elements
