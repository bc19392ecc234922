"""A run folder: creating it, finding its checkpoints, and deleting those beyond a limit.

A checkpoint is a folder `checkpoint-<step>` that is complete by its manifest. Modification times play no part. How
these functions work together with `staged` is shown in publish.py.
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
from .hub_cache import status
from .lock import is_leftover, private_name, writer_lock
from .manifest import MANIFEST, MAX_ENTRIES, FolderGone, first_reason, list_entries, survey

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run folder."""

    step: int
    path: Path


def make_run_dir(run_dir: os.PathLike | str) -> list[Path]:
    """Create a run folder and its missing parents, and flush each of them to the disk.

    Returns the folders that were created, the innermost first. Raises UsageError, and then leaves no folder behind.
    """
    folder = Path(os.path.abspath(run_dir))
    created: list[Path] = []
    try:
        with explained("create", folder):
            existing, missing = folder, list[Path]()
            while lstat(existing) is None:
                missing.insert(0, existing)
                existing = existing.parent
            for path in [existing, *missing]:  # the existing one may have been created by a process that was killed
                if path is not existing:
                    with suppress(FileExistsError):  # another process was faster
                        os.mkdir(path)
                        created.insert(0, path)
                with suppress(PermissionError):  # a folder that one may write into, but not read
                    fsync(path.parent, folder=True)
            if not stat.S_ISDIR(os.stat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except BaseException:
        for path in created:
            with suppress(OSError):
                os.rmdir(path)
        raise
    return created


def check_writable(run_dir: os.PathLike | str) -> None:
    """Write, flush and remove a file, to raise UsageError before training rather than at the first save."""
    run_dir = Path(run_dir)
    with writer_lock(run_dir), private_name(run_dir, "probe") as probe, explained("write in", run_dir):
        try:
            write_new(probe, b"probe\n")
        finally:
            remove(probe)
        fsync(run_dir, folder=True)


def rotate(run_dir: os.PathLike | str, limit: int, keep: Iterable[int] = ()) -> list[Path]:
    """Delete complete checkpoints beyond `limit`, chosen by `to_delete`. Returns the paths of the deleted ones.

    A checkpoint that holds a file which its manifest does not list stays: somebody has put that file there.
    """
    run_dir, removed = Path(run_dir), []
    with writer_lock(run_dir):
        complete = {checkpoint.step: checkpoint.path for checkpoint in checkpoints(run_dir)}
        for step in to_delete(complete, limit, keep):
            if _holds_more(complete[step]):
                continue
            with private_name(run_dir, "trash") as trash, explained("move away", complete[step]):
                os.rename(complete[step], trash)
                fsync(run_dir, folder=True)  # or a power cut could restore the name, with half of the files
                remove(trash)
            removed.append(complete[step])
    return removed


def _holds_more(folder: Path) -> bool:
    """Return whether a complete checkpoint holds a file that its manifest does not list."""
    with explained("list", folder):
        listed = {MANIFEST, *survey(folder)[2]}
        return any(
            not stat.S_ISDIR(found.st_mode) for path, found in list_entries(folder).items() if path not in listed
        )


def to_delete(steps: Iterable[int], limit: int, keep: Iterable[int] = ()) -> list[int]:
    """Return the steps to delete, oldest first, so that `limit` remain. The newest and those in `keep` always do."""
    if limit < 1:
        raise UsageError(f"the number of checkpoints to keep must be at least 1, got {limit}")
    newest_first = sorted(set(steps), reverse=True)
    remaining = set(newest_first[:1]) | set(keep).intersection(newest_first)
    for step in newest_first:
        if len(remaining) < limit:
            remaining.add(step)
    return sorted(set(newest_first) - remaining)


def clean_leftovers(run_dir: os.PathLike | str) -> list[Path]:
    """Remove what crashed saves and rotations have left. Returns the paths that were removed."""
    run_dir = Path(run_dir)
    with writer_lock(run_dir):
        with explained("list", run_dir):
            removed = [run_dir / name for name in sorted(os.listdir(run_dir)) if is_leftover(name)]
        for path in removed:
            remove(path)
    return removed


def checkpoints(run_dir: os.PathLike | str) -> list[Checkpoint]:
    """Return the complete checkpoints in the order of their steps; [] if the run folder does not exist."""
    return [Checkpoint(step, path) for step, path, reason in _scan(run_dir) if reason is None]


def latest(run_dir: os.PathLike | str) -> Checkpoint | None:
    """Return the complete checkpoint with the highest step, or None."""
    return max(checkpoints(run_dir), key=lambda checkpoint: checkpoint.step, default=None)


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint is in; None if its folder is not named like one of a run."""
    checkpoint = checkpoint.absolute()
    return checkpoint.parent if _CHECKPOINT.fullmatch(checkpoint.name) else None


def incomplete(run_dir: os.PathLike | str) -> list[tuple[Path, str]]:
    """Return the incomplete folders that are named like checkpoints, in the order of their steps, with a reason."""
    return [(path, reason) for _, path, reason in _scan(run_dir) if reason is not None]


def _scan(run_dir: os.PathLike | str) -> list[tuple[int, Path, str | None]]:
    """Return (step, path, why it is incomplete or None) of all folders named like checkpoints.

    The folder is listed until two listings agree. In between, a save and a rotation could hide both the new and the old
    checkpoint from a single listing.
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


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size of every file below a folder, by relative POSIX path. No file is opened.

    At most `MAX_ENTRIES` entries are looked at, in case `--checkpoint` names a home folder by mistake.
    """
    return {
        path.relative_to(folder).as_posix(): status(path).st_size
        for path in islice(folder.rglob("*"), MAX_ENTRIES)
        if path.is_symlink() or path.is_file()
    }
