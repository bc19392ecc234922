"""A base model that was found, but is not loaded yet."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UsageError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WEIGHT_FILES = SINGLE_FILES + INDEX_FILES


@dataclass(frozen=True)
class Base:
    """A base model that was found, but is not loaded yet."""

    name: str  # as the user gave it, or the full hub id of a preset
    kind: str  # "hub", "folder", "gguf" or "preset"
    location: str | None  # the local folder or file, or the snapshot folder in the hub's cache; None for a preset
    revision: str | None  # the commit of a model of the hub
    config: PreTrainedConfig  # checked
    has_weights: bool  # whether its weights can be loaded
    note: str | None = None  # one line for the user if "auto" had to choose random weights
    quantization: dict[str, Any] | None = None  # arguments of BitsAndBytesConfig with which its weights are loaded
    token: str | None = field(default=None, repr=False, compare=False)  # of the hub, for the download; never shown

    @property
    def path(self) -> Path:
        """`location` as a path. Raises UsageError for a preset."""
        if self.location is None:
            raise UsageError(
                f"{self.name} is a preset: it has an architecture but no weights. Use find_base to get them."
            )
        return Path(self.location)


def has_weights(folder: Path) -> bool:
    """Return whether a folder has a file of weights, or an index of several."""
    return any((folder / name).exists() for name in WEIGHT_FILES)


def need_gguf(name: str) -> None:
    """Raise UsageError unless the package that reads the GGUF file `name` is installed."""
    need_package("gguf", f"Reading the GGUF file {name}")


def need_package(package: str, what: str) -> None:
    """Raise UsageError unless an optional package is installed, which `what` needs."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{what} needs the package {package}, which is not installed:\n    pip install {package}")
