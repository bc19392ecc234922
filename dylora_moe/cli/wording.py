"""The wording that several commands share."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.config import CheckpointConfig
from ..errors import UsageError, counted


def existing_folder(path: str) -> Path:
    """Return a run folder as a path. Raises UsageError if it is not there, or no folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a run folder, found {'a file' if folder.exists() else 'nothing'}.")
    return folder


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
