"""Reads a checkpoint, once it has been verified, into a mixture.

checkpoint-836/
├── peft_adapters/expert_0/expert_0/{adapter_config.json, adapter_model.safetensors}
├── router.safetensors, skill_library.safetensors, probe.safetensors
├── config.json, manifest.json
└── optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json    when saved by training
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel

from ..base.find import find_base
from ..base.fingerprint import architecture
from ..base.load import load_base
from ..base.preserve import as_found_on_error
from ..base.structure import check_base, quantization
from ..errors import CheckpointError, UsageError, printable
from ..mixture.config import MoELoraConfig, RouterConfig
from ..mixture.model import Mixture
from ..skills.library import SkillLibrary
from ..store.files import FileProblem
from . import formats
from .config import CheckpointConfig, RouterEntry
from .probe import read_probe, saved_on
from .safetensors_file import read_json
from .tensors import expert_tensors, router_tensors
from .verify import SoundCheckpoint, open_checkpoint
from .write import describe_mixture

M = TypeVar("M", bound=Mixture)
Tensors = dict[str, torch.Tensor]
# What is read of an adapter_config.json; verification has made sure that the rest describes a plain LoRA.
_READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights")
_COMPARED = ("r", "lora_alpha", "use_rslora", "target_modules", "tensors", "parameters")
_REMEDY = "the file belongs to another model or was changed; restore it from a copy"
_UNLIKE = "is of another mixture than this model"  # it may be sound nevertheless


def load_mixture(
    folder: str | Path,
    base: PreTrainedModel | str | os.PathLike | None = None,
    *,
    kind: type[M] = Mixture,  # type: ignore[assignment]  # mypy knows no defaults of type variables
    **options: Any,
) -> M:
    """Verify a checkpoint and read it into a fresh mixture.

    Args:
        base: the base model, or the name of one to load; by default the one that the checkpoint names is loaded.
        kind: the class to build.
        options: `weights` ("pretrained", or "random" if others will do), `seed` (of random ones), `dtype`, `device`,
            `token` and `revision` of that base model, and `label_smoothing`.

    Warns:
        UserWarning: if the base's weights are not those that the checkpoint was saved on, as far as its probe tells.

    Raises:
        CheckpointError: with every problem, before anything is built.
        UsageError: if the base model is not available, or the folder is moved away meanwhile.
    """
    needless = sorted(options.keys() - {"label_smoothing", "revision"}) if isinstance(base, PreTrainedModel) else []
    if needless:
        raise UsageError(f"{', '.join(needless)}: of a base model that is to be loaded, but base= gives one; leave out")
    checkpoint = open_checkpoint(folder)
    smoothing = options.pop("label_smoothing", 0.0)
    if base is None or isinstance(base, (str, os.PathLike)):
        base, revision = _load_base(checkpoint, base, **options)
    else:
        revision = options.pop("revision", None) or checkpoint.config.base_model.revision
    with as_found_on_error(base), checkpoint.held_still():
        model = _build(checkpoint, base, kind, smoothing)
        model.base_revision = revision
        _copy(checkpoint, _read_tensors(checkpoint, model), model)
        _take_generation_config(checkpoint, model)
        probe = read_probe(checkpoint)
    if probe is not None and not saved_on(probe[1], model):
        named = checkpoint.config.base_model.name
        text = f"{folder} was saved on other weights of its base model ({named}) than it is loaded on: its experts were"
        warnings.warn(printable(f"{text} not trained for these"), stacklevel=3)
    return model


def _load_base(
    checkpoint: SoundCheckpoint, name: str | os.PathLike | None, *, weights: str = "pretrained", **options: Any
) -> tuple[PreTrainedModel, str | None]:
    """Load the base model of this name, or the one that a checkpoint names. Returns its revision, too."""
    trained_on = checkpoint.config.base_model
    revision = options.pop("revision", None) or (None if name else trained_on.revision)
    name = name or named_base(checkpoint, "base=")
    source, weights = find_base(name, weights=weights, token=options.pop("token", None), revision=revision)
    source = replace(source, quantization=trained_on.quantization)
    return load_base(source, weights, **{"dtype": trained_on.dtype} | options), source.revision or revision


def named_base(checkpoint: SoundCheckpoint, argument: str) -> str:
    """Return the hub id or the path of the base model that a checkpoint names.

    Raises:
        UsageError: if it names none, or a path at which nothing is any more; the message asks for `argument`.
    """
    where = checkpoint.folder / formats.CONFIG
    name = checkpoint.config.base_model.located(checkpoint.folder)
    if not name:
        raise UsageError(f"{where} names no base model: say with {argument} which it is")
    if os.path.isabs(name) and not os.path.exists(name):
        raise UsageError(
            f"There is no file or folder {name!r}, which {where} names as the base model: restore it, or say with "
            f"{argument} where that model is now"
        )
    return name


def build_mixture(checkpoint: SoundCheckpoint, base: PreTrainedModel) -> Mixture:
    """Build a fresh mixture of a checkpoint's shape, without reading its tensors.

    Raises:
        CheckpointError: if the experts do not fit the base model.
        UsageError: if the folder has been moved away.
    """
    with checkpoint.held_still():
        return _build(checkpoint, base, Mixture)


def load_into(
    checkpoint: SoundCheckpoint, model: Mixture, *, check: Callable[[], object] = lambda: None
) -> SkillLibrary:
    """Read the experts, the router and the states of a checkpoint into a mixture of the same shape.

    The router takes over `decay` and `prior_tokens`, for which it was fitted; its other settings stay.

    Args:
        check: called before anything is copied, once experts and router fit; its exceptions pass.

    Returns:
        The skill library of the checkpoint.

    Raises:
        CheckpointError: with every problem, before the first tensor of the model changes.
        UsageError: if the folder has been moved away; nothing of the model changes then, either.
    """
    with checkpoint.held_still():
        _check_architecture(checkpoint, model.base)
        _check_same_mixture(checkpoint, model)
        skills, tensors = read_skills(checkpoint), _read_tensors(checkpoint, model)
        check()
    _copy(checkpoint, tensors, model)
    fitted = checkpoint.config.router
    model.router.config = replace(model.router.config, decay=fitted.decay, prior_tokens=fitted.prior_tokens)
    return skills


def read_skills(checkpoint: SoundCheckpoint) -> SkillLibrary:
    """Return the skill library of a checkpoint."""
    with checkpoint.held_still():
        return SkillLibrary.load(checkpoint.folder / formats.SKILLS)


# ---- building ----


def _build(checkpoint: SoundCheckpoint, base: PreTrainedModel, kind: type[M], label_smoothing: float = 0.0) -> M:
    check_base(base)  # a mistake of the caller, not of the checkpoint
    if not 0 <= label_smoothing < 1:  # likewise
        raise UsageError(f"label smoothing must be at least 0 and less than 1, got {label_smoothing!r}")
    _check_architecture(checkpoint, base)
    experts = [_adapter_config(checkpoint, index) for index in range(checkpoint.config.num_experts)]
    try:
        return kind(base, experts, router=_router_config(checkpoint.config.router), label_smoothing=label_smoothing)
    except ValueError as error:
        problem = f"{formats.ADAPTERS}: expected experts that fit this base, found: {error}; {_REMEDY}"
        raise CheckpointError(checkpoint.folder, [problem]) from None


def _router_config(router: RouterEntry) -> RouterConfig:
    return RouterConfig(router.temperature, router.top_k, router.balance_coefficient, router.decay, router.prior_tokens)


def _adapter_config(checkpoint: SoundCheckpoint, index: int) -> MoELoraConfig:
    """Return the config that an expert's adapter_config.json describes."""
    path = f"{checkpoint.adapter_folder(index)}/{formats.ADAPTER_CONFIG}"
    try:
        found: Any = read_json(checkpoint.folder / path)
        return MoELoraConfig(**{key: found[key] for key in _READ if key in found})
    except (FileProblem, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(checkpoint.folder, [f"{path}: {error}; {_REMEDY}"]) from None


def _check_architecture(checkpoint: SoundCheckpoint, base: PreTrainedModel) -> None:
    trained_on = checkpoint.config.base_model
    found = trained_on.architecture.differences(architecture(base))
    there, here = trained_on.quantization, quantization(base)
    if there != here and trained_on.architecture.settings is not None:  # a converted one does not say
        found.append(f"quantization: {there} there, {here} here")
    if found:
        problem = f"was saved on another base model, {trained_on.name} ({'; '.join(found)}); load it on that one"
        raise CheckpointError(checkpoint.folder, [f"{formats.CONFIG}: {problem}"], "does not fit this base model")


def _check_same_mixture(checkpoint: SoundCheckpoint, model: Mixture) -> None:
    there: CheckpointConfig = checkpoint.config
    problems = []
    if there.num_experts != model.num_experts:
        problems.append(f"has {there.num_experts} experts, the model has {model.num_experts}")
    for theirs, mine in zip(there.experts, describe_mixture(model).experts, strict=False):
        for key in _COMPARED:
            found, expected = getattr(theirs, key), getattr(mine, key)
            if found != expected:
                problems.append(f"{mine.name} has {key} {found}, in the model it is {expected}")
    if problems:
        remedy = "build the model as the checkpoint was, or start another run"
        problems = [f"{formats.CONFIG}: {problem}; {remedy}" for problem in problems]
        raise CheckpointError(checkpoint.folder, problems, _UNLIKE)


def _take_generation_config(checkpoint: SoundCheckpoint, model: Mixture) -> None:
    """Take over the generation config of a checkpoint, if it has one of its own."""
    path = checkpoint.folder / formats.GENERATION
    if not path.is_file():
        return
    try:
        model.base.generation_config = GenerationConfig.from_dict(cast(dict[str, Any], read_json(path)))
    except (FileProblem, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(checkpoint.folder, [f"{formats.GENERATION}: {error}; {_REMEDY}"]) from None
    model.generation_of_base = None


# ---- tensors ----


def _read_tensors(checkpoint: SoundCheckpoint, model: Mixture) -> list[tuple[str, Tensors, Tensors]]:
    """Return (file, its tensors, the model's) of each expert and of the router. The files are mapped, not copied."""
    parts = [(checkpoint.adapter(index), mine) for index, mine in enumerate(expert_tensors(model))]
    parts.append((formats.ROUTER, router_tensors(model)))
    return [(name, _read_file(checkpoint, name), mine) for name, mine in parts]


def _read_file(checkpoint: SoundCheckpoint, name: str) -> Tensors:
    try:
        return load_file(checkpoint.folder / name)
    except (OSError, SafetensorError) as error:  # it was there a moment ago
        problem = f"{name}: expected to read it, found {error}; {_REMEDY}"
        raise CheckpointError(checkpoint.folder, [problem]) from None


def _copy(checkpoint: SoundCheckpoint, parts: list[tuple[str, Tensors, Tensors]], model: Mixture) -> None:
    """Copy what `_read_tensors` has found into the model: all of it or, if one tensor does not fit, nothing."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    problems: list[str] = []
    for name, there, here in parts:
        for key in sorted(set(here) - set(there)):
            problems.append(f"{name}: tensor {key}: expected in this model, found nothing; {_REMEDY}")
        for key in sorted(set(there) - set(here)):
            problems.append(f"{name}: tensor {key}: expected the model's tensors only, found this one; {_REMEDY}")
        for key in sorted(set(there) & set(here)):
            pairs.append((there[key], here[key]))
            if there[key].shape != here[key].shape or there[key].dtype != here[key].dtype:
                expected = f"{tuple(here[key].shape)} {here[key].dtype}"
                found = f"{tuple(there[key].shape)} {there[key].dtype}"
                problems.append(f"{name}: tensor {key}: expected {expected}, found {found}; {_REMEDY}")
    if problems:
        raise CheckpointError(checkpoint.folder, problems, _UNLIKE)
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(source)
    model.set_expert_states(checkpoint.config.states)
