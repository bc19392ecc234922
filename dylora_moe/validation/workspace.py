"""Where a script writes its checkpoint, and how that is removed again whatever happens."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import formats
from ..errors import UsageError
from ..store import run_folder
from ..store.claim import claimed

# A folder is in this set from before it is made until after it is removed: what a signal prevents is done at exit.
_temporary: set[Path] = set()


@contextmanager
def temporary(prefix: str, keep: bool = False) -> Iterator[Path]:
    """Make a temporary folder. It is removed at the end, unless it is to be kept and nothing was raised.

    Raises:
        UsageError: If none can be made.
    """
    folder = temporary_root() / f"{prefix}{os.urandom(8).hex()}"
    _temporary.add(folder)
    try:
        _make_private(folder)
        yield folder
        if keep:
            _temporary.discard(folder)
    finally:
        if folder in _temporary:
            shutil.rmtree(folder, ignore_errors=True)
            _temporary.discard(folder)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise UsageError(
            f"No temporary folder can be made ({error.strerror or error}): set TMPDIR to a folder that can be written "
            "to, or give --output-dir."
        ) from None


@atexit.register
def _remove_what_is_left() -> None:
    for folder in _temporary:
        shutil.rmtree(folder, ignore_errors=True)


def check_output_folder(folder: Path) -> None:
    """Refuse a folder into which no checkpoint can be written, as far as that is seen without making it.

    Raises:
        UsageError: If it is a file, or holds a checkpoint already.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir {folder}: expected a folder, found a file.")
    target = folder / formats.CHECKPOINT
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists already; a checkpoint is never replaced: choose another --output-dir.")


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Make `folder` where it is missing. Unless a checkpoint is published in it, all that was made is removed again.

    Raises:
        UsageError: If nothing can be written there, or another process writes there.
    """
    check_output_folder(folder)
    with claimed(folder) as claim:
        run_folder.check_writable(folder)
        try:
            yield folder
        finally:
            if (folder / formats.CHECKPOINT).exists():
                claim.keep()


def temporary_root() -> Path:
    """Return the folder in which temporary folders are made.

    Raises:
        UsageError: If there is none that can be written to.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise UsageError(
            f"{error.strerror or error}: set TMPDIR to a folder with room, or give --output-dir."
        ) from None
