"""The links of the Hub's cache, the only ones that are followed: from a snapshot to the content of its files.

    models--org--name/snapshots/<revision>/router.safetensors -> ../../blobs/<etag>
    models--org--name/blobs/<etag> -> ../../blobs/<2 digits>/<hash>      where repositories share their large files

A link counts only if it is written exactly like this and leads to a regular file of the same cache.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_HASH = re.compile(r"[0-9a-f]{64}")


def status(path: Path) -> os.stat_result:
    """Return the status of a path, and of the content for a link of the Hub's cache. Others are not followed.

    Raises:
        OSError: If nothing is there.
    """
    found = os.lstat(path)
    content = content_of(path) if stat.S_ISLNK(found.st_mode) else None
    return found if content is None else os.lstat(content)


def content_of(link: Path) -> Path | None:
    """Return the file that a link of the Hub's cache leads to; None for any other link. May raise OSError."""
    folder = Path(os.path.realpath(os.path.dirname(link)))
    for revision in (folder, *folder.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
            break
    else:
        return None
    blob = _target(folder / os.path.basename(link), repository / "blobs")
    if blob is None:
        return None
    found = os.lstat(blob)
    if stat.S_ISLNK(found.st_mode):
        digits = os.path.basename(os.readlink(blob))
        if not _HASH.fullmatch(digits):
            return None
        shared = _target(blob, repository.parent / "blobs" / digits[:2])
        if shared is None or not _is_folder(repository.parent / "blobs"):
            return None
        blob, found = shared, os.lstat(shared)
    return blob if stat.S_ISREG(found.st_mode) else None


def _target(link: Path, folder: Path) -> Path | None:
    """Return what a link leads to, if that is written as the shortest way to an entry of `folder`, which is no link."""
    written = os.readlink(link)
    target = folder / os.path.basename(written)
    if written != os.path.relpath(target, link.parent) or not _is_folder(folder):
        return None
    return target if os.path.lexists(target) else None


def _is_folder(path: Path) -> bool:
    return os.path.lexists(path) and stat.S_ISDIR(os.lstat(path).st_mode)
