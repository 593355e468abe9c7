"""The verbs: parse, call, print. Exit code 0 when done, 2 for the user's errors, 1 for the system's.

Each verb imports what it needs when it runs: `--help` is instant, and Ray is loaded after its environment is set.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from actors.errors import IsthmusError, UserError
from orchestrator.complaint import complain, drop_output
from orchestrator.environment import prepare_environment

if TYPE_CHECKING:
    from actors.fleet_spec import Fleet
    from orchestrator.config import RunConfig

# Figures of `python -m bench.quality`.
_CODECS = """

codecs: wire.forward= and wire.backward=, or for one link wire.links.0-1=FORWARD/BACKWARD
  none, bf16                     32 or 16 bits an element
  q8                             8.125 bits; learns as none does; what is used where nothing is set
  backward hq4-stochastic        4.125 bits; about 0.2% more loss
  forward hq4 (or q4)            4.125 bits; 3% more loss after 320 steps, and growing: where no other fits the link
  docs/quality.md says how this was measured"""
_OVERLAYS = "*.yaml files, merged left to right, then a.b=c"
_PREPARE_EXAMPLE = "data prepare 'corpus/*.jsonl.gz' --out data/corpus --vocab-size 32000"
_INTERRUPTED = 130
# What a table may take where the output is no terminal.
_PIPE_WIDTH = 180


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors are one line and a remedy."""
    arguments = _parse(argv)
    # A pipe has no width of its own: a line is never folded. A path may look like markup, so there is none.
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal else _PIPE_WIDTH
    console = Console(highlight=False, markup=False, soft_wrap=not is_terminal, width=width)
    prepare_environment(getattr(arguments, "address", None))
    try:
        return arguments.run(arguments, console)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (IsthmusError, OSError) as error:
        if os.environ.get("ISTHMUS_TRACEBACK"):
            raise
        if isinstance(error, IsthmusError):
            return complain(error.message, error.remedy, error.exit_code)
        drop_output()
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return complain(named, "see that it is there, may be used, and has room; ISTHMUS_TRACEBACK=1 says where", 1)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no words after an option that stands among them: train a.yaml --address auto b.c=1
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest
    return arguments


