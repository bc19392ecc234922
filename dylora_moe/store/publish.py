"""The commit protocol: a folder of files becomes a checkpoint all at once, or not at all.

    run_folder.make_run_dir(run_dir)
    with staged(run_dir / "checkpoint-836") as folder:
        if folder is not None:                    # None: this step is published already, nothing is to be written
            write_all_files(folder)
    run_folder.rotate(run_dir, limit=3, keep=[best_step])    # only after the commit
    newest = run_folder.latest(run_dir)                      # considers complete checkpoints only

A save writes into a folder `.dylora-staging-*` beside the target. It flushes files and folders to the disk, writes
`manifest.json` last, renames the folder to its final name and flushes the parent. A reader sees no checkpoint or a
whole one: a folder without a valid manifest (manifest.py) is not a checkpoint. Rotation (run_folder.py) renames a
checkpoint to `.dylora-trash-*` before it deletes it. One process at a time writes into a run folder (lock.py).

Nothing here knows what a tensor is. Only the standard library is used, and every access to the file system is a call of
`os.*`, where the tests inject their faults (files.py). Every failure is a `UsageError`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ..errors import UsageError, listed, shown
from . import run_folder
from .claim import claimed
from .files import FileProblem, explained, fsync, kind, lstat, parallel, read_json, remove, write_new
from .lock import guard, private_name
from .manifest import MANIFEST, MAX_MANIFEST_BYTES, Digests, encode, file_digest, list_entries, parents, survey


@contextmanager
def staged(target: os.PathLike | str) -> Iterator[Path | None]:
    """Yield a folder to write into, which becomes `target` when the block ends. If it raises, nothing is left behind.

    None is yielded if `target` is published already; then it is not changed. An incomplete checkpoint of its name is
    moved aside, never deleted. Any other folder with files is refused. The folder around `target` is made where it is
    missing.

    Raises:
        UsageError: if the folder cannot be published. Exceptions of the block pass unchanged.
    """
    target = Path(os.path.abspath(target))
    with claimed(target.parent) as claim:
        run_folder.clean_leftovers(target.parent)
        if _is_published(target):
            claim.keep()
            with explained("flush", target.parent):  # its writer may have been killed before it did
                fsync(target.parent, folder=True)
            yield None
            return
        _is_in_the_way(target)  # before anything is written
        with private_name(target.parent, "staging") as folder:
            try:
                with explained("create", folder):
                    os.mkdir(folder)
                yield folder
                seal(folder)
                with guard():
                    if not _is_published(target):  # by another thread of this process
                        _publish(folder, target)
                claim.keep()
            finally:
                remove(folder)  # unless it was renamed


def _is_published(target: Path) -> bool:
    with explained("look at", target):
        found = lstat(target)
        if found is None:
            return False
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{target} is {kind(found)}, not a folder: move it away, or choose another output folder")
        # What cannot be read is not known to be incomplete: that passes as an error.
        return not survey(target)[0]


def _is_in_the_way(target: Path) -> bool:
    """Return whether there is a folder that must be moved aside before a checkpoint can have its name.

    Raises:
        UsageError: if it has files, but neither the name nor the manifest of a checkpoint.
    """
    with explained("list", target):
        if lstat(target) is None:
            return False
        if run_folder.run_of(target) is not None:
            return True
        names = sorted(os.listdir(target))
    if names and not _has_manifest(target, names):
        some = ", ".join([*map(shown, names[:3]), *(["..."] if names[3:] else [])])
        raise UsageError(
            f"nothing was saved: {target} holds other files ({some}), and a checkpoint needs a folder of its own; name "
            f"a new one, such as {target / 'model'}"
        )
    return bool(names)


def _has_manifest(target: Path, names: list[str]) -> bool:
    """Return whether a folder has the manifest of a checkpoint, whole or broken, and not one of something else."""
    try:
        found = read_json(target / MANIFEST, MAX_MANIFEST_BYTES) if MANIFEST in names else {}
    except (OSError, FileProblem):
        return True
    return isinstance(found, dict) and "files" in found


def seal(folder: Path) -> None:
    """Flush and hash every file of a folder, write its manifest, and flush every folder. Raises UsageError."""
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
    problems += [  # readers would refuse these
        f"{shown(path)}: expected files, found {kind(found)} without any"
        for path, found in entries.items()
        if path not in sizes and path not in folders
    ]
    if problems:
        raise UsageError(f"cannot publish what was written into {folder}:\n{listed(sorted(problems))}")
    with explained("write", folder / MANIFEST):
        write_new(folder / MANIFEST, data)
    for path in sorted(folders, key=len, reverse=True):  # a folder after those in it
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

    files = sorted(sizes, key=lambda path: (-sizes[path], path))  # the largest first, flushed and hashed at once
    jobs = [(job, path) for path in files for job in (flush, digest)]
    parallel(lambda job: job[0](job[1]), jobs)
    return digests


def _publish(folder: Path, target: Path) -> None:
    """Rename a sealed folder to its final name, and an incomplete checkpoint of that name to `*.incomplete`."""
    if _is_in_the_way(target):
        names = (f"{target.name}.incomplete" + (f"-{number}" if number > 1 else "") for number in count(1))
        with explained("move aside", target):
            os.rename(target, next(path for path in map(target.with_name, names) if lstat(path) is None))
    try:
        with explained("publish", target):
            os.rename(folder, target)
            fsync(target.parent, folder=True)
    except BaseException:  # not known to be on the disk: undo the rename, since a save that fails publishes nothing
        with suppress(OSError):
            if lstat(folder) is None:
                os.rename(target, folder)
        raise
