"""Finding the text files of a folder and reading them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError


def text_of(path: Path) -> str | None:
    """Return the text of a file, without a byte order mark; None if it is not UTF-8 text."""
    content = path.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in the order of their paths, without hidden ones, caches and linked folders."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path
