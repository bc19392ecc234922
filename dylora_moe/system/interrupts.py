"""Turn Ctrl-C, SIGTERM and a closed terminal into an exception, so that a script removes its temporary files and ends.

with handled():              # once, around the whole script
    work()
    check()                  # raises again if a library has swallowed the exception
"""

from __future__ import annotations

import atexit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REASONS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
DEAF_SECONDS = 2.0  # after the first signal: an impatient second Ctrl-C must not cut the cleaning up short

_first: tuple[int, float] | None = None  # number and time of the first signal that was raised


class Interrupted(KeyboardInterrupt):
    """A signal arrived. As a KeyboardInterrupt it passes every `except Exception`."""

    def __init__(self, number: int):
        super().__init__(_REASONS[signal.Signals(number).name])
        self.exit_code = 128 + number  # as shells report it


@contextmanager
def handled() -> Iterator[None]:
    """Raise `Interrupted` inside the block when SIGINT, SIGTERM or SIGHUP arrives.

    The block ends by restoring the previous handlers, unless a signal arrived: then the process is about to end.
    """
    global _first
    _first = None
    before = {}
    try:
        for name in _REASONS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a job in the background
                before[number] = signal.signal(number, _received)
    except ValueError:  # not in the main thread, where alone handlers can be set
        pass
    try:
        yield
    finally:
        if _first is None:
            for number, handler in before.items():
                signal.signal(number, handler)


def arrived() -> Interrupted | None:
    """Return the first signal, even if another exception took its place, as happens in an interrupted import."""
    return None if _first is None else Interrupted(_first[0])


def check() -> None:
    """Raise `Interrupted` again if a signal has arrived."""
    if _first is not None:
        raise Interrupted(_first[0])


def _received(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is None:
        _first = number, time.monotonic()
        # When Python exits it restores the default actions. Another signal then would change the exit code.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    elif time.monotonic() - _first[1] < DEAF_SECONDS:
        return
    raise Interrupted(number)
