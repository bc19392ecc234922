"""A base model's structure: built without its weights, its decoder layers, and what tells it from another.

`skeleton` has its parameters on the `meta` device and costs no memory.
"""

from __future__ import annotations

import copy
import hashlib
import json

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import UsageError
from .quiet import quiet, refused

LONG_POSITIONS = 1 << 16  # beyond this, a model that keeps a positions-by-positions mask is looked for
MAX_BUFFER_BYTES = 1 << 30
BLOCKS, BLOCK = 8, 32  # what weights_fingerprint reads of a large parameter


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Parameters on `meta`, buffers (rotary frequencies, embedding scales) real. Tied weights are tied."""

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
        model.tie_weights()  # init_empty_weights makes each parameter anew, which unties
    return model.requires_grad_(False)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The one ModuleList of the decoder that has num_hidden_layers entries; PEFT's wrapping may be around it."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for modules in (decoder.children(), decoder.modules()):  # a layer may itself hold lists of that length
        found = [module for module in modules if isinstance(module, nn.ModuleList) and len(module) == count]
        if len(found) == 1:
            return found[0]
    raise UsageError(
        f"The decoder layers of {type(model).__name__} cannot be told: expected one ModuleList of {count} entries "
        f"in {type(decoder).__name__}, found {len(found)}. This architecture is not supported."
    )


def architecture(config_or_model: PreTrainedConfig | nn.Module) -> dict:
    """What tells one architecture from another: sizes, and a sha256 over the sorted names and shapes of all parameters.

    Adapters, PEFT's wrapping, dtype, device and the sharing of tensors do not change it.
    """
    model = config_or_model
    if not isinstance(model, nn.Module):
        model = skeleton(model, torch.float32)
    return _describe(model.config, _base_parameters(model))


def _describe(config: PreTrainedConfig, parameters: list[tuple[str, nn.Parameter]]) -> dict:
    text = config.get_text_config()
    shapes = [[name, list(parameter.shape)] for name, parameter in parameters]
    digest = hashlib.sha256(json.dumps([config.model_type, shapes]).encode()).hexdigest()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {
        "model_type": config.model_type,
        **{size: getattr(text, size, None) for size in sizes},
        "fingerprint": digest,
    }


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the base alone, sorted, under the names it has without PEFT; tied ones under each name."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return sorted(
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if "lora_" not in name
    )


def weights_fingerprint(model: nn.Module) -> str:
    """ "dtype:sha256" over samples of every base parameter: whole if small, else 8 strided blocks of 32 numbers.

    The samples are hashed as float32, so the part after the colon is the same for the same values in any dtype that
    holds them, on any device. Of a sharded base every rank must ask for it. Raises UsageError for a model without
    weights.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model):
        if parameter.is_meta:
            raise UsageError(f"There are no weights to fingerprint: {name} is on the meta device (--weights none).")
        tensor = parameter.detach()
        if hasattr(tensor, "full_tensor"):  # a DTensor, of which this process may have a part only
            tensor = tensor.full_tensor()
        sample = _sample(tensor).to(torch.float32).cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    dtype = next(model.parameters()).dtype if not hasattr(model, "dtype") else model.dtype
    return f"{str(dtype).removeprefix('torch.')}:{digest.hexdigest()}"


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """All of a small tensor, flat; of a large one (8, 32) numbers, from the first to the last."""
    size = tensor.numel()
    if size <= 2 * BLOCKS * BLOCK:
        return tensor.reshape(-1)
    stride = (size - BLOCK) // (BLOCKS - 1)
    positions = torch.arange(BLOCKS).unsqueeze(1) * stride + torch.arange(BLOCK)  # (8, 32), as if it were flat
    indices = []
    for length in reversed(tensor.shape):
        indices.append((positions % length).to(tensor.device))
        positions = positions // length
    return tensor[tuple(reversed(indices))]  # a flat view of a Hankel matrix would be a copy of full size


def check_base(base: object) -> None:
    """Raises UsageError for what is no Hugging Face model, or has adapters."""
    if not isinstance(base, PreTrainedModel) or any(isinstance(module, LoraLayer) for module in base.modules()):
        raise UsageError(f"expected a Hugging Face causal LM without adapters, got {_described(base)}")


def _described(base: object) -> str:
    wrapped = isinstance(base, nn.Module) and any(isinstance(module, LoraLayer) for module in base.modules())
    return f"{type(base).__name__}{' with LoRA layers in it' if wrapped else ''}"
