"""DyLoRA-MoE: a mixture of LoRA experts on a frozen causal LM, with checkpoints that can be trusted.

Importing the package is light: torch, transformers and peft are loaded when a name that needs them is first used. It
makes `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` of Transformers know the checkpoints of a mixture
(auto.py).
"""

from __future__ import annotations

import importlib
from typing import Any

from .auto import register_with_transformers

__version__ = "0.3.0.dev0"

_HOMES = {
    "CheckpointError": "errors",
    "DyLoRAMoE": "api",
    "DyLoRAMoEConfig": "api",
    "DyLoRAMoEError": "errors",
    "MoELoraConfig": "mixture.config",
    "MoETrainer": "training.trainer",
    "NoveltyDetector": "skills.novelty",
    "PeftCheckpointCallback": "training.checkpoint_callback",
    "RoutedLinear": "mixture.routed_linear",
    "Router": "mixture.router",
    "RouterConfig": "mixture.config",
    "SkillLibrary": "skills.library",
    "UsageError": "errors",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


register_with_transformers()
