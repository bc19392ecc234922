"""Where a script writes its checkpoint, and how that is removed again whatever happens."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoint import formats
from ..errors import UsageError
from ..store import run_folder
from ..store.lock import LOCK
from ..system import interrupts

_temporary: set[Path] = set()


@contextmanager
def temporary(prefix: str, keep: bool = False) -> Iterator[Path]:
    """A new temporary folder. Removed at the end, unless it is to be kept and nothing was raised.

    Raises:
        UsageError: where none can be made.
    """
    folder, done = None, False
    try:
        with interrupts.shielded():
            folder = _make_temporary(prefix)
        yield folder
        done = True
    finally:
        with interrupts.shielded():
            if folder is not None:
                _temporary.discard(folder)
                if not (keep and done):
                    shutil.rmtree(folder, ignore_errors=True)


def _make_temporary(prefix: str) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise UsageError(
            f"No temporary folder can be made ({error.strerror or error}): set TMPDIR to a folder that can be written "
            "to, or give --output-dir."
        ) from None
    _temporary.add(folder)
    return folder


@atexit.register
def _remove_what_is_left() -> None:
    """A second Ctrl-C may have cut the removal short."""
    for folder in _temporary:
        shutil.rmtree(folder, ignore_errors=True)


def check_output_folder(folder: Path) -> None:
    """Whether a checkpoint could go into `folder`, as far as can be seen without making it.

    Raises:
        UsageError: where it is a file, or holds a checkpoint already.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir {folder}: expected a folder, found a file.")
    target = folder / formats.CHECKPOINT
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists already; a checkpoint is never replaced: choose another --output-dir.")


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """`folder`, made where it is missing; unless a checkpoint is published in it, all that was made is removed.

    Raises:
        UsageError: where nothing can be written there.
    """
    check_output_folder(folder)
    made: list[Path] = []
    had_lock = (folder / LOCK).exists()
    try:
        with interrupts.shielded():
            made = run_folder.make_run_dir(folder)
        run_folder.check_writable(folder)
        yield folder
    finally:
        with interrupts.shielded():
            if not (folder / formats.CHECKPOINT).exists():
                _remove_traces(folder, made, had_lock)


def _remove_traces(folder: Path, made: list[Path], had_lock: bool) -> None:
    with suppress(OSError, UsageError):
        run_folder.clean_leftovers(folder)
    if not had_lock:
        with suppress(OSError):
            (folder / LOCK).unlink()
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def temporary_root() -> Path:
    """The folder in which temporary ones are made.

    Raises:
        UsageError: where there is none that can be written to.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise UsageError(
            f"{error.strerror or error}: set TMPDIR to a folder with room, or give --output-dir."
        ) from None
