"""A run folder: its complete checkpoints, the newest of them, and which of them rotation deletes.

make_run_dir(run_dir)
rotate(run_dir, limit=3, keep=[best_step])    # only after a commit
newest = latest(run_dir)                      # complete checkpoints only
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import UsageError
from .files import explained, fsync, lstat, remove, write_new
from .lock import is_leftover, private_name, writer_lock
from .manifest import FolderGone, first_reason

MOST_FILES = 100_000  # where --checkpoint names a home folder by mistake, this ends


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative POSIX path. Nothing is followed, nothing is opened."""
    return {
        path.relative_to(folder).as_posix(): path.lstat().st_size
        for path in islice(folder.rglob("*"), MOST_FILES)
        if path.is_symlink() or path.is_file()
    }


_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run folder."""

    step: int
    path: Path


# ---- the run folder -------------------------------------------------------------------------------------------------


def make_run_dir(run_dir: os.PathLike | str) -> list[Path]:
    """Create the run folder and its missing parents, and fsync what they are in: no checkpoint outlasts its folder.

    Returns what was created, the innermost first. Raises: UsageError where that cannot be done, or a file is there;
    what was created is removed again.
    """
    folder = Path(os.path.abspath(run_dir))
    made: list[Path] = []
    try:
        with explained("create", folder):
            there, missing = folder, []
            while lstat(there) is None:
                missing.insert(0, there)
                there = there.parent
            for path in [there, *missing]:  # the first, too: its maker may have been killed before it was flushed
                if path is not there:
                    with suppress(FileExistsError):  # another process was quicker
                        os.mkdir(path)
                        made.insert(0, path)
                with suppress(PermissionError):  # a folder may be open for writing and not for reading
                    fsync(path.parent, folder=True)
            if not stat.S_ISDIR(os.stat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except BaseException:
        for path in made:
            with suppress(OSError):
                os.rmdir(path)
        raise
    return made


def check_writable(run_dir: os.PathLike | str) -> None:
    """Write, fsync and remove a file in the run folder; a UsageError now, rather than at the first save."""
    run_dir = Path(run_dir)
    with writer_lock(run_dir), private_name(run_dir, "probe") as probe, explained("write in", run_dir):
        try:
            write_new(probe, b"probe\n")
        finally:
            remove(probe)
        fsync(run_dir, folder=True)


def rotate(run_dir: os.PathLike | str, limit: int, keep: Iterable[int] = ()) -> list[Path]:
    """Delete complete checkpoints beyond `limit`, see `to_delete`. Returns the paths that are gone."""
    run_dir, removed = Path(run_dir), []
    with writer_lock(run_dir):
        complete = {checkpoint.step: checkpoint.path for checkpoint in checkpoints(run_dir)}
        for step in to_delete(complete, limit, keep):
            with private_name(run_dir, "trash") as trash, explained("move away", complete[step]):
                os.rename(complete[step], trash)
                fsync(run_dir, folder=True)  # else a power cut might bring the name back with half of its files
                remove(trash)
            removed.append(complete[step])
    return removed


def to_delete(steps: Iterable[int], limit: int, keep: Iterable[int] = ()) -> list[int]:
    """The steps to delete, oldest first, so that `limit` stay. The newest and those of `keep` stay in any case."""
    if limit < 1:
        raise UsageError(f"the number of checkpoints to keep must be at least 1, got {limit}")
    newest_first = sorted(set(steps), reverse=True)
    stay = set(newest_first[:1]) | set(keep).intersection(newest_first)
    for step in newest_first:
        if len(stay) < limit:
            stay.add(step)
    return [step for step in reversed(newest_first) if step not in stay]


def clean_leftovers(run_dir: os.PathLike | str) -> list[Path]:
    """Remove what crashed saves and rotations left. Whoever holds the lock knows that their owners are gone."""
    run_dir = Path(run_dir)
    with writer_lock(run_dir):
        with explained("list", run_dir):
            removed = [run_dir / name for name in sorted(os.listdir(run_dir)) if is_leftover(name)]
        for path in removed:
            remove(path)
    return removed


# ---- finding --------------------------------------------------------------------------------------------------------


def checkpoints(run_dir: os.PathLike | str) -> list[Checkpoint]:
    """The complete checkpoints, by step number; times play no part. A run folder that is not there has none."""
    return [Checkpoint(step, path) for step, path, reason in _scan(run_dir) if reason is None]


def latest(run_dir: os.PathLike | str) -> Checkpoint | None:
    """The complete checkpoint with the highest step number."""
    return max(checkpoints(run_dir), key=lambda checkpoint: checkpoint.step, default=None)


def incomplete(run_dir: os.PathLike | str) -> list[tuple[Path, str]]:
    """The folders that are named like checkpoints and are none, by step number, with the first reason."""
    return [(path, reason) for _, path, reason in _scan(run_dir) if reason is not None]


def _scan(run_dir: os.PathLike | str) -> list[tuple[int, Path, str | None]]:
    """(step, path, why it is incomplete), read until two listings agree.

    With one listing alone, a save and a rotation in the meantime could hide both the new checkpoint and the old one.
    """
    folders, before = _named_like_checkpoints(Path(run_dir)), None
    verdicts: list[tuple[int, Path, str | None]] = []
    for _ in range(100):
        if folders == before:
            break
        before, verdicts = folders, []
        for step, path in sorted(folders.items()):
            with suppress(FolderGone):
                verdicts.append((step, path, first_reason(path)))
        folders = _named_like_checkpoints(Path(run_dir))
    return verdicts


def _named_like_checkpoints(run_dir: Path) -> dict[int, Path]:
    with explained("list", run_dir):
        try:
            with os.scandir(run_dir) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return {}
    return {int(match[1]): run_dir / name for name in names if (match := _CHECKPOINT.fullmatch(name))}
