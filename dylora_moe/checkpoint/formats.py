"""The names of a checkpoint's files, and its versions. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Container

FORMAT_VERSION = 2
OLD_VERSION = 1  # of DyLoRA-MoE 0.2.1, which `dylora-moe convert` reads

CHECKPOINT = "checkpoint"  # what a script names the one that it writes
CONFIG = "config.json"
ROUTER = "router.safetensors"
SKILLS = "skill_library.safetensors"
PROBE = "probe.safetensors"
GENERATION = "generation_config.json"  # where it is not the base model's
ADAPTERS = "peft_adapters"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TENSOR_FILES = (ADAPTER_WEIGHTS, ROUTER, SKILLS, PROBE)
GATE, GATE_BIAS, PRIOR = "gate.weight", "gate.bias", "prior"  # the tensors of the router

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
TRAINER_STATE = "trainer_state.json"
RNG_STATE = re.compile(r"rng_state(_(0|[1-9]\d{0,5}))?\.pth", re.ASCII)
TRAINING_FILES = (OPTIMIZER, SCHEDULER, TRAINER_STATE)

PROBE_TOKENS = 16

_WEIGHTS = r"(safetensors|bin|pt|pth)"
_MERGED = re.compile(
    # model.safetensors, pytorch_model-00001-of-00002.bin, model.fp16.safetensors, merged_model.pt
    rf"(.*[-_.])?(model|merged|consolidated|weights|checkpoint)([-_.].*)?\.{_WEIGHTS}"
    rf"|.+\.{_WEIGHTS}\.index(\..+)?\.json"
    r"|.+\.(gguf|ggml|onnx|ckpt|h5|msgpack|ot|keras|tflite|npz|distcp|pdparams)",
    re.IGNORECASE | re.DOTALL,
)
_ADAPTER = re.compile(r"adapter_model\.(safetensors|bin)")


def is_merged_model(filename: str) -> bool:
    """Whether a file of this name (without folders) is a whole model, which a checkpoint never holds."""
    return _MERGED.fullmatch(filename) is not None and _ADAPTER.fullmatch(filename) is None


def is_training_file(name: str) -> bool:
    """Whether a file of this path in a checkpoint is part of what training needs to resume."""
    return name in (*TRAINING_FILES, SCALER) or RNG_STATE.fullmatch(name) is not None


def expert_folder(name: str) -> str:
    """Where an expert's files are, as PEFT nests them: peft_adapters/expert_0/expert_0."""
    return f"{ADAPTERS}/{name}/{name}"


def adapter_folder(files: Container[str], name: str) -> str:
    """Where an expert's files are among these: nested as PEFT nests them, or flat where only that is there."""
    nested, flat = expert_folder(name), f"{ADAPTERS}/{name}"
    has_flat = any(f"{flat}/{leaf}" in files for leaf in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    has_nested = any(f"{nested}/{leaf}" in files for leaf in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return flat if has_flat and not has_nested else nested
