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

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UsageError, listed
from .formats import ADAPTERS, CHECKPOINT, MANIFEST, ROUTER
from .lock import LOCK as LOCK
from .lock import guard, is_leftover, private_name, writer_lock
from .manifest import Digests, FolderGone, encode, file_digest, first_reason, list_entries, parallel, parents, survey
from .safefiles import PLAIN, explained, kind, shown

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run folder."""

    step: int
    path: Path


@dataclass
class Staging:
    """What `staged` yields. `path` is None where `target` is published already and nothing is to be written."""

    target: Path
    path: Path | None
    digests: Digests = field(default_factory=dict)  # of files whose hash the writer knows
    set_aside: Path | None = None  # after the save: where an incomplete folder of the target's name was moved to


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
            while _lstat(there) is None:
                missing.insert(0, there)
                there = there.parent
            for path in [there, *missing]:  # the first, too: its maker may have been killed before it was flushed
                if path is not there:
                    with suppress(FileExistsError):  # another process was quicker
                        os.mkdir(path)
                        made.insert(0, path)
                with suppress(PermissionError):  # a folder may be open for writing and not for reading
                    _fsync(path.parent, folder=True)
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
            _write_new(probe, b"probe\n")
        finally:
            _remove(probe)
        _fsync(run_dir, folder=True)


# ---- saving ---------------------------------------------------------------------------------------------------------


@contextmanager
def staged(target: os.PathLike | str) -> Iterator[Staging]:
    """A folder to write into, which becomes `target` when the block ends; an exception leaves nothing of it.

    A published target stays as it is. An incomplete folder of its name is moved aside, never deleted. A writer that
    knows the hash of a file puts it into `Staging.digests`, and the file is not read again.

    Raises: UsageError where the save could not be done: nothing is published then. Exceptions of the block pass.
    """
    target = Path(os.path.abspath(target))
    with writer_lock(target.parent):
        clean_leftovers(target.parent)
        if _is_published(target):
            with explained("flush", target.parent):  # its writer may have been killed before it could
                _fsync(target.parent, folder=True)
            yield Staging(target, None)
            return
        with private_name(target.parent, "staging") as path:
            try:
                with explained("create", path):
                    os.mkdir(path)
                staging = Staging(target, path)
                yield staging
                _seal(path, staging.digests)
                with guard():
                    if not _is_published(target):  # by another thread of this process
                        staging.set_aside = _publish(path, target)
            finally:
                _remove(path)  # nothing is there after a rename


def _is_published(target: Path) -> bool:
    with explained("look at", target):
        found = _lstat(target)
        if found is None:
            return False
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{target} is {kind(found)}, not a folder: move it away, or choose another output folder")
        # A read error is no proof that it is incomplete, so it is an error here.
        return not survey(target)[0]


def _seal(folder: Path, known: Digests) -> None:
    """Fsync and hash every file, write the manifest, fsync every folder."""
    with explained("list", folder):
        entries = list_entries(folder)
    sizes = {path: found.st_size for path, found in entries.items() if stat.S_ISREG(found.st_mode)}
    digests = known | _flush_and_hash(folder, sizes, known)
    data, problems = encode(digests)
    problems += [f"{shown(path)}: handed over, but not written" for path in known.keys() - sizes.keys()]
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
        _write_new(folder / MANIFEST, data)
    for path in sorted(folders, key=len, reverse=True):  # a folder after those inside it
        with explained("flush", folder / path):
            _fsync(folder / path, folder=True)


def _flush_and_hash(folder: Path, sizes: dict[str, int], known: Digests) -> Digests:
    digests = {}

    def flush(path: str) -> None:
        with explained("flush", folder / path):
            _fsync(folder / path)

    def digest(path: str) -> None:
        with explained("read back", folder / path):
            digests[path] = file_digest(folder / path, sizes[path])

    files = sorted(sizes, key=lambda path: (-sizes[path], path))  # the largest first, and flushed while it is hashed
    jobs = [(job, path) for path in files for job in (flush, digest) if job is flush or path not in known]
    parallel(lambda job: job[0](job[1]), jobs)
    return digests


def _publish(path: Path, target: Path) -> Path | None:
    """Rename the sealed folder to its name. Returns where an incomplete one of that name was moved to."""
    aside = None
    with explained("move aside", target):
        if _lstat(target) is not None:  # a rename would silently replace an empty folder
            aside = _set_aside(target)
    try:
        with explained("publish", target):
            os.rename(path, target)
            _fsync(target.parent, folder=True)
    except BaseException:  # renamed, but not known to be on the disk: a save that fails has never happened
        with suppress(OSError):
            if _lstat(path) is None:
                os.rename(target, path)
        raise
    return aside


def _set_aside(folder: Path) -> Path:
    number = 1
    while True:
        aside = folder.with_name(f"{folder.name}.incomplete" + (f"-{number}" if number > 1 else ""))
        if _lstat(aside) is None:
            os.rename(folder, aside)
            return aside
        number += 1


def rotate(run_dir: os.PathLike | str, limit: int, keep: Iterable[int] = ()) -> list[Path]:
    """Delete complete checkpoints beyond `limit`, see `to_delete`. Returns the paths that are gone."""
    run_dir, removed = Path(run_dir), []
    with writer_lock(run_dir):
        complete = {checkpoint.step: checkpoint.path for checkpoint in checkpoints(run_dir)}
        for step in to_delete(complete, limit, keep):
            with private_name(run_dir, "trash") as trash, explained("move away", complete[step]):
                os.rename(complete[step], trash)
                _fsync(run_dir, folder=True)  # else a power cut might bring the name back with half of its files
                _remove(trash)
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
            _remove(path)
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


def checkpoint_folder(folder: os.PathLike | str) -> Path:
    """The folder that a user names as a checkpoint.

    Raises:
        UsageError: where it is missing or a file; or a folder around checkpoints: then it names the one to give.
    """
    folder = Path(folder)
    try:
        found = "a folder" if folder.is_dir() else "a file" if folder.exists() else "nothing"
    except (OSError, ValueError) as error:
        found = str(error)
    if found != "a folder":
        raise UsageError(
            f"{folder}: expected a checkpoint folder, found {found}; name a folder like RUN/checkpoint-100"
        )
    # A damaged checkpoint has some of these left; what cannot be listed is for verify.py to say.
    can_list = os.access(folder, os.R_OK | os.X_OK)
    if can_list and not any(os.path.lexists(folder / name) for name in (MANIFEST, ROUTER, ADAPTERS)):
        if newest := latest(folder):
            raise UsageError(f"{folder} is a run folder: name its newest checkpoint,\n    {newest.path}")
        if broken := incomplete(folder):
            reasons = listed([f"{path.name}: {reason}" for path, reason in broken])
            raise UsageError(f"{folder} is a run folder without a complete checkpoint:\n{reasons}")
        if os.path.lexists(folder / CHECKPOINT / MANIFEST):
            raise UsageError(f"{folder}: the checkpoint is in it,\n    {folder / CHECKPOINT}")
    return folder


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


# ---- files ----------------------------------------------------------------------------------------------------------


def _lstat(path: Path) -> os.stat_result | None:
    """None only if there is nothing; os.path.lexists would say so of an unreadable disk, too."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(path: Path, *, folder: bool = False) -> None:
    if folder and os.name == "nt":  # Windows has no fsync of folders, and none of files opened for reading
        return
    how = 0 if folder else PLAIN  # a run folder may be a link
    descriptor = os.open(path, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | how)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Best effort: what stays is removed by the next save."""
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            from shutil import rmtree  # late, for a light import

            rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
