"""House rules that a test can hold, over every module of both planes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for folder in ("orchestrator", "actors") for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400
# What would run bytes that came from outside.
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load"}

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="ascii"), str(path))


def calls(tree: ast.Module) -> Iterator[str]:
    return (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_there_are_modules_to_check() -> None:
    assert {ROOT / "actors" / "frame.py", ROOT / "orchestrator" / "cli.py"} <= set(MODULES)


@each_module
def test_a_file_is_short_enough_to_do_one_thing(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES


@each_module
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(parse(path))


@each_module
def test_public_functions_and_classes_have_docstrings(path: Path) -> None:
    defined = (node for node in parse(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    silent = [node.name for node in defined if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert silent == []


@each_module
def test_nothing_runs_bytes_from_outside(path: Path) -> None:
    tree = parse(path)
    assert not FORBIDDEN_IMPORTS & {name.partition(".")[0] for name in imports(tree)}
    assert not FORBIDDEN_CALLS & set(calls(tree))


@each_module
def test_only_the_cli_prints(path: Path) -> None:
    assert path == ROOT / "orchestrator" / "cli.py" or "print" not in set(calls(parse(path)))
