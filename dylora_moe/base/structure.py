"""The structure of a base model: its modules without weights, its decoder layers, and what identifies it."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import UsageError
from .quiet import quiet, refused

LONG_POSITIONS = 1 << 16  # from here on, buffers are measured: some models keep a mask of positions x positions
MAX_BUFFER_BYTES = 1 << 30
BLOCKS, BLOCK = 8, 32  # what weights_fingerprint reads of a large parameter


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
    base = _without_adapters(model)
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


def architecture(config_or_model: PreTrainedConfig | nn.Module) -> dict[str, Any]:
    """Identify an architecture by its sizes and a SHA-256 over the sorted names and shapes of all parameters.

    Adapters, dtype, device and the sharing of tensors do not change the result.
    """
    model: Any = config_or_model
    if not isinstance(model, nn.Module):
        model = skeleton(model, torch.float32)
    config = model.config
    text = config.get_text_config()
    shapes = [[name, list(parameter.shape)] for name, parameter in _base_parameters(model)]
    digest = hashlib.sha256(json.dumps([config.model_type, shapes]).encode()).hexdigest()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {
        "model_type": config.model_type,
        **{size: getattr(text, size, None) for size in sizes},
        "fingerprint": digest,
    }


def _without_adapters(model: nn.Module) -> Any:
    """Return the base model that PEFT may have wrapped, whose linear layers may contain adapters."""
    return getattr(model, "get_base_model", lambda: model)()


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of the base model, sorted by the names without PEFT; tied ones under each name."""
    return sorted(
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in _without_adapters(model).named_parameters(remove_duplicate=False)
        if "lora_" not in name
    )


def weights_fingerprint(model: nn.Module) -> str:
    """Identify the weights of a model by "dtype:sha256", over samples of every parameter of the base.

    Small parameters are hashed whole, others by 8 blocks of 32 numbers at equal distances. Samples are hashed as
    float32: after the colon, the same values give the same text in any dtype that holds them, on any device. All ranks
    must call this for a sharded base.

    Raises:
        UsageError: if the model has no weights.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model):
        if parameter.is_meta:
            raise UsageError(f"There are no weights to fingerprint: {name} is on the meta device (--weights none).")
        tensor = parameter.detach()
        if hasattr(tensor, "full_tensor"):  # a DTensor, of which this process may hold only a part
            tensor = tensor.full_tensor()
        sample = _sample(tensor).to(torch.float32).cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    dtype = next(model.parameters()).dtype if not hasattr(model, "dtype") else model.dtype
    return f"{str(dtype).removeprefix('torch.')}:{digest.hexdigest()}"


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a small tensor flattened, and (8, 32) numbers of a large one, from the first to the last."""
    size = tensor.numel()
    if size <= 2 * BLOCKS * BLOCK:
        return tensor.reshape(-1)
    stride = (size - BLOCK) // (BLOCKS - 1)
    positions = torch.arange(BLOCKS).unsqueeze(1) * stride + torch.arange(BLOCK)  # (8, 32), as if it were flat
    indices = []
    for length in reversed(tensor.shape):
        indices.append((positions % length).to(tensor.device))
        positions = positions // length
    return tensor[tuple(reversed(indices))]  # flattening a Hankel matrix would copy it at full size


def check_base(base: object) -> None:
    """Raise UsageError unless `base` is a Hugging Face model without adapters."""
    adapted = isinstance(base, nn.Module) and any(isinstance(module, LoraLayer) for module in base.modules())
    if adapted or not isinstance(base, PreTrainedModel):
        found = f"{type(base).__name__}{' with LoRA layers in it' if adapted else ''}"
        raise UsageError(f"expected a Hugging Face causal LM without adapters, got {found}")
