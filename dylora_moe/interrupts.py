"""Ctrl-C, SIGTERM and a closed terminal end a script by an exception, so that what is temporary is removed on the way.

with handled():              # once, around the whole script
    with shielded():         # inside, a signal waits: what is made and what must remember it belong together
        folder = make()
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_REASONS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_shields = 0
_waiting: list[int] = []


class Interrupted(KeyboardInterrupt):
    """A signal arrived. No `except Exception` on the way swallows it."""

    def __init__(self, number: int):
        super().__init__(_REASONS[signal.Signals(number).name])
        self.exit_code = 128 + number  # as shells report it


@contextmanager
def handled() -> Iterator[None]:
    """Inside, the signals raise `Interrupted`; afterwards they do what they did before."""
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
        for number, handler in before.items():
            signal.signal(number, handler)
        _waiting.clear()


@contextmanager
def shielded() -> Iterator[None]:
    """Inside, signals wait; the first of them is raised at the end."""
    global _shields
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
    if _waiting and not _shields:
        raise Interrupted(_waiting.pop(0))


def _received(number: int, frame) -> None:
    if _shields:
        _waiting.append(number)
    else:
        raise Interrupted(number)
