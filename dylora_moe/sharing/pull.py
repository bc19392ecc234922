"""Getting a checkpoint from the Hugging Face Hub, through its cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..base import hub
from ..base.load import TOKENIZER_PATTERNS
from ..checkpoint import formats
from ..checkpoint.verify import open_checkpoint
from ..errors import UsageError
from ..store import run_folder
from ..store.manifest import MANIFEST, read_manifest

CARD = "README.md"


def local_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint of a run folder, and any other folder as it is."""
    if not (folder / MANIFEST).exists() and (newest := run_folder.latest(folder)):
        return newest.path
    return folder


def find_checkpoint(name: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder of a checkpoint, which is not verified yet: a local one, a run's newest, or one from the Hub.

    Args:
        name: a folder, or the id of a repository on the Hub, such as "user/repo".
        revision: a branch, tag or commit on the Hub.
        token: of the Hub; by default HF_TOKEN, or the stored login.

    Raises:
        UsageError: if there is no such folder or repository, or it holds no checkpoint.
    """
    path = Path(os.path.expanduser(name))
    text = os.fspath(name)
    if text and path.is_dir():
        if revision not in (None, "main"):  # Transformers and others hand over "main" where nothing is asked for
            raise UsageError(f"revision={revision!r} is of a repository on the Hub, but {name} is a local folder")
        return local_checkpoint(path)
    is_file = bool(text) and path.exists()
    if is_file or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        found = "a file" if is_file else "nothing"
        raise UsageError(f"{text or 'no name'}: expected a checkpoint folder or a repository's id, found {found}")
    return _download(text, revision, token)


def pull(repo_id: str, *, revision: str | None = None, token: str | None = None, **options: Any) -> Path:
    """Download a checkpoint into the cache of the Hub and verify it.

    Only the files that its manifest lists are downloaded, and those of a tokenizer and a model card beside them. Where
    the Hub cannot be reached, or HF_HUB_OFFLINE is set, the cache is used.

    Args:
        options: those of `hub.using`.

    Returns:
        The folder in the cache.

    Raises:
        HubError: if the Hub refuses, or cannot be reached and the cache does not have all files.
        UsageError: if the repository holds no checkpoint.
        CheckpointError: if the checkpoint is not sound.
    """
    with hub.using(**options):
        return open_checkpoint(_download(repo_id, revision, token)).folder


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    """Return the folder of a checkpoint that is not verified yet: whoever loads it verifies it, once."""
    folder = hub.download(repo_id, revision, [MANIFEST, formats.CONFIG], token)
    if not (folder / MANIFEST).exists():
        raise UsageError(
            f"{repo_id} on the Hub holds no checkpoint of DyLoRA-MoE: expected {MANIFEST}, found none; a base model is "
            "loaded by DyLoRAMoE.from_base"
        )
    # The commit, which the folder is named like: the branch may have moved meanwhile.
    return hub.download(repo_id, folder.name, [*read_manifest(folder), *TOKENIZER_PATTERNS, CARD], token)
