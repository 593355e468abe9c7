"""`isthmus demo`: from nothing to a trained model and a sample of its writing, on this machine alone."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from rich.console import Console

from actors.prepare import prepare
from orchestrator.config import load_config
from orchestrator.controller import train
from orchestrator.whole import open_trained, sample_text

_CONFIG = "conf/demo.yaml"
_PROMPT = "def "


def run_demo(words: list[str], console: Console, interrupted: Callable[[], bool]) -> int:
    """Prepare the demo's data, train, sample, and say what to try next; return the exit code."""
    began_s = time.monotonic()
    config = load_config([_CONFIG, *words])
    console.print(f"preparing tokens from the Python standard library's source in {config.data.path}")
    data = prepare(["python-stdlib"], config.data.path, vocab_size=config.model.vocab_size, workers=os.cpu_count() or 1)
    tokens = data.num_tokens("train") + data.num_tokens("val")
    console.print(f"{tokens:,} tokens of {data.num_documents:,} files, {data.vocab_size:,} byte-level BPE tokens")
    result = train(config, address=None, console=console, interrupted=interrupted)
    if not result.finished:
        console.print(f"stopped at step {result.step}; `isthmus demo` goes on from there")
        return 0
    assert result.val_loss is not None
    console.print(
        f"\nvalidation loss {result.val_loss:.3f} nats a token; a unigram model's is {data.unigram_loss:.3f} "
        f"(perplexity {math.exp(result.val_loss):,.0f} against {math.exp(data.unigram_loss):,.0f})"
    )
    sample = sample_text(
        open_trained(result.folder), _PROMPT, max_new_tokens=96, temperature=0.7, top_k=50, top_p=0.95, seed=1
    )
    console.print("a sample of what it writes:\n", style="bold")
    console.print(sample, markup=False, highlight=False)
    console.print(f"\nall in {time.monotonic() - began_s:.0f} s; the run folder is {result.folder}")
    console.print("next: ", style="bold", end="")
    console.print(
        f"isthmus report {result.folder}   |   isthmus generate {result.folder} --prompt 'class '   |   "
        f"isthmus train {_CONFIG} train.steps={2 * config.train.steps}",
        highlight=False,
    )
    return 0
