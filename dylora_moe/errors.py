"""The errors that a user can mend. Each message says what, where, what was expected, what was found, and the remedy."""

from __future__ import annotations

MAX_LISTED = 10
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so in words only."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def listed(items: list[str], limit: int = MAX_LISTED) -> str:
    """The items on lines of their own, at most `limit` of them and a count of the rest."""
    lines = [f"  - {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)


class DyLoRAMoEError(Exception):
    """Base of every error that this package raises on purpose; its text is meant for the user as it stands."""


class UsageError(DyLoRAMoEError, ValueError):
    """What was asked for cannot be done: bad input, an unreachable model, too little memory. Exit code 2."""


class CheckpointError(DyLoRAMoEError, ValueError):
    """A checkpoint is not what it must be. `problems` has one text for each thing that is wrong. Exit code 1."""

    def __init__(self, where: object, problems: list[str]):
        self.where = str(where)
        self.problems = sorted(problems)
        super().__init__(f"{self.where} is not a sound checkpoint:\n{listed(self.problems)}")
