"""The commit protocol: a folder of files becomes a checkpoint all at once, or not at all.

    with staged(run_dir / "checkpoint-836") as staging:
        if staging.path is not None:              # None: this step is published already, nothing is to be written
            write_all_files(staging.path)
    rotate(run_dir, limit=3, keep=[best_step])    # only after the commit
    newest = latest(run_dir)                      # complete checkpoints only

A save writes into `.dylora-staging-*` beside the target, fsyncs files and folders, writes `manifest.json` last, renames
the folder to its name and fsyncs the parent; whoever looks sees no checkpoint or a whole one. A folder without a valid
manifest is not a checkpoint. Rotation renames to `.dylora-trash-*` before it deletes. `.dylora-lock` stays in the run
folder; what counts is the kernel's lock on it, which a killed process cannot leave behind.

Nothing here knows what a tensor is. Only the standard library is used, and every file-system call goes through `os.*`
(the lock through `fcntl`), where the tests put their faults. Everything that fails is a `UsageError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .errors import UsageError
from .errors import listed as listed_lines

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
LOCK = ".dylora-lock"
WORKERS = 4  # threads that hash and fsync; both release the GIL
MAX_MANIFEST_BYTES = 4 << 20  # 1024 experts need about 0.4 MiB
MAX_ENTRIES = 100_000
CHUNK = 1 << 18

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
# No step number in these names: tools that search for `checkpoint-(\d+)` anywhere in a name must not find one.
_PRIVATE = re.compile(r"\.dylora-(staging|trash|probe)-[0-9]+-[0-9a-f]{8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_AGAIN = "copy the checkpoint again from where it came, or use another one"
_REMEDIES = {
    "ENOSPC": "free space on that disk, or choose another output folder",
    "EDQUOT": "free space in your quota, or choose another output folder",
    "EROFS": "the file system is read-only: choose another output folder",
    "EACCES": "check the permissions of the folder, or choose another output folder",
    "EPERM": "check the permissions of the folder, or choose another output folder",
    "ENOENT": "create the folder that is to hold it",
    "ENOTDIR": "choose a folder, not a file",
    "EIO": "the disk reports an error: check it (dmesg), and choose a folder on another one",
    "ENOLCK": "the file system has no locks: choose a folder on another one",
    "ENOTSUP": "the file system lacks this: choose a folder on another one",
}


class FolderGone(UsageError):
    """The folder is not there, or was moved away while it was read; what was found in it says nothing."""


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
    digests: dict[str, tuple[int, str]] = field(default_factory=dict)  # to hand over: path -> (bytes, sha256)
    set_aside: Path | None = None  # after the save: where an incomplete folder of the target's name was moved to


@contextmanager
def explained(action: str, path: os.PathLike | str) -> Iterator[None]:
    """Any OSError inside becomes a UsageError: what could not be done to which path, why, and the remedy."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno, "no errno")
        remedy = _REMEDIES.get(name, "mend that, or choose another output folder")
        raise UsageError(f"cannot {action} {path}: {error.strerror or error} ({name}); {remedy}") from error


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
        with _private_name(target.parent, "staging") as path:
            try:
                with explained("create", path):
                    os.mkdir(path)
                staging = Staging(target, path)
                yield staging
                _seal(path, staging.digests)
                with _guard:
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
            raise UsageError(f"{target} is {_kind(found)}, not a folder: move it away, or choose another output folder")
        # A read error is no proof that it is incomplete, so it is an error here.
        return not _survey(target)[0]


