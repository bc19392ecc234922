"""The size of things: a room, a file, a function and a signature can each be taken in at one look."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES_IN_A_ROOM, LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 12, 400, 60, 6
# "file::function" -> why it may have more parameters.
MANY_PARAMETERS = {
    "dylora_moe/api.py::from_base": "the public door: each is a setting by keyword, as in from_pretrained",
    "dylora_moe/api.py::from_pretrained": "as in Transformers",
    "dylora_moe/data/blocks.py::load_blocks": "the settings of the data, by keyword",
}
# Room -> why it may have more files.
MANY_FILES = {"dylora_moe/cli/commands": "one for each command"}


def sources() -> dict[str, str]:
    """Every source file of the package and every script, by its path from the root."""
    paths = [*(ROOT / "dylora_moe").rglob("*.py"), *ROOT.glob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters(function: ast.FunctionDef) -> list[str]:
    """The names of a function's parameters, without self and cls, *args and **kwargs."""
    arguments = function.args
    found = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in found if name not in ("self", "cls")]


def too_large(files: dict[str, str]) -> list[str]:
    problems, rooms = [], {}
    for path, source in files.items():
        folder, _, leaf = path.rpartition("/")
        if leaf != "__init__.py":
            rooms[folder] = rooms.get(folder, 0) + 1
        if (lines := len(source.splitlines())) > LINES_OF_A_FILE:
            problems.append(f"{path}: {lines} lines")
        for function in functions(ast.parse(source)):
            where = f"{path}::{function.name}"
            if (lines := function.end_lineno - function.lineno + 1) > LINES_OF_A_FUNCTION:
                problems.append(f"{where}: {lines} lines")
            if (count := len(parameters(function))) > PARAMETERS and where not in MANY_PARAMETERS:
                problems.append(f"{where}: {count} parameters")
    problems += [
        f"{room}/: {count} files" for room, count in rooms.items() if count > FILES_IN_A_ROOM and room not in MANY_FILES
    ]
    return problems


def test_nothing_is_too_large():
    assert too_large(sources()) == []


def test_every_exception_is_one():
    """What is listed as an exception has more parameters, or it need not be listed."""
    files = sources()
    for where in MANY_PARAMETERS:
        path, _, name = where.partition("::")
        found = [function for function in functions(ast.parse(files[path])) if function.name == name]
        assert any(len(parameters(function)) > PARAMETERS for function in found), where
    for room in MANY_FILES:
        assert len([path for path in files if path.startswith(f"{room}/")]) - 1 > FILES_IN_A_ROOM, room


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1\n" * 401, "a/b.py: 401 lines"),
        ("def f():\n" + "    x = 1\n" * 60, "a/b.py::f: 61 lines"),
        ("def f(self, a, b, c, d, *, e, g, h): ...", "a/b.py::f: 7 parameters"),
        ("def f(self, a, b, c, d, *args, e, g, **kwargs): ...", None),
    ],
)
def test_what_is_too_large_is_seen(source, problem):
    assert too_large({"a/b.py": source}) == ([problem] if problem else [])


def test_a_room_that_is_too_full_is_seen():
    assert too_large({f"a/{name}.py": "" for name in range(13)} | {"a/__init__.py": ""}) == ["a/: 13 files"]
