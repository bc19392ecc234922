"""The structure of a base model: its modules without weights, its decoder layers, and whether it can be a base."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..constants import BITSANDBYTES
from ..errors import UsageError
from .quiet import quiet, refused

LONG_POSITIONS = 1 << 16  # from here on, buffers are measured: some models keep a mask of positions x positions
MAX_BUFFER_BYTES = 1 << 30


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with its parameters on the `meta` device, where they take no memory, and real buffers."""

    def build(include_buffers: bool) -> PreTrainedModel:
        with init_empty_weights(include_buffers=include_buffers):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)

    what = f"transformers cannot build this {config.model_type} architecture"
    with quiet(), refused(what, "Correct the config."), torch.random.fork_rng(devices=[]):
        if (getattr(config.get_text_config(), "max_position_embeddings", None) or 0) > LONG_POSITIONS:
            size = sum(buffer.nbytes for buffer in build(True).buffers())
            if size > MAX_BUFFER_BYTES:
                raise ValueError(f"its buffers alone would take {size} bytes; lower max_position_embeddings")
        model = build(False)
        model.tie_weights()  # init_empty_weights replaces each parameter, which unties the tied ones
    return model.requires_grad_(False)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a model with or without adapters, or raise UsageError if they cannot be told."""
    base = without_adapters(model)
    count = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    for modules in (decoder.children(), decoder.modules()):  # a layer may itself hold lists of that length
        found = [module for module in modules if isinstance(module, nn.ModuleList) and len(module) == count]
        if len(found) == 1:
            return found[0]
    raise UsageError(
        f"The decoder layers of {type(base).__name__} cannot be told: expected one ModuleList of {count} entries "
        f"in {type(decoder).__name__}, found {len(found)}. This architecture is not supported."
    )


def without_adapters(model: nn.Module) -> Any:
    """Return the base model that PEFT may have wrapped, whose linear layers may contain adapters."""
    return getattr(model, "get_base_model", lambda: model)()


def check_base(base: object) -> None:
    """Raise UsageError unless `base` is a Hugging Face model without adapters that could be loaded again as it is."""
    adapted = isinstance(base, nn.Module) and any(isinstance(module, LoraLayer) for module in base.modules())
    if adapted or not isinstance(base, PreTrainedModel):
        found = f"{type(base).__name__}{' with LoRA layers in it' if adapted else ''}"
        raise UsageError(f"expected a Hugging Face causal LM without adapters, got {found}")
    if quantization(base) is not None:
        return
    for name, parameter in base.named_parameters():
        kind = type(parameter.data)
        plain = kind is torch.Tensor or hasattr(parameter, "full_tensor")  # a DTensor
        if not plain or not parameter.is_floating_point():
            raise _cannot_be_loaded_again(f"{name} is a {kind.__name__} of {parameter.dtype}")


def quantization(base: PreTrainedModel) -> dict[str, Any] | None:
    """Return how a model was quantized when it was loaded, as arguments of `BitsAndBytesConfig`; None if it was not.

    Raises:
        UsageError: if another library has quantized it.
    """
    config: Any = getattr(base.config, "quantization_config", None)
    if not config:
        return None
    found = config if isinstance(config, dict) else config.to_diff_dict()
    method = getattr(found.get("quant_method"), "value", found.get("quant_method"))
    if method == "gguf":  # Transformers says so of a GGUF file that it has unpacked, too; `check_base` sees the others
        return None
    if not (found.get("load_in_4bit") or found.get("load_in_8bit")):
        raise _cannot_be_loaded_again(f"quantization_config, {method}")
    return {key: value for key, value in found.items() if key.startswith(BITSANDBYTES)}


def keep_layout(base: PreTrainedModel) -> None:
    """Keep weights in 4 bits as they were loaded.

    On CPUs with AVX512-BF16, bitsandbytes lays them out anew in the first forward pass in evaluation mode. Then there
    is no backward pass, some shapes are refused, and reading the weights does not restore the scales.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def _cannot_be_loaded_again(found: str) -> UsageError:
    return UsageError(
        f"the base model is quantized ({found}) in a way that a checkpoint could not load again: quantize it with "
        "bitsandbytes, or load it without quantization, for instance in bfloat16"
    )