def _seal(folder: Path, known: dict[str, tuple[int, str]]) -> None:
    """Hash and fsync every file, write the manifest, fsync every folder."""
    with explained("list", folder):
        entries = _entries(folder)
    parents, digests = _parents(entries), dict(known)
    problems = [f"{_shown(path)}: handed over, but not written" for path in known.keys() - entries.keys()]
    files, folders = [], [""]
    for path, found in entries.items():
        if stat.S_ISREG(found.st_mode):
            files.append(path)
        elif path in parents:
            folders.append(path)
        else:  # a reader would refuse it
            problems.append(f"{_shown(path)}: expected files, found {_kind(found)} without any")

    def digest(path: str) -> None:
        with explained("read back", folder / path):
            digests[path] = _sha256(folder / path, entries[path].st_size)

    def flush(path: str) -> None:
        with explained("flush", folder / path):
            _fsync(folder / path)

    files.sort(key=lambda path: (-entries[path].st_size, path))  # the largest first, and flushed while it is hashed
    jobs = [partial(job, path) for path in files for job in (flush, digest) if job is flush or path not in known]
    _parallel(lambda job: job(), jobs)

    listed = {path: {"bytes": digests[path][0], "sha256": digests[path][1]} for path in sorted(digests)}
    problems += _listed_files({"format_version": FORMAT_VERSION, "files": listed})[1]
    problems += [
        f"{_shown(path)}: expected the {entries[path].st_size} bytes it has, hashed were {digests[path][0]}"
        for path in files
        if digests[path][0] != entries[path].st_size
    ]
    data = json.dumps({"format_version": FORMAT_VERSION, "files": listed}, indent=1).encode() + b"\n"
    if len(data) > MAX_MANIFEST_BYTES:
        problems.append(f"{MANIFEST}: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
    if problems:
        raise UsageError(f"cannot publish what was written into {folder}:\n{listed_lines(sorted(problems))}")
    with explained("write", folder / MANIFEST):
        _write_new(folder / MANIFEST, data)
    for path in sorted(folders, key=len, reverse=True):  # a folder after those inside it
        with explained("flush", folder / path):
            _fsync(folder / path, folder=True)


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
            with _private_name(run_dir, "trash") as trash, explained("move away", complete[step]):
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
    run_dir, removed = Path(run_dir), []
    with writer_lock(run_dir):
        with explained("list", run_dir):
            names = sorted(os.listdir(run_dir))
        for path in [run_dir / name for name in names if _PRIVATE.fullmatch(name)]:
            if path.name not in _live:  # other threads of this process share its lock
                _remove(path)
                removed.append(path)
    return removed


def check_writable(run_dir: os.PathLike | str) -> None:
    """Write, fsync and remove a file in the run folder; a UsageError now, rather than at the first save."""
    run_dir = Path(run_dir)
    with writer_lock(run_dir), _private_name(run_dir, "probe") as probe, explained("write in", run_dir):
        try:
            _write_new(probe, b"probe\n")
        finally:
            _remove(probe)
        _fsync(run_dir, folder=True)


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


def is_complete(folder: os.PathLike | str) -> bool:
    """Whether there is a valid manifest and every file it lists has its size. Nothing is hashed, extras are allowed."""
    try:
        return _first_reason(Path(folder)) is None
    except UsageError:
        return False


def manifest_problems(folder: os.PathLike | str, *, hash: bool = True) -> list[str]:
    """Everything in which the folder is not what its manifest says, sorted; [] if it is sound.

    Names in the manifest are only compared with those found on disk: just files found there are opened, no link is
    followed. `hash=False` compares names and sizes.

    Raises: FolderGone if the folder is not there, or was moved away meanwhile; UsageError if it is not a folder.
    """
    folder = Path(folder)
    with _held_still(folder):
        try:
            problems, extras, intact = _survey(folder)
            problems += extras
            if hash:
                problems += filter(None, _parallel(partial(_hash_problem, folder), sorted(intact.items())))
        except OSError as error:
            problems = [_unreadable(error.filename or folder, error)]
    return sorted(problems)


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
                verdicts.append((step, path, _first_reason(path)))
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


def _first_reason(folder: Path) -> str | None:
    with _held_still(folder):
        try:
            return min(_survey(folder)[0], default=None)
        except OSError as error:
            return _unreadable(error.filename or folder, error)


@contextmanager
def _held_still(folder: Path) -> Iterator[None]:
    """What is found inside the block counts only if the folder is the same one at the end of it."""

    def identity() -> tuple[int, int] | None:
        with explained("read", folder):
            try:
                found = os.stat(folder)
            except FileNotFoundError:
                return None
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{folder} is not a folder: name a checkpoint folder")
        return found.st_dev, found.st_ino

    before = identity()
    if before is not None:
        yield
    if before is None or identity() != before:
        raise FolderGone(f"{folder} is not there, or was removed meanwhile (by rotation?): list the run folder again")


# ---- what a manifest says, and what is there ------------------------------------------------------------------------


def _survey(folder: Path) -> tuple[list[str], list[str], dict[str, tuple[int, str]]]:
    """(problems, files too many, path -> (bytes, sha256) of the files whose size is right). OSErrors pass."""
    entries = _entries(folder)
    try:
        text = _manifest_text(folder, entries.get(MANIFEST))
        listed, problems = _listed_files(json.loads(text, object_pairs_hook=_no_duplicates, parse_int=_small_int))
    except (ValueError, RecursionError) as error:
        return [f"{MANIFEST}: {str(error)[:300]}; {_AGAIN}"], [], {}
    intact = {}
    for path, (size, sha256) in listed.items():
        found = entries.get(path)
        if found is None:
            has = "no such file"
        elif not stat.S_ISREG(found.st_mode):
            has = _kind(found)
        elif found.st_size != size:
            has = f"{found.st_size} bytes"
        elif size > 1 << 30 and getattr(found, "st_blocks", size) * 512 < size >> 6:  # hours of hashing nothing
            has = f"a hole, {found.st_blocks * 512} bytes on disk"
        else:
            intact[path] = (size, sha256)
            continue
        problems.append(f"{_shown(path)}: expected a file of {size} bytes, found {has}; {_AGAIN}")
    known = {MANIFEST, *listed, *_parents(entries)}
    extras = [
        f"{_shown(path)}: expected only what {MANIFEST} lists, found {_kind(found)} more; move it out of the folder"
        for path, found in entries.items()
        if path not in known
    ]
    return problems, extras, intact


def _manifest_text(folder: Path, found: os.stat_result | None) -> str:
    if found is None:
        raise ValueError("expected in every checkpoint, not found: this save was never finished")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"expected a regular file, found {_kind(found)}")
    if found.st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"expected at most {MAX_MANIFEST_BYTES} bytes, found {found.st_size}")
    data = b"".join(_chunks(folder / MANIFEST, MAX_MANIFEST_BYTES))
    return data.decode("utf-8")


