"""A checkpoint's contents: what is written, and how it is read back.

    checkpoint-836/
    ├── peft_adapters/expert_0/expert_0/{adapter_config.json, adapter_model.safetensors}
    ├── router.safetensors, skill_library.safetensors, probe.safetensors
    ├── config.json, manifest.json
    └── optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json    when saved by training

Written through commit.py, which publishes a folder whole or not at all; read only after verify.py has found no problem.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import operator
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from . import __version__, bases, commit, formats, manifest, verify, verify_tensors
from .config import MoELoraConfig, RouterConfig
from .errors import CheckpointError, UsageError, listed
from .isolation import as_found_on_error
from .layers import expert_name
from .model import DyLoRAMoE, check_base, untouched
from .probe import (
    PROBE_TOLERANCE,
    Outputs,
    ProbeDifference,
    as_arrays,
    changed_tensors,
    dtype_name,
    expert_tensors,
    gate_tensors,
    make_probe,
    max_abs_difference,
    probe_difference,
    probe_facts,
    probe_outputs,
    read_probe,
    saved_on,
)
from .skills import SkillLibrary
from .tensorfile import FileProblem, Written, read_json, write_bytes, write_tensors

__all__ = [
    "PROBE_TOLERANCE",
    "ProbeDifference",
    "build",
    "changed_tensors",
    "describe",
    "dtype_name",
    "export_expert",
    "load",
    "load_into",
    "make_probe",
    "max_abs_difference",
    "probe_difference",
    "probe_facts",
    "probe_outputs",
    "read_probe",
    "read_skills",
    "save",
    "sound_config",
    "stock_peft_logits",
    "untouched",
    "write_adapter",
]

# What an adapter_config.json tells of an expert; all else in it is as in any plain LoRA, which verify.py has made sure.
_READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights")
_REMEDY = "the file belongs to another model or was changed; restore it from a copy"


# ---- writing ----


def save(
    target: str | Path,
    model: DyLoRAMoE,
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
    with commit.staged(target) as staging:
        if staging.path is None:
            return False
        with commit.explained("write the checkpoint", target):
            written = write_files(staging.path, model, step=step, skills=skills or SkillLibrary(), outputs=outputs)
            staging.digests.update({name: file.digest for name, file in written.items()})
            if training_files is not None:
                with _disk_errors():
                    training_files(staging.path)
        problems = verify.inspect_files(staging.path, {name: file.values for name, file in written.items()}).problems
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
    folder: Path, model: DyLoRAMoE, *, step: int, skills: SkillLibrary, outputs: Outputs | None = None
) -> dict[str, Written]:
    """Write everything but the training state and the manifest; few experts at a time."""
    experts = expert_tensors(model)
    folders = [formats.expert_folder(expert_name(index)) for index in range(len(experts))]

    def write(index: int) -> dict[str, Written]:
        return _write_adapter(_adapter_json(model, index), experts[index], folder / folders[index])

    written = {
        f"{where}/{leaf}": file
        for where, files in zip(folders, manifest.parallel(write, range(len(experts))), strict=True)
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
    config = describe(model, step=step, has_probe=probe is not None)
    written[formats.CONFIG] = write_bytes(folder / formats.CONFIG, _json(config))
    return written


def write_adapter(model: DyLoRAMoE, index: int, folder: Path) -> None:
    """One expert as PEFT writes a LoRA: adapter_config.json and adapter_model.safetensors."""
    _write_adapter(_adapter_json(model, index), model.expert_tensors(index), folder)


def _write_adapter(config: bytes, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, Written]:
    folder.mkdir(parents=True)
    return {
        formats.ADAPTER_WEIGHTS: write_tensors(folder / formats.ADAPTER_WEIGHTS, as_arrays(tensors)),
        formats.ADAPTER_CONFIG: write_bytes(folder / formats.ADAPTER_CONFIG, config),
    }


def _adapter_json(model: DyLoRAMoE, index: int) -> bytes:
    return _json(
        model.expert_configs[index].to_dict()
        | {"inference_mode": True, "base_model_name_or_path": base_name(model), "revision": model.base_revision}
    )


def export_expert(model: DyLoRAMoE, index: int, folder: str | Path) -> Path:
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
        with commit.explained("export to", folder):
            write_adapter(model, index, partial)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def describe(model: DyLoRAMoE, *, step: int = 0, has_probe: bool = False) -> dict:
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
                "layout": verify_tensors.layout((name, tensor.shape) for name, tensor in tensors.items()),
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
            "architecture": bases.architecture(model.base),
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


def base_name(model: DyLoRAMoE) -> str | None:
    """The hub id or folder that the base model came from."""
    return model.base.config._name_or_path or None


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


# ---- reading ----


def load(folder: str | Path, base: PreTrainedModel | None = None, **options) -> DyLoRAMoE:
    """Read a checkpoint into a fresh mixture.

    Args:
        base: the base model; without it, the one that the checkpoint names is loaded.
        options: `weights` ("pretrained"; "random": where others will do), `dtype`, `device`, `token` and `revision` of
            that base model, and `label_smoothing`.

    Warns:
        UserWarning: where the base's weights are not those that the checkpoint was saved on, as far as its probe tells.

    Raises:
        CheckpointError: with every problem, before anything is built.
        UsageError: where the base model cannot be had, or the folder is moved away meanwhile.
    """
    folder = Path(folder)
    needless = sorted(options.keys() - {"label_smoothing", "revision"}) if base is not None else []
    if needless:
        raise UsageError(f"{', '.join(needless)}: of a base model that is to be loaded, but base= gives one; leave out")
    config = sound_config(folder)
    smoothing = options.pop("label_smoothing", 0.0)
    revision = options.pop("revision", None) or config["base_model"]["revision"]
    if base is None:
        name = config["base_model"]["name"]
        if not name:
            raise UsageError(f"{folder}/{formats.CONFIG} names no base model; pass base=")
        options.setdefault("dtype", config["base_model"]["dtype"])
        base = _load_base(name, revision=revision, **options)
    with as_found_on_error(base), manifest.held_still(folder):
        model = _build(folder, config, base, smoothing)
        model.base_revision = revision
        _copy(folder, _read_all(folder, model), model, _states(config))
        probe = read_probe(folder)
    if probe is not None and not saved_on(probe[1], model):
        name = config["base_model"]["name"]
        warnings.warn(
            f"{folder} was saved on other weights of its base model ({name}) than it is loaded on: its experts were "
            "not trained for these",
            stacklevel=3,
        )
    return model


def build(folder: str | Path, base: PreTrainedModel) -> DyLoRAMoE:
    """A fresh mixture of a checkpoint's shape, into which nothing was read yet.

    Raises:
        CheckpointError: with every problem, before anything is built.
    """
    folder = Path(folder)
    config = sound_config(folder)
    with manifest.held_still(folder):
        return _build(folder, config, base)


def _build(folder: Path, config: dict, base: PreTrainedModel, label_smoothing: float = 0.0) -> DyLoRAMoE:
    _check_architecture(folder, config, base)
    adapters = [_adapter_config(folder, expert["name"]) for expert in config["experts"]]
    return _mixture(folder, base, adapters, router=_router_config(config), label_smoothing=label_smoothing)


def _mixture(folder: Path, base: PreTrainedModel, adapters: list[MoELoraConfig], **options) -> DyLoRAMoE:
    if not 0 <= options["label_smoothing"] < 1:  # the caller's fault, not the checkpoint's
        raise UsageError(f"label smoothing must be at least 0 and less than 1, got {options['label_smoothing']!r}")
    check_base(base)  # likewise
    try:
        return DyLoRAMoE(base, adapters, **options)
    except ValueError as error:
        problem = f"{formats.ADAPTERS}: expected experts that fit this base, found: {error}; {_REMEDY}"
        raise CheckpointError(folder, [problem]) from None


def load_into(
    folder: str | Path,
    model: DyLoRAMoE,
    *,
    weights_only: bool = False,
    check: Callable[[], object] = lambda: None,
) -> SkillLibrary:
    """Read experts, router and states of a checkpoint into a mixture of the same shape; its skill library is returned.

    Args:
        weights_only: as in `sound_config`.
        check: called where experts and router fit, before they are copied; what it raises passes.

    Raises:
        CheckpointError: with every problem, before the first tensor of the model changes.
        UsageError: where the folder is moved away meanwhile; nothing of the model changes then, either.
    """
    folder = Path(folder)
    config = sound_config(folder, weights_only=weights_only)
    with manifest.held_still(folder):
        _check_architecture(folder, config, model.base)
        _check_same_mixture(folder, config, model)
        skills, files = read_skills(folder), _read_all(folder, model)
        check()
    _copy(folder, files, model, _states(config))
    return skills


def stock_peft_logits(folder: str | Path, experts: int, base: PreTrainedModel, input_ids: torch.Tensor) -> Iterator:
    """What stock PEFT computes with each expert as a LoRA of its own: logits (T, vocabulary) of input_ids (1, T).

    Args:
        base: a base model without adapters; PEFT wraps its layers.
    """
    folder = Path(folder)
    model = None
    for index in range(experts):
        name = expert_name(index)
        path = folder / _adapter_folder(folder, name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks Transformers by a name that is going
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=name).eval()
            else:
                model.load_adapter(path, name)
        model.set_adapter(name)
        with torch.no_grad():
            yield model(input_ids=input_ids, use_cache=False).logits[0]


def sound_config(folder: str | Path, *, weights_only: bool = False) -> dict:
    """The config of a checkpoint in which verify.py finds no problem.

    Args:
        weights_only: what is wrong with the training state is none: it will not be used.

    Raises:
        CheckpointError: with every problem it finds.
    """
    contents = verify.inspect(folder)
    problems = [
        text for text in contents.problems if not (weights_only and formats.is_training_file(text.partition(": ")[0]))
    ]
    if problems:
        raise CheckpointError(folder, problems)
    return contents.config


def read_skills(folder: str | Path) -> SkillLibrary:
    return SkillLibrary.load(Path(folder) / formats.SKILLS)


def _load_base(name: str, *, weights="pretrained", dtype=None, device="cpu", token=None, revision=None, seed=0):
    source, weights = bases.find_base(name, weights=weights, token=token, revision=revision)
    return bases.load_base(source, weights, dtype=dtype, device=device, seed=seed)


def _router_config(config: dict) -> RouterConfig:
    router = config["router"]
    return RouterConfig(router["temperature"], router["top_k"], router["balance_coefficient"])


def _adapter_folder(folder: Path, name: str) -> str:
    files = {path.relative_to(folder).as_posix() for path in (folder / formats.ADAPTERS / name).rglob("*")}
    return verify.adapter_folder(files, name)


def _adapter_config(folder: Path, name: str) -> MoELoraConfig:
    """The MoELoraConfig of an expert's adapter_config.json."""
    path = f"{_adapter_folder(folder, name)}/{formats.ADAPTER_CONFIG}"
    try:
        found = read_json(folder / path)
        return MoELoraConfig(**{key: found[key] for key in _READ if key in found})
    except (FileProblem, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(folder, [f"{path}: {error}; {_REMEDY}"]) from None


def _check_architecture(folder: Path, config: dict, base: PreTrainedModel) -> None:
    expected, found = config["base_model"]["architecture"], bases.architecture(base)
    if expected["fingerprint"] == found["fingerprint"]:
        return
    keys = sorted(set(expected) & set(found) - {"fingerprint"})
    differences = [f"{key}: {expected[key]} there, {found[key]} here" for key in keys if expected[key] != found[key]]
    text = "; ".join(differences) or "parameters of other names or shapes"
    name = config["base_model"]["name"]
    raise CheckpointError(
        folder, [f"{formats.CONFIG}: was saved on another base model, {name} ({text}); load it on that one"]
    )


def _check_same_mixture(folder: Path, config: dict, model: DyLoRAMoE) -> None:
    here = describe(model)
    problems = []
    if config["num_experts"] != model.num_experts:
        problems.append(f"{formats.CONFIG}: has {config['num_experts']} experts, the model has {model.num_experts}")
    for there, mine in zip(config["experts"], here["experts"], strict=False):
        for key in ("r", "lora_alpha", "use_rslora", "target_modules", "tensors", "parameters"):
            if there[key] != mine[key]:
                problems.append(
                    f"{formats.CONFIG}: {mine['name']} has {key} {there[key]}, in the model it is {mine[key]}"
                )
    if problems:
        raise CheckpointError(
            folder, [f"{p}; build the model as the checkpoint was, or start another run" for p in problems]
        )


def _states(config: dict) -> list[str]:
    return [expert["state"] for expert in config["experts"]]


def _read_all(folder: Path, model: DyLoRAMoE) -> list[tuple[str, dict, dict]]:
    """(file, its tensors, the model's) of each expert and of the router."""
    files = []
    for index, mine in enumerate(expert_tensors(model)):
        name = f"{_adapter_folder(folder, expert_name(index))}/{formats.ADAPTER_WEIGHTS}"
        files.append((name, _read_tensors(folder, name), mine))
    files.append((formats.ROUTER, _read_tensors(folder, formats.ROUTER), gate_tensors(model)))
    return files


def _read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:  # it was there a moment ago
        raise CheckpointError(folder, [f"{name}: expected to read it, found {error}; {_REMEDY}"]) from None


def _copy(folder: Path, files: list[tuple[str, dict, dict]], model: DyLoRAMoE, states: list[str]) -> None:
    """Copy what `_read_all` found into the model: all of it or, where one tensor does not fit, none."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    problems: list[str] = []
    for name, there, here in files:
        _match(name, there, here, pairs, problems)
    if problems:
        raise CheckpointError(folder, problems)
    with torch.no_grad():
        for there, here in pairs:
            here.copy_(there)
    model.set_expert_states(states)


def _match(name: str, there: dict, here: dict, pairs: list, problems: list[str]) -> None:
    """Pair the tensors of a file with those of the model, both ways; note what does not fit."""
    for key in sorted(set(here) - set(there)):
        problems.append(f"{name}: tensor {key}: expected in this model, found nothing; {_REMEDY}")
    for key in sorted(set(there) - set(here)):
        problems.append(f"{name}: tensor {key}: expected the model's tensors only, found this one; {_REMEDY}")
    for key in sorted(set(there) & set(here)):
        if there[key].shape != here[key].shape or there[key].dtype != here[key].dtype:
            expected = f"{tuple(here[key].shape)} {here[key].dtype}"
            found = f"{tuple(there[key].shape)} {there[key].dtype}"
            problems.append(f"{name}: tensor {key}: expected {expected}, found {found}; {_REMEDY}")
        else:
            pairs.append((there[key], here[key]))
