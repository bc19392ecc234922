"""Files beside the checkpoints of a run folder, such as the tokenizer and the results: whole, or not there at all.

    publish_files(run_dir, {"results.json": data}, replace=True)     # bytes
    publish_written(run_dir, tokenizer.save_pretrained)              # what a library writes into a folder by itself
    replace_file("result.json", data)                                # a single file in any folder, without its lock
    with new_folder(target) as folder: ...                           # a folder of its own, that nobody shares

Everything is written into a private folder `.dylora-staging-*` in the run folder and flushed to the disk. Each file and
folder is then renamed into place, and the run folder is flushed. A crash leaves every file as it was or as it is to be,
never a part of it. Nothing that is there with another content is replaced unless the caller asks for it.

What was new is returned as `Made`: `unmake` removes it again, and nothing else that bears its name by then.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, listed, shown
from .files import explained, fsync, kind, lstat, native_errors, remove, write_new
from .lock import guard, private_name, writer_lock
from .manifest import file_digest, list_entries


@dataclass(frozen=True)
class Made:
    """A file or a folder that this process has made, and by what it is known again."""

    path: Path
    identity: tuple[int, ...]  # device and inode; of a file, the time of its last change and its size as well

    @classmethod
    def at(cls, path: Path) -> Made:
        """Take note of what is at a path. Raises OSError if nothing is."""
        return cls(path, _identity(os.lstat(path)))


def _identity(found: os.stat_result) -> tuple[int, ...]:
    if stat.S_ISDIR(found.st_mode):
        return found.st_dev, found.st_ino
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def unmake(made: Iterable[Made]) -> None:
    """Remove what was made, as far as possible: the files that did not change since, and then the empty folders."""
    for each in sorted(made, key=lambda each: len(each.path.parts), reverse=True):
        with suppress(OSError):
            found = os.lstat(each.path)
            if _identity(found) == each.identity:
                os.rmdir(each.path) if stat.S_ISDIR(found.st_mode) else os.unlink(each.path)


def publish_files(folder: os.PathLike | str, files: Mapping[str, bytes], *, replace: bool = False) -> list[Made]:
    """Write files, by their names in a folder that exists. Returns and raises as `publish_written` does."""

    def write(staging: Path) -> None:
        for name, data in files.items():
            with explained("write", Path(folder, name)):
                write_new(staging / name, data)

    return publish_written(folder, write, replace=replace)


def publish_written(folder: os.PathLike | str, write: Callable[[Path], object], *, replace: bool = False) -> list[Made]:
    """Call `write` with a private folder, and move every file and folder that it writes there into `folder`.

    What is there already with the same content is left as it is.

    Args:
        replace: Replace files that are there with another content. Folders are never replaced.

    Returns:
        What is new in `folder`, without the files that were replaced.

    Raises:
        UsageError: If it cannot be written, another process writes into the folder, or something is there that is not
            to be replaced. What is new is removed again then. Exceptions of `write` that are no OSErrors pass.
    """
    folder = Path(os.path.abspath(folder))
    with writer_lock(folder), private_name(folder, "staging") as staging:
        try:
            with explained("write in", folder), native_errors():
                os.mkdir(staging)
                write(staging)
            with explained("flush", staging):
                flush(staging)
            with guard():
                return _move(staging, folder, replace)
        finally:
            remove(staging)


def replace_file(path: os.PathLike | str, data: bytes) -> None:
    """Write a file, whole or not at all, in place of one that may be there. A link is followed.

    What is no regular file, such as /dev/stdout or a pipe, is written into.

    Raises:
        UsageError: If it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with explained("write", path):
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                file.write(data)
            return
        with private_name(target.parent, "staging") as staging:
            try:
                write_new(staging, data)
                os.replace(staging, target)
                fsync(target.parent, folder=True)
            finally:
                remove(staging)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder that the block makes, and that becomes `folder`, whole or not at all, when it ends.

    Raises:
        UsageError: if `folder` exists already or cannot be written.
    """
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists already; name a new folder")
    private = folder.with_name(f".{folder.name}.partial-{os.urandom(8).hex()}")
    with explained("export to", folder):
        private.mkdir(parents=True)
        try:
            yield private / "new"
            flush(private)
            (private / "new").rename(folder)
            fsync(folder.parent, folder=True)
        finally:
            remove(private)


def flush(folder: Path) -> None:
    """Flush every file below a folder, and then the folders, each after those in it."""
    entries = list_entries(folder)
    folders = [path for path, found in entries.items() if stat.S_ISDIR(found.st_mode)]
    for path in entries.keys() - set(folders):
        fsync(folder / path)
    for path in sorted(["", *folders], key=len, reverse=True):
        fsync(folder / path, folder=True)


def same_content(one: Path, other: Path) -> bool:
    """Return whether two files, or all files of two folders, have the same content."""
    a, b = lstat(one), lstat(other)
    if a is None or b is None or stat.S_IFMT(a.st_mode) != stat.S_IFMT(b.st_mode):
        return False
    if stat.S_ISDIR(a.st_mode):
        names = set(os.listdir(one))
        return names == set(os.listdir(other)) and all(same_content(one / name, other / name) for name in names)
    return (
        stat.S_ISREG(a.st_mode)
        and a.st_size == b.st_size
        and file_digest(one, a.st_size) == file_digest(other, b.st_size)
    )


def _move(staging: Path, folder: Path, replace: bool) -> list[Made]:
    with explained("look at", folder):
        wanted = [name for name in sorted(os.listdir(staging)) if not same_content(staging / name, folder / name)]
        there = {name: found for name in wanted if (found := lstat(folder / name)) is not None}
        made = [each for name in wanted if name not in there for each in _made(staging / name, folder / name)]
        in_the_way = [
            name
            for name, found in there.items()
            if not (replace and stat.S_ISREG(found.st_mode) and stat.S_ISREG(os.lstat(staging / name).st_mode))
        ]
    if in_the_way:
        problems = listed([f"{shown(name)}: {kind(there[name])} with another content" for name in in_the_way])
        raise UsageError(f"{folder} holds already:\n{problems}\nMove that away, or choose another output folder")
    try:
        for name in wanted:
            with explained("publish", folder / name):
                os.replace(staging / name, folder / name)
        with explained("flush", folder):
            fsync(folder, folder=True)
    except BaseException:
        unmake(made)
        raise
    return made


def _made(staged: Path, target: Path) -> list[Made]:
    """Take note of everything at a path that is about to be renamed."""
    found = os.lstat(staged)
    below = list_entries(staged) if stat.S_ISDIR(found.st_mode) else {}
    return [Made(target, _identity(found)), *(Made(target / path, _identity(info)) for path, info in below.items())]
