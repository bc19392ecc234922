"""Reads checkpoints from before manifests: `router.pt` and `adapter_model.bin`, where a newer one has safetensors.

Nothing vouches for such a folder; names and shapes are all that can be checked. The validators refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import formats
from .errors import CheckpointError
from .layers import expert_name
from .tensorfile import FileProblem, read_json

_EXPERT = re.compile(r"expert_(0|[1-9]\d{0,3})", re.ASCII)


def is_legacy(folder: Path) -> bool:
    """Whether a folder has adapters and a router, but nothing that only newer checkpoints have: a manifest, a probe, a
    skill library, a config with a version."""
    newer = (formats.MANIFEST, formats.PROBE, formats.SKILLS)
    if not folder.is_dir() or any((folder / name).exists() for name in newer):
        return False
    has_router = (folder / formats.LEGACY_ROUTER).is_file() or (folder / formats.ROUTER).is_file()
    config = folder / formats.CONFIG
    try:
        versioned = config.exists() and "format_version" in read_json(config)
    except (FileProblem, TypeError):
        versioned = True
    return has_router and (folder / formats.ADAPTERS).is_dir() and not versioned


def base_name(folder: Path) -> str | None:
    """The base model that the config names, if it names one."""
    try:
        config = read_json(folder / formats.CONFIG)
    except FileProblem:
        return None
    names = (config.get(key) for key in ("base_model_name_or_path", "base_model", "model_name"))
    return next((name for name in names if isinstance(name, str) and name), None)


def experts(folder: Path) -> list[str]:
    """The names of the experts, in order.

    Raises:
        CheckpointError: where they are not expert_0, expert_1, ...
    """
    found = {path.name for path in (folder / formats.ADAPTERS).iterdir() if path.is_dir()}
    expected = [expert_name(index) for index in range(len(found))]
    if not found or found != set(expected):
        where = f"{formats.ADAPTERS}: expected the folders expert_0, expert_1, ..., found {sorted(found)[:10]}"
        raise CheckpointError(folder, [f"{where}; restore the missing ones from a copy"])
    return expected


def tensors(folder: Path, files: Iterable[str], name: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The file of an expert, and its tensors by name."""
    nested, flat = formats.expert_folder(name), f"{formats.ADAPTERS}/{name}"
    leaves = (formats.ADAPTER_WEIGHTS, formats.LEGACY_ADAPTER_WEIGHTS)
    path = next((p for p in (f"{where}/{leaf}" for where in (nested, flat) for leaf in leaves) if p in files), None)
    if path is None:
        problem = f"{flat}: expected {' or '.join(leaves)}, found neither; restore the file from a copy"
        raise CheckpointError(folder, [problem])
    return path, read_tensors(folder, path)


def gate(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The file of the router, and its one matrix by the name it has now, whatever it was called."""
    path = formats.ROUTER if (folder / formats.ROUTER).exists() else formats.LEGACY_ROUTER
    found = read_tensors(folder, path)
    return path, {formats.GATE: next(iter(found.values()))} if len(found) == 1 else found


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A file's tensors by name. Of a pickle only tensors are taken: nothing else in it is run.

    Raises:
        CheckpointError: where it holds anything else or cannot be read.
    """
    try:
        if name.endswith(".safetensors"):
            return load_file(folder / name)
        found = torch.load(folder / name, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
            raise TypeError("it holds something else")
        return found
    except Exception as error:  # torch raises what pickle, zipfile and itself do
        reason = str(error).splitlines()[0][:160] if str(error) else ""
        problem = f"{name}: expected tensors by name and nothing else, found {type(error).__name__}: {reason}"
        raise CheckpointError(folder, [f"{problem}; restore the file from a copy"]) from None
