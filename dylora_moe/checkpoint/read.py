"""A checkpoint's contents: what is written, and how it is read back.

    checkpoint-836/
    ├── peft_adapters/expert_0/expert_0/{adapter_config.json, adapter_model.safetensors}
    ├── router.safetensors, skill_library.safetensors, probe.safetensors
    ├── config.json, manifest.json
    └── optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json    when saved by training

Written through commit.py, which publishes a folder whole or not at all; read only after verify.py has found no problem.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..base.find import find_base
from ..base.load import load_base
from ..base.preserve import as_found_on_error
from ..base.structure import architecture, check_base
from ..constants import expert_name
from ..errors import CheckpointError, UsageError
from ..mixture.config import MoELoraConfig, RouterConfig
from ..mixture.model import Mixture
from ..skills.library import SkillLibrary
from ..store.files import FileProblem
from ..store.manifest import held_still
from . import formats
from .probe import expert_tensors, gate_tensors, read_probe, saved_on
from .safetensors_file import read_json
from .verify import inspect_checkpoint
from .write import describe_mixture

# What an adapter_config.json tells of an expert; all else in it is as in any plain LoRA, which verify.py has made sure.
M = TypeVar("M", bound=Mixture)
_READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights")
_REMEDY = "the file belongs to another model or was changed; restore it from a copy"


# ---- reading ----


def load_mixture(folder: str | Path, base: PreTrainedModel | None = None, *, kind: type[M] = Mixture, **options) -> M:
    """Read a checkpoint into a fresh mixture.

    Args:
        base: the base model; without it, the one that the checkpoint names is loaded.
        kind: the class to build.
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
    with as_found_on_error(base), held_still(folder):
        model = _build(folder, config, base, kind, smoothing)
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


def build_mixture(folder: str | Path, base: PreTrainedModel, kind: type[M] = Mixture) -> M:
    """A fresh mixture of a checkpoint's shape, into which nothing was read yet.

    Raises:
        CheckpointError: with every problem, before anything is built.
    """
    folder = Path(folder)
    config = sound_config(folder)
    with held_still(folder):
        return _build(folder, config, base, kind)


def _build(folder: Path, config: dict, base: PreTrainedModel, kind: type[M], label_smoothing: float = 0.0) -> M:
    _check_architecture(folder, config, base)
    adapters = [_adapter_config(folder, expert["name"]) for expert in config["experts"]]
    return _mixture(kind, folder, base, adapters, router=_router_config(config), label_smoothing=label_smoothing)


def _mixture(kind: type[M], folder: Path, base: PreTrainedModel, adapters: list[MoELoraConfig], **options) -> M:
    if not 0 <= options["label_smoothing"] < 1:  # the caller's fault, not the checkpoint's
        raise UsageError(f"label smoothing must be at least 0 and less than 1, got {options['label_smoothing']!r}")
    check_base(base)  # likewise
    try:
        return kind(base, adapters, **options)
    except ValueError as error:
        problem = f"{formats.ADAPTERS}: expected experts that fit this base, found: {error}; {_REMEDY}"
        raise CheckpointError(folder, [problem]) from None


def load_into(
    folder: str | Path,
    model: Mixture,
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
    with held_still(folder):
        _check_architecture(folder, config, model.base)
        _check_same_mixture(folder, config, model)
        skills, files = read_skills(folder), _read_all(folder, model)
        check()
    _copy(folder, files, model, _states(config))
    return skills


def sound_config(folder: str | Path, *, weights_only: bool = False) -> dict:
    """The config of a checkpoint in which verify.py finds no problem.

    Args:
        weights_only: what is wrong with the training state is none: it will not be used.

    Raises:
        CheckpointError: with every problem it finds.
    """
    contents = inspect_checkpoint(folder)
    problems = [
        text for text in contents.problems if not (weights_only and formats.is_training_file(text.partition(": ")[0]))
    ]
    if problems:
        raise CheckpointError(folder, problems)
    return contents.config


def read_skills(folder: str | Path) -> SkillLibrary:
    return SkillLibrary.load(Path(folder) / formats.SKILLS)


def _load_base(name: str, *, weights="pretrained", dtype=None, device="cpu", token=None, revision=None, seed=0):
    source, weights = find_base(name, weights=weights, token=token, revision=revision)
    return load_base(source, weights, dtype=dtype, device=device, seed=seed)


def _router_config(config: dict) -> RouterConfig:
    router = config["router"]
    return RouterConfig(router["temperature"], router["top_k"], router["balance_coefficient"])


def _adapter_folder(folder: Path, name: str) -> str:
    files = {path.relative_to(folder).as_posix() for path in (folder / formats.ADAPTERS / name).rglob("*")}
    return formats.adapter_folder(files, name)


def _adapter_config(folder: Path, name: str) -> MoELoraConfig:
    """The MoELoraConfig of an expert's adapter_config.json."""
    path = f"{_adapter_folder(folder, name)}/{formats.ADAPTER_CONFIG}"
    try:
        found = read_json(folder / path)
        return MoELoraConfig(**{key: found[key] for key in _READ if key in found})
    except (FileProblem, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(folder, [f"{path}: {error}; {_REMEDY}"]) from None


def _check_architecture(folder: Path, config: dict, base: PreTrainedModel) -> None:
    expected, found = config["base_model"]["architecture"], architecture(base)
    if expected["fingerprint"] == found["fingerprint"]:
        return
    keys = sorted(set(expected) & set(found) - {"fingerprint"})
    differences = [f"{key}: {expected[key]} there, {found[key]} here" for key in keys if expected[key] != found[key]]
    text = "; ".join(differences) or "parameters of other names or shapes"
    name = config["base_model"]["name"]
    raise CheckpointError(
        folder, [f"{formats.CONFIG}: was saved on another base model, {name} ({text}); load it on that one"]
    )


def _check_same_mixture(folder: Path, config: dict, model: Mixture) -> None:
    here = describe_mixture(model)
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


def _read_all(folder: Path, model: Mixture) -> list[tuple[str, dict, dict]]:
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


def _copy(folder: Path, files: list[tuple[str, dict, dict]], model: Mixture, states: list[str]) -> None:
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
