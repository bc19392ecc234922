"""A LoRA that stock PEFT has saved, read as an expert of a mixture, or refused by name.

An expert is a plain LoRA on linear layers. What makes a LoRA more than that would be lost without a word, and a LoRA of
another base model would be noise, so both are refused. On which layers it is, its tensors tell.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base import hub
from ..checkpoint import formats
from ..checkpoint.findings import short
from ..checkpoint.safetensors_file import read_json, scan_file
from ..checkpoint.verify_tensors import TENSOR_NAME
from ..errors import UsageError, listed, shown
from ..mixture.config import MoELoraConfig
from ..mixture.model import Mixture
from ..mixture.targets import linear_layers
from ..store.files import FileProblem

FILES = (formats.ADAPTER_CONFIG, formats.ADAPTER_WEIGHTS)
PICKLE = "adapter_model.bin"
# Of an adapter_config.json: what its tensors tell as well, what is known of the base model, and notes of PEFT.
NOT_READ = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
NOT_READ |= {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "runtime_config"}
NOT_READ |= {"lora_dropout", "task_type", "peft_type"}


@dataclass(frozen=True)
class Lora:
    """A LoRA that was read.

    Attributes:
        config: as an expert of the mixture has it.
        tensors: in float32, by the names that PEFT gives them.
        notes: lines for the user.
    """

    config: MoELoraConfig
    tensors: dict[str, torch.Tensor]
    notes: list[str]


def find_lora(source: str, revision: str | None = None) -> Path:
    """Return the folder with the two files of a LoRA: a local one, or one of the Hub, from which they are downloaded.

    Raises:
        UsageError: if there is no such folder or repository, or it holds no LoRA that can be read.
    """
    folder = Path(os.path.expanduser(source))
    if not folder.exists():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise UsageError(f"{source}: expected a folder with a LoRA, or a Hub id like user/name, found nothing")
        folder = hub.download(source, revision, list(FILES), None)
    elif revision is not None:
        raise UsageError(f"--revision {revision} is of a repository on the Hub, but {source} is on this machine")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        near = [str(path.parent) for path in sorted(folder.glob(f"*/{formats.ADAPTER_CONFIG}"))]
        remedy = f"name the folder of one LoRA:\n{listed(near)}" if near else "save_pretrained of PEFT writes both"
        if (folder / PICKLE).exists():
            remedy = f"{PICKLE} is a pickle, which is not read: load the LoRA in PEFT and save it again"
        raise UsageError(f"{source}: expected {' and '.join(FILES)} of a LoRA, found no {missing[0]}; {remedy}")
    return folder


def read_lora(folder: Path, model: Mixture) -> Lora:
    """Read a LoRA as an expert of a mixture.

    Raises:
        UsageError: with everything that an expert cannot be, and every tensor that does not fit the base model.
    """
    path = folder / formats.ADAPTER_CONFIG
    try:
        found = read_json(path)
    except FileProblem as error:
        raise UsageError(f"{path}: {error}; save the LoRA again") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected the config of a LoRA, found {short(found)}; save it again")
    settings = _settings(path, found, model)
    tensors = _tensors(folder / formats.ADAPTER_WEIGHTS)
    modules = {match["module"] for name in tensors if (match := TENSOR_NAME.fullmatch(name))}
    _check_fit(folder, tensors, settings["r"], model, found.get("base_model_name_or_path"))
    return Lora(MoELoraConfig(**settings, target_modules=_targets(modules, model)), tensors, _notes(found, model))


def _settings(path: Path, found: dict[str, Any], model: Mixture) -> dict[str, Any]:
    """Return the arguments of the expert's config, but for its targets."""
    problems = [
        f"{key}: expected {expected}, found {short(found.get(key))}"
        for key, expected, allowed in (
            ("peft_type", "LORA", ("LORA",)),
            ("task_type", "CAUSAL_LM", ("CAUSAL_LM", None)),
        )
        if found.get(key) not in allowed
    ]
    known = {each.name for each in fields(LoraConfig)}
    problems += [
        f"{shown(key)}={short(value)}: unknown to the installed version of PEFT; update it"
        for key, value in sorted(found.items())
        if key not in known and value
    ]
    settings = {key: value for key, value in found.items() if key in known - NOT_READ}
    # All experts have one dropout, which matters in training only.
    settings["lora_dropout"] = model.expert_configs[0].lora_dropout
    try:
        MoELoraConfig(**settings)
    except UsageError as error:
        problems.append(str(error))
    except (TypeError, ValueError, AttributeError) as error:
        problems.append(f"PEFT refuses it: {error}")
    if problems:
        raise UsageError(f"{path}: this LoRA cannot be an expert:\n{listed(problems)}")
    return {key: settings[key] for key in ("r", "lora_alpha", "use_rslora", "lora_dropout") if key in settings}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        problem = scan_file(path).problem
        tensors = {} if problem else load_file(path)
    except OSError as error:
        problem, tensors = f"cannot be read ({error.strerror or error})", {}
    if problem is None and not all(tensor.is_floating_point() for tensor in tensors.values()):
        problem = "expected tensors of floating-point numbers, found others"
    tensors = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    if problem is None and not all(tensor.isfinite().all() for tensor in tensors.values()):
        problem = "expected finite numbers, found others"
    if problem is None and not any(t.any() for name, t in tensors.items() if name.endswith(".lora_B.weight")):
        problem = "expected a LoRA that was trained, found every lora_B zero or none: it has no effect"
    if problem is not None:
        raise UsageError(f"{path}: {problem}")
    return tensors


def _check_fit(folder: Path, tensors: dict[str, torch.Tensor], r: int, model: Mixture, trained_on: object) -> None:
    linear = linear_layers(model.base)
    problems = []
    for name, tensor in sorted(tensors.items()):
        match = TENSOR_NAME.fullmatch(name)
        layer = linear.get(match["module"]) if match else None
        if match is None or layer is None:
            problems.append(f"{name}: expected A and B of linear layers of the base model, found this one")
            continue
        d_in, d_out = sizes_of_linear(layer)
        expected = (r, d_in) if match["side"] == "A" else (d_out, r)
        other = name.replace(f".lora_{match['side']}.", ".lora_B." if match["side"] == "A" else ".lora_A.")
        if tuple(tensor.shape) != expected:
            problems.append(f"{name}: expected the shape {expected}, found {tuple(tensor.shape)}")
        elif other not in tensors:
            problems.append(f"{name}: expected {other} beside it, found nothing")
    if problems:
        base = model.base.config._name_or_path
        raise UsageError(
            f"{folder}: this LoRA, of the base model {short(trained_on)}, does not fit {base}:\n{listed(problems)}"
        )


def sizes_of_linear(layer: nn.Module) -> tuple[int, int]:
    """Return how many inputs and outputs a linear layer has, also one that is quantized."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]  # of any kind of linear layer


def _targets(modules: set[str], model: Mixture) -> list[str]:
    """Return the ends of the names of these layers if no other layer has such an end, and otherwise whole names."""
    ends = {module.rpartition(".")[-1] for module in modules}
    same = {name for name in linear_layers(model.base) if name.rpartition(".")[-1] in ends}
    return sorted(ends if same == modules else modules)


def _notes(found: dict[str, Any], model: Mixture) -> list[str]:
    there, here = found.get("base_model_name_or_path"), model.base.config._name_or_path
    if there in (None, "", here):
        return []
    return [f"it was trained on {short(there)}, and is now an expert on {here}; they have the same shapes"]
