"""FSDP2: each process keeps a part of the frozen base; experts and router are whole on every process.

Only the base is large. torch's `fully_shard` (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)
shards its parameters: each decoder layer is one unit, and all that is outside of the layers is another. A forward pass
gathers a unit when it reaches it, and frees it afterwards. Experts and router are not sharded, and DDP averages their
gradients as in any other run of several processes. So the numbers and the checkpoints are those of a run without
sharding, and a save gathers nothing.

A forward pass of a sharded base needs every rank, and so does everything else that reads its tensors. A rank that makes
a forward pass alone, or one more than the others, waits for ever.

Every process first reads the whole base into its own CPU memory; only its part is moved to the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..base.structure import decoder_layers, quantization
from ..errors import UsageError, listed
from ..mixture.model import Mixture
from . import ranks

WANTED = "ACCELERATE_USE_FSDP"
VERSION = "FSDP_VERSION"
# Settings of Accelerate's launcher that are not supported, and what to do instead.
REFUSED_FLAGS = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params: the parts stay on the device; leave it out",
    "FSDP_FORWARD_PREFETCH": "--fsdp_forward_prefetch is of FSDP1; leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing: use train.py's --gradient-checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "--fsdp_activation_checkpointing_offload: leave it out",
}


@dataclass(frozen=True)
class Sharding:
    """How the base is to be sharded."""

    reshard_after_forward: bool = True  # whether a unit is freed after its forward pass, and gathered for the backward
    layers: tuple[str, ...] = ()  # the class names of the decoder layers, if the launcher was given them


# ---- what the launcher asks for ----


@contextmanager
def requested() -> Iterator[Sharding | None]:
    """Yield what `accelerate launch --use_fsdp` has put into the environment; None if it did not ask for FSDP.

    Inside the block, Accelerate and Transformers do not see it. Otherwise Accelerate would shard the experts with the
    base (and on the CPU nothing at all), and Transformers would load the weights on the first rank only.

    Raises:
        UsageError: For FSDP1, or for settings that are not supported; it lists them.
    """
    if not is_requested():
        yield None
        return
    sharding = _read_settings()
    before = os.environ.pop(WANTED)
    try:
        yield sharding
    finally:
        os.environ[WANTED] = before


def is_requested() -> bool:
    return is_set(WANTED)


def is_set(name: str) -> bool:
    """Return whether a variable of the environment is true, as Accelerate reads it."""
    return os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def _read_settings() -> Sharding:
    version = os.environ.get(VERSION, "1")  # the default of Accelerate
    if version != "2":
        raise UsageError(
            f"FSDP version {version} is not supported, FSDP2 is: accelerate launch --use_fsdp --fsdp_version 2 "
            f"({VERSION}=2 in the environment), or leave --use_fsdp out for DDP"
        )
    problems = [text for name, text in REFUSED_FLAGS.items() if is_set(name)]
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy.upper() != "TRANSFORMER_BASED_WRAP":
        problems.append(f"--fsdp_auto_wrap_policy {policy}: a unit is a decoder layer; leave it out")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        problems.append("--fsdp_ignored_modules: all of the base is sharded; leave it out")
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")
    if reshard.lower() not in ("true", "false"):
        problems.append(f"--fsdp_reshard_after_forward {reshard}: expected true or false")
    if problems:
        raise UsageError(f"these settings of FSDP are not supported:\n{listed(problems)}")
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    return Sharding(reshard.lower() == "true", tuple(name.strip() for name in names if name.strip()))


# ---- sharding ----


def shard(model: Mixture, device: torch.device, how: Sharding) -> str:
    """Move the mixture to `device` in place: the part of the base of this process, and all of experts and router.

    Every rank calls this, with the same weights. With one process nothing is sharded.

    Returns:
        A line for the user.

    Raises:
        UsageError: If the launcher names other layers than those of the decoder, or the base is quantized; then nothing
            is changed.
    """
    if quantization(model.base) is not None:
        raise UsageError(
            "FSDP2 does not shard a quantized base model: leave --use_fsdp out, so that each process has all of it, or "
            "--quantize"
        )
    layers = decoder_layers(model.base)
    _check_layers(layers, how.layers)
    size = ranks.world()[1]
    if size == 1:
        nn.Module.to(model, device)
        return "FSDP2: one process has the whole base"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    experts = (model.expert_tensors(index).values() for index in range(model.num_experts))
    whole = {*chain.from_iterable(experts), *model.router.parameters()}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    _own_parameters(layers)
    mesh = init_device_mesh(device.type, (size,))
    for module in (*layers, model.base):  # the base last: it takes what is in no layer
        fully_shard(module, mesh=mesh, reshard_after_forward=how.reshard_after_forward, ignored_params=whole)
    model.sharded = True
    return f"FSDP2: each of {size} processes keeps {_held(model):,} of the base's parameters"


def _check_layers(layers: nn.ModuleList, names: tuple[str, ...]) -> None:
    found = sorted({type(layer).__name__ for layer in layers})
    if names and sorted(names) != found:
        raise UsageError(
            f"--fsdp_transformer_layer_cls_to_wrap {','.join(names)}: the base's decoder layers are of "
            f"{', '.join(found)}; leave it out"
        )


def _own_parameters(layers: nn.ModuleList) -> None:
    """Give each layer parameters of its own, which sharding needs: random weights are one tensor for all layers."""
    owners: dict[nn.Parameter, nn.Module] = {}
    for layer in layers:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and owners.setdefault(parameter, layer) is not layer:
                    module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)


def _held(model: Mixture) -> int:
    """Return how many parameters of the base this process keeps."""
    return sum(p.to_local().numel() for p in model.base.parameters() if hasattr(p, "to_local"))


def replicated(model: Mixture, device: torch.device, **options: Any) -> nn.parallel.DistributedDataParallel:
    """Wrap the model in DDP over experts and router alone; `options` are those of DistributedDataParallel."""
    ddp = nn.parallel.DistributedDataParallel
    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    ddp._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return ddp(model, device_ids=None if device.type == "cpu" else [device.index], **options)
