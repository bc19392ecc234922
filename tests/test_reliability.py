"""docs/reliability.md cannot drift from the tests: its rows are all there, and so is every test that they name."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
ROWS = 54
ROW = re.compile(r"\| (\d+) \| (.+?) \| (.+?) \| (.+) \|")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^`]+)\])?`")
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
NOT_RUN = {"skip", "skipif", "xfail", "slow"}


def rows() -> list[tuple[int, list[tuple[str, str, str]]]]:
    """(number, its tests as (file, test, id in brackets or nothing)) of each row of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [match.groups() for line in lines if (match := ROW.fullmatch(line))]
    return [(int(number), TEST.findall(tests)) for number, _, _, tests in found]


@functools.cache
def functions_of(file: str) -> tuple[dict[str, set[str]], set[str]]:
    """(function -> the names of its marks, every text) of a file of tests."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    marks = {node.name: marks_of(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return marks, texts


def marks_of(function: ast.FunctionDef) -> set[str]:
    """`skipif` of `@pytest.mark.skipif(...)`; what marks some cases alone does not count."""
    decorators = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {d.attr for d in decorators if isinstance(d, ast.Attribute)}


def problem_of(file: str, test: str, case: str) -> str | None:
    """Why this is no test that is run."""
    if not (ROOT / file).is_file():
        return "there is no such file"
    marks, texts = functions_of(file)
    if test not in marks or not test.startswith("test_"):
        return "there is no such test"
    if marks[test] & NOT_RUN:
        return f"is marked {', '.join(sorted(marks[test] & NOT_RUN))}"
    if case and ("parametrize" not in marks[test] or not any(is_case(case, text) for text in texts)):
        return "has no such case"
    return None


def is_case(case: str, text: str) -> bool:
    """Whether a text of the file is the case's name, or a part of it between dashes."""
    return bool(text) and f"-{text}-" in f"-{case}-"


def test_every_row_is_there_and_names_tests_that_are_run():
    found = rows()
    assert [number for number, _ in found] == list(range(1, ROWS + 1))
    assert [number for number, tests in found if not tests] == []
    named = [test for _, tests in found for test in tests]
    problems = [f"{'::'.join(test)}: {problem}" for test in named if (problem := problem_of(*test))]
    assert problems == []


def test_every_file_that_the_page_links_is_there():
    links = LINK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(links) > 3
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (PAGE.parent / link).exists()] == []
    assert "(docs/reliability.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        (("tests/test_nothing.py", "test_x", ""), "there is no such file"),
        (("tests/store/test_publish.py", "test_nothing", ""), "there is no such test"),
        (("tests/store/test_publish.py", "add_strangers", ""), "there is no such test"),
        (("tests/mixture/test_routing.py", "test_compiled_it_computes_the_same", ""), "is marked slow"),
        (("tests/store/test_publish.py", "test_a_fault_at_every_operation_of_a_save", "limit 9"), "has no such case"),
        (("tests/store/test_publish.py", "test_times_play_no_part", "limit 1"), "has no such case"),
        (("tests/store/test_publish.py", "test_a_fault_at_every_operation_of_a_save", "limit 1-kill"), None),
    ],
)
def test_what_is_wrong_with_a_name_is_found(named, problem):
    assert problem_of(*named) == problem
