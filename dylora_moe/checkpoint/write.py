"""Writes a checkpoint: its experts, router, skill library, probe and config, published whole or not at all."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from .. import __version__
from ..base.structure import architecture
from ..constants import expert_name
from ..errors import UsageError, listed
from ..mixture.model import Mixture
from ..skills.library import SkillLibrary
from ..store.files import explained, parallel
from ..store.publish import staged
from . import formats
from .probe import Outputs, as_arrays, dtype_name, expert_tensors, gate_tensors, make_probe
from .safetensors_file import Written, write_bytes, write_tensors
from .verify import inspect_files
from .verify_tensors import layout

# ---- writing ----


def save_checkpoint(
    target: str | Path,
    model: Mixture,
    *,
    step: int = 0,
    skills: SkillLibrary | None = None,
    training_files: Callable[[Path], None] | None = None,
    outputs: Outputs | None = None,
) -> bool:
    """Publish a checkpoint at `target`, whole or not at all.

    Args:
        training_files: writes what training needs to resume into the folder it is given.
        outputs: of `probe_outputs`, where the base is sharded: one rank saves, and alone it could not compute them.

    Returns:
        False where a complete checkpoint stood there already: it is left as it is.

    Raises:
        UsageError: where it could not be written, or verify.py would refuse it; nothing is left behind.
    """
    step = operator.index(step)
    with staged(target) as staging:
        if staging.path is None:
            return False
        with explained("write the checkpoint", target):
            written = write_files(staging.path, model, step=step, skills=skills or SkillLibrary(), outputs=outputs)
            if training_files is not None:
                with _disk_errors():
                    training_files(staging.path)
        problems = inspect_files(staging.path, {name: file.values for name, file in written.items()}).problems
        if problems:
            raise UsageError(f"cannot save {target}: what would be published is not sound:\n{listed(problems)}")
    return True


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Native code says as a RuntimeError or SafetensorError that it could not write; in truth that is an OSError."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        text = str(error)
        words = ("PytorchStream", "inline_container", "os error", "open file failed")
        if not any(word in text for word in words):
            raise
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
        code = next((c for c in codes if os.strerror(c) in text or f"os error {c})" in text), None)
        raise OSError(code, text.splitlines()[0][:200]) from error


def write_files(
    folder: Path, model: Mixture, *, step: int, skills: SkillLibrary, outputs: Outputs | None = None
) -> dict[str, Written]:
    """Write everything but the training state and the manifest; few experts at a time."""
    experts = expert_tensors(model)
    folders = [formats.expert_folder(expert_name(index)) for index in range(len(experts))]

    def write(index: int) -> dict[str, Written]:
        return _write_adapter(_adapter_json(model, index), experts[index], folder / folders[index])

    written = {
        f"{where}/{leaf}": file
        for where, files in zip(folders, parallel(write, range(len(experts))), strict=True)
        for leaf, file in files.items()
    }
    written[formats.ROUTER] = write_tensors(folder / formats.ROUTER, as_arrays(gate_tensors(model)))
    skills.save(folder / formats.SKILLS)
    parts = [*(f"{where}/{formats.ADAPTER_WEIGHTS}" for where in folders), formats.ROUTER]
    probe = make_probe(model, [written[part].digest[1] for part in parts], outputs)
    if probe is not None:
        tensors, facts = probe
        metadata = {"probe": json.dumps(facts, sort_keys=True)}
        written[formats.PROBE] = write_tensors(folder / formats.PROBE, as_arrays(tensors), metadata)
    config = describe_mixture(model, step=step, has_probe=probe is not None)
    written[formats.CONFIG] = write_bytes(folder / formats.CONFIG, _json(config))
    return written


def write_adapter(model: Mixture, index: int, folder: Path) -> None:
    """One expert as PEFT writes a LoRA: adapter_config.json and adapter_model.safetensors."""
    _write_adapter(_adapter_json(model, index), model.expert_tensors(index), folder)


def _write_adapter(config: bytes, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, Written]:
    folder.mkdir(parents=True)
    return {
        formats.ADAPTER_WEIGHTS: write_tensors(folder / formats.ADAPTER_WEIGHTS, as_arrays(tensors)),
        formats.ADAPTER_CONFIG: write_bytes(folder / formats.ADAPTER_CONFIG, config),
    }


def _adapter_json(model: Mixture, index: int) -> bytes:
    return _json(
        model.expert_configs[index].to_dict()
        | {"inference_mode": True, "base_model_name_or_path": base_name(model), "revision": model.base_revision}
    )


def export_expert(model: Mixture, index: int, folder: str | Path) -> Path:
    """Write one expert as a LoRA of its own, flat, as `PeftModel.from_pretrained` reads it.

    Raises:
        UsageError: where `folder` exists already or cannot be written, or a number of the expert is not finite.
    """
    model._check_expert(-1 if index is None else index)
    broken = [name for name, tensor in model.expert_tensors(index).items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"{expert_name(index)} cannot be exported: {broken[0]} has numbers that are not finite")
    folder = Path(folder)
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists already; an expert is exported into a new folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        with explained("export to", folder):
            write_adapter(model, index, partial)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def describe_mixture(model: Mixture, *, step: int = 0, has_probe: bool = False) -> dict:
    """The content of config.json."""
    experts = []
    parts = zip(model.expert_configs, model.expert_states, expert_tensors(model), strict=True)
    for index, (config, state, tensors) in enumerate(parts):
        experts.append(
            {
                "name": expert_name(index),
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "use_rslora": config.use_rslora,
                "target_modules": sorted(config.target_modules),
                "state": state,
                "tensors": len(tensors),
                "parameters": sum(t.numel() for t in tensors.values()),
                "layout": layout((name, tensor.shape) for name, tensor in tensors.items()),
            }
        )
    router = model.router.config
    return {
        "model_type": formats.MODEL_TYPE,
        "format_version": formats.FORMAT_VERSION,
        "base_model": {
            "name": base_name(model),
            "revision": model.base_revision,
            "dtype": dtype_name(model),
            "architecture": architecture(model.base),
        },
        "num_experts": model.num_experts,
        "experts": experts,
        "router": {
            "hidden_size": model.router.gate.in_features,
            "temperature": router.temperature,
            "top_k": router.top_k,
            "balance_coefficient": router.balance_coefficient,
        },
        "step": step,
        "probe": has_probe,
        "versions": {"dylora_moe": __version__}
        | {name: importlib.metadata.version(name) for name in ("peft", "safetensors", "torch", "transformers")},
    }


def base_name(model: Mixture) -> str | None:
    """The hub id or folder that the base model came from."""
    return model.base.config._name_or_path or None


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
