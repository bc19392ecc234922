"""The errors that a user can fix. Messages say what is wrong and where, what was expected and found, and the remedy.

Much of what a message names comes from files of others, such as names, tensors and columns. `printable` makes it safe.
"""

from __future__ import annotations

import re

MAX_LISTED = 10
_BEARER = re.compile("Bearer [^'\"\n]*")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, which torch reports only by the words of its errors."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def shown(name: object, most: int | None = 200) -> str:
    """Make a text fit for one line of any terminal: no control characters or lone surrogates, at most `most` others."""
    text = str(name)
    text = text if most is None or len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def has_controls(text: str) -> bool:
    """Return whether a text has control characters or line breaks, which no honest name has."""
    return _CONTROLS.search(text) is not None


def printable(text: object) -> str:
    """Make a text of one or several lines fit for any terminal, and for GitHub Actions, which takes lines for commands.

    A command there is a line that begins with `::` after spaces, or has `##[` somewhere. An access token is left out:
    what sends requests shows the header that holds it where it cannot be sent.
    """
    text = _BEARER.sub("Bearer ***", str(text))
    lines = (shown(line, most=None).replace("##[", "##\\[") for line in text.split("\n"))
    return "\n".join(f"\\{line}" if line.lstrip().startswith("::") else line for line in lines)


def counted(number: int, what: str) -> str:
    """Return a number with its noun, as in "1 document" or "2,000 documents"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(items: list[str], limit: int = MAX_LISTED) -> str:
    """Format at most `limit` items, each on its own line, and the number of the others."""
    lines = [f"  - {shown(item, most=None)}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)


class DyLoRAMoEError(Exception):
    """Base class of the errors that this package raises on purpose. Their messages are meant for the user."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class UsageError(DyLoRAMoEError, ValueError):
    """A request cannot be fulfilled: bad input, an unreachable model, too little memory. Exit code 2."""


class CheckpointError(DyLoRAMoEError, ValueError):
    """A checkpoint is not sound, or does not fit the model. Exit code 1.

    Attributes:
        problems: One text for each thing that is wrong.
    """

    def __init__(self, where: object, problems: list[str], verdict: str = "is not a sound checkpoint"):
        self.where = str(where)
        self.problems = sorted(problems)
        super().__init__(f"{self.where} {verdict}:\n{listed(self.problems)}")
