"""The config that vLLM sees: that of the base model, with what the checkpoint says of the mixture.

vLLM looks into a model's config for much that depends on the type of the model. So a checkpoint's config is that of the
base model in all but two points: `architectures` names the mixture, and `dylora_moe` holds how to find the base model.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import ARCHITECTURE
from .checkpoint import BASE_VARIABLE, MODEL_TYPE, Expert, Mixture, Router, read_mixture


class DyLoRAMoEConfig(PretrainedConfig):
    """Known to `AutoConfig` by the model type of a checkpoint. `from_dict` returns the base model's config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of the base model that a checkpoint's config.json names.

        Raises:
            ValueError: if it is no config of a checkpoint, or the base model is not there, or is another one.
        """
        unused = kwargs.pop("return_unused_kwargs", False)
        mixture = read_mixture(config_dict, str(kwargs.pop("name_or_path", "")))
        hub = {key: kwargs[key] for key in ("token", "local_files_only", "cache_dir") if key in kwargs}
        try:
            config = AutoConfig.from_pretrained(mixture.base, revision=mixture.revision, **hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot read the config of the base model {mixture.base}: {error}\n"
                f"Set {BASE_VARIABLE} to the path or Hub id where it is now."
            ) from None
        _check_sizes(mixture, config)
        architectures = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.architectures = [ARCHITECTURE]
        config.dtype = getattr(torch, mixture.dtype)
        config.dylora_moe = asdict(mixture) | {"architectures": architectures}
        return (config, {}) if unused else config


def mixture_of(config: PretrainedConfig) -> Mixture:
    """Return what `from_dict` has put into the config of a base model."""
    found = {key: value for key, value in config.dylora_moe.items() if key != "architectures"}
    experts = tuple(Expert(**expert) for expert in found["experts"])
    return Mixture(**found | {"experts": experts, "router": Router(**found["router"])})


def _check_sizes(mixture: Mixture, config: PretrainedConfig) -> None:
    text = config.get_text_config()
    differences = [
        f"{key}: {expected} there, {getattr(text, key, None)} here"
        for key, expected in mixture.sizes.items()
        if expected is not None and key != "model_type" and getattr(text, key, None) != expected
    ]
    if config.model_type != mixture.sizes["model_type"]:
        differences.insert(0, f"model_type: {mixture.sizes['model_type']} there, {config.model_type} here")
    if differences:
        raise ValueError(
            f"{mixture.base} is not the base model that the experts were trained on:\n  " + "\n  ".join(differences)
        )
