"""Context managers that leave random generators, modes and base models as they were, and copies that share tensors."""

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
    """Seed the random generators of torch inside the block; afterwards they continue as if it had not been run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluate inside the block, without dropout or gradients. The modes of all modules and the RNG are restored."""
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
    """Restore a base model if the block fails: no layer stays wrapped, no hook and no changed flag stays behind."""
    modules = [(module, dict(vars(module))) for module in base.modules()]
    # The dictionaries of parameters, submodules and hooks.
    inside = [(found, dict(found)) for _, before in modules for found in before.values() if isinstance(found, dict)]
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:
        for module, before in modules:
            vars(module).clear()
            vars(module).update(before)
        for found, before in inside:
            found.clear()
            found.update(before)
        for parameter, required in trainable:
            parameter.requires_grad_(required)
        raise


def fresh_base(base: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a base model without experts. Its modules are new, its tensors are shared with `base`."""
    with init_empty_weights(include_buffers=False):
        fresh = type(base)(copy.deepcopy(base.config))
    for path, module in base.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):  # which keeps more than tensors in its layers
            fresh.set_submodule(path.removesuffix(".base_layer"), _shallow(module))
    donor = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    donor = {name.replace(".base_layer.", "."): tensor for name, tensor in donor.items() if "lora_" not in name}
    for path, module in fresh.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = donor[f"{path}.{name}" if path else name]
    fresh.generation_config = copy.deepcopy(base.generation_config)
    return fresh.eval()


def _shallow(module: nn.Module) -> nn.Module:
    """Return a copy of a module with tables of its own for the same tensors."""
    twin = copy.copy(module)
    twin.__dict__ = {name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()}
    return twin