class _Version(argparse.Action):
    """Prints the version when asked, and not before: looking it up takes a moment."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            found = version("isthmus")
        except PackageNotFoundError:
            found = "(not installed: running from its source)"
        print(f"isthmus {found}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="isthmus",
        description="Train one language model on GPUs in many places.",
        epilog="`isthmus VERB --help` has a verb's options and an example; begin with `isthmus demo`. "
        "ISTHMUS_TRACEBACK=1 shows where an error came from.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version and exit"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(name: str, run: Callable[[argparse.Namespace, Console], int], text: str, example: str):
        verb = verbs.add_parser(name, help=text, **_page(text, example))
        verb.set_defaults(run=run)
        return verb

    demo = add("demo", _demo, "prepare data, train a small model in 4 stages here, sample from it", "demo")
    demo.add_argument("words", nargs="*", metavar="a.b=c", help="changes to conf/demo.yaml")

    for name, run, text, example in (
        ("train", _train, "start a run, or go on with the one of that name", "train conf/demo.yaml train.steps=240"),
        ("plan", _plan, "probe the fleet and print the plan, without training", "plan conf/demo.yaml fleet.nodes=2"),
        ("baseline", _baseline, "run the same recipe centralised, through Ray Train", "baseline conf/demo.yaml"),
    ):
        verb = add(name, run, text, example + (_CODECS if name != "baseline" else ""))
        verb.add_argument("words", nargs="+" if name != "plan" else "*", metavar="CONFIG", help=_OVERLAYS)
        _add_address(verb, "a running Ray cluster, or 'auto'; else this machine (default: RAY_ADDRESS)")
        if name == "plan":
            verb.add_argument(
                "--fleet", type=Path, help="a fleet file to plan for, without hardware (docs/fleet-file.md)"
            )

    data_text = "prepare: text to token shards"
    data = verbs.add_parser("data", help=data_text, **_page(data_text, _PREPARE_EXAMPLE))
    _add_prepare(data.add_subparsers(required=True, metavar="prepare"))

    doctor = add(
        "doctor",
        _doctor,
        "check this machine, a cluster, a store, data: pass or fail, with the remedy",
        "doctor --store s3://bucket/runs --data data/python-stdlib",
    )
    _add_address(doctor, "also check this Ray cluster, node by node (default: RAY_ADDRESS)")
    doctor.add_argument("--store", metavar="URL", help="also check this folder or s3://bucket/prefix")
    doctor.add_argument("--data", metavar="PATH", help="also check this prepared data, shard by shard")

    status = add("status", _status, "what is running: stages, links, loss, tokens/s, bytes, money", "status demo")
    status.add_argument("name", nargs="?", help="a run, by name or folder; without it, all of them")
    status.add_argument("--runs-dir", default="runs", type=Path)

    export = add("export", _export, "write a trained run as a Hugging Face folder", "export runs/demo out/demo")
    _add_run(export)
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")

    generate = add(
        "generate", _generate, "sample from a run's newest checkpoint", "generate runs/demo --prompt 'class '"
    )
    _add_run(generate)
    generate.add_argument("--prompt", default="", help="what the sample begins with")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    generate.add_argument("--top-k", type=int, default=50, help="sample from this many of the likeliest tokens")
    generate.add_argument("--top-p", type=float, default=0.95, help="... that together are this likely")
    generate.add_argument("--seed", type=int, default=1, help="the same seed, the same sample")

    simulate = add(
        "simulate",
        _simulate,
        "play a plan, or a fleet whose nodes come and go, without hardware",
        "simulate runs/demo/plan.json --steps 3",
    )
    simulate.add_argument("source", type=Path, metavar="FLEET_OR_PLAN", help="plan.json, or fleet.json to plan for")
    simulate.add_argument("words", nargs="*", metavar="CONFIG", help=f"{_OVERLAYS}; or config.yaml beside the plan")
    simulate.add_argument("--steps", type=int, default=1, help="how many steps to play where no node comes or goes")
    simulate.add_argument("--spread", type=float, default=0.0, help="of compute times: 0.1 for about 10%% (lognormal)")
    simulate.add_argument("--trace", type=Path, help="a spot trace: when nodes come and go")
    simulate.add_argument(
        "--hours", type=float, help="with --trace, at most; without, lives drawn from losses_per_hour"
    )
    simulate.add_argument("--recovery", choices=("rollback", "step", "microbatches"), default="rollback")
    simulate.add_argument("--seed", type=int, default=1, help="the same seed, the same simulation")
    simulate.add_argument("--out", type=Path, default=Path("runs/simulated"), help="the folder to write")

    report = add(
        "report", _report, "one page: curves, timeline, links, cost, and the baseline beside them", "report runs/demo"
    )
    _add_run(report)
    report.add_argument("--baseline", type=Path, help="the baseline's folder; RUN-baseline where there is one")
    report.add_argument("--out", type=Path, help="where the page goes; RUN/report.html")
    return parser


def _add_prepare(verbs: Any) -> None:
    """Add `data prepare`; the defaults of most of its options are those of `actors.prepare.prepare`."""
    text = "text, JSONL or Parquet to hashed token shards"
    verb = verbs.add_parser("prepare", help=text, **_page(text, _PREPARE_EXAMPLE))
    verb.set_defaults(run=_prepare)
    verb.add_argument("inputs", nargs="+", help="files, folders, globs, s3:// prefixes, or python-stdlib")
    verb.add_argument("--out", required=True, help="a folder, or s3://bucket/prefix")
    verb.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; as many as cores")
    verb.add_argument("--force", action="store_true", help="replace other data in --out")

    def add(flag: str, kind: Callable[[str], Any], text: str) -> None:
        verb.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)

    add("--vocab-size", int, "how many tokens the tokenizer that is trained knows")
    add("--tokenizer", Path, "a tokenizer.json to use instead of training one")
    add("--eos", str, "that tokenizer's end-of-document token, where its name is unusual")
    add("--text-key", str, "the JSONL key or Parquet column that holds the text")
    add("--val-fraction", float, "the share of documents that is held out")
    add("--shard-tokens", int, "how many tokens a shard holds")
    add("--train-bytes", int, "how much of the text the tokenizer is trained on")


def _add_address(verb: argparse.ArgumentParser, text: str) -> None:
    verb.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help=text)


def _add_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, such as runs/demo")


def _page(text: str, example: str) -> dict[str, Any]:
    """Return what frames a verb's help; raw, so that an example stays one line to copy."""
    return {
        "description": f"{text[0].upper()}{text[1:]}.",
        "epilog": f"example:\n  isthmus {example}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _demo(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.demo import run_demo
    from orchestrator.interrupt import catch_interrupts

    with catch_interrupts(lambda: _announce_stop(console)) as interrupted:
        return run_demo(arguments.words, console, interrupted)


def _train(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.config import load_config
    from orchestrator.controller import train
    from orchestrator.interrupt import catch_interrupts
    from orchestrator.report import where_text

    config = load_config(arguments.words)
    with catch_interrupts(lambda: _announce_stop(console)) as interrupted:
        result = train(config, address=arguments.address, console=console, interrupted=interrupted)
    if where := where_text(result.folder, is_last_enough=True):
        console.print(where, highlight=False, markup=False, soft_wrap=True)
    if not result.finished:
        console.print(f"saved at step {result.step}; the same command goes on from there")
    return 0


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.config import load_config
    from orchestrator.planview import render_plan
    from orchestrator.recipe import keep_plan, plan_ahead, resolve

    config = resolve(load_config(arguments.words))
    planned = plan_ahead(config, _fleet(arguments, config))
    console.print(render_plan(planned.plan, planned.fleet))
    console.print(f"saved in {keep_plan(planned)}")
    return 0


def _fleet(arguments: argparse.Namespace, config: RunConfig) -> Fleet:
    """Return the fleet of the file that was named, else what probing the nodes says."""
    from orchestrator.fleet import open_fleet
    from orchestrator.fleetfile import load_fleet
    from orchestrator.recipe import probe_fleet, workload

    if arguments.fleet is not None:
        return load_fleet(arguments.fleet, workload(config), config.plan.batches(config.batch))
    with open_fleet(config.fleet, arguments.address, f"{config.name}-plan", config.timeouts) as crew:
        return probe_fleet(config, crew)


def _baseline(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.baseline import train_baseline
    from orchestrator.config import load_config

    folder = train_baseline(load_config(arguments.words), address=arguments.address, console=console)
    console.print(f"the baseline's run folder is {folder}")
    return 0


def _prepare(arguments: argparse.Namespace, console: Console) -> int:
    from rich.progress import Progress

    from actors.prepare import prepare

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "inputs", "out")}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenising", total=None)
        manifest = prepare(
            arguments.inputs,
            arguments.out,
            **options,
            progress=lambda done, total: bar.update(task, completed=done, total=total or None),
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

    with console.status("looking; this takes less than a minute"):
        findings = examine(address=arguments.address, store_url=arguments.store, data_path=arguments.data)
    console.print(render(findings))
    return 0 if all(finding.passed for finding in findings) else 1


def _status(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.status import list_status, read_status, render, render_list

    if arguments.name is None:
        console.print(render_list(list_status(arguments.runs_dir), time.time()))
    else:
        named: Path = arguments.runs_dir / arguments.name
        is_folder = os.sep in arguments.name and not named.is_dir()
        console.print(render(read_status(Path(arguments.name) if is_folder else named), time.time()))
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
    console.print(text)
    return 0


def _simulate(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.simulate import open_scene, play_run, play_steps, trace_for
    from orchestrator.simulator.outcome import RunRules
    from orchestrator.simview import render_run, render_step

    scene = open_scene(arguments.source, arguments.words)
    step_tokens = scene.config.batch.step_tokens
    if arguments.trace is None and arguments.hours is None:
        step = play_steps(scene, arguments.steps, arguments.seed, arguments.spread, arguments.out)
        console.print(render_step(step, scene.node_names, step_tokens))
    else:
        trace = trace_for(scene, arguments.trace, arguments.hours, arguments.seed)
        run = play_run(scene, trace, RunRules(recovery=arguments.recovery), arguments.out)
        console.print(render_run(run, step_tokens))
    console.print(f"written to {arguments.out}; see it with `isthmus report {arguments.out}`")
    return 0


def _report(arguments: argparse.Namespace, console: Console) -> int:
    from orchestrator.report import summary_text, trace_path, where_text, write_report
    from orchestrator.runfolder import BASELINE_SUFFIX

    folder: Path = arguments.folder
    beside = folder.with_name(folder.name + BASELINE_SUFFIX)
    baseline = arguments.baseline or (beside if beside.is_dir() else None)
    if baseline is not None and not baseline.is_dir():
        raise UserError(f"there is no baseline in {baseline}", "make one with `isthmus baseline CONFIG`")
    page = write_report(folder, baseline, arguments.out or folder / "report.html")
    console.print(summary_text(folder, baseline))
    if where := where_text(folder):
        console.print(where, highlight=False, markup=False, soft_wrap=True)
    console.print(f"the page is {page}")
    console.print(f"all actions on record are in {trace_path(page)}; open it in chrome://tracing or ui.perfetto.dev")
    return 0


def _announce_stop(console: Console) -> None:
    console.print("stopping: what is committed is saved first; again to stop at once")


if __name__ == "__main__":
    sys.exit(main())
