"""The verbs: parse, call, print. Exit code 0 when done, 2 for the user's errors, 1 for the system's.

Each verb imports what it needs when it runs: `--help` is instant, and Ray is loaded after its environment is set.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from actors.errors import IsthmusError, UserError
from orchestrator.environment import prepare_environment

_OVERLAYS = "*.yaml files, merged left to right, then a.b=c"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors are one line and a remedy."""
    arguments = _parser().parse_args(argv)
    # A pipe has no width of its own: a line is never folded.
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    prepare_environment(getattr(arguments, "address", None))
    try:
        return arguments.run(arguments, console)
    except IsthmusError as error:
        errors = Console(stderr=True, highlight=False, soft_wrap=True)
        errors.print(f"isthmus: {error.message}", style="red", markup=False)
        if error.remedy:
            errors.print(f"  remedy: {error.remedy}", markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="isthmus", description="Train one language model on GPUs in many places.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="prepare data, train a small model in 4 stages here, sample from it")
    demo.add_argument("words", nargs="*", metavar="a.b=c", help="changes to conf/demo.yaml")
    demo.set_defaults(run=_demo)

    for name, run, text in (
        ("train", _train, "start a run, or go on with the one of that name"),
        ("plan", _plan, "probe the fleet and print the plan, without training"),
        ("baseline", _baseline, "run the same recipe centralised, through Ray Train"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("words", nargs="+" if name != "plan" else "*", metavar="CONFIG", help=_OVERLAYS)
        verb.add_argument(
            "--address",
            default=os.environ.get("RAY_ADDRESS"),
            help="a running Ray cluster, or 'auto'; else this machine",
        )
        verb.set_defaults(run=run)

    data = verbs.add_parser("data", help="prepare: text to token shards").add_subparsers(
        required=True, metavar="prepare"
    )
    prepare = data.add_parser("prepare", help="text, JSONL or Parquet to hashed token shards")
    prepare.add_argument("inputs", nargs="+", help="files, folders, globs, s3:// prefixes, or python-stdlib")
    prepare.add_argument("--out", required=True, help="a folder, or s3://bucket/prefix")
    prepare.add_argument("--vocab-size", type=int, default=4096)
    prepare.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of training one")
    prepare.add_argument("--eos", help="that tokenizer's end-of-document token, where its name is unusual")
    prepare.add_argument("--text-key", default="text", help="the JSONL key or Parquet column that holds the text")
    prepare.add_argument("--val-fraction", type=float, default=0.02, help="the share of documents that is held out")
    prepare.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    prepare.add_argument("--force", action="store_true", help="replace other data in --out")
    prepare.set_defaults(run=_prepare)

    doctor = verbs.add_parser("doctor", help="check this machine, a cluster, a store: pass or fail, with the remedy")
    doctor.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="also check this Ray cluster")
    doctor.add_argument("--store", help="also check this folder or s3://bucket/prefix")
    doctor.add_argument("--data", help="also check this prepared data")
    doctor.set_defaults(run=_doctor)

    status = verbs.add_parser("status", help="what is running: stages, links, loss, tokens/s, bytes, money")
    status.add_argument("name", nargs="?", help="a run; without it, all of them")
    status.add_argument("--runs-dir", default="runs", type=Path)
    status.set_defaults(run=_status)

    export = verbs.add_parser("export", help="write a trained run as a Hugging Face folder")
    export.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, such as runs/demo")
    export.add_argument("out", type=Path)
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    export.set_defaults(run=_export)

    generate = verbs.add_parser("generate", help="sample from a run's newest checkpoint")
    generate.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, such as runs/demo")
    generate.add_argument("--prompt", default="")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--top-k", type=int, default=50)
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=1)
    generate.set_defaults(run=_generate)

    report = verbs.add_parser("report", help="one page: curves, timeline, links, cost, and the baseline beside them")
    report.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, such as runs/demo")
    report.add_argument("--baseline", type=Path, help="the baseline's folder; RUN-baseline where there is one")
    report.add_argument("--out", type=Path, help="where the page goes; RUN/report.html")
    report.set_defaults(run=_report)
    return parser


def _demo(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.demo import run_demo
    from orchestrator.interrupt import catch_interrupts

    with catch_interrupts(lambda: _announce_stop(console)) as interrupted:
        return run_demo(arguments.words, console, interrupted)


def _train(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.config import load_config
    from orchestrator.controller import train
    from orchestrator.interrupt import catch_interrupts

    config = load_config(arguments.words)
    with catch_interrupts(lambda: _announce_stop(console)) as interrupted:
        result = train(config, address=arguments.address, console=console, interrupted=interrupted)
    if not result.finished:
        console.print(f"saved at step {result.step}; the same command goes on from there")
    return 0


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.config import load_config
    from orchestrator.controller import plan_fleet, resolve_model, save_plan
    from orchestrator.fleet import open_fleet
    from orchestrator.planview import render_plan
    from orchestrator.runfolder import RunFolder

    config = resolve_model(load_config(arguments.words))
    with open_fleet(config.fleet, arguments.address, f"{config.name}-plan", config.timeouts) as crew:
        fleet, plan = plan_fleet(config, crew)
    folder = RunFolder.open(Path(config.runs_dir), config.name)
    with folder.lock():
        save_plan(folder, plan, fleet)
    console.print(render_plan(plan, fleet))
    console.print(f"saved in {folder.plan}")
    return 0


def _baseline(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.baseline import train_baseline
    from orchestrator.config import load_config

    folder = train_baseline(load_config(arguments.words), address=arguments.address, console=console)
    console.print(f"the baseline's run folder is {folder}")
    return 0


def _prepare(arguments: argparse.Namespace, console: Console) -> int:
    from rich.progress import Progress

    from actors.prepare import prepare

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("tokenising", total=None)
        manifest = prepare(
            arguments.inputs,
            arguments.out,
            vocab_size=arguments.vocab_size,
            tokenizer=arguments.tokenizer,
            eos=arguments.eos,
            text_key=arguments.text_key,
            val_fraction=arguments.val_fraction,
            workers=arguments.workers,
            force=arguments.force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(
        f"{manifest.num_tokens('train'):,} training and {manifest.num_tokens('val'):,} held-out tokens of "
        f"{manifest.num_documents:,} documents in {arguments.out}; vocabulary {manifest.vocab_size:,}, "
        f"unigram loss {manifest.unigram_loss:.3f}"
    )
    console.print(f"train on them with data.path={arguments.out} model.vocab_size={manifest.vocab_size}")
    return 0


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.doctor import examine, render

    findings = examine(address=arguments.address, store_url=arguments.store, data_path=arguments.data)
    console.print(render(findings))
    return 0 if all(finding.passed for finding in findings) else 1


def _status(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.status import list_status, read_status, render, render_list

    if arguments.name is None:
        console.print(render_list(list_status(arguments.runs_dir), time.time()))
    else:
        console.print(render(read_status(arguments.runs_dir / arguments.name), time.time()))
    return 0


def _export(arguments: argparse.Namespace, console: Console) -> int:
    import torch

    from orchestrator.whole import export_run, open_trained

    trained = open_trained(arguments.folder)
    with tempfile.TemporaryDirectory() as scratch:
        export_run(trained, arguments.out, getattr(torch, arguments.dtype), Path(scratch))
    console.print(f"{trained.manifest.checkpoint} of run {trained.config.name} is in {arguments.out}; load it with")
    console.print(f"  transformers.AutoModelForCausalLM.from_pretrained({str(arguments.out)!r})")
    return 0


def _generate(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.whole import open_trained, sample_text

    text = sample_text(
        open_trained(arguments.folder),
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    console.print(text, markup=False)
    return 0


def _report(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.report import summary_text, write_report

    folder: Path = arguments.folder
    beside = folder.with_name(f"{folder.name}-baseline")
    baseline = arguments.baseline or (beside if beside.is_dir() else None)
    if baseline is not None and not baseline.is_dir():
        raise UserError(f"there is no baseline in {baseline}", "make one with `isthmus baseline CONFIG`")
    page = write_report(folder, baseline, arguments.out or folder / "report.html")
    console.print(summary_text(folder, baseline), markup=False)
    console.print(f"the page is {page}")
    return 0


def _announce_stop(console: Console) -> None:
    console.print("stopping: this step is finished and saved first; again to stop at once")


if __name__ == "__main__":
    sys.exit(main())
