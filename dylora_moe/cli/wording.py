"""The wording that several commands share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.config import CheckpointConfig
from ..errors import CheckpointError, UsageError, counted


def existing_folder(path: str) -> Path:
    """Return a run folder as a path. Raises UsageError if it is not there, or no folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a run folder, found {'a file' if folder.exists() else 'nothing'}.")
    return folder


@contextmanager
def needed() -> Iterator[None]:
    """Inside, a checkpoint that is not sound is bad input, with exit code 2, and not the result of a check."""
    try:
        yield
    except CheckpointError as error:
        raise UsageError(str(error)) from error


def experts_line(config: CheckpointConfig | None) -> str:
    """Describe the experts of a checkpoint, as in "4 experts (3 mature, 1 new)"."""
    states = states_of(config)
    if not states:
        return "experts unknown"
    if len(set(states)) == 1:
        counts = states[0]
    else:
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states), key=states.index))
    return f"{counted(len(states), 'expert')} ({counts})"


def states_of(config: CheckpointConfig | None) -> list[str]:
    """Return the state of each expert; an empty list if there is no config to tell them."""
    return [] if config is None else config.states


def percent(share: float) -> str:
    """Return a share as in "97.3 %"."""
    return f"{100 * share:.1f} %"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. Its first column is aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in (titles, *rows))
    ]
