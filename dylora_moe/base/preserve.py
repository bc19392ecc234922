"""Leaving things as they were found: random generators, modes, and the tensors of a base model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generators start from `seed`; outside they go on as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation without dropout or gradients that leaves mode (of every module) and RNG as found."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def as_found_on_error(base: PreTrainedModel) -> Iterator[None]:
    """A base model is as it was where what is done to it inside fails: no layer wrapped, no hook, no flag changed."""
    modules = [(module, dict(vars(module))) for module in base.modules()]
    inside = [(found, dict(found)) for _, before in modules for found in before.values() if isinstance(found, dict)]
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:
        for module, before in modules:
            vars(module).clear()
            vars(module).update(before)
        for found, before in inside:  # parameters, submodules, hooks
            found.clear()
            found.update(before)
        for parameter, before in trainable:
            parameter.requires_grad_(before)
        raise


def fresh_base(base: PreTrainedModel) -> PreTrainedModel:
    """A base model of its own module tree, without experts, whose tensors are those of `base` (shared, not copied)."""
    with init_empty_weights(include_buffers=False):
        fresh = type(base)(copy.deepcopy(base.config))
    donor = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    donor = {name.replace(".base_layer.", "."): tensor for name, tensor in donor.items() if "lora_" not in name}
    for path, module in fresh.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = donor[f"{path}.{name}" if path else name]
    fresh.generation_config = copy.deepcopy(base.generation_config)
    return fresh.eval()
