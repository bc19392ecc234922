"""Ctrl-C, SIGTERM and a closed terminal end a script by an exception, so that what is temporary is removed on the way.

with handled():              # once, around the whole script
    with shielded():         # inside, a signal waits: what is made and what must remember it belong together
        folder = make()
    check()                  # raises again what a library has swallowed
"""

from __future__ import annotations

import atexit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

_REASONS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
DEAF_SECONDS = 2.0  # after the first signal, an impatient second one must not cut the removal short

_shields = 0
_waiting: int | None = None
_first: tuple[int, float] | None = None  # signal and time of the one that was raised


class Interrupted(KeyboardInterrupt):
    """A signal arrived. No `except Exception` on the way swallows it."""

    def __init__(self, number: int):
        super().__init__(_REASONS[signal.Signals(number).name])
        self.exit_code = 128 + number  # as shells report it


@contextmanager
def handled() -> Iterator[None]:
    """Inside, the signals raise `Interrupted`.

    Afterwards they do what they did before, unless one was raised: then the process is on its way out, and this stays.
    """
    global _waiting, _first
    _waiting = _first = None
    before = {}
    try:
        for name in _REASONS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a job in the background
                before[number] = signal.signal(number, _received)
    except ValueError:  # not the main thread: whoever started it handles signals
        pass
    try:
        yield
    finally:
        if _first is None:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def shielded() -> Iterator[None]:
    """Inside, signals wait; the first of them is raised at the end."""
    global _shields, _waiting
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
    if _waiting is not None and not _shields:
        number, _waiting = _waiting, None
        _raise(number)


def arrived() -> Interrupted | None:
    """The first signal that was raised, whatever became of it: what an interrupted import raises is up to that."""
    return None if _first is None else Interrupted(_first[0])


def check() -> None:
    """Raise `Interrupted` if a signal was raised already."""
    if _first is not None:
        raise Interrupted(_first[0])


def _received(number: int, frame) -> None:
    global _waiting
    if _first is not None and time.monotonic() - _first[1] < DEAF_SECONDS:
        return
    if _shields:
        _waiting = _waiting or number
    else:
        _raise(number)


def _raise(number: int) -> None:
    global _first
    if _first is None:
        _first = number, time.monotonic()
        # Python's own end gives each signal back its default action, which would change the exit code.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    raise Interrupted(number)