def _listed_files(manifest: object) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """path -> (bytes, sha256) of the entries that make sense, and the problems of those that do not."""
    if type(manifest) is not dict or type(manifest.get("format_version")) is not int:
        raise ValueError("expected an object with the integer format_version")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(f"expected format_version {FORMAT_VERSION}, found {manifest['format_version']}; update")
    if set(manifest) != {"format_version", "files"} or type(manifest["files"]) is not dict:
        raise ValueError("expected format_version and the object files, and nothing else")
    listed, problems = {}, []
    for path, entry in manifest["files"].items():
        if _is_bad(path):
            problems.append(f"{MANIFEST}: expected relative paths inside the folder, found {_shown(path)}; {_AGAIN}")
        elif (
            type(entry) is not dict
            or set(entry) != {"bytes", "sha256"}
            or type(entry["bytes"]) is not int
            or entry["bytes"] < 0
            or type(entry["sha256"]) is not str
            or not _SHA256.fullmatch(entry["sha256"])
        ):
            found = _shown(repr(entry))
            problems.append(f"{MANIFEST}: expected bytes and sha256 of {_shown(path)}, found {found}; {_AGAIN}")
        else:
            listed[path] = entry["bytes"], entry["sha256"]
    return listed, problems


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"expected each key once, found {_shown(key)} again")
        found[key] = value
    return found


def _small_int(digits: str) -> int:
    if len(digits) > 19:  # int() takes time that grows with the square of the length
        raise ValueError(f"expected numbers of at most 19 digits, found {len(digits)}")
    return int(digits)


def _hash_problem(folder: Path, item: tuple[str, tuple[int, str]]) -> str | None:
    path, (size, sha256) = item
    try:
        found = _sha256(folder / path, size)
    except OSError as error:
        return _unreadable(path, error)
    if found != (size, sha256):
        return f"{_shown(path)}: expected sha256 {sha256}, found {found[1]}: its content was changed; {_AGAIN}"
    return None


def _is_bad(path: str) -> bool:
    return "\\" in path or "\0" in path or path == MANIFEST or any(part in ("", ".", "..") for part in path.split("/"))


def _parents(entries: Iterable[str]) -> set[str]:
    return {path.rpartition("/")[0] for path in entries}


def _kind(found: os.stat_result) -> str:
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(found.st_mode), "a special file")


