"""Random generators, modes and base models that are left as they were, and copies that share tensors."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
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


def generation_text(base: PreTrainedModel) -> str:
    """Return the generation config of a model as JSON, without defaults; an empty text if it has none.

    One that JSON cannot hold is returned as another text, by which a change can still be seen.
    """
    config = base.generation_config
    if config is None:
        return ""
    try:
        return config.to_json_string(use_diff=True, ignore_metadata=True)
    except TypeError:
        return repr(config.to_diff_dict())


def _shallow(module: nn.Module) -> nn.Module:
    """Return a copy of a module with tables of its own for the same tensors."""
    twin = copy.copy(module)
    twin.__dict__ = {name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()}
    return twin


# ---- the states of the random generators ----

MT19937_WORDS = 624


def rng_state() -> dict[str, Any]:
    """Return the states of the random generators, in types that `torch.load(weights_only=True)` reads."""
    numpy_state: Any = np.random.get_state()
    version, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def check_rng_state(state: Any) -> None:
    """Check a state as `rng_state` returns it, on generators that nobody uses. Raises ValueError if it is none."""
    try:
        _check_python(state["python"])
        _check_numpy(*state["numpy"])
        torch.Generator().set_state(state["cpu"])
        for found in state.get("cuda", []):
            if not (found.dtype == torch.uint8 and found.dim() == 1):
                raise ValueError("cuda: expected bytes")
            if torch.cuda.is_available():
                torch.Generator("cuda").set_state(found)
    except (LookupError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {str(error)[:160]}") from None


def _check_python(state: Any) -> None:
    random.Random().setstate(_python_state(state))
    if not (state[2] is None or (isinstance(state[2], float) and math.isfinite(state[2]))):  # setstate does not look
        raise ValueError("python: expected a finite number as the next normal one")


def _check_numpy(version: Any, keys: Any, position: Any, has_gauss: Any, cached: Any) -> None:
    """Check what `set_state` does not: beyond the last word, NumPy would read memory that is not its own."""
    is_right = version == "MT19937" and keys.dtype == torch.int64 and keys.shape == (MT19937_WORDS,)
    is_right = is_right and type(position) is int and 0 <= position <= MT19937_WORDS
    is_right = is_right and type(has_gauss) is int and has_gauss in (0, 1)
    if not (is_right and isinstance(cached, float) and math.isfinite(cached)):
        raise ValueError("numpy: expected the state of an MT19937")
    if int(keys.min()) < 0 or int(keys.max()) >= 1 << 32:
        raise ValueError("numpy: expected words of 32 bits")


def _python_state(state: Any) -> tuple[int, tuple[int, ...], float | None]:
    version, keys, gauss = state
    return version, tuple(keys), gauss


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the random generators of this process, those of CUDA for as many GPUs as there are here and were there."""
    version, keys, *rest = state["numpy"]
    random.setstate(_python_state(state["python"]))
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for device, found in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(found, device)
