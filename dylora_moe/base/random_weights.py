"""Seeded random weights in place of those of a base model, which take a fraction of its memory.

All decoder layers share one tensor per parameter, and each matrix is a Hankel matrix of noise (hankel.py). CodeGemma-2B
takes 1.2 GB with dense matrices and 0.7 MB with compact ones. Only integer random numbers and single IEEE operations
are used, so that a seed gives the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import numpy
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..system import machine
from .hankel import hankel_matrix
from .quiet import quiet, refused
from .structure import decoder_layers, skeleton


class Location(NamedTuple):
    """One of the places where a model has a parameter."""

    key: Hashable  # locations with the same key are to share one tensor
    label: str  # seeds the noise: the path, without the number of the decoder layer
    module: nn.Module
    name: str  # of the parameter in the module
    parameter: nn.Parameter


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int, *, compact: bool = False
) -> PreTrainedModel:
    """Build a model with random matrices of its own standard deviation. It initialises norms and biases itself.

    Args:
        compact: whether the matrices of linear layers and embeddings are stored compactly. Their values are the same,
            but they take a thousandth of the memory, and linear layers a fraction of the time. For forward passes on
            one device.
    """
    model = skeleton(config, dtype)
    if device.type == "cpu":
        machine.need_memory(shared_bytes(model, compact), f"random weights of this {config.model_type} architecture")
    spread = _spread(config)
    with quiet(), refused("The random weights cannot be made", "Use --weights none, or a smaller model."):
        locations = list(_locations(model))  # keeps the old parameters alive, whose ids are keys
        compactable = _compactable(locations) if compact else set()
        owners = _replace([at for at in locations if at.parameter.ndim < 2], _constant)
        # Matrices are still on the meta device, because some models initialise those of children along with a module.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for module, label in owners.items():
                if all(parameter.ndim < 2 for parameter in module.parameters(recurse=False)):
                    torch.default_generator.manual_seed(_hash(f"{seed}.{label}"))  # some values are random
                    model._init_weights(module)
        _replace(
            [at for at in locations if at.parameter.ndim >= 2],
            lambda at: _matrix(at.parameter, f"{seed}.{at.label}", spread, device, at.key in compactable),
        )
        nn.Module.to(model, device)  # vectors and buffers
    return model


def _replace(locations: list[Location], new: Callable[[Location], nn.Parameter]) -> dict[nn.Module, str]:
    """Put one new parameter into all locations of each key. Returns the modules of the first ones, with the labels."""
    created: dict[Hashable, nn.Parameter] = {}
    owners: dict[nn.Module, str] = {}
    for location in locations:
        if location.key not in created:
            created[location.key] = new(location)
            owners.setdefault(location.module, location.label)
        location.module._parameters[location.name] = created[location.key]
    return owners


def shared_bytes(model: PreTrainedModel, compact: bool = False) -> int:
    """Return the bytes that the parameters of a model take when its decoder layers share them."""
    locations = list(_locations(model))
    compactable = _compactable(locations) if compact else set()
    sizes = {}
    for at in locations:
        count = sum(at.parameter.shape) - 1 if at.key in compactable else at.parameter.numel()
        sizes[at.key] = count * at.parameter.element_size()
    return sum(sizes.values())


def _locations(model: PreTrainedModel) -> Iterator[Location]:
    """Yield where the parameters are. Tied ones, and those of equal name and shape in all layers, have one key."""
    in_layer: dict[int, str] = {}
    for layer in decoder_layers(model):
        in_layer |= {id(module): name for name, module in layer.named_modules()}
    for path, module in model.named_modules():
        inside = id(module) in in_layer
        for name, parameter in module._parameters.items():
            if parameter is not None:
                label = f"layer.{in_layer[id(module)]}.{name}" if inside else f"{path}.{name}"
                key = (label, tuple(parameter.shape)) if inside else id(parameter)
                yield Location(key, label, module, name, parameter)


def _compactable(locations: list[Location]) -> set[Hashable]:
    """Return the keys of the matrices that only linear layers and embeddings use."""
    others = {at.key for at in locations if not isinstance(at.module, (nn.Linear, nn.Embedding))}
    return {at.key for at in locations if at.parameter.ndim == 2} - others


def _spread(config: PreTrainedConfig) -> float:
    spread = getattr(config.get_text_config(), "initializer_range", None)
    return spread if isinstance(spread, float) and 0 < spread < 10 else 0.02


def _constant(at: Location) -> nn.Parameter:
    """Return a frozen parameter of the same shape and dtype on the CPU: zeros for a bias, ones otherwise."""
    start = torch.zeros if at.label.endswith("bias") else torch.ones
    return nn.Parameter(start(at.parameter.shape, dtype=at.parameter.dtype, device="cpu"), requires_grad=False)


def _matrix(parameter: nn.Parameter, label: str, spread: float, device: torch.device, compact: bool) -> nn.Parameter:
    """Return a frozen parameter of the same shape and dtype, a matrix or a stack of matrices, with seeded noise."""
    columns = parameter.shape[-1]
    rows = parameter.numel() // columns
    matrix = hankel_matrix(_noise(label, rows + columns - 1, spread).to(parameter.dtype).to(device), (rows, columns))
    if compact:
        return matrix
    return nn.Parameter(matrix.detach().contiguous().view(parameter.shape), requires_grad=False)


def _noise(label: str, count: int, spread: float) -> torch.Tensor:
    """Return (count,) uniform numbers with the standard deviation `spread`. numpy never changes PCG64's raw stream."""
    raw = numpy.random.PCG64(_hash(label)).random_raw(-(-count // 4)).astype("<u8").view("<i2")[:count]
    centred = raw.astype(numpy.float32) + numpy.float32(0.5)
    return torch.from_numpy(centred * numpy.float32(spread * 12**0.5 / 65536))


def _hash(label: str) -> int:
    """Return a seed of 64 bits."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
