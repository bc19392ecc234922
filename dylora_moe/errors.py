"""The errors that a user can fix. Messages say what is wrong and where, what was expected and found, and the remedy."""

from __future__ import annotations

MAX_LISTED = 10
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, which torch reports only by the words of its errors."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def listed(items: list[str], limit: int = MAX_LISTED) -> str:
    """Format at most `limit` items, each on its own line, and the number of the others."""
    lines = [f"  - {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)


class DyLoRAMoEError(Exception):
    """Base class of the errors that this package raises on purpose. Their messages are meant for the user."""


class UsageError(DyLoRAMoEError, ValueError):
    """A request cannot be fulfilled: bad input, an unreachable model, too little memory. Exit code 2."""


class CheckpointError(DyLoRAMoEError, ValueError):
    """A checkpoint is not sound. `problems` has one text for each thing that is wrong. Exit code 1."""

    def __init__(self, where: object, problems: list[str]):
        self.where = str(where)
        self.problems = sorted(problems)
        super().__init__(f"{self.where} is not a sound checkpoint:\n{listed(self.problems)}")
