"""The flow of the package: imports go one way, from room to room and inside a room, and the library names no script.

`docs/architecture.md` draws the same order.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dylora_moe"
# Each level may import from those before it; what shares a level knows nothing of its neighbours.
LEVELS = (
    {"constants", "errors"},
    {"auto"},
    {"system", "store", "data"},
    {"base", "ops", "reporting"},
    {"pretrained"},
    {"mixture"},
    {"skills"},
    {"distributed"},
    {"stages"},
    {"checkpoint"},
    {"sharing"},
    {"api"},
    {"training", "editing", "serving"},
    {"validation"},
    {"cli"},
    {"__init__", "__main__"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
# May a module be imported without torch? What the command line and the commit protocol are made of.
TORCH_FREE_ROOMS = {"constants", "errors", "system", "store", "data", "reporting"}
TORCH = {"torch", "transformers", "peft", "accelerate"}


@functools.cache
def modules(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """Module, such as "store.files", to its syntax tree."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] != "__init__" or len(parts) == 1:
            found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(module: str, tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of the project that a module imports, at its head or inside a function, for types or to run."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parents = module.split(".")[: -node.level]
            source = ".".join([*parents, *([node.module] if node.module else [])])
        elif node.module == "dylora_moe" or (node.module or "").startswith("dylora_moe."):
            source = node.module.removeprefix("dylora_moe").removeprefix(".")
        else:
            continue
        for alias in node.names:
            full = f"{source}.{alias.name}".removeprefix(".")
            found.add(full if full in known else source or "__init__")
    return found


def others_imported(tree: ast.AST) -> set[str]:
    """The top-level names of what else a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    return {module: imported(module, tree, set(trees)) - {module} for module, tree in trees.items()}


def against_the_flow(arrows: dict[str, set[str]]) -> list[str]:
    def level(module: str) -> int:
        return LEVEL_OF[module.split(".")[0]]

    problems = []
    for module, targets in sorted(arrows.items()):
        for target in sorted(targets):
            rooms = module.split(".")[0], target.split(".")[0]
            if target != "__init__" and rooms[0] != rooms[1] and level(target) >= level(module):
                problems.append(f"{module} imports {target}")
    return problems


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, in a row; empty where there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    for module in sorted(arrows):
        if module != "__init__" and (found := visit(module, [])):
            return found
    return []


def test_imports_follow_the_flow():
    assert against_the_flow(graph(modules())) == []


def test_there_is_no_circle():
    assert circle(graph(modules())) == []


def test_the_library_imports_no_script_and_uses_torch_only_where_it_may():
    problems = []
    for module, tree in modules().items():
        others = others_imported(tree)
        problems += [f"{module} imports {name}" for name in others & SCRIPTS]
        if module.split(".")[0] in TORCH_FREE_ROOMS:
            problems += [f"{module} imports {name}" for name in others & TORCH]
    assert problems == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from ..checkpoint.verify import verify", "store.files imports checkpoint.verify"),
        ("def f():\n    from dylora_moe.training import run", "store.files imports training.run"),
        ("from ..data import documents", "store.files imports data.documents"),
        ("from ..errors import UsageError", None),
        ("from . import lock", None),
    ],
)
def test_what_goes_against_the_flow_is_seen(source, problem):
    trees = modules() | {"store.files": ast.parse(source), "training.run": ast.parse("")}
    found = against_the_flow({"store.files": graph(trees)["store.files"]})
    assert found == ([problem] if problem else [])


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_names_in_the_documentation_are_in_the_code():
    """docs/architecture.md and CONTRIBUTING.md name files and definitions that are there."""
    defined = {
        node.name
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("## The journey of a batch", 1)[1]
    quoted = re.findall(r"`([^`]+)`", text)
    files = [name for name in quoted if name.endswith(".py")]
    names = [part for name in quoted if re.fullmatch(r"[A-Za-z_.]+", name) for part in name.split(".")]
    names = [name for name in names if name not in files]
    assert len(files) > 15 and len(names) > 20
    assert [name for name in files if not (PACKAGE / name).is_file()] == []
    known = defined | {"config", "html", "json", "lm_loss", "loss", "manifest", "results"}
    assert [name for name in names if name not in known and name != "py"] == []
    told = re.findall(r"`((?:\w+/)+|\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    places = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir()), ROOT, ROOT / "tests"]
    assert [name for name in told if not any((place / name).exists() for place in places)] == []