def _shown(name: object) -> str:
    """A name that can be printed on any terminal: no control characters, no lone surrogates, no megabytes."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = text if len(text) <= 200 else text[:200] + "..."
    return text if text.isprintable() else ascii(text)


def _unreadable(path: object, error: OSError) -> str:
    return f"{_shown(path)}: expected to read it, found: {error.strerror or error}; check the disk and permissions"


# ---- one writer -----------------------------------------------------------------------------------------------------

_guard = threading.Lock()
_held: dict[str, list[int]] = {}  # real path of a run folder -> [file descriptor of its lock, depth]
_live: set[str] = set()  # the private names that threads of this process are using now


@contextmanager
def writer_lock(run_dir: os.PathLike | str) -> Iterator[None]:
    """Be the one process that writes into this run folder; re-entrant within the process.

    Raises: UsageError naming the other writer's process and host, or why the folder cannot be written.
    """
    key = os.path.realpath(run_dir)
    with _guard:
        if key in _held:
            _held[key][1] += 1
        else:
            _held[key] = [_acquire(Path(run_dir)), 1]
    try:
        yield
    finally:
        with _guard:
            if key in _held:  # not so in a forked child, which holds nothing
                _held[key][1] -= 1
                if _held[key][1] == 0:
                    with suppress(OSError):
                        os.close(_held.pop(key)[0])


def _acquire(run_dir: Path) -> int:
    with explained("write in", run_dir):
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
    try:
        with explained("lock", run_dir / LOCK):
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:  # a byte far behind the text, which stays readable
                    os.lseek(descriptor, 1 << 30, os.SEEK_SET)
                    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                    raise
                os.lseek(descriptor, 0, os.SEEK_SET)
                holder = _shown(os.read(descriptor, 200).decode(errors="replace").strip()) or "unknown"
                raise UsageError(
                    f"{run_dir}: another process writes checkpoints here ({holder}); "
                    "stop it or wait for its end, or choose another output folder"
                ) from None
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    with suppress(OSError):  # for people; the lock itself holds without it
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "unknown")
        os.write(descriptor, f"process {os.getpid()} on {host}\n".encode())
    return descriptor


def _forget_locks() -> None:
    """In a forked child, such as a data loader's worker: it must neither keep the lock alive nor think it holds it."""
    global _guard
    _guard = threading.Lock()
    for descriptor, _ in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def _private_name(run_dir: Path, purpose: str) -> Iterator[Path]:
    path = Path(os.path.abspath(run_dir), f".dylora-{purpose}-{os.getpid()}-{os.urandom(4).hex()}")
    _live.add(path.name)
    try:
        yield path
    finally:
        _live.discard(path.name)


# ---- files ----------------------------------------------------------------------------------------------------------


def _entries(folder: Path) -> dict[str, os.stat_result]:
    """Everything below the folder, by relative POSIX path; links are not followed."""
    found: dict[str, os.stat_result] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                found[prefix + entry.name] = info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    pending.append(f"{prefix}{entry.name}/")
                if len(found) > MAX_ENTRIES:
                    raise OSError(errno.E2BIG, f"more than {MAX_ENTRIES} files", str(folder))
    return found


def _lstat(path: Path) -> os.stat_result | None:
    """None only if there is nothing; os.path.lexists would say so of an unreadable disk, too."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    """The content of a regular file, up to the chunk in which it exceeds `size` bytes."""
    descriptor = os.open(path, os.O_RDONLY | _BINARY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        while size >= 0 and (chunk := os.read(descriptor, CHUNK)):
            size -= len(chunk)
            yield chunk
    finally:
        os.close(descriptor)


def _sha256(path: Path, size: int) -> tuple[int, str]:
    digest, length = hashlib.sha256(), 0
    for chunk in _chunks(path, size):
        digest.update(chunk)
        length += len(chunk)
    return length, digest.hexdigest()


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(path: Path, *, folder: bool = False) -> None:
    if folder and os.name == "nt":  # Windows has no fsync of folders, and none of files opened for reading
        return
    how = 0 if folder else _BINARY  # a run folder may be a link
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


def _parallel(function: Callable, items: Iterable) -> list:
    """[function(item) ...]; the first exception is raised, and what has not begun by then is left out."""
    items = list(items)
    if WORKERS < 2 or len(items) < 2:
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="commit") as pool:
        return list(pool.map(function, items))
