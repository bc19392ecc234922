"""A checkpoint as the Hub's cache holds it: links into blobs, made by huggingface_hub itself."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import file_download

REVISION = "2439f60ef33a0d46d85da5001d52aeda5b00ce9f"


def in_hub_cache(folder: Path, cache: Path, *, shared: bool = False, name: str = "models--org--name") -> Path:
    """Copy a folder into a cache, and return its snapshot.

    Args:
        shared: Repositories share their large files, so that the blobs of these are links themselves.
    """
    repository = cache / name
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        digits = hashlib.sha256(path.read_bytes()).hexdigest()
        blob, link = repository / "blobs" / digits, snapshot / path.relative_to(folder)
        if not blob.exists():
            shutil.copyfile(path, blob)
            if shared and path.suffix == ".safetensors":
                _share(blob, cache, digits)
        link.parent.mkdir(parents=True, exist_ok=True)
        file_download._create_symlink(str(blob), str(link))
        assert link.is_symlink() and link.read_bytes() == path.read_bytes()
    return snapshot


def _share(blob: Path, cache: Path, digits: str) -> None:
    stores = pytest.importorskip(
        "huggingface_hub.utils._shared_blobs", reason="an older huggingface_hub shares nothing"
    )
    size = os.path.getsize(blob)
    assert stores.publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash=digits, cache_dir=str(cache), expected_size=size
    )
    assert blob.is_symlink()


def add_what_the_hub_adds(folder: Path) -> list[str]:
    """Add the files that may be beside those of a checkpoint. Returns their names."""
    names = ["README.md", ".gitattributes", ".git/HEAD", ".git/objects/0d/4b", ".cache/huggingface/.gitignore",
             ".cache/huggingface/download/router.safetensors.metadata", "tokenizer_config.json", "chat_template.jinja",
             "additional_chat_templates/rag.jinja", "peft_adapters/Thumbs.db", "LICENSE"]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}, which no manifest lists")
    return sorted(names)
