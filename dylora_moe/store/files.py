"""Files that may be hostile, on disks that may fail: no link is followed, every read is bounded, errors are explained.

Only the standard library is used, and every file-system call goes through `os.*`, where the tests put their faults.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UsageError

WORKERS = 4  # threads that hash and fsync; both release the GIL

CHUNK_BYTES = 1 << 18
MAX_DIGITS = 40  # int() takes time that grows with the square of the length
# Bytes as they are, never through a link, never waiting for the other end of a pipe.
PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_REMEDIES = {
    "ENOSPC": "free space on that disk, or choose another output folder",
    "EDQUOT": "free space in your quota, or choose another output folder",
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
    """What is wrong with one file; the text does not repeat the file's name."""


@contextmanager
def explained(action: str, path: os.PathLike | str) -> Iterator[None]:
    """Any OSError inside becomes a UsageError: what could not be done to which path, why, and the remedy."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno, "no errno")
        remedy = _REMEDIES.get(name, "mend that, or choose another output folder")
        raise UsageError(f"cannot {action} {path}: {error.strerror or error} ({name}); {remedy}") from error


def open_regular(path: Path) -> int:
    """The descriptor of a regular file, open for reading; the caller closes it. OSErrors pass."""
    descriptor = os.open(path, os.O_RDONLY | PLAIN)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def chunks(path: Path, size: int) -> Iterator[bytes]:
    """The content of a regular file, up to the chunk in which it exceeds `size` bytes. OSErrors pass."""
    descriptor = open_regular(path)
    try:
        while size >= 0 and (chunk := os.read(descriptor, CHUNK_BYTES)):
            size -= len(chunk)
            yield chunk
    finally:
        os.close(descriptor)


def read_json(path: Path, most: int) -> object:
    """Parse a regular file of at most `most` bytes. OSErrors pass; FileProblem as of `parse_json`."""
    raw = b"".join(chunks(path, most))
    if len(raw) > most:
        raise FileProblem(f"expected at most {most} bytes, found more")
    return parse_json(raw)


def parse_json(raw: bytes) -> object:
    """What UTF-8 JSON says.

    Raises:
        FileProblem: for what is no JSON; for a key that stands twice, since readers would disagree about it; and for
            numbers and depths that no honest file has.
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
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise FileProblem(f"expected each key once, found {twice[:80]!r} twice")
    return result


def _small_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise FileProblem(f"expected numbers of at most {MAX_DIGITS} digits, found {len(digits)}")
    return int(digits)


def is_hole(info: os.stat_result) -> bool:
    """Whether a large file takes next to nothing on the disk: reading all its zeros would take hours."""
    return info.st_size > 1 << 30 and getattr(info, "st_blocks", info.st_size) * 512 < info.st_size >> 6


def kind(info: os.stat_result) -> str:
    """What it is, for people: a file, a folder, a symbolic link, ..."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(info.st_mode), "a special file")


def shown(name: object) -> str:
    """A name that can be printed on any terminal: no control characters, no lone surrogates, no megabytes."""
    text = str(name)
    text = text if len(text) <= 200 else text[:200] + "..."
    return text if text.isprintable() else ascii(text)


# ---- files ----------------------------------------------------------------------------------------------------------


def lstat(path: Path) -> os.stat_result | None:
    """None only if there is nothing; os.path.lexists would say so of an unreadable disk, too."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync(path: Path, *, folder: bool = False) -> None:
    if folder and os.name == "nt":  # Windows has no fsync of folders, and none of files opened for reading
        return
    how = 0 if folder else PLAIN  # a run folder may be a link
    descriptor = os.open(path, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | how)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Best effort: what stays is removed by the next save."""
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            from shutil import rmtree  # late, for a light import

            rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def parallel(function: Callable, items: Iterable) -> list:
    """[function(item) ...]; the first exception is raised, and what has not begun by then is left out."""
    items = list(items)
    if WORKERS < 2 or len(items) < 2:
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor  # late, for a light import

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="files") as pool:
        return list(pool.map(function, items))
