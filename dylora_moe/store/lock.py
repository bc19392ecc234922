"""One writer per run folder, and the names of what it is working on.

`.dylora-lock` stays in the run folder; what counts is the kernel's lock on it, which a killed process cannot leave
behind. The threads of a process share its lock. Only the standard library is used.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UsageError
from .files import PLAIN, explained, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = ".dylora-lock"

# No step number in these names: tools that search for `checkpoint-(\d+)` anywhere in a name must not find one.
_PRIVATE = re.compile(r"\.dylora-(staging|trash|probe)-[0-9]+-[0-9a-f]{8}")

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


@contextmanager
def private_name(run_dir: Path, purpose: str) -> Iterator[Path]:
    """A new path in the run folder, for staging, trash or a probe; until the block ends it is no leftover."""
    path = Path(os.path.abspath(run_dir), f".dylora-{purpose}-{os.getpid()}-{os.urandom(4).hex()}")
    _live.add(path.name)
    try:
        yield path
    finally:
        _live.discard(path.name)


def is_leftover(name: str) -> bool:
    """Whether a private name is no longer in use, as seen by who holds the lock: its owner has crashed."""
    return _PRIVATE.fullmatch(name) is not None and name not in _live


def guard() -> threading.Lock:
    """What only one thread at a time may do, be it in different run folders."""
    return _guard


def _acquire(run_dir: Path) -> int:
    with explained("write in", run_dir):
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | PLAIN, 0o666)
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
                holder = shown(os.read(descriptor, 200).decode(errors="replace").strip()) or "unknown"
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
