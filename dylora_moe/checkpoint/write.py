"""Writes a checkpoint: its experts, router, skill library, probe and config, published whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import operator
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig

from .. import __version__
from ..base.fingerprint import architecture
from ..base.preserve import generation_text
from ..base.structure import quantization
from ..constants import expert_name
from ..errors import UsageError, listed
from ..mixture.config import MoELoraConfig
from ..mixture.experts import check_expert
from ..mixture.model import Mixture
from ..skills.library import SkillLibrary
from ..store.files import explained, native_errors, parallel
from ..store.publish import staged
from ..store.whole_files import new_folder
from . import formats
from .config import BESIDE, ArchitectureEntry, BaseModelEntry, CheckpointConfig, ExpertEntry, RouterEntry, encode
from .probe import Outputs, make_probe
from .safetensors_file import Scan
from .tensors import dtype_name, expert_tensors, router_tensors, write_tensors
from .verify import inspect_files
from .verify_tensors import layout

# What a plain LoRA needs: an older PEFT refuses a file with keys that it does not know.
ADAPTER_KEYS: tuple[str, ...] = ("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode")
ADAPTER_KEYS += ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "bias", "fan_in_fan_out")
ADAPTER_KEYS += ("init_lora_weights",)


def save_checkpoint(
    target: str | Path,
    model: Mixture,
    *,
    step: int = 0,
    skills: SkillLibrary | None = None,
    training_files: Callable[[Path], None] | None = None,
    outputs: Outputs | None = None,
) -> Path:
    """Publish a checkpoint at `target`, whole or not at all, and return its path.

    Args:
        training_files: writes what training needs to resume into the folder it is given.
        outputs: what `probe_outputs` has returned on every rank, if the base is sharded: the one rank that saves could
            not compute it alone.

    Raises:
        UsageError: if there is a complete checkpoint already, which is left as it is; or if it cannot be written, or
            would not be sound. Nothing is left behind.
    """
    step = operator.index(step)
    with staged(target) as folder:
        if folder is None:
            raise UsageError(
                f"nothing was saved: {target} is a checkpoint already, and a checkpoint is never replaced; choose "
                "another folder, or move that one away"
            )
        with explained("write the checkpoint", target):
            scans = write_files(folder, model, step=step, skills=skills or SkillLibrary(), outputs=outputs)
            if training_files is not None:
                with native_errors():
                    training_files(folder)
        problems = inspect_files(folder, scans).problems
        if problems:
            raise UsageError(f"cannot save {target}: what would be published is not sound:\n{listed(problems)}")
    return Path(target)


def write_files(
    folder: Path, model: Mixture, *, step: int, skills: SkillLibrary, outputs: Outputs | None = None
) -> dict[str, Scan]:
    """Write everything but the training state and the manifest. Returns what the files with tensors hold, read back."""
    experts = expert_tensors(model)
    folders = [formats.expert_folder(expert_name(index)) for index in range(len(experts))]

    def write(index: int) -> Scan:
        return _write_adapter(_adapter_json(model, index), experts[index], folder / folders[index])

    adapters = parallel(write, range(len(experts)))
    scans = {f"{where}/{formats.ADAPTER_WEIGHTS}": scan for where, scan in zip(folders, adapters, strict=True)}
    scans[formats.ROUTER] = write_tensors(folder / formats.ROUTER, router_tensors(model))
    probe = make_probe(model, [scan.digest[1] for scan in scans.values()], outputs)
    _write_bytes(folder / formats.SKILLS, skills.to_bytes())
    if probe is not None:
        tensors, facts = probe
        metadata = {"probe": json.dumps(facts, sort_keys=True)}
        scans[formats.PROBE] = write_tensors(folder / formats.PROBE, tensors, metadata)
    if model.has_own_generation_config:
        _write_generation_config(folder / formats.GENERATION, generation_text(model.base))
    config = describe_mixture(model, step=step, has_probe=probe is not None, run_dir=folder.parent)
    _write_bytes(folder / formats.CONFIG, config.to_json())
    return scans


def _write_generation_config(path: Path, text: str) -> None:
    """Write a generation config, unless it could not be read again: that is no reason to save nothing."""
    try:
        GenerationConfig.from_dict(json.loads(text))
    except json.JSONDecodeError:
        cause = "it holds values that JSON does not have"
    except Exception as error:  # whatever Transformers raises for values that it does not take
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        _write_bytes(path, text.encode())
        return
    warnings.warn(f"the checkpoint has no generation_config: it could not be read again ({cause})", stacklevel=2)


def _write_adapter(config: bytes, tensors: Mapping[str, torch.Tensor], folder: Path) -> Scan:
    """Write one expert as PEFT writes a LoRA: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True)
    scan = write_tensors(folder / formats.ADAPTER_WEIGHTS, tensors)
    _write_bytes(folder / formats.ADAPTER_CONFIG, config)
    return scan


