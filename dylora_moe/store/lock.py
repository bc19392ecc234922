"""The lock of a run folder: one process writes into it at a time.

The file `.dylora-lock` stays in the run folder. What counts is the kernel's lock on it, which ends with the process,
however that ends. The threads of a process share its lock; a forked child does not have it. (`filelock` offers less
here: it creates missing folders, and of two threads that acquire at once one times out.)

A lock counts only while the name leads to the file that is locked, since the file may be removed or replaced. A copy of
a run folder that consists of hard links (`cp -al`) shares the file with the original. Whoever locks one of them first
replaces its file by a new one.

While it writes, a process uses private names, such as `.dylora-staging-*`. Whoever holds the lock and finds such a name
that is not its own knows that the owner has crashed.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, shown
from .files import PLAIN, explained, lstat

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".dylora-lock"

# These names contain no step: tools that search for `checkpoint-(\d+)` anywhere in a name must not find one.
_PRIVATE = re.compile(r"\.dylora-(staging|trash|probe)-[0-9]+-[0-9a-f]{8}")

ATTEMPTS = 50  # to lock a file that others replace or remove at the same time
PAUSE_SECONDS = 0.02


@dataclass
class Held:
    """The lock of a run folder, which this process holds.

    Attributes:
        made: Whether this process made the lock file.
        discard: Whether to remove the lock file when the lock ends.
        blocks: How many nested `writer_lock` blocks hold it.
    """

    path: Path
    descriptor: int
    made: bool
    discard: bool = False
    blocks: int = 0


_guard = threading.Lock()
_held: dict[str, Held] = {}  # by the real path of the run folder
_live: set[str] = set()  # the private names that threads of this process are using


@contextmanager
def writer_lock(run_dir: os.PathLike | str) -> Iterator[Held]:
    """Hold the lock of a run folder inside the block. Blocks may be nested, and threads may share the lock.

    Raises:
        UsageError: if another process holds the lock (its id and host are named), or the folder cannot be written.
    """
    key = os.path.realpath(run_dir)
    with _guard:
        if key not in _held:
            _held[key] = _acquire(Path(run_dir))
        held = _held[key]
        held.blocks += 1
    try:
        yield held
    finally:
        with _guard:
            if _held.get(key) is held:  # a forked child has let go of it
                held.blocks -= 1
                if held.blocks == 0:
                    del _held[key]
                    _release(held)


@contextmanager
def private_name(run_dir: Path, purpose: str) -> Iterator[Path]:
    """Yield a new path in the run folder for "staging", "trash" or a "probe". During the block it is no leftover."""
    path = Path(os.path.abspath(run_dir), f".dylora-{purpose}-{os.getpid()}-{os.urandom(4).hex()}")
    _live.add(path.name)
    try:
        yield path
    finally:
        _live.discard(path.name)


def is_leftover(name: str) -> bool:
    """Return whether a name is a private one that is no longer in use. The caller holds the lock."""
    return _PRIVATE.fullmatch(name) is not None and name not in _live


def guard() -> threading.Lock:
    """Return the lock that serializes the threads of this process, whichever run folders they use."""
    return _guard


# ---- the lock file ----


def _acquire(run_dir: Path) -> Held:
    path, holder = Path(os.path.abspath(run_dir), LOCK), ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        with explained("write in", run_dir):
            descriptor, made = _open(path)
        kept = False
        try:
            with explained("lock", path):
                locked, found = _lock(descriptor), os.fstat(descriptor)
                holder = "" if locked else _text(descriptor)
                shared = found.st_nlink > 1
                if locked and not shared and _leads_to(path, found):
                    _sign(descriptor, run_dir)
                    kept = True
                    return Held(path, descriptor, made)
                if not locked and not (shared and _is_elsewhere(holder, run_dir)):
                    break
                own = _replace(path, found) if shared and _leads_to(path, found) else None
            if own is not None:
                return Held(path, own, made=False)
        finally:
            if not kept:
                with suppress(OSError):
                    os.close(descriptor)
    raise UsageError(
        f"{run_dir}: another process writes checkpoints here ({_shown_holder(holder)}); "
        "stop it or wait for its end, or choose another output folder"
    )


def _open(path: Path) -> tuple[int, bool]:
    """Open the lock file. Returns its descriptor, and whether it was made."""
    flags = os.O_RDWR | os.O_CREAT | PLAIN
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags, 0o666), False


def _lock(descriptor: int) -> bool:
    """Lock a file. Returns False if another process has locked it."""
    try:
        if sys.platform == "win32":  # lock a byte far behind the text, which others are to read
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise
        return False
    return True


def _leads_to(path: Path, found: os.stat_result) -> bool:
    """Return whether a path leads to the file that was opened, which may have been removed or replaced since."""
    there = lstat(path)
    return there is not None and (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino)


def _replace(path: Path, shared: os.stat_result) -> int | None:
    """Replace a lock file that other folders share by a new one, which is locked before it gets the name.

    Returns:
        The descriptor of the new file; None if another process is replacing the file, or has done so.
    """
    fresh = path.with_name(f"{LOCK}-new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | PLAIN, 0o666)
    done = False
    try:
        if _lock(descriptor) and _leads_to(fresh, os.fstat(descriptor)):  # otherwise another process has it, or had it
            if _leads_to(path, shared):
                _sign(descriptor, path.parent)
                os.replace(fresh, path)
                done = True
                return descriptor
            os.unlink(fresh)
        return None
    finally:
        if not done:
            os.close(descriptor)


def _release(held: Held) -> None:
    with suppress(OSError):
        if held.discard and _leads_to(held.path, os.fstat(held.descriptor)):
            os.unlink(held.path)
    with suppress(OSError):
        os.close(held.descriptor)


# ---- the text in it: it is for people, and tells which of several folders that share the file is locked ----


def _sign(descriptor: int, run_dir: Path) -> None:
    with suppress(OSError):  # the lock holds without it
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "unknown")
        os.write(descriptor, f"process {os.getpid()} on {host}\nfolder {os.stat(run_dir).st_ino}\n".encode())


def _text(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 400).decode(errors="replace")


def _shown_holder(text: str) -> str:
    return shown(text.partition("\n")[0].strip()) or "unknown"


def _is_elsewhere(text: str, run_dir: Path) -> bool:
    """Return whether the holder that signed this has locked another folder; False if nobody signed."""
    folder = re.search(r"^folder ([0-9]{1,20})$", text, re.MULTILINE)
    return folder is not None and int(folder[1]) != os.stat(run_dir).st_ino


def _forget_locks() -> None:
    """Let go of the locks in a forked child, such as a data loader worker: it neither holds them nor keeps them."""
    global _guard
    _guard = threading.Lock()
    for held in _held.values():
        with suppress(OSError):
            os.close(held.descriptor)
    _held.clear()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
