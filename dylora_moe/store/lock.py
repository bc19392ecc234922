"""The lock of a run folder: one process writes into it at a time.

The file `.dylora-lock` stays in the run folder. What counts is the kernel's lock on it, which ends with the process,
however that ends. The threads of a process share its lock; a forked child does not have it. (`filelock` offers less
here: it creates missing folders, and of two threads that acquire at once one times out.)

While it writes, a process uses private names, such as `.dylora-staging-*`. Whoever holds the lock and finds such a name
that is not its own knows that the owner has crashed.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UsageError
from .files import PLAIN, explained, shown

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".dylora-lock"

# These names contain no step: tools that search for `checkpoint-(\d+)` anywhere in a name must not find one.
_PRIVATE = re.compile(r"\.dylora-(staging|trash|probe)-[0-9]+-[0-9a-f]{8}")

_guard = threading.Lock()
_held: dict[str, list[int]] = {}  # real path of a run folder -> [descriptor of its lock file, nested `writer_lock`s]
_live: set[str] = set()  # the private names that threads of this process are using


@contextmanager
def writer_lock(run_dir: os.PathLike | str) -> Iterator[None]:
    """Hold the lock of a run folder inside the block. Blocks may be nested, and threads may share the lock.

    Raises:
        UsageError: if another process holds the lock (its id and host are named), or the folder cannot be written.
    """
    key = os.path.realpath(run_dir)
    with _guard:
        if key not in _held:
            _held[key] = [_acquire(Path(run_dir)), 0]
        _held[key][1] += 1
    try:
        yield
    finally:
        with _guard:
            if key in _held:  # a forked child has let go of it
                _held[key][1] -= 1
                if _held[key][1] == 0:
                    with suppress(OSError):
                        os.close(_held.pop(key)[0])


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


def _acquire(run_dir: Path) -> int:
    with explained("write in", run_dir):
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | PLAIN, 0o666)
    try:
        with explained("lock", run_dir / LOCK):
            try:
                if sys.platform == "win32":  # lock a byte far behind the text, which others are to read
                    os.lseek(descriptor, 1 << 30, os.SEEK_SET)
                    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                    raise
                os.lseek(descriptor, 0, os.SEEK_SET)
                holder = shown(os.read(descriptor, 200).decode(errors="replace").strip()) or "unknown"
                raise UsageError(
                    f"{run_dir}: another process writes checkpoints here ({holder}); "
                    "stop it or wait for its end, or choose another output folder"
                ) from None
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    with suppress(OSError):  # the text is for people; the lock holds without it
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "unknown")
        os.write(descriptor, f"process {os.getpid()} on {host}\n".encode())
    return descriptor


def _forget_locks() -> None:
    """Let go of the locks in a forked child, such as a data loader worker: it neither holds them nor keeps them."""
    global _guard
    _guard = threading.Lock()
    for descriptor, _ in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
