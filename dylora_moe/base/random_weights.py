"""Seeded random weights that stand in for a base model's own, in a fraction of its memory.

A matrix is a Hankel matrix of noise (`hankel`): a thousandth of its size in memory where it is compact. All decoder
layers share one tensor per parameter; dense, CodeGemma-2B takes 1.2 GB, compact 0.7 MB. Only integer random numbers and
single IEEE operations are used, so that a seed gives the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..system import machine
from .hankel import hankel_matrix
from .quiet import quiet, refused
from .structure import decoder_layers, skeleton

Place = tuple[Any, str, nn.Module, str, nn.Parameter]  # key, label, module, name, parameter


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int, *, compact: bool = False
) -> PreTrainedModel:
    """Matrices from seeded noise of the model's own spread; norms and biases as the model itself initialises them.

    Args:
        compact: the same values, but the matrices of linear layers and embeddings take a thousandth of their memory,
            and linear layers a fraction of their time. For forward passes on one device.
    """
    model = skeleton(config, dtype)
    if device.type == "cpu":
        machine.need_memory(shared_bytes(model, compact), f"random weights of this {config.model_type} architecture")
    spread = _spread(config)
    with quiet(), refused("The random weights cannot be made", "Use --weights none, or a smaller model."):
        places = list(_places(model))  # a list keeps the old ones alive: keys are ids
        small = _compactable(places) if compact else set()
        owners = _put([place for place in places if place[-1].ndim < 2], lambda _, label, old: _constant(old, label))
        # While matrices are on the meta device: some models initialise those of a module's children along with it.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for module, label in owners.items():
                if all(parameter.ndim < 2 for parameter in module.parameters(recurse=False)):
                    torch.default_generator.manual_seed(_number_of(f"{seed}.{label}"))  # some draw at random
                    model._init_weights(module)
        _put(
            [place for place in places if place[-1].ndim >= 2],
            lambda key, label, old: _matrix(old, f"{seed}.{label}", spread, device, key in small),
        )
        model.to(device)  # the rest
    return model


def _put(places: list[Place], make: Callable[[Any, str, nn.Parameter], nn.Parameter]) -> dict[nn.Module, str]:
    """One new parameter per key into all its places. Returns the modules that were the first, and their first label."""
    made: dict[Any, nn.Parameter] = {}
    owners: dict[nn.Module, str] = {}
    for key, label, module, name, old in places:
        if key not in made:
            made[key] = make(key, label, old)
            owners.setdefault(module, label)
        module._parameters[name] = made[key]
    return owners


def shared_bytes(model: PreTrainedModel, compact: bool = False) -> int:
    """Bytes of its parameters, once the decoder layers share theirs."""
    places = list(_places(model))
    small = _compactable(places) if compact else set()
    sizes = {}
    for key, _, _, _, parameter in places:
        count = sum(parameter.shape) - 1 if key in small else parameter.numel()
        sizes[key] = count * parameter.element_size()
    return sum(sizes.values())


def _places(model: PreTrainedModel) -> Iterator[Place]:
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


def _compactable(places: list[Place]) -> set:
    """The keys of the matrices that nothing but linear layers and embeddings holds."""
    others = {key for key, _, module, _, _ in places if not isinstance(module, (nn.Linear, nn.Embedding))}
    return {key for key, _, _, _, parameter in places if parameter.ndim == 2} - others


def _spread(config: PreTrainedConfig) -> float:
    spread = getattr(config.get_text_config(), "initializer_range", None)
    return spread if isinstance(spread, float) and 0 < spread < 10 else 0.02


def _constant(parameter: nn.Parameter, label: str) -> nn.Parameter:
    """A frozen parameter of that shape and dtype on the CPU: zeros for a bias, else ones."""
    start = 0.0 if label.endswith("bias") else 1.0
    return nn.Parameter(torch.full(parameter.shape, start, dtype=parameter.dtype, device="cpu"), requires_grad=False)


def _matrix(parameter: nn.Parameter, label: str, spread: float, device: torch.device, compact: bool) -> nn.Parameter:
    """A frozen parameter of that shape and dtype: noise for a matrix, and for a stack of them."""

    columns = parameter.shape[-1]
    rows = parameter.numel() // columns
    matrix = hankel_matrix(_noise(label, rows + columns - 1, spread).to(parameter.dtype).to(device), (rows, columns))
    if compact:
        return matrix
    return nn.Parameter(matrix.detach().contiguous().view(parameter.shape), requires_grad=False)


def _noise(label: str, count: int, spread: float) -> torch.Tensor:
    """(count,) uniform numbers with that standard deviation. PCG64's raw stream is fixed by numpy's promise."""
    raw = numpy.random.PCG64(_number_of(label)).random_raw(-(-count // 4)).astype("<u8").view("<i2")[:count]
    centred = raw.astype(numpy.float32) + numpy.float32(0.5)
    return torch.from_numpy(centred * numpy.float32(spread * 12**0.5 / 65536))


def _number_of(label: str) -> int:
    """A seed of 64 bits."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
