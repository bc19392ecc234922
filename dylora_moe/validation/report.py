"""How the result of a script is shown: lines for people, JSON for machines, annotations for GitHub Actions."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

from ..checkpoint import formats
from ..constants import MIB
from ..errors import printable
from ..store.whole_files import replace_file
from ..system import command_line

JSON_HELP = "write the result as JSON; - for standard output"
JUNIT_HELP = "write the result as JUnit XML, which CI systems read; - for standard output"
REPORTS = ("json", "junit")  # flags that name a file for the result

RULE = "=" * 60


@dataclass
class CheckResult:
    """What one check has found: problems (if there are none, it has passed), lines for people, and measures.

    Attributes:
        value: what the check hands on to the next one, if anything.
    """

    name: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    value: Any = None

    @property
    def passed(self) -> bool:
        return not self.problems


def timed(check: Callable[..., CheckResult], *args: Any, **kwargs: Any) -> CheckResult:
    """Make a check and note how long it took."""
    started = time.perf_counter()
    result = check(*args, **kwargs)
    result.seconds = time.perf_counter() - started
    return result


@dataclass
class Report:
    """What one run of a script has found."""

    script: str
    model: str | None = None
    weights: str | None = None
    experts: int | None = None
    checkpoint: str | None = None
    total_bytes: int | None = None
    checks: list[CheckResult] = field(default_factory=list)
    error: str | None = None
    exit_code: int = command_line.PASSED
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def passed(self) -> bool:
        return self.error is None and bool(self.checks) and all(check.passed for check in self.checks)

    def as_json(self) -> str:
        """Return the object that --json writes."""
        value = {
            "script": self.script,
            "passed": self.passed,
            "exit_code": self.exit_code,
            "error": self.error,
            "model": self.model,
            "weights": self.weights,
            "experts": self.experts,
            "checkpoint": self.checkpoint,
            "total_bytes": self.total_bytes,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "checks": [
                {
                    "name": check.name,
                    "passed": check.passed,
                    "seconds": round(check.seconds, 3),
                    "problems": check.problems,
                    "measures": finite(check.measures),
                }
                for check in self.checks
            ],
        }
        return json.dumps(value, indent=2) + "\n"

    def as_junit(self) -> str:
        """Return the XML that --junit writes: a test case for each check, and one for an error."""
        failed = sum(not check.passed for check in self.checks)
        counts = {"tests": len(self.checks) + (self.error is not None), "failures": failed}
        counts["errors"] = int(self.error is not None)
        numbers = {name: str(count) for name, count in counts.items()} | {"time": f"{self.seconds:.3f}"}
        suites = ElementTree.Element("testsuites", numbers)
        suite = ElementTree.SubElement(suites, "testsuite", {"name": self.script} | numbers)
        for check in self.checks:
            where = {"classname": self.script, "name": check.name, "time": f"{check.seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", where)
            if not check.passed:
                text = printable("\n".join(check.problems))
                ElementTree.SubElement(case, "failure", {"message": text.splitlines()[0]}).text = text
        if self.error is not None:
            case = ElementTree.SubElement(suite, "testcase", {"classname": self.script, "name": "run"})
            text = printable(self.error)
            ElementTree.SubElement(case, "error", {"message": text.splitlines()[0]}).text = text
        ElementTree.indent(suites)
        return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def finite(value: object) -> object:
    """Replace infinity and NaN, which JSON does not have, by text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Printer:
    """Prints to standard output, or to standard error if standard output is for JSON."""

    def __init__(self, to_stderr: bool = False):
        self.to_stderr = to_stderr

    def __call__(self, line: str = "") -> None:
        with _if_read(sys.stderr if self.to_stderr else sys.stdout) as stream:
            command_line.say(line, stream)

    def error(self, text: str) -> None:
        """Print why the script could not run."""
        with _if_read(sys.stderr) as stream:
            command_line.say(f"{command_line.FAIL_MARK} {text}", stream)

    def annotation(self, title: str, text: str) -> None:
        """Print a failure as an annotation of GitHub Actions."""
        with _if_read(sys.stderr if self.to_stderr else sys.stdout) as stream:
            command_line.annotate(title, text, stream)

    def heading(self, title: str) -> None:
        """Print the heading of a check."""
        self()
        self(RULE)
        self(title)
        self(RULE)

    def result(self, check: CheckResult) -> None:
        """Print the notes and the problems of a check, at most ten of them."""
        for note in check.notes:
            self(f"  {note}")
        for problem in check.problems[:10]:
            self(f"{command_line.FAIL_MARK} {problem}")
        if len(check.problems) > 10:
            self(f"  ... and {len(check.problems) - 10} more")
        self(f"  ({check.seconds:.1f} s)")

    def summary(self, report: Report, success: str) -> None:
        """Print the last lines: each check's verdict, that of all, and the size of the checkpoint."""
        self()
        self(f"Peak memory: {report.peak_memory_bytes / 1e9:.2f} GB, {report.seconds:.1f} s in all")
        self()
        for check in report.checks:
            self(
                f"{command_line.PASS_MARK} PASS: {check.name}"
                if check.passed
                else f"{command_line.FAIL_MARK} FAIL: {check.name}"
            )
        self(f"{command_line.PASS_MARK} {success}" if report.passed else f"{command_line.FAIL_MARK} SOME TESTS FAILED")
        if report.total_bytes is not None:
            self()
            self(f"Total checkpoint size: {report.total_bytes / MIB:.1f} MB")


