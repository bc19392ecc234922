"""What every edit and export checks first: the old checkpoint, the place of the new one, the experts that are named."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.verify import SoundCheckpoint, checkpoint_folder, open_checkpoint
from ..constants import expert_name
from ..errors import UsageError


def sound(old: str | Path, new: str | Path) -> SoundCheckpoint:
    """Verify a checkpoint from which something new is to be made, and that there is room for that.

    Raises:
        UsageError: if there is something at `new`, or it lies inside of the old checkpoint.
        CheckpointError: with every problem of the old checkpoint.
    """
    old, new = checkpoint_folder(old), Path(new)
    if new.exists() or new.is_symlink():
        raise UsageError(f"{new} exists already: name a new folder")
    if new.resolve().is_relative_to(old.resolve()):
        raise UsageError(f"{new} is inside the checkpoint, which stays as it is: name a folder elsewhere")
    return open_checkpoint(old)


def check_experts(checkpoint: SoundCheckpoint, experts: Iterable[int]) -> list[int]:
    """Return the experts in order. Raises UsageError if one is not there, or is named twice."""
    named, count = list(experts), checkpoint.config.num_experts
    for index in named:
        if not 0 <= index < count:
            raise UsageError(f"{checkpoint.folder} has no {expert_name(index)}, only expert_0 to expert_{count - 1}")
        if named.count(index) > 1:
            raise UsageError(f"{expert_name(index)} is named twice")
    return sorted(named)
