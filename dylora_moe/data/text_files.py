"""Finding the files of a folder, and reading those that hold text, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError

COMPRESSED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
# Endings of compressed files and archives that are not read, and what unpacks them.
NOT_READ = {".zst": "zstd -d", ".lz4": "lz4 -d", ".zip": "unzip", ".7z": "7z x", ".rar": "unrar x", ".tar": "tar xf"}
NOT_READ |= {".tgz": "tar xf"}
# What `git clone` leaves in the place of a file if Git LFS is not installed.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def ending(path: Path) -> str:
    """Return the ending that says what a file holds, in lower case; of `a.jsonl.gz` it is `.jsonl`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def stem(path: Path) -> str:
    """Return the name of a file without its ending; of `a.jsonl.gz` it is `a`."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def refuse_compression(path: Path) -> None:
    """Raise UsageError if a file is compressed, or an archive, in a way that is not read."""
    suffix = ending(path)  # of `a.tar.gz` it is `.tar`
    if suffix in NOT_READ:
        raise UsageError(
            f"{path}: expected a data file, or one compressed as {', '.join(COMPRESSED)}, found {suffix}; unpack it "
            f"first, for instance with `{NOT_READ[suffix]}`"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        if not isinstance(error, OSError) or error.errno is None:  # of gzip, bz2 and lzma
            raise UsageError(f"{path}: is not a whole compressed file ({error}); restore it from its source") from error
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error


def check_readable(path: Path) -> None:
    """Raise UsageError if a file cannot be read, is empty, a Git LFS pointer, or no file but a pipe or a device."""
    if not path.is_file():  # its end may never come, and what was looked at is gone
        raise UsageError(f"{path}: expected a file or a folder, found a pipe or a device; write its content to a file")
    with _readable(path), path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        raise UsageError(f"{path}: is empty (0 bytes); expected documents")
    _check_no_pointer(path, start)


def _check_no_pointer(path: Path, start: bytes) -> None:
    if start.startswith(LFS_POINTER):
        raise UsageError(f"{path}: is a Git LFS pointer, not the file itself; fetch the files with git lfs pull")


def content_of(path: Path) -> bytes:
    """Return the content of a file, decompressed. Raises UsageError."""
    with _readable(path):
        content = path.read_bytes()
        _check_no_pointer(path, content)
        decompress = COMPRESSED.get(path.suffix.lower())
        return content if decompress is None else decompress(content)


def text_of(path: Path) -> str | None:
    """Return the text of a file, without a byte order mark; None if it is not UTF-8 text. Raises UsageError."""
    content = content_of(path)
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
