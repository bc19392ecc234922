"""A base model that was found, but is not loaded yet."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UsageError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WEIGHT_FILES = SINGLE_FILES + INDEX_FILES


# Arguments of BitsAndBytesConfig. nf4: https://huggingface.co/papers/2305.14314, int8:
# https://huggingface.co/papers/2208.07339
QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


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


def quantized(base: Base, how: str) -> Base:
    """Return a base model that is quantized in one of the `QUANTIZATIONS` when it is loaded. Raises UsageError."""
    if how not in QUANTIZATIONS:
        raise UsageError(f"Unknown quantization {how!r}: expected one of {', '.join(QUANTIZATIONS)}.")
    if how != "none" and base.kind == "gguf":
        raise UsageError(
            f"{base.name} is a GGUF file, which bitsandbytes does not quantize: give the model's folder or Hub id, or "
            "leave quantization out."
        )
    return replace(base, quantization=QUANTIZATIONS[how])


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
