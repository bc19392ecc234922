"""A DyLoRA-MoE checkpoint: what its config.json says, and its tensors, checked against its manifest.

config.json                                                      base model, experts, settings of the router
router.safetensors                                               gate.weight (N, D), gate.bias (N,), prior (N,)
peft_adapters/expert_0/expert_0/adapter_model.safetensors        a plain LoRA of PEFT, and so on
manifest.json                                                    size and SHA-256 of every file
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load

MODEL_TYPE = "dylora-moe"
FORMAT_VERSION = 2
ROUTER = "router.safetensors"
CONFIG, MANIFEST = "config.json", "manifest.json"
BESIDE = "../"  # begins the name of a base model that is in the run folder, seen from the checkpoint
BASE_VARIABLE = "DYLORA_MOE_BASE"  # the environment variable that says where the base model is now
NEW, MATURE = "new", "mature"
ADAPTER_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Expert:
    """One LoRA expert. Its update is scaling * B A."""

    name: str
    rank: int
    scaling: float
    state: str


@dataclass(frozen=True)
class Router:
    """The settings of the router. `width` is that of the input embeddings."""

    width: int
    temperature: float
    top_k: int | None
    decay: float
    prior_tokens: float


@dataclass(frozen=True)
class Mixture:
    """What a config.json says.

    Attributes:
        base: the Hub id or the path of the base model.
        sizes: of the base model; one that is None is not known.
    """

    base: str
    revision: str | None
    dtype: str
    quantization: dict[str, Any] | None
    sizes: dict[str, Any]
    experts: tuple[Expert, ...]
    router: Router

    @property
    def trained(self) -> tuple[int, ...]:
        """The experts that are routed over. One that was never trained adds nothing, and has no part in the softmax."""
        return tuple(i for i, expert in enumerate(self.experts) if expert.state != NEW)

    @property
    def per_token(self) -> int:
        """How many experts a token has: top-k of them if all that were trained are mature, otherwise all."""
        trained = [self.experts[i] for i in self.trained]
        mature = all(expert.state == MATURE for expert in trained)
        return min(self.router.top_k or 2, len(trained)) if mature else len(trained)


def read_mixture(found: dict[str, Any], checkpoint: str) -> Mixture:
    """Read the parsed content of a config.json.

    Args:
        checkpoint: the folder or Hub id that it comes from.

    Raises:
        ValueError: if it is of another version, or not complete.
    """
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint}: expected a checkpoint of format version {FORMAT_VERSION}, found {version!r}; "
            "`dylora-moe convert` rewrites an older one, and a newer one needs a newer version of dylora-moe-vllm"
        )
    try:
        base, router = found["base_model"], found["router"]
        experts = tuple(
            Expert(each["name"], each["r"], _scaling(each["r"], each["lora_alpha"], each["use_rslora"]), each["state"])
            for each in found["experts"]
        )
        sizes = {key: value for key, value in base["architecture"].items() if key not in ("settings", "fingerprint")}
        moved = os.environ.get(BASE_VARIABLE)
        return Mixture(
            base=moved or _located(base["name"], checkpoint),
            revision=None if moved else base["revision"],
            dtype=base["dtype"],
            quantization=base["quantization"],
            sizes=sizes,
            experts=experts,
            router=Router(**{key: router[key] for key in Router.__dataclass_fields__}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint}/{CONFIG} is not the config of a sound checkpoint ({type(error).__name__}: {error}); "
            "`dylora-moe verify` lists every problem"
        ) from None


def _scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _located(name: str | None, checkpoint: str) -> str:
    """Return the Hub id, or the absolute path, of the base model."""
    if name is None:
        raise ValueError(f"{checkpoint} does not name its base model; set {BASE_VARIABLE} to its path or Hub id")
    if not name.startswith(BESIDE):
        return name
    if not os.path.isdir(checkpoint):
        raise ValueError(
            f"{checkpoint} has its base model in its run folder; set {BASE_VARIABLE} to its path or Hub id"
        )
    return os.path.normpath(Path(checkpoint).resolve() / name)


class Files:
    """The files of a checkpoint in a local folder, or of one on the Hub, which is downloaded.

    Raises:
        ValueError: if a file is missing, or is not as the manifest has it.
    """

    def __init__(self, checkpoint: str, revision: str | None = None):
        if not os.path.isdir(checkpoint):
            wanted = [CONFIG, MANIFEST, ROUTER, "peft_adapters/*"]
            checkpoint = snapshot_download(checkpoint, revision=revision, allow_patterns=wanted)
        self.folder = Path(checkpoint)
        try:
            self._manifest = json.loads((self.folder / MANIFEST).read_bytes())["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.folder} has no {MANIFEST} that can be read: no complete checkpoint") from None
        self._read(CONFIG)

    def router(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the router, in float32."""
        return self._tensors(ROUTER)

    def adapter(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """Return the A (r, d_in) and B (d_out, r) of an expert by the name of their linear layer, in float32."""
        nested, flat = (f"peft_adapters/{path}/adapter_model.safetensors" for path in (f"{name}/{name}", name))
        path = flat if flat in self._manifest else nested
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for tensor, value in self._tensors(path).items():
            match = ADAPTER_TENSOR.fullmatch(tensor)
            if match is None:
                raise ValueError(f"{self.folder / path}: expected tensors of a plain LoRA, found {tensor}")
            layers.setdefault(match["module"], {})[match["side"]] = value
        return layers

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {key: value.float() for key, value in load(self._read(name)).items()}

    def _read(self, name: str) -> bytes:
        """Return the content of a file, which must be as the manifest has it."""
        path = self.folder / name
        try:
            content = path.read_bytes()
            expected = self._manifest[name]["bytes"], self._manifest[name]["sha256"]
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected it in the checkpoint and its {MANIFEST}, found {error!r}") from None
        found = len(content), hashlib.sha256(content).hexdigest()
        if found != expected:
            raise ValueError(
                f"{path}: expected {expected[0]} bytes with the SHA-256 {expected[1]}, found {found[0]} bytes with "
                f"{found[1]}; copy the checkpoint again from where it came, or use another one"
            )
        return content
