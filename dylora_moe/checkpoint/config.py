"""The content of a checkpoint's config.json, as frozen dataclasses. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import formats


@dataclass(frozen=True)
class ArchitectureEntry:
    """What tells one base model from another: its sizes, and a SHA-256 over the names and shapes of its parameters."""

    model_type: str
    hidden_size: int | None
    num_hidden_layers: int | None
    num_attention_heads: int | list[int] | None  # one for all decoder layers, or one for each
    intermediate_size: int | list[int] | None
    vocab_size: int | None
    fingerprint: str

    def differences(self, here: Mapping[str, object]) -> list[str]:
        """Describe each size in which another architecture, as of `base.structure.architecture`, differs."""
        there = asdict(self)
        keys = sorted(there.keys() - {"fingerprint"})
        return [f"{key}: {there[key]} there, {here.get(key)} here" for key in keys if there[key] != here.get(key)]


@dataclass(frozen=True)
class BaseModelEntry:
    """The base model that the experts were trained on."""

    name: str | None  # hub id or folder
    revision: str | None
    dtype: str  # such as "bfloat16"
    architecture: ArchitectureEntry


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
        kind = {"model_type": formats.MODEL_TYPE, "format_version": formats.FORMAT_VERSION}
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


def encode(value: dict[str, Any]) -> bytes:
    """Return the JSON text of a config: sorted and indented."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
