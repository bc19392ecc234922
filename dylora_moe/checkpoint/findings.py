"""What the checks of a checkpoint share: the files found, the problems found, and rules for values from JSON.

Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import reprlib
import stat
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import has_controls, shown
from ..store.files import FileProblem
from ..store.hub_cache import status
from ..store.manifest import Identity, may_be_beside
from .config import CheckpointConfig
from .safetensors_file import Scan, read_json, scan_file

MAX_FILES = 8 * 1024
MAX_LISTED = 10
SAVE_AGAIN = "restore the file from a copy, or save the checkpoint again"

Rules = tuple[tuple[str, str, Callable[[Any], bool]], ...]  # key, what is expected, whether a value is that
T = TypeVar("T")

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 60
_shortener.maxlevel = 2


@dataclass(frozen=True)
class SkillFacts:
    """What the skill library says of one skill, apart from its samples."""

    name: str
    expert: int | None
    tokens: int
    loss: float | None  # held-out, in nats per token


@dataclass
class Contents:
    """What a folder holds, as far as it can be read, and every problem of it."""

    folder: Path
    files: dict[str, os.stat_result] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)  # files that may be in the folder, and are not read
    config: CheckpointConfig | None = None  # None if it is missing or wrong
    skills: list[SkillFacts] = field(default_factory=list)  # of a library in which nothing is wrong
    problems: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)  # the files that a problem names
    scans: dict[str, Scan] = field(default_factory=dict)  # of the safetensors files that have been read already
    is_old: bool = False  # whether version 0.2.1 has written it: nothing else is checked then
    identity: Identity | None = None  # of the folder; None before it is published

    @property
    def total_bytes(self) -> int:
        return sum(info.st_size for info in self.files.values())

    @property
    def beside_line(self) -> str | None:
        """A line that names the files beside those of the checkpoint, or None if there are none."""
        if not self.beside:
            return None
        beside = list(dict.fromkeys(".git" if name.startswith(".git/") else name for name in self.beside))
        names = ", ".join(shown(name) for name in beside[:MAX_LISTED])
        more = f" and {len(beside) - MAX_LISTED} more" if len(beside) > MAX_LISTED else ""
        return f"beside the checkpoint's files, not read: {names}{more}"

    def report(self, name: str, text: str, remedy: str = SAVE_AGAIN) -> None:
        """Add a problem of a file."""
        self.problems.append(shown(f"{shown(name)}: {text}; {remedy}", most=2000))
        self.suspects.add(shown(name))

    def take(self, problems: Iterable[str]) -> None:
        """Add problems that are complete texts, each of which begins with the name of its file."""
        for problem in problems:
            self.problems.append(problem)
            self.suspects.add(problem.partition(": ")[0])

    def expect(self, name: str, what: str, expected: object, found: object) -> None:
        """Report that a file holds something else than expected."""
        what = f"{what}: " if what else ""
        self.report(name, f"{what}expected {expected}, found {found}")

    def is_known(self, name: str) -> bool:
        """Whether a problem of this file has been reported already: a missing file is one problem, not several."""
        return shown(name) in self.suspects

    def list(self, name: str, items: Iterable[str], text: Callable[[str], str]) -> None:
        """Report a text for each item, at most ten and a count."""
        items = sorted(items)
        for item in items[:MAX_LISTED]:
            self.report(name, text(item))
        if len(items) > MAX_LISTED:
            self.report(name, f"... and {len(items) - MAX_LISTED} more like this: {text(items[-1])}")

    def read(self, name: str, reader: Callable[[Path], T]) -> T | None:
        """Return what `reader` makes of a file, or None if the file is missing or unreadable.

        An unreadable file is reported here, a missing one by the check of the set of files.
        """
        if name not in self.files:
            return None
        try:
            return reader(self.folder / name)
        except FileProblem as error:
            self.report(name, str(error))
        except OSError as error:
            self.report(name, f"expected to read it, found: {error.strerror or error}")
        return None

    def read_object(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object that a file holds, or None if it holds none, which is reported."""
        before = len(self.problems)
        found = self.read(name, read_json)
        if isinstance(found, dict):
            return found
        if name in self.files and len(self.problems) == before:
            self.expect(name, "", "a JSON object", type(found).__name__)
        return None

    def scan(self, name: str) -> Scan | None:
        """Return what one reading of a safetensors file tells; it is read now unless it has been already."""
        scan = self.scans.get(name) or self.read(name, scan_file)
        if scan is not None and scan.problem is not None:
            self.report(name, scan.problem)
            return None
        return scan

    def follow(self, name: str, found: object, rules: Rules, prefix: str = "") -> bool:
        """Report each value of a JSON object, by dotted path, that breaks its rule. Returns whether none does."""
        right = True
        for path, expected, rule in rules:
            value = get(found, path)
            if not rule(value):
                self.expect(name, prefix + path, expected, short(value))
                right = False
        return right

    def walk(self) -> None:
        """Find all files. Whatever is neither a file nor a folder, as far as links are followed, is reported."""
        pending = deque([""])
        seen = 0
        while pending:
            prefix = pending.pop()
            try:
                with os.scandir(self.folder / prefix) as entries:
                    for entry in entries:
                        seen += 1
                        if seen > MAX_FILES:
                            self.expect(".", "", f"at most {MAX_FILES} files and folders", "more")
                            return
                        self._see(prefix + entry.name, entry, pending)
            except OSError as error:
                self.report(prefix or ".", f"expected to list it, found: {error.strerror or error}")

    def _see(self, name: str, entry: os.DirEntry[str], pending: deque[str]) -> None:
        found = status(Path(entry.path))
        if stat.S_ISDIR(found.st_mode):
            pending.append(f"{name}/")
        elif may_be_beside(name, found):
            self.beside.append(name)
        elif stat.S_ISREG(found.st_mode):
            self.files[name] = found
        elif not self.is_known(name):
            kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "something else"
            self.report(name, f"expected a regular file, found {kind}")


def get(found: Any, path: str) -> Any:
    """Return the value at a dotted path of nested JSON objects, or None if there is none."""
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def natural(value: object, least: int = 0, most: int = 1 << 48) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def nothing_or(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def text(value: object) -> bool:
    """Whether it is a text without control characters, which could act on a terminal."""
    return isinstance(value, str) and not has_controls(value)


def texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(text(v) and v for v in value)


def short(value: object) -> str:
    """Represent a value from JSON in at most 80 characters, however deep or long it is."""
    text = _shortener.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
