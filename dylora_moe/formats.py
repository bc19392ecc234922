"""The names of a checkpoint's files, and its version. Standard library only."""

from __future__ import annotations

import re

FORMAT_VERSION = 1
MODEL_TYPE = "dylora-moe"

MANIFEST = "manifest.json"
CONFIG = "config.json"
ROUTER = "router.safetensors"
SKILLS = "skill_library.safetensors"
PROBE = "probe.safetensors"
ADAPTERS = "peft_adapters"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GATE = "gate.weight"

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
TRAINER_STATE = "trainer_state.json"
RNG_STATE = re.compile(r"rng_state(_\d+)?\.pth")
TRAINING_FILES = (OPTIMIZER, SCHEDULER, TRAINER_STATE)

# From before manifests; read by `load`, never by the validators.
LEGACY_ROUTER = "router.pt"
LEGACY_ADAPTER_WEIGHTS = "adapter_model.bin"

_MERGED = re.compile(
    r"(model|pytorch_model|tf_model|flax_model)([-.]\d+[-_]of[-_]\d+)?\.(safetensors|bin|h5|msgpack)"
    r"|.+\.(safetensors|bin)\.index\.json"
    r"|consolidated.*\.(pth|safetensors)|pytorch_model_fsdp.*|.+\.(gguf|onnx|ckpt)",
    re.IGNORECASE,
)


def is_merged_model(filename: str) -> bool:
    """Whether a file of this name (without folders) is a whole model, which a checkpoint never holds."""
    return _MERGED.fullmatch(filename) is not None


def expert_folder(name: str) -> str:
    """Where an expert's files are, as PEFT nests them: peft_adapters/expert_0/expert_0."""
    return f"{ADAPTERS}/{name}/{name}"