@contextmanager
def _if_read(stream: TextIO) -> Iterator[TextIO]:
    """Write to a stream inside the block, unless its reader has closed it, as under `| head`: the exit code counts."""
    try:
        yield stream
    except BrokenPipeError:
        command_line.mute(stream)


def write_text(text: str, target: str) -> None:
    """Write a report to a file, or to standard output if `target` is "-". Raises UsageError if it cannot be written."""
    if target == "-":
        with _if_read(sys.stdout) as stream:
            stream.write(text)
            stream.flush()
    else:
        replace_file(target, text.encode())


def annotate(report: Report, printer: Printer) -> None:
    """In GitHub Actions, annotate failures and add a table to the job's summary (see its workflow commands)."""
    if not command_line.in_github_actions():
        return
    for check in report.checks:
        for problem in check.problems[:10]:
            printer.annotation(f"{report.script} {check.name}", problem)
    if report.error:
        printer.annotation(report.script, report.error)
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(_table(report))
        except OSError as error:
            printer.error(f"GITHUB_STEP_SUMMARY: {path} cannot be written ({error.strerror or error})")


def _table(report: Report) -> str:
    rows = ["", f"### {report.script}", "", "| check | result | seconds | problems |", "|---|---|---|---|"]
    for check in report.checks:
        mark = f"{command_line.PASS_MARK} PASS" if check.passed else f"{command_line.FAIL_MARK} FAIL"
        problems = "<br>".join(_cell(problem) for problem in check.problems[:10])
        rows.append(f"| {check.name} | {mark} | {check.seconds:.1f} | {problems} |")
    if report.error:
        rows.append(f"| | {command_line.FAIL_MARK} could not run | | {_cell(report.error)} |")
    if report.total_bytes is not None:
        rows += ["", f"Total checkpoint size: {report.total_bytes / MIB:.1f} MB"]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Escape what would end a cell or a row of a table, or open a tag."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def report_file(value: str) -> str:
    """Parse the value of --json or --junit, as a type of argparse: a file that is not in a checkpoint."""
    target = command_line.path(value)
    if target == "-":
        return target
    folder = os.path.dirname(os.path.realpath(target))
    while folder != os.path.dirname(folder):
        if os.path.exists(os.path.join(folder, formats.ADAPTERS)):
            raise argparse.ArgumentTypeError(f"{value} lies in a checkpoint, {folder}; give a file outside of it")
        folder = os.path.dirname(folder)
    return target


def can_be_written(target: str) -> bool:
    """Return whether a report can be written to this value of --json or --junit, which is told before the work."""
    if target == "-":
        return True
    path = Path(target)
    if path.exists() and not path.is_file():  # a device or a pipe
        return not path.is_dir() and os.access(path, os.W_OK)
    folder = Path(os.path.realpath(path)).parent
    return folder.is_dir() and os.access(folder, os.W_OK)
