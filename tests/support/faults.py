"""Faults at the k-th file-system operation of a function that runs in a child process.

    for k in itertools.count(1):
        outcome = run_with_fault(function, k, "kill")      # function(ack): calls ack("saved 10") when a save returned
        ...                                                # look at what the child left behind
        if not outcome.fired:
            break                                          # k was beyond the last operation: this run was clean

The child is a fork of this process, so nothing is imported again and the function may be a closure. In it, the
functions of `os` (and `fcntl.flock`, and `open` for writing) count the operations that the mode applies to, and the
k-th one fails or kills the process with SIGKILL. `os.fsync` is counted but not carried out: a killed process loses
nothing that it has written, and whether everything is flushed in time is to be read from `Outcome.calls`.

Files that are written by native code, such as those of safetensors, count as one write if the function that writes them
is named: `writers=[(checkpoint_module, "save_file")]`; its first argument that is a path names the file.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import functools
import io
import os
import select
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from dylora_moe.errors import UsageError

READS = {"scandir", "listdir", "stat", "lstat", "fstat", "read"}
CHANGES = {"open", "close", "write", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "ftruncate"}
LOCKS = {"flock"}
# What a mode does, and the operations it applies to; "half" writes half of the data before.
MODES = {
    "kill": CHANGES | LOCKS,
    "half-kill": {"write"},
    "EIO": CHANGES | LOCKS | READS,
    "ENOSPC": {"open", "write", "fsync", "mkdir", "rename"},
    "half-ENOSPC": {"write"},
}
TIMEOUT_S = 60


@dataclass
class Outcome:
    """What became of a child."""

    fired: bool = False  # whether there was a k-th operation
    killed: bool = False
    acks: list[str] = field(default_factory=list)  # what the function acknowledged
    error: str | None = None  # the name of the exception's class and its text
    calls: list[str] = field(default_factory=list)  # "fsync /path/of/file": every call and "ack ...", in order


def full_disk(monkeypatch, name: str, *, after: int = 0) -> None:
    """Every file that is opened for writing under this name lies on a full disk, except for the first `after` times.

    `save_file` of safetensors does not call `open`: it raises what it raises on a full disk (safetensors 0.8).
    """
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    real, seen = builtins.open, []

    def opened(path, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and not isinstance(path, int) and os.fsdecode(path).endswith(f"/{name}"):
            seen.append(path)
            if len(seen) > after:
                return real("/dev/full", mode, *args, **kwargs)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", opened)
    from safetensors import SafetensorError

    from dylora_moe.checkpoint import tensors

    save_file = tensors.save_file

    def saved(arrays, path, metadata=None):
        if os.fsdecode(path).endswith(f"/{name}") and len(seen) > after:  # the writer has opened it before
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(arrays, path, metadata=metadata)

    monkeypatch.setattr(tensors, "save_file", saved)


def run_with_fault(
    function: Callable[[Callable[[str], None]], object],
    k: int,
    mode: str,
    writers: Iterable[tuple[object, str]] = (),
) -> Outcome:
    """Run function(ack) in a forked child with a fault at its k-th operation; k = 0 only records the calls."""
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: the child does not use theirs
        child = os.fork()
    if child == 0:
        os.close(receiver)
        _run_child(function, _Shim(k, mode, sender), writers)
    os.close(sender)
    try:
        text = _read_all(receiver, child)
    finally:
        os.close(receiver)
        status = os.waitpid(child, 0)[1]
    outcome = Outcome(killed=os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
    for line in text.split("\0")[:-1]:
        kind, _, rest = line.partition(" ")
        if kind == "ack":
            outcome.acks.append(rest)
            outcome.calls.append(line)
        elif kind == "error":
            outcome.error = rest
        elif kind == "fired":
            outcome.fired = True
        elif kind != "end":
            outcome.calls.append(line)
    return outcome


def _read_all(receiver: int, child: int) -> str:
    parts, end = [], time.monotonic() + TIMEOUT_S
    while True:
        if not select.select([receiver], [], [], max(0.0, end - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"the child did not end within {TIMEOUT_S} s; it said:\n{b''.join(parts)[-2000:]!r}")
        part = os.read(receiver, 1 << 16)
        if not part:
            return b"".join(parts).decode(errors="surrogateescape")
        parts.append(part)


def _run_child(function: Callable, shim: _Shim, writers: Iterable[tuple[object, str]]) -> None:
    """Never returns: what pytest has open is no business of the child."""
    try:
        shim.install(writers)
        function(lambda text: shim.say(f"ack {text}"))
    except BaseException as error:
        shim.over = True
        details = "" if isinstance(error, UsageError) else traceback.format_exc()
        shim.say(f"error {type(error).__name__}: {error}\n{details}")
    finally:
        shim.over = True
        shim.say("end")
        os._exit(0)


class _Shim:
    def __init__(self, k: int, mode: str, sender: int):
        self.k, self.sender = k, sender
        self.half, self.fault = mode.startswith("half-"), mode.removeprefix("half-")
        self.applies = MODES[mode]
        self.count, self.guard = 0, threading.Lock()
        self.names: dict[int, str] = {}  # file descriptor -> path
        self.over = False  # whether the function has ended
        self.real_write = os.write
        self.unsaid = b""

    def say(self, text: str, now: bool = True) -> None:
        self.unsaid += os.fsencode(text) + b"\0"
        while now and self.unsaid:
            self.unsaid = self.unsaid[self.real_write(self.sender, self.unsaid) :]

    def install(self, writers: Iterable[tuple[object, str]]) -> None:
        for name in sorted((CHANGES | READS) - {"write"}):
            setattr(os, name, self.counted(name, getattr(os, name)))
        os.write = self.write
        fcntl.flock = self.counted("flock", fcntl.flock)
        builtins.open = io.open = self.counted_open(io.open)
        for module, name in writers:
            setattr(module, name, self.native_writer(getattr(module, name)))

    def due(self, name: str, where: object) -> bool:
        """Record a call; whether it is the one that is to fail."""
        if self.over:
            return False
        if isinstance(where, int):
            where = self.names.get(where, str(where))
        with self.guard:
            self.say(f"{name} {os.fsdecode(where)}", now=False)
            self.count += name in self.applies
            if name not in self.applies or self.count != self.k:
                return False
            self.say("fired")
        if self.fault == "kill" and not self.half:
            self.strike()
        return True

    def strike(self) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(TIMEOUT_S)
        code = getattr(errno, self.fault)
        raise OSError(code, os.strerror(code))

    def counted(self, name: str, real: Callable) -> Callable:
        @functools.wraps(real)
        def call(*args, **kwargs):
            due = self.due(name, args[0] if args else ".")
            if due and name != "close":
                self.strike()
            result = None if name == "fsync" else real(*args, **kwargs)
            if due:  # a close that fails has closed the file
                self.strike()
            if name == "open":
                self.names[result] = os.fsdecode(args[0])
            return result

        return call

    def write(self, descriptor: int, data: bytes) -> int:
        if self.due("write", descriptor):
            if self.half:
                self.real_write(descriptor, bytes(data)[: len(data) // 2])
            self.strike()
        return self.real_write(descriptor, data)

    def counted_open(self, real: Callable) -> Callable:
        @functools.wraps(real)
        def call(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return real(file, mode, *args, **kwargs)
            if self.due("open", file):
                self.strike()
            return _CountedFile(real(file, mode, *args, **kwargs), file, self)

        return call

    def native_writer(self, real: Callable) -> Callable:
        @functools.wraps(real)
        def call(*args, **kwargs):
            path = next(arg for arg in [*args, *kwargs.values()] if isinstance(arg, str | os.PathLike))
            due = self.due("write", path)
            if due and not self.half:
                self.strike()
            result = real(*args, **kwargs)
            if due:
                os.truncate(path, os.path.getsize(path) // 2)
                self.strike()
            return result

        return call


class _CountedFile:
    """A file opened for writing by `open`, with its writes and its close counted."""

    def __init__(self, file, name: object, shim: _Shim):
        self._file, self._name, self._shim = file, name, shim

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, data):
        if self._shim.due("write", self._name):
            if self._shim.half:
                self._file.write(data[: len(data) // 2])
                self._file.flush()
            self._shim.strike()
        return self._file.write(data)

    def close(self):
        if self._file.closed:
            return
        due = self._shim.due("close", self._name)
        self._file.close()
        if due:
            self._shim.strike()
