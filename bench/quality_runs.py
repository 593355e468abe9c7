"""Runs cases in worker processes of one thread each, and keeps each result as soon as it is there.

A case whose result lies in the work folder, of the same settings and the same data, is not run again.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from actors.settings import DataConfig
from actors.token_shards import DataManifest
from bench.quality_cases import Case, Measured

NUM_WORKERS = 2
NICENESS = 10
# Far beyond what a case takes on a busy machine; its worker is then ended.
CASE_DEADLINE_S = 7200


def run_cases(cases: Sequence[Case], data: DataConfig, folder: Path) -> dict[Case, Measured]:
    """Return the result of every case, those of `folder` and those run now.

    BrokenProcessPool where a worker was killed, or took longer than CASE_DEADLINE_S.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data_sha256 = DataManifest.load(data.path).sha256
    results = {case: kept for case in cases if (kept := read_kept(case, data_sha256, folder)) is not None}
    waiting = [case for case in cases if case not in results]
    print(f"{len(cases)} cases, {len(results)} of them kept in {folder}", flush=True)
    began_s = time.monotonic()
    pool = ProcessPoolExecutor(NUM_WORKERS, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        running = {pool.submit(_run_case, case, data): case for case in waiting}
        for future in as_completed(running, timeout=CASE_DEADLINE_S * len(waiting)):
            case = running.pop(future)
            results[case] = future.result()
            keep(case, results[case], data_sha256, folder)
            elapsed_s = time.monotonic() - began_s
            left = sum(other.cost for other in running.values())
            left_s = elapsed_s * left / sum(done.cost for done in waiting if done in results)
            print(
                f"{case.key}: held-out loss {results[case].final_loss:.4f}; {len(results)}/{len(cases)} done in "
                f"{elapsed_s / 60:.0f} min, about {left_s / 60:.0f} min left",
                flush=True,
            )
    finally:
        # After a failure, what waits is not begun.
        pool.shutdown(cancel_futures=True)
    return {case: results[case] for case in cases}


def _start_worker() -> None:
    os.nice(NICENESS)
    torch.set_num_threads(1)


def _run_case(case: Case, data: DataConfig) -> Measured:
    signal.alarm(CASE_DEADLINE_S)
    measured = case.run(data, lambda text: print(f"  {case.key}: {text}", flush=True))
    signal.alarm(0)
    return measured


def _settings(case: Case, data_sha256: str) -> Mapping[str, object]:
    # Through JSON, which knows no tuples, as what is kept went.
    return json.loads(json.dumps({"case": asdict(case), "data_sha256": data_sha256}))


def keep(case: Case, measured: Measured, data_sha256: str, folder: Path) -> None:
    """Write a result with all that it depends on but the code."""
    document = {"settings": _settings(case, data_sha256), "measured": asdict(measured)}
    partial = folder / f"{case.key}.partial"
    partial.write_text(json.dumps(document, indent=1) + "\n")
    # At once or not at all: a file that is there is whole.
    partial.replace(folder / f"{case.key}.json")


def read_kept(case: Case, data_sha256: str, folder: Path) -> Measured | None:
    """Return the result that was kept for the same settings and data, if there is one."""
    path = folder / f"{case.key}.json"
    if not path.exists():
        return None
    document = json.loads(path.read_text())
    return Measured(**document["measured"]) if document["settings"] == _settings(case, data_sha256) else None
