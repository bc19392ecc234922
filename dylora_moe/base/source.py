"""What is known of a base model that was found but is not loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedConfig

from ..errors import UsageError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WEIGHT_FILES = SINGLE_FILES + INDEX_FILES


@dataclass(frozen=True)
class Base:
    """A base model, found but not loaded."""

    name: str  # as the user gave it; a preset's full hub id
    kind: str  # "hub", "folder", "gguf" or "preset"
    location: str | None  # local folder or file; for the hub the cached snapshot, if any
    revision: str | None  # hub commit hash, when known
    config: PreTrainedConfig
    has_weights: bool
    note: str | None = None  # one line for the user when "auto" had to take random weights
    token: str | None = field(default=None, repr=False, compare=False)  # for the download; never shown


def has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in WEIGHT_FILES)


def need_gguf(name: str) -> None:

    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"Reading the GGUF file {name} needs the package gguf, which is not installed:\n    pip install gguf"
        )
