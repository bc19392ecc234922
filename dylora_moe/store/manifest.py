"""The manifest: which files a checkpoint has, and whether they are unchanged.

    {"format_version": 1, "files": {"router.safetensors": {"bytes": 16520, "sha256": "..."}, ...}}

It lists every file of the folder except itself, by relative POSIX path, and is written last: a folder without a valid
manifest is not a checkpoint. A manifest is not trusted. Its paths are only compared with those that are found in the
folder, and no link is followed but those of the Hub's cache. Files that the Hub or a desktop adds to a checkpoint may
be beside those that it lists, and so may a tokenizer; they are never read. Only the standard library is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..errors import UsageError, shown
from .files import chunks, explained, is_hole, kind, parallel, read_json
from .hub_cache import status

MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # of the manifest itself
MAX_MANIFEST_BYTES = 4 << 20  # 1024 experts need about 0.4 MiB
MAX_ENTRIES = 100_000

Digests = dict[str, tuple[int, str]]  # path -> (bytes, sha256)
Digest = Callable[[Path, int], tuple[int, str]]  # as `file_digest`
Identity = tuple[int, int]  # device and inode of a folder

_TOKENIZER = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\.model|tekken\.json|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|sentencepiece\.bpe\.model|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja"
)
# What may be in a checkpoint though no manifest lists it: files of git, the Hub, the Trainer, desktops and a tokenizer.
_BESIDE = re.compile(
    r"README\.md|LICENSE(\.md|\.txt)?|training_args\.bin|\.git(attributes|ignore)|\.(git|cache/huggingface)/.+"
    rf"|(.+/)?(\.DS_Store|Thumbs\.db)|{_TOKENIZER.pattern}",
    re.DOTALL,
)
_FOLDERS_BESIDE = re.compile(r"\.git(/.+)?|\.cache(/huggingface(/.+)?)?|additional_chat_templates", re.DOTALL)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "copy the checkpoint again from where it came, or use another one"


class FolderGone(UsageError):
    """A folder does not exist, or was moved away while it was read, so that what was found in it means nothing."""


def manifest_problems(folder: os.PathLike | str, digest: Digest | None = None) -> list[str]:
    """Return all differences between a folder and its manifest, sorted; [] if it is sound.

    Args:
        digest: called instead of `file_digest`, by a caller that examines the content while it is read.

    Raises:
        FolderGone: if the folder does not exist, or is moved away while it is read.
        UsageError: if it is not a folder.
    """
    folder = Path(folder)
    with held_still(folder):
        try:
            problems, extras, intact = survey(folder)
            problems += extras
            check = partial(_hash_problem, folder, digest or file_digest)
            problems += filter(None, parallel(check, sorted(intact.items())))
        except OSError as error:
            problems = [_unreadable(error.filename or folder, error)]
    return sorted(problems)


def first_reason(folder: Path) -> str | None:
    """Return why a folder is not a complete checkpoint, or None. Raises as `manifest_problems`.

    It is complete if its manifest is valid and all files have the listed sizes. Nothing is hashed; others may be there.
    """
    with held_still(folder):
        try:
            return min(survey(folder)[0], default=None)
        except OSError as error:
            return _unreadable(error.filename or folder, error)


def survey(folder: Path) -> tuple[list[str], list[str], Digests]:
    """Return the problems, those of unlisted files, and the entries of files with the right size. May raise OSError."""
    entries = list_entries(folder)
    try:
        listed, problems = _read(folder, entries.get(MANIFEST))
    except ValueError as error:
        return [f"{MANIFEST}: {str(error)[:300]}; {_AGAIN}"], [], {}
    intact = {}
    for path, (size, sha256) in listed.items():
        found = entries.get(path)
        if found is None:
            has = "no such file"
        elif not stat.S_ISREG(found.st_mode):
            has = kind(found)
        elif found.st_size != size:
            has = f"{found.st_size} bytes"
        elif is_hole(found):
            has = f"a hole, {found.st_blocks * 512} bytes on disk"
        else:
            intact[path] = (size, sha256)
            continue
        problems.append(f"{shown(path)}: expected a file of {size} bytes, found {has}; {_AGAIN}")
    known = {MANIFEST, *listed, *parents(entries)}
    known |= {path for path, found in entries.items() if may_be_beside(path, found)}
    extras = [
        f"{shown(path)}: expected only what {MANIFEST} lists, found {kind(found)} more; move it out of the folder"
        for path, found in entries.items()
        if path not in known
    ]
    return problems, extras, intact


def read_manifest(folder: Path) -> Digests:
    """Return what the manifest of a folder lists. Raises UsageError if there is none, or it is not valid."""
    try:
        listed, problems = _read(folder, list_entries(folder).get(MANIFEST))
    except (OSError, ValueError) as error:
        listed, problems = {}, [f"{MANIFEST}: {error}"]
    if problems:
        raise UsageError(f"{folder} is not a checkpoint: {problems[0]}")
    return listed


def encode(digests: Digests) -> tuple[bytes, list[str]]:
    """Return the bytes of a manifest, which the order of `digests` does not change, and what a reader would refuse."""
    files = {path: {"bytes": size, "sha256": sha256} for path, (size, sha256) in sorted(digests.items())}
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    data = json.dumps(manifest, indent=1).encode() + b"\n"
    problems = _check(manifest)[1]
    if len(data) > MAX_MANIFEST_BYTES:
        problems.append(f"{MANIFEST}: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
    return data, problems


def list_entries(folder: Path) -> dict[str, os.stat_result]:
    """Return everything below a folder, by relative POSIX path. Only links of the Hub's cache are followed.

    May raise OSError.
    """
    found: dict[str, os.stat_result] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                found[prefix + entry.name] = info = status(Path(entry.path))
                if stat.S_ISDIR(info.st_mode):
                    pending.append(f"{prefix}{entry.name}/")
                if len(found) > MAX_ENTRIES:
                    raise OSError(errno.E2BIG, f"more than {MAX_ENTRIES} files", str(folder))
    return found


def may_be_beside(path: str, found: os.stat_result) -> bool:
    """Return whether a file, or a folder for such files, may be in a checkpoint though no manifest lists it."""
    if stat.S_ISDIR(found.st_mode):
        return _FOLDERS_BESIDE.fullmatch(path) is not None
    return stat.S_ISREG(found.st_mode) and _BESIDE.fullmatch(path) is not None


def is_tokenizer_file(path: str) -> bool:
    """Return whether a relative POSIX path is that of a file of a tokenizer."""
    return _TOKENIZER.fullmatch(path) is not None


def parents(paths: Iterable[str]) -> set[str]:
    """Return the folders that hold the paths, "" for the outermost."""
    return {path.rpartition("/")[0] for path in paths}


def file_digest(path: Path, size: int) -> tuple[int, str]:
    """Return (bytes, SHA-256) of a regular file, reading little more than `size` bytes. May raise OSError."""
    digest, length = hashlib.sha256(), 0
    for chunk in chunks(path, size):
        digest.update(chunk)
        length += len(chunk)
    return length, digest.hexdigest()


def _read(folder: Path, found: os.stat_result | None) -> tuple[Digests, list[str]]:
    if found is None:
        raise ValueError("expected in every checkpoint, not found: this save was never finished")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"expected a regular file, found {kind(found)}")
    return _check(read_json(folder / MANIFEST, MAX_MANIFEST_BYTES))


def _check(manifest: object) -> tuple[Digests, list[str]]:
    """Return the valid entries of a manifest, and the problems of the others."""
    if type(manifest) is not dict or type(manifest.get("format_version")) is not int:
        raise ValueError("expected an object with the integer format_version")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(f"expected format_version {FORMAT_VERSION}, found {manifest['format_version']}; update")
    if set(manifest) != {"format_version", "files"} or type(manifest["files"]) is not dict:
        raise ValueError("expected format_version and the object files, and nothing else")
    listed, problems = {}, []
    for path, entry in manifest["files"].items():
        if not _is_inside(path):
            problems.append(f"{MANIFEST}: expected relative paths inside the folder, found {shown(path)}; {_AGAIN}")
        elif (
            type(entry) is not dict
            or set(entry) != {"bytes", "sha256"}
            or type(entry["bytes"]) is not int
            or entry["bytes"] < 0
            or type(entry["sha256"]) is not str
            or not _SHA256.fullmatch(entry["sha256"])
        ):
            found = shown(repr(entry))
            problems.append(f"{MANIFEST}: expected bytes and sha256 of {shown(path)}, found {found}; {_AGAIN}")
        else:
            listed[path] = entry["bytes"], entry["sha256"]
    return listed, problems


def _is_inside(path: str) -> bool:
    return not (path == MANIFEST or set(path) & set("\\\0") or set(path.split("/")) & {"", ".", ".."})


def _hash_problem(folder: Path, digest: Digest, item: tuple[str, tuple[int, str]]) -> str | None:
    path, expected = item
    try:
        found = digest(folder / path, expected[0])
    except OSError as error:
        return _unreadable(path, error)
    if found != expected:
        return f"{shown(path)}: expected sha256 {expected[1]}, found {found[1]}: its content was changed; {_AGAIN}"
    return None


def _unreadable(path: object, error: OSError) -> str:
    return f"{shown(path)}: expected to read it, found: {error.strerror or error}; check the disk and permissions"


@contextmanager
def held_still(folder: Path, before: Identity | None = None) -> Iterator[Identity]:
    """Check at the end of the block that a folder was not replaced, so that what was found in it counts.

    Args:
        before: the identity that an earlier block has yielded, if the folder must be the same since then.

    Raises:
        FolderGone: if it is not, instead of any exception of the block.
        UsageError: if it is not a folder.
    """

    def identity() -> Identity | None:
        with explained("read", folder):
            try:
                found = os.stat(folder)
            except FileNotFoundError:
                return None
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{folder} is not a folder: name a checkpoint folder")
        return found.st_dev, found.st_ino

    gone = FolderGone(f"{folder} is not there, or was removed meanwhile (by rotation?): list the run folder again")
    before = before or identity()
    if before is None:
        raise gone
    try:
        yield before
    except Exception as error:
        if identity() != before:
            raise gone from error
        raise
    if identity() != before:
        raise gone
