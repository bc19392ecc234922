"""The commit protocol: a folder of files becomes a checkpoint all at once, or not at all.

    make_run_dir(run_dir)
    with staged(run_dir / "checkpoint-836") as staging:
        if staging.path is not None:              # None: this step is published already, nothing is to be written
            write_all_files(staging.path)
    rotate(run_dir, limit=3, keep=[best_step])    # only after the commit
    newest = latest(run_dir)                      # complete checkpoints only

A save writes into `.dylora-staging-*` beside the target, fsyncs files and folders, writes `manifest.json` last, renames
the folder to its name and fsyncs the parent; whoever looks sees no checkpoint or a whole one. A folder without a valid
manifest (manifest.py) is not a checkpoint. Rotation renames to `.dylora-trash-*` before it deletes. One process at a
time writes into a run folder (lock.py).

Nothing here knows what a tensor is. Only the standard library is used, and every file-system call goes through `os.*`,
where the tests put their faults. Everything that fails is a `UsageError`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, listed
from . import run_folder
from .files import explained, fsync, kind, lstat, parallel, remove, shown, write_new
from .lock import guard, private_name, writer_lock
from .manifest import MANIFEST, Digests, encode, file_digest, list_entries, parents, survey


@dataclass
class Staging:
    """What `staged` yields. `path` is None where `target` is published already and nothing is to be written."""

    target: Path
    path: Path | None
    set_aside: Path | None = None  # after the save: where an incomplete folder of the target's name was moved to


# ---- saving ---------------------------------------------------------------------------------------------------------


@contextmanager
def staged(target: os.PathLike | str) -> Iterator[Staging]:
    """A folder to write into, which becomes `target` when the block ends; an exception leaves nothing of it.

    A published target stays as it is. An incomplete folder of its name is moved aside, never deleted.

    Raises: UsageError where the save could not be done: nothing is published then. Exceptions of the block pass.
    """
    target = Path(os.path.abspath(target))
    with writer_lock(target.parent):
        run_folder.clean_leftovers(target.parent)
        if _is_published(target):
            with explained("flush", target.parent):  # its writer may have been killed before it could
                fsync(target.parent, folder=True)
            yield Staging(target, None)
            return
        with private_name(target.parent, "staging") as path:
            try:
                with explained("create", path):
                    os.mkdir(path)
                staging = Staging(target, path)
                yield staging
                _seal(path)
                with guard():
                    if not _is_published(target):  # by another thread of this process
                        staging.set_aside = _publish(path, target)
            finally:
                remove(path)  # nothing is there after a rename


def _is_published(target: Path) -> bool:
    with explained("look at", target):
        found = lstat(target)
        if found is None:
            return False
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{target} is {kind(found)}, not a folder: move it away, or choose another output folder")
        # A read error is no proof that it is incomplete, so it is an error here.
        return not survey(target)[0]


def _seal(folder: Path) -> None:
    """Fsync and hash every file, write the manifest, fsync every folder."""
    with explained("list", folder):
        entries = list_entries(folder)
    sizes = {path: found.st_size for path, found in entries.items() if stat.S_ISREG(found.st_mode)}
    digests = _flush_and_hash(folder, sizes)
    data, problems = encode(digests)
    problems += [
        f"{shown(path)}: expected the {size} bytes it has, hashed were {digests[path][0]}"
        for path, size in sizes.items()
        if digests[path][0] != size
    ]
    folders = parents(entries) | {""}
    problems += [  # a reader would refuse it
        f"{shown(path)}: expected files, found {kind(found)} without any"
        for path, found in entries.items()
        if path not in sizes and path not in folders
    ]
    if problems:
        raise UsageError(f"cannot publish what was written into {folder}:\n{listed(sorted(problems))}")
    with explained("write", folder / MANIFEST):
        write_new(folder / MANIFEST, data)
    for path in sorted(folders, key=len, reverse=True):  # a folder after those inside it
        with explained("flush", folder / path):
            fsync(folder / path, folder=True)


def _flush_and_hash(folder: Path, sizes: dict[str, int]) -> Digests:
    digests = {}

    def flush(path: str) -> None:
        with explained("flush", folder / path):
            fsync(folder / path)

    def digest(path: str) -> None:
        with explained("read back", folder / path):
            digests[path] = file_digest(folder / path, sizes[path])

    files = sorted(sizes, key=lambda path: (-sizes[path], path))  # the largest first, and flushed while it is hashed
    jobs = [(job, path) for path in files for job in (flush, digest)]
    parallel(lambda job: job[0](job[1]), jobs)
    return digests


def _publish(path: Path, target: Path) -> Path | None:
    """Rename the sealed folder to its name. Returns where an incomplete one of that name was moved to."""
    aside = None
    with explained("move aside", target):
        if lstat(target) is not None:  # a rename would silently replace an empty folder
            aside = _set_aside(target)
    try:
        with explained("publish", target):
            os.rename(path, target)
            fsync(target.parent, folder=True)
    except BaseException:  # renamed, but not known to be on the disk: a save that fails has never happened
        with suppress(OSError):
            if lstat(path) is None:
                os.rename(target, path)
        raise
    return aside


def _set_aside(folder: Path) -> Path:
    number = 1
    while True:
        aside = folder.with_name(f"{folder.name}.incomplete" + (f"-{number}" if number > 1 else ""))
        if lstat(aside) is None:
            os.rename(folder, aside)
            return aside
        number += 1
