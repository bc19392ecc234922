"""FSDP2: each process keeps a part of the frozen base; experts and router stay whole on all, as without it.

Only the base is large. torch's `fully_shard` (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)
shards its parameters, each decoder layer as one unit and what is outside of them as another; a forward pass gathers a
unit when it comes to it, and lets go of it afterwards. Experts and router are left out of that, and DDP averages their
gradients as in any other run of several processes. So the numbers, and the checkpoints, are those of a run without
sharding, and nothing has to be gathered for a save.

What follows from it: a forward pass of a sharded base, and whatever else reads its tensors, needs every rank. Where
one rank alone makes a forward pass, or one more than the others, it waits for ever.

Every process reads the whole base into its own CPU memory once; only then does the device get its part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..base.structure import decoder_layers
from ..errors import UsageError, listed
from ..mixture.model import Mixture
from . import ranks

WANTED = "ACCELERATE_USE_FSDP"
VERSION = "FSDP_VERSION"
# What Accelerate's launcher may also ask for, which is not done here -> what to do instead.
REFUSED_FLAGS = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params: the parts stay on the device; leave it out",
    "FSDP_FORWARD_PREFETCH": "--fsdp_forward_prefetch is of FSDP1; leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing: use train.py's --gradient-checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "--fsdp_activation_checkpointing_offload: leave it out",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config: all processes share one base; leave it out",
}


@dataclass(frozen=True)
class Sharding:
    """How the base is to be sharded.

    Args:
        reshard_after_forward: whether a unit is let go of after its forward pass, and gathered again for backward.
        layers: the class names of the decoder layers, where the launcher was told them.
    """

    reshard_after_forward: bool = True
    layers: tuple[str, ...] = ()


# ---- what the launcher asks for ----


@contextmanager
def requested() -> Iterator[Sharding | None]:
    """What `accelerate launch --use_fsdp` has put into the environment; None where it did not ask for FSDP.

    Inside, Accelerate and Transformers do not see it: Accelerate would shard the experts with the base (and on the CPU
    nothing at all), and Transformers would load the weights on the first rank only.

    Raises:
        UsageError: for FSDP1, and with every setting that is not supported.
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
    return _is_set(WANTED)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def _read_settings() -> Sharding:
    version = os.environ.get(VERSION, "1")  # as Accelerate counts
    if version != "2":
        raise UsageError(
            f"FSDP version {version} is not supported, FSDP2 is: accelerate launch --use_fsdp --fsdp_version 2 "
            f"({VERSION}=2 in the environment), or leave --use_fsdp out for DDP"
        )
    problems = [text for name, text in REFUSED_FLAGS.items() if _is_set(name)]
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


# ---- doing it ----


def shard(model: Mixture, device: torch.device, how: Sharding) -> str:
    """Put the mixture on `device`: of the base this process's part, experts, router and buffers whole. In place.

    Every rank calls it, with the same weights; with one process nothing is sharded.

    Returns:
        A line for the user.

    Raises:
        UsageError: where the launcher names other layers than the decoder's; nothing is changed then.
    """
    layers = decoder_layers(model.base)
    _check_layers(layers, how.layers)
    size = ranks.world()[1]
    if size == 1:
        model.to(device)
        return "FSDP2: one process has the whole base"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = {*model.trained_parameters().values(), *model.router.parameters()}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    _own_parameters(layers)
    mesh = init_device_mesh(device.type, (size,))
    for module in (*layers, model.base):  # the base last: it gets what is in no layer
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
    """Random weights are one tensor for all layers; of a sharded base each layer's parameters must be its own."""
    owners: dict[nn.Parameter, nn.Module] = {}
    for layer in layers:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and owners.setdefault(parameter, layer) is not layer:
                    module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)


def _held(model: Mixture) -> int:
    """How many of the base's parameters this process keeps."""
    return sum(p.to_local().numel() for p in model.base.parameters() if hasattr(p, "to_local"))


def replicated(model: Mixture, device: torch.device, **options) -> nn.parallel.DistributedDataParallel:
    """DDP over experts and router alone.

    Args:
        options: of DistributedDataParallel.
    """
    ddp = nn.parallel.DistributedDataParallel
    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    ddp._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return ddp(model, device_ids=None if device.type == "cpu" else [device.index], **options)