def _write_bytes(path: Path, data: bytes) -> None:
    with explained("write", path), open(path, "wb") as file:
        file.write(data)


def _adapter_json(model: Mixture, index: int) -> bytes:
    found = model.expert_configs[index].to_dict()
    found |= {"inference_mode": True, "base_model_name_or_path": base_name(model), "revision": model.base_revision}
    excluded = ("exclude_modules",) if found["exclude_modules"] else ()  # known to PEFT from 0.14 on
    return encode({key: found[key] for key in (*ADAPTER_KEYS, *excluded)})


def export_expert(model: Mixture, index: int, folder: str | Path) -> Path:
    """Write one expert to a new folder as a plain LoRA, as `PeftModel.from_pretrained` reads it.

    Raises:
        UsageError: if `folder` exists already or cannot be written, or if a value of the expert is not finite.
    """
    check_expert(-1 if index is None else index, model.num_experts)
    broken = [name for name, tensor in model.expert_tensors(index).items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"{expert_name(index)} cannot be exported: {broken[0]} has numbers that are not finite")
    folder = Path(folder)
    with new_folder(folder) as partial:
        _write_adapter(_adapter_json(model, index), model.expert_tensors(index), partial)
    return folder


def describe_mixture(
    model: Mixture, *, step: int = 0, has_probe: bool = False, run_dir: Path | None = None
) -> CheckpointConfig:
    """Return the content of a mixture's config.json, for a checkpoint in `run_dir`."""
    names = map(expert_name, range(model.num_experts))
    parts = zip(names, model.expert_configs, model.expert_states, expert_tensors(model), strict=True)
    router = model.router.config
    libraries = ("peft", "safetensors", "torch", "transformers")
    return CheckpointConfig(
        base_model=BaseModelEntry(
            name=base_name(model, run_dir),
            revision=model.base_revision,
            dtype=dtype_name(model),
            architecture=ArchitectureEntry(**architecture(model.base)),
            quantization=quantization(model.base),
        ),
        experts=[_describe_expert(*each) for each in parts],
        router=RouterEntry(
            width=model.router.gate.in_features,
            temperature=router.temperature,
            top_k=router.top_k,
            balance_coefficient=router.balance_coefficient,
            decay=router.decay,
            prior_tokens=router.prior_tokens,
        ),
        step=step,
        probe=has_probe,
        versions={"dylora_moe": __version__} | {name: importlib.metadata.version(name) for name in libraries},
    )


def _describe_expert(name: str, config: MoELoraConfig, state: str, tensors: dict[str, torch.Tensor]) -> ExpertEntry:
    return ExpertEntry(
        name=name,
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=sorted(config.target_modules or ()),
        state=state,
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        layout=layout((key, tensor.shape) for key, tensor in tensors.items()),
    )


def base_name(model: Mixture, run_dir: Path | None = None) -> str | None:
    """Return the hub id or the absolute path that the base model came from, or ../NAME for what is in `run_dir`."""
    name = model.base.config._name_or_path
    if not name or not (name.startswith((".", "~")) or os.path.exists(name)):
        return name or None
    path = Path(name).expanduser().resolve()
    if run_dir is not None and path.is_relative_to(run_dir.resolve()):
        return BESIDE + path.relative_to(run_dir.resolve()).as_posix()
    return str(path)
