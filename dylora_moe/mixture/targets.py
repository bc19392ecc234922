"""Which linear layers of a base model an expert goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.structure import decoder_layers
from ..errors import MAX_LISTED, UsageError
from .config import MoELoraConfig
from .expert_matrices import weight_of

ATTENTION_TARGETS = ("k_proj", "o_proj", "q_proj", "v_proj")
ALL_LINEAR = "all-linear"
# What tells a Mamba layer. Its kernels read the weights of its linear layers, all but that of in_proj, without calling
# the layers: experts on them would have no effect, and get no gradient.
STATE_SPACE, CALLED_LEAVES = ("A_log", "D"), {"in_proj"}
CACHE_LEAVES = {"kv_b_proj"}  # it reads all tokens of the cache, of which the router sees the newest
STACKED_LEAVES = {"gate_proj", "up_proj", "down_proj"}  # by which PEFT means a base's own experts where it has some


def resolve_targets(base: PreTrainedModel, config: MoELoraConfig) -> tuple[MoELoraConfig, list[str]]:
    """A copy of the config whose targets are names of linear layers inside the decoder layers.

    Returns:
        The config, and lines for the user about what was left out.

    Raises:
        UsageError: for targets that are not there.
    """
    linear = linear_layers(base)
    inside = {name for layer in decoder_layers(base) for name in _names_of(base, layer) if name in linear}
    leaves = {name.rsplit(".", 1)[-1] for name in inside}
    all_linear = _all_linear(base, leaves)
    default = set(ATTENTION_TARGETS) if leaves.issuperset(ATTENTION_TARGETS) else all_linear  # their usual names
    known = f"the decoder layers have {', '.join(sorted(leaves))}"
    wanted = default if config.target_modules is None else _wanted(config.target_modules, linear, all_linear)
    unknown = sorted(str(target) for target in wanted if not _matching(linear, [target]))
    if unknown:
        raise UsageError(f"no linear layer of {type(base).__name__} is named {comma_separated(unknown)}; {known}")
    unwanted = _matching(linear, _wanted(config.exclude_modules or (), linear, leaves))
    notes = []
    bypassed = _matching(_bypassed(base, linear) - unwanted, wanted)
    if bypassed and config.target_modules in (None, ALL_LINEAR):
        unwanted |= bypassed
        notes.append(f"left out of the targets, since {_bypass(bypassed)}")
    elif bypassed:
        notes.append(f"experts may have no effect on some of the targets, since {_bypass(bypassed)}")
    matched = _matching(linear, wanted) - unwanted
    outside = sorted(matched - inside)
    if outside:
        notes.append(f"left out of the targets, since outside the decoder layers: {comma_separated(outside)}")
    targets = {target for target in wanted if _matching(matched & inside, [target])}
    if not targets:
        reason = (
            f"all targets lie outside the decoder layers ({comma_separated(outside)})"
            if outside
            else "no target is left"
        )
        raise UsageError(f"{reason}; {known}")
    excluded = _matching(linear, targets) & (unwanted | set(outside))
    resolved = replace_config(
        config,
        target_modules=targets,
        exclude_modules=sorted(excluded) or None,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in matched & inside),
        base_model_name_or_path=base.config._name_or_path or None,
    )
    return resolved, notes


def _all_linear(base: PreTrainedModel, leaves: set[str]) -> set[str]:
    """The linear layers that an expert can go on."""
    leaves = leaves - CACHE_LEAVES
    stacked = {name.rsplit(".", 1)[-1] for name, parameter in base.named_parameters() if parameter.ndim == 3}
    return leaves - STACKED_LEAVES if "down_proj" in stacked else leaves


def _wanted(targets: str | Iterable[str], linear: Iterable[str], leaves: set[str]) -> set[str]:
    """The names or ends of names that `target_modules` means; PEFT's rule for a text is a regular expression."""
    if not isinstance(targets, str):
        return set(targets)
    if targets == ALL_LINEAR:
        return leaves
    try:
        return {name for name in linear if re.fullmatch(targets, name)} or {targets}
    except re.error as error:
        raise UsageError(f"targets {targets!r} is neither a name nor a regular expression ({error})") from None


def _bypassed(base: PreTrainedModel, linear: Iterable[str]) -> set[str]:
    """The linear layers whose weights are read without a call of the layer."""
    mixers = {name for name, module in base.named_modules() if all(hasattr(module, part) for part in STATE_SPACE)}
    parts = {name: name.rpartition(".") for name in linear}
    return {name for name, (parent, _, leaf) in parts.items() if parent in mixers and leaf not in CALLED_LEAVES}


def _bypass(bypassed: set[str]) -> str:
    leaves = sorted({name.rpartition(".")[-1] for name in bypassed})
    return f"a Mamba layer reads their weights without calling them: {', '.join(leaves)}"


def _matching(names: Iterable[str], targets: Iterable[str]) -> set[str]:
    """The names that a list of targets means, by PEFT's rule."""
    ends = tuple(f".{target}" for target in targets)
    return {name for name in names if f".{name}".endswith(ends)}


def comma_separated(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _names_of(base: nn.Module, layer: nn.Module) -> Iterator[str]:
    prefix = next(name for name, module in base.named_modules() if module is layer)
    return (f"{prefix}.{name}" for name, _ in layer.named_modules() if name)


def linear_layers(base: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of a model by name, wrapped or not.

    Without the routers of a base that is a mixture itself: they return more than a linear layer does.
    """
    found = {}
    for name, module in base.named_modules():
        if "Router" in type(module).__name__:
            continue
        if isinstance(module, LoraLayer):
            found[name] = module.get_base_layer()
        elif isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name and not name.endswith(".base_layer"):
            found[name] = module
    return found


def replace_config(config: MoELoraConfig, **changes: Any) -> MoELoraConfig:
    """A copy of the config with changes, and its mapping to routed layers."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), set):
            changes.setdefault(name, sorted(getattr(config, name)))
    return replace(config, **changes)


def adapter_parameters(config: PreTrainedConfig, r: int) -> int:
    """The parameters of one expert of rank r with the default targets; nothing is allocated."""
    with init_empty_weights(include_buffers=True):
        base = AutoModelForCausalLM.from_config(config)
    linear = linear_layers(base)
    targets = resolve_targets(base, MoELoraConfig(r=r))[0].target_modules or ()
    return sum(r * sum(weight_of(linear[name]).shape) for name in _matching(linear, targets))
