"""Seeded random weights that stand in for a base model's own, in a fraction of its memory.

One tensor per parameter of a decoder layer, shared by all layers, holds CodeGemma-2B in 1.2 GB. Only integer random
numbers and single IEEE operations are used, so that a seed gives the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dylora_moe.machine import need_memory
from dylora_moe.quiet import quiet, refused
from dylora_moe.skeleton import decoder_layers, skeleton

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

NOISE_PERIOD = 1_048_573  # a prime, so that no two rows of a matrix start at the same place of the noise


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """Matrices from seeded noise of the model's own spread; norms and biases as the model itself initialises them."""
    import torch

    model = skeleton(config, dtype)
    if device.type == "cpu":
        need_memory(shared_bytes(model), f"random weights of this {config.model_type} architecture")
    noise = _noise(seed, _spread(config), dtype)
    made: dict[Any, nn.Parameter] = {}
    plain = []
    with quiet(), refused("The random weights cannot be made", "Use --weights none, or a smaller model."):
        places = list(_places(model))  # a list keeps the old ones alive: keys are ids
        for key, label, module, name, parameter in places:
            if key not in made:
                made[key] = _filled(parameter, f"{seed}.{label}", noise, device)
                plain.append(module)
            module._parameters[name] = made[key]
        model.to(device)  # the buffers
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for module in plain:
                if all(parameter.ndim < 2 for parameter in module.parameters(recurse=False)):
                    model._init_weights(module)
    return model


def shared_bytes(model: PreTrainedModel) -> int:
    """Bytes of its parameters, once the decoder layers share theirs."""
    return sum({key: parameter.nbytes for key, _, _, _, parameter in _places(model)}.values())


def _places(model: PreTrainedModel) -> Iterator[tuple[Any, str, nn.Module, str, nn.Parameter]]:
    """Every (key, label, module, name, parameter). Same key: to be one tensor, being tied, or the same parameter of
    another decoder layer of the same shape. The label says where it is, without the number of the layer."""
    in_layer = {}
    for layer in decoder_layers(model):
        in_layer |= {id(module): name for name, module in layer.named_modules()}
    for path, module in model.named_modules():
        inside = id(module) in in_layer
        for name, parameter in module._parameters.items():
            if parameter is not None:
                label = f"layer.{in_layer[id(module)]}.{name}" if inside else f"{path}.{name}"
                yield (label, tuple(parameter.shape)) if inside else id(parameter), label, module, name, parameter


def _spread(config: PreTrainedConfig) -> float:
    spread = getattr(config.get_text_config(), "initializer_range", None)
    return spread if isinstance(spread, float) and 0 < spread < 10 else 0.02


def _noise(seed: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    """(NOISE_PERIOD,) uniform numbers with that standard deviation. PCG64's raw stream is fixed by numpy's promise."""
    import numpy
    import torch

    raw = numpy.random.PCG64(seed).random_raw(-(-NOISE_PERIOD // 4)).astype("<u8").view("<i2")[:NOISE_PERIOD]
    centred = raw.astype(numpy.float32) + numpy.float32(0.5)
    return torch.from_numpy(centred * numpy.float32(spread * 12**0.5 / 65536)).to(dtype)


def _filled(parameter: nn.Parameter, label: str, noise: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A frozen parameter of that shape and dtype: noise from a place of its own for matrices, else one or zero."""
    import torch
    from torch import nn

    if parameter.ndim < 2:
        start = 0.0 if label.endswith("bias") else 1.0
        return nn.Parameter(torch.full(parameter.shape, start, dtype=parameter.dtype, device=device), False)
    filled = torch.empty(parameter.shape, dtype=parameter.dtype)
    flat = filled.view(-1)
    begin = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") % NOISE_PERIOD
    first = noise[begin : begin + flat.numel()]
    flat[: first.numel()] = first
    for at in range(first.numel(), flat.numel(), NOISE_PERIOD):
        rest = noise[: flat.numel() - at]
        flat[at : at + rest.numel()] = rest
    return nn.Parameter(filled.to(device), requires_grad=False)
