"""The tensors of a mixture as a checkpoint stores them: which they are, their bytes, and how they are written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.numpy import save, save_file

from ..constants import expert_name
from ..errors import UsageError
from ..mixture.model import Mixture
from ..store.files import explained, native_errors
from .safetensors_file import Scan, scan_file

PLAIN_METADATA = {"format": "pt"}  # what PEFT and Transformers write


def expert_tensors(model: Mixture) -> list[dict[str, torch.Tensor]]:
    """Return `model.expert_tensors` of every expert, from one walk over the modules."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(model.num_experts)]
    for path, layer in model.routed_layers():
        for index, tensors in enumerate(found):
            name = expert_name(index)
            if name in layer.lora_A:
                for side, matrices in (("A", layer.lora_A), ("B", layer.lora_B)):
                    tensors[f"base_model.model.{path}.lora_{side}.weight"] = cast(torch.Tensor, matrices[name].weight)
    return found


def router_tensors(model: Mixture) -> dict[str, torch.Tensor]:
    """Return the router's tensors by their names in the file."""
    return dict(model.router.named_parameters())


def dtype_name(model: Mixture) -> str:
    """Return the dtype of the base's weights, such as "bfloat16"."""
    return str(input_embeddings(model).weight.dtype).removeprefix("torch.")


def input_embeddings(model: Mixture) -> torch.nn.Embedding:
    """Return the base's input embeddings."""
    return cast(torch.nn.Embedding, model.base.get_input_embeddings())


def tensor_digests(model: Mixture) -> list[str]:
    """Return the SHA-256 of the file that each expert, and then the router, is written to."""
    parts = [*expert_tensors(model), router_tensors(model)]
    return [hashlib.sha256(save(_as_arrays(part), metadata=PLAIN_METADATA)).hexdigest() for part in parts]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Scan:
    """Write a safetensors file, and read it back.

    Args:
        metadata: at most one key, since safetensors writes several in an order that changes from run to run.

    Raises:
        UsageError: if it cannot be written, or a tensor is in float64.
    """
    with explained("write", path), native_errors():
        with open(path, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777  # as the umask says; save_file would leave 0600
        save_file(_as_arrays(tensors), path, metadata=metadata or PLAIN_METADATA)
        os.chmod(path, mode)
        return scan_file(path)


def _as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the values on the CPU, floating-point ones in float32, copied only if they are not that already."""
    return {name: _as_saved(name, tensor).contiguous().numpy() for name, tensor in tensors.items()}


def _as_saved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float64:
        raise UsageError(f"{name} is in float64, experts and router are saved in float32: cast the mixture to it first")
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
