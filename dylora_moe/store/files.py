"""Reading and writing files that may be hostile, on disks that may fail.

No symbolic link is followed but those of the Hub's cache (hub_cache.py), every read is bounded, and every error says
what to do about it. Only the standard library is used, and every access to the file system is a call of `os.*`, where
the tests inject their faults.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ..errors import UsageError
from .hub_cache import content_of

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 4  # threads that hash and fsync; both release the GIL
CHUNK_BYTES = 1 << 18
MAX_DIGITS = 40  # the time of int() grows with the square of the number of digits
# Read bytes as they are, never follow a link, and never wait for the other end of a pipe.
PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_REMEDIES = {
    "ENOSPC": "free space on that disk, or choose another output folder",
    "EDQUOT": "free space in your quota, or choose another output folder",
    "EFBIG": "allow larger files (ulimit -f unlimited), or choose another output folder",
    "EROFS": "the file system is read-only: choose another output folder",
    "EACCES": "check the permissions of the folder, or choose another output folder",
    "EPERM": "check the permissions of the folder, or choose another output folder",
    "ENOENT": "create the folder that is to hold it",
    "ENOTDIR": "choose a folder, not a file",
    "EIO": "the disk reports an error: check it (dmesg), and choose a folder on another one",
    "ENOLCK": "the file system has no locks: choose a folder on another one",
    "ENOTSUP": "the file system lacks this: choose a folder on another one",
}


class FileProblem(ValueError):
    """A file is not what it should be. The message leaves out the name of the file, which the caller adds."""


@contextmanager
def explained(action: str, path: os.PathLike | str) -> Iterator[None]:
    """Turn an OSError inside the block into a UsageError that names the action, the path, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "no errno")
        remedy = _REMEDIES.get(name, "mend that, or choose another output folder")
        raise UsageError(f"cannot {action} {path}: {error.strerror or error} ({name}); {remedy}") from error


@contextmanager
def native_errors() -> Iterator[None]:
    """Raise the OSError that native code (safetensors, tokenizers, torch) reports in the words of another exception."""
    try:
        yield
    except (OSError, UsageError):
        raise
    except Exception as error:
        text = str(error)
        words = ("PytorchStream", "inline_container", "os error", "open file failed")
        if not any(word in text for word in words):
            raise
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
        code = next((c for c in codes if os.strerror(c) in text or f"os error {c})" in text), None)
        raise OSError(code, os.strerror(code) if code else text.splitlines()[0][:200]) from error


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes. May raise OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | PLAIN)
    except OSError as error:
        content = content_of(path) if error.errno == errno.ELOOP else None  # a link
        if content is None:
            raise
        descriptor = os.open(content, os.O_RDONLY | PLAIN)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def chunks(path: Path, size: int) -> Iterator[bytes]:
    """Yield the content of a regular file, up to the chunk that goes beyond `size` bytes. May raise OSError."""
    descriptor = open_regular(path)
    try:
        while size >= 0 and (chunk := os.read(descriptor, CHUNK_BYTES)):
            size -= len(chunk)
            yield chunk
    finally:
        os.close(descriptor)


def read_json(path: Path, most: int) -> object:
    """Parse a JSON file of at most `most` bytes. Raises FileProblem like `parse_json`, and OSError."""
    raw = b"".join(chunks(path, most))
    if len(raw) > most:
        raise FileProblem(f"expected at most {most} bytes, found more")
    return parse_json(raw)


def parse_json(raw: bytes) -> object:
    """Parse JSON in UTF-8.

    Raises:
        FileProblem: if it is not JSON, if a key occurs twice (readers would disagree about its value), or if a number
            is too long or the nesting too deep for an honest file.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_small_int)
    except FileProblem:
        raise
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"expected JSON, found something else ({type(error).__name__}: {str(error)[:120]})") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FileProblem(f"expected each key once, found {twice[:80]!r} twice")
    return result


def _small_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise FileProblem(f"expected numbers of at most {MAX_DIGITS} digits, found {len(digits)}")
    return int(digits)


def is_hole(info: os.stat_result) -> bool:
    """Return whether a large file is sparse, almost empty on the disk: reading its zeros could take hours."""
    return info.st_size > 1 << 30 and getattr(info, "st_blocks", info.st_size) * 512 < info.st_size >> 6


def kind(info: os.stat_result) -> str:
    """Describe the type of a file for people: "a file", "a folder", "a symbolic link", ..."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(info.st_mode), "a special file")


def lstat(path: Path) -> os.stat_result | None:
    """Return the status of a path, or None if nothing is there. Other OSErrors pass, unlike in `os.path.lexists`."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def write_new(path: Path, data: bytes) -> None:
    """Create a file, write all of `data` and fsync it. Raises FileExistsError if something is there already."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync(path: Path, *, folder: bool = False) -> None:
    """Flush a file, or the entries of a folder, to the disk. File systems that cannot flush folders are left alone."""
    if folder and os.name == "nt":  # Windows can flush no folder, and no file that is open for reading only
        return
    flags = 0 if folder else PLAIN  # a run folder may be a link
    descriptor = os.open(path, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder tree as far as possible; the next save removes the rest."""
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            from shutil import rmtree  # here, to keep the import of this module light

            rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return [function(item) for item in items], computed by `WORKERS` threads. The first exception is raised."""
    items = list(items)
    if WORKERS < 2 or len(items) < 2:
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor  # as above

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="files") as pool:
        return list(pool.map(function, items))
