"""A vLLM plugin that serves DyLoRA-MoE checkpoints: every token gets the LoRA experts that the router chooses for it.

vLLM calls `register` in each of its processes. Nothing here imports the package dylora_moe, which needs a newer version
of Transformers than vLLM allows.
"""

from __future__ import annotations

ARCHITECTURE = "DyLoRAMoEForCausalLM"  # in the config that vLLM sees


def register() -> None:
    """Make vLLM know checkpoints of the model type dylora-moe."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .config import DyLoRAMoEConfig
    from .supported import SupportedConfig

    AutoConfig.register(DyLoRAMoEConfig.model_type, DyLoRAMoEConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = SupportedConfig
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
