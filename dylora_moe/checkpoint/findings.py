"""What the checks of a checkpoint folder share: its files, the problems found so far, and rules for values from JSON.

Standard library only.
"""

from __future__ import annotations

import math
import os
import reprlib
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..store.files import FileProblem, shown

MAX_FILES = 8 * 1024
MAX_LISTED = 10
SAVE_AGAIN = "restore the file from a copy, or save the checkpoint again"

Rules = tuple[tuple[str, str, Callable[[object], bool]], ...]  # key, what is expected, whether a value is that

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 60
_shortener.maxlevel = 2


@dataclass
class Contents:
    """What a folder holds, as far as it could be read, and what is wrong with it."""

    folder: Path
    files: dict[str, os.stat_result] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)  # the files that a problem names
    scanned: dict[str, list] = field(default_factory=dict)  # file -> what `scan_float32` says, where that is known

    @property
    def total_bytes(self) -> int:
        return sum(info.st_size for info in self.files.values())

    def report(self, name: str, text: str, remedy: str = SAVE_AGAIN) -> None:
        self.problems.append(printable(f"{shown(name)}: {text}; {remedy}"))
        self.suspects.add(shown(name))

    def take(self, problems: Iterable[str]) -> None:
        """Problems that are texts already, each beginning with the file's name."""
        for problem in problems:
            self.problems.append(problem)
            self.suspects.add(problem.partition(": ")[0])

    def expect(self, name: str, what: str, expected: object, found: object) -> None:
        """Report a difference."""
        what = f"{what}: " if what else ""
        self.report(name, f"{what}expected {expected}, found {found}")

    def is_known(self, name: str) -> bool:
        """Whether a problem of this file has been reported already: one missing file is one problem."""
        return shown(name) in self.suspects

    def list(self, name: str, items: Iterable[str], text: Callable[[str], str]) -> None:
        """Report a text for each item, at most ten and a count."""
        items = sorted(items)
        for item in items[:MAX_LISTED]:
            self.report(name, text(item))
        if len(items) > MAX_LISTED:
            self.report(name, f"... and {len(items) - MAX_LISTED} more like this: {text(items[-1])}")

    def read(self, name: str, reader: Callable) -> object | None:
        """`reader` of one file; None where it is missing (which the file set reports) or unreadable (reported here)."""
        if name not in self.files:
            return None
        try:
            return reader(self.folder / name)
        except FileProblem as error:
            self.report(name, str(error))
        except OSError as error:
            self.report(name, f"expected to read it, found: {error.strerror or error}")
        return None

    def follow(self, name: str, found: object, rules: Rules, prefix: str = "") -> bool:
        """Report where the values of a JSON object, by dotted path, are not what the rules say."""
        right = True
        for path, expected, rule in rules:
            value = get(found, path)
            if not rule(value):
                self.expect(name, prefix + path, expected, short(value))
                right = False
        return right

    def walk(self) -> None:
        """Find all files. Links are not followed, and what is neither file nor folder is reported."""
        pending = [""]
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

    def _see(self, name: str, entry: os.DirEntry, pending: list[str]) -> None:
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            pending.append(f"{name}/")
        elif stat.S_ISREG(mode):
            self.files[name] = entry.stat(follow_symlinks=False)
        elif not self.is_known(name):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
            self.report(name, f"expected a regular file, found {kind}")


def get(found: object, path: str) -> object:
    """The value at a dotted path of nested JSON objects; None where there is none."""
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def natural(value: object, least: int = 0, most: int = 1 << 48) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def nothing_or(rule: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or rule(value)


def text(value: object) -> bool:
    return isinstance(value, str)


def texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def short(value: object) -> str:
    """A value from JSON in at most 80 characters, however deep or long it is."""
    text = _shortener.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """A text that every terminal can show: no control characters, no lone surrogates, no megabytes."""
    text = text if len(text) <= 2000 else text[:2000] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
