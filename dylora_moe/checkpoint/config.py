"""The content of a checkpoint's config.json, as frozen dataclasses. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr  # of bounded length
from typing import Any

from ..constants import MODEL_TYPE
from . import formats

BESIDE = "../"  # begins the name of a base model in the run folder, so that the run folder can be moved
VERSION = "transformers_version"  # of the library whose config has the settings
FLOAT32 = 1e-6  # GGUF files hold numbers in float32, so that 1e-05 is 9.99999974e-06 there


@dataclass(frozen=True)
class ArchitectureEntry:
    """What tells one base model from another: sizes, a SHA-256 over names and shapes of parameters, and settings.

    The settings are the values of the base's config that change what it computes; None in a checkpoint that was
    converted from version 0.2.1, which kept none.
    """

    model_type: str
    hidden_size: int | None
    num_hidden_layers: int | None
    num_attention_heads: int | list[int] | None  # one for all decoder layers, or one for each
    intermediate_size: int | list[int] | None
    vocab_size: int | None
    fingerprint: str
    settings: dict[str, Any] | None

    def differences(self, here: Mapping[str, Any]) -> list[str]:
        """Describe all in which another architecture, as of `base.fingerprint.architecture`, differs; [] if in nothing.

        Settings that only one of both has are left out: Transformers adds some from version to version, and other
        tools leave notes of their own in a config.
        """
        there = asdict(self)
        sizes = sorted(there.keys() - {"fingerprint", "settings"})
        found = [f"{key}: {there[key]} there, {here[key]} here" for key in sizes if there[key] != here[key]]
        if not found and self.fingerprint != here["fingerprint"]:
            found = ["parameters of other names or shapes"]
        if found or self.settings is None:
            return found
        same_version = self.settings.get(VERSION) == here["settings"].get(VERSION)
        keys = sorted(self.settings.keys() & here["settings"].keys() - {VERSION})
        pairs = ((key, self.settings[key], here["settings"][key]) for key in keys)
        return [line for pair in pairs for line in _unlike(*pair, whole=same_version)]


@dataclass(frozen=True)
class BaseModelEntry:
    """The base model that the experts were trained on."""

    name: str | None  # hub id, absolute path, or ../NAME for what is in the run folder, seen from the checkpoint
    revision: str | None
    dtype: str  # such as "bfloat16"
    architecture: ArchitectureEntry
    quantization: dict[str, Any] | None  # with which it was loaded: arguments of BitsAndBytesConfig

    def located(self, checkpoint: Path) -> str | None:
        """Return the hub id, or the absolute path, of the base model that a checkpoint folder names."""
        if self.name is None or not self.name.startswith(BESIDE):
            return self.name
        return os.path.normpath(checkpoint.resolve() / self.name)


@dataclass(frozen=True)
class ExpertEntry:
    """One expert; `layout` is a SHA-256 over the names and shapes of its tensors."""

    name: str
    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: list[str]
    state: str
    tensors: int
    parameters: int
    layout: str


@dataclass(frozen=True)
class RouterEntry:
    """The router's size and settings."""

    width: int  # of the input embeddings
    temperature: float
    top_k: int | None
    balance_coefficient: float
    decay: float
    prior_tokens: float


@dataclass(frozen=True)
class CheckpointConfig:
    """The content of config.json, apart from its kind and version, which this version of the package fixes."""

    base_model: BaseModelEntry
    experts: list[ExpertEntry]
    router: RouterEntry
    step: int
    probe: bool  # whether the checkpoint has a probe
    versions: dict[str, str]  # of the libraries that wrote it

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def states(self) -> list[str]:
        """The state of each expert."""
        return [expert.state for expert in self.experts]

    def to_json(self) -> bytes:
        """Return the bytes of config.json: the same for the same content."""
        kind = {"model_type": MODEL_TYPE, "format_version": formats.FORMAT_VERSION}
        return encode(kind | {"num_experts": self.num_experts} | asdict(self))

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> CheckpointConfig:
        """Build it from the parsed content of a config.json that breaks no rule."""
        base = found["base_model"]
        return cls(
            base_model=BaseModelEntry(**base | {"architecture": ArchitectureEntry(**base["architecture"])}),
            experts=[ExpertEntry(**expert) for expert in found["experts"]],
            router=RouterEntry(**found["router"]),
            step=found["step"],
            probe=found["probe"],
            versions=found["versions"],
        )


def _unlike(path: str, there: Any, here: Any, *, whole: bool) -> Iterator[str]:
    """Describe in what two values of a config differ.

    Args:
        whole: whether what only one of two objects has counts as well.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        keys = there.keys() | here.keys() if whole else there.keys() & here.keys()
        for key in sorted(keys):
            yield from _unlike(f"{path}.{key}", there.get(key), here.get(key), whole=whole)
        return
    numbers = [value for value in (there, here) if isinstance(value, (int, float))]
    if there != here and not (len(numbers) == 2 and math.isclose(*numbers, rel_tol=FLOAT32)):
        yield f"{path}: {repr(there)} there, {repr(here)} here"


def encode(value: dict[str, Any]) -> bytes:
    """Return the JSON text of a config: sorted and indented."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
