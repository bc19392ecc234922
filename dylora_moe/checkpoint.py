"""A checkpoint's contents: what is written, and how it is read back.

    checkpoint-836/
    ├── peft_adapters/expert_0/expert_0/{adapter_config.json, adapter_model.safetensors}
    ├── router.safetensors, skill_library.safetensors, probe.safetensors
    ├── config.json, manifest.json
    └── optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json    when saved by training

Written through commit.py, which publishes a folder whole or not at all; read only after verify.py has found no problem.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from . import __version__, bases, commit, formats, machine, verify
from .config import MoELoraConfig, RouterConfig
from .errors import CheckpointError, UsageError
from .layers import expert_name
from .model import DyLoRAMoE, untouched
from .skills import SkillLibrary
from .tensorfile import FileProblem, read_header, read_json

PROBE_TOKENS = 16
PROBE_ENTRIES = 32
# Between machines, devices or numbers of threads matmuls round differently; about four bits of the dtype's precision.
PROBE_TOLERANCE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 0.25, "float16": 0.05}


@dataclass(frozen=True)
class ProbeDifference:
    """The largest absolute difference of logits between a model and the probe of a checkpoint."""

    routed: float
    experts: list[float]

    @property
    def largest(self) -> float:
        return max([self.routed, *self.experts])


# ---- writing ----


def save(
    target: str | Path,
    model: DyLoRAMoE,
    *,
    step: int = 0,
    skills: SkillLibrary | None = None,
    training_files: Callable[[Path], None] | None = None,
) -> bool:
    """Publish a checkpoint at `target`, whole or not at all.

    Args:
        training_files: writes what training needs to resume into the folder it is given.

    Returns:
        False where a complete checkpoint stood there already: it is left as it is.

    Raises:
        UsageError: where it could not be written; nothing is left behind.
    """
    probe = make_probe(model)
    with commit.staged(target) as staging:
        if staging.path is None:
            return False
        with commit.explained("write the checkpoint", target):
            try:
                write_files(staging.path, model, step=step, skills=skills or SkillLibrary(), probe=probe)
                if training_files is not None:
                    training_files(staging.path)
            except SafetensorError as error:
                raise OSError(_errno_in(error), str(error)) from error
    return True


def _errno_in(error: SafetensorError) -> int | None:
    """safetensors reports a failed write as text, such as "... (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else None


def write_files(folder: Path, model: DyLoRAMoE, *, step: int, skills: SkillLibrary, probe: dict | None) -> None:
    for index in range(model.num_experts):
        write_adapter(model, index, folder / formats.expert_folder(expert_name(index)))
    _write_tensors(folder / formats.ROUTER, {formats.GATE: model.router.gate.weight})
    skills.save(folder / formats.SKILLS)
    if probe is not None:
        tensors, facts = probe
        _write_tensors(folder / formats.PROBE, tensors, {"probe": json.dumps(facts, sort_keys=True)})
    _write_json(folder / formats.CONFIG, describe(model, step=step, has_probe=probe is not None))


def write_adapter(model: DyLoRAMoE, index: int, folder: Path) -> None:
    """One expert as PEFT writes a LoRA: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True)
    _write_tensors(folder / formats.ADAPTER_WEIGHTS, model.expert_tensors(index))
    _write_json(folder / formats.ADAPTER_CONFIG, model.expert_configs[index].to_dict() | {"inference_mode": True})


def export_expert(model: DyLoRAMoE, index: int, folder: str | Path) -> Path:
    """Write one expert as a LoRA of its own, flat, as `PeftModel.from_pretrained` reads it.

    Raises:
        UsageError: where `folder` exists already or cannot be written.
    """
    model._check_expert(index)
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists already; an expert is exported into a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        write_adapter(model, index, partial)
        partial.rename(folder)
    except OSError as error:
        raise UsageError(f"{folder}: cannot export {expert_name(index)} there: {error}") from None
    finally:
        for leaf in (formats.ADAPTER_CONFIG, formats.ADAPTER_WEIGHTS):
            (partial / leaf).unlink(missing_ok=True)
        if partial.exists():
            partial.rmdir()
    return folder


def describe(model: DyLoRAMoE, *, step: int = 0, has_probe: bool = False) -> dict:
    """The content of config.json."""
    experts = []
    for index, (config, state) in enumerate(zip(model.expert_configs, model.expert_states, strict=True)):
        tensors = model.expert_tensors(index)
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
            }
        )
    router = model.router.config
    return {
        "model_type": formats.MODEL_TYPE,
        "format_version": formats.FORMAT_VERSION,
        "base_model": {
            "name": model.base.config._name_or_path or None,
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


def dtype_name(model: DyLoRAMoE) -> str:
    """The dtype of the base's weights, such as "bfloat16"."""
    weight = model.base.get_input_embeddings().weight
    return str(weight.dtype).removeprefix("torch.")


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """One key of metadata at most: safetensors writes them in an order that changes from run to run."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=metadata or {"format": "pt"})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- the probe ----


def make_probe(model: DyLoRAMoE) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """What this model computes for a fixed input, and the facts under which that can be compared.

    input_ids (1, 16) and vocabulary (32,) int64; routed (16, 32) and experts (N, 16, 32) float32, the logits of those
    vocabulary entries. None where the base has no weights.
    """
    if not model.has_base_weights:
        return None
    size = model.base.get_input_embeddings().num_embeddings
    input_ids = (torch.arange(PROBE_TOKENS).unsqueeze(0) * 7919 + 13) % size
    vocabulary = torch.arange(PROBE_ENTRIES) * size // PROBE_ENTRIES
    routed, experts = _probe_logits(model, input_ids, vocabulary)
    tensors = {"input_ids": input_ids, "vocabulary": vocabulary, "routed": routed, "experts": experts}
    return tensors, probe_facts(model)


def probe_facts(model: DyLoRAMoE) -> dict[str, str]:
    """Where these are equal, so must the logits be to the bit; with another machine or device they round differently."""
    return {
        "dtype": dtype_name(model),
        "device_type": model.device.type,
        "base_weights": bases.weights_fingerprint(model.base),
        "machine": machine.arithmetic(model.device),
    }


def _probe_logits(model: DyLoRAMoE, input_ids: torch.Tensor, vocabulary: torch.Tensor) -> tuple:
    input_ids = input_ids.to(model.base.get_input_embeddings().weight.device)
    with untouched(model):
        runs = [
            model(input_ids, expert=expert, use_cache=False).logits[0].index_select(-1, vocabulary.to(input_ids.device))
            for expert in (None, *range(model.num_experts))
        ]  # each (16, 32)
    runs = [run.float().cpu() for run in runs]
    return runs[0], torch.stack(runs[1:])


def read_probe(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """The tensors and facts of a checkpoint's probe; None where it carries none."""
    path = Path(folder) / formats.PROBE
    if not path.exists():
        return None
    metadata = read_header(path)[0]
    facts = json.loads(metadata.get("probe", "{}"))
    return load_file(path), facts


def probe_difference(model: DyLoRAMoE, probe: dict[str, torch.Tensor]) -> ProbeDifference:
    """How far this model is from what the saving process computed."""
    routed, experts = _probe_logits(model, probe["input_ids"], probe["vocabulary"])
    return ProbeDifference(
        routed=max_abs_difference(routed, probe["routed"]),
        experts=[max_abs_difference(a, b) for a, b in zip(experts, probe["experts"], strict=True)],
    )


def max_abs_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b|; NaN counts as infinitely far."""
    difference = (a.double() - b.double()).abs().max().item()
    return float("inf") if difference != difference else difference


# ---- reading ----


def load(folder: str | Path, base: PreTrainedModel | None = None, **options) -> DyLoRAMoE:
    """Read a checkpoint into a fresh mixture.

    Args:
        base: the base model; without it, the one that the checkpoint names is loaded.
        options: `weights`, `dtype`, `device`, `token` and `revision` of that base model, and `label_smoothing`.

    Raises:
        CheckpointError: with every problem, before anything is built.
        UsageError: where the base model cannot be had.
    """
    folder = Path(folder)
    if _is_legacy(folder):
        return _load_legacy(folder, base, **options)
    config = sound_config(folder)
    smoothing = options.pop("label_smoothing", 0.0)
    revision = options.pop("revision", None) or config["base_model"]["revision"]
    if base is None:
        name = config["base_model"]["name"]
        if not name:
            raise UsageError(f"{folder}/{formats.CONFIG} names no base model; pass base=")
        options.setdefault("dtype", config["base_model"]["dtype"])
        base = _load_base(name, revision=revision, **options)
    model = _build(folder, config, base, smoothing)
    model.base_revision = revision
    _copy_tensors(folder, config, model)
    return model


def build(folder: str | Path, base: PreTrainedModel) -> DyLoRAMoE:
    """A fresh mixture of a checkpoint's shape, into which nothing was read yet.

    Raises:
        CheckpointError: with every problem, before anything is built.
    """
    return _build(Path(folder), sound_config(folder), base)


def _build(folder: Path, config: dict, base: PreTrainedModel, label_smoothing: float = 0.0) -> DyLoRAMoE:
    _check_architecture(folder, config, base)
    adapters = [_adapter_config(folder, expert["name"]) for expert in config["experts"]]
    return DyLoRAMoE(base, adapters, router=_router_config(config), label_smoothing=label_smoothing)


def load_into(folder: str | Path, model: DyLoRAMoE) -> SkillLibrary:
    """Read experts, router and states of a checkpoint into a mixture of the same shape; its skill library is returned.

    Raises:
        CheckpointError: with every problem, before the first tensor of the model changes.
    """
    folder = Path(folder)
    config = sound_config(folder)
    _check_architecture(folder, config, model.base)
    _check_same_mixture(folder, config, model)
    _copy_tensors(folder, config, model)
    return read_skills(folder)


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


def sound_config(folder: str | Path) -> dict:
    """The config of a checkpoint in which verify.py finds no problem.

    Raises:
        CheckpointError: with every problem it finds.
    """
    contents = verify.inspect(folder)
    if contents.problems:
        raise CheckpointError(folder, contents.problems)
    return contents.config


def read_skills(folder: str | Path) -> SkillLibrary:
    return SkillLibrary.load(Path(folder) / formats.SKILLS)


def _load_base(name: str, *, weights="auto", dtype=None, device="cpu", token=None, revision=None, seed=0):
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
    path = folder / _adapter_folder(folder, name) / formats.ADAPTER_CONFIG
    found = read_json(path)
    known = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "bias", "use_dora"}
    try:
        return MoELoraConfig(**{key: value for key, value in found.items() if key in known})
    except (UsageError, TypeError, ValueError) as error:
        raise CheckpointError(path, [str(error)]) from None


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


def _copy_tensors(folder: Path, config: dict, model: DyLoRAMoE) -> None:
    """Read and compare everything, then copy."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    problems: list[str] = []
    for index in range(model.num_experts):
        name = f"{_adapter_folder(folder, expert_name(index))}/{formats.ADAPTER_WEIGHTS}"
        _match(name, load_file(folder / name), model.expert_tensors(index), pairs, problems)
    _match(formats.ROUTER, load_file(folder / formats.ROUTER), dict(model.router.named_parameters()), pairs, problems)
    if problems:
        raise CheckpointError(folder, problems)
    with torch.no_grad():
        for there, here in pairs:
            here.copy_(there)
    model.set_expert_states([expert["state"] for expert in config["experts"]])


def _match(name: str, there: dict, here: dict, pairs: list, problems: list[str]) -> None:
    """Pair the tensors of a file with those of the model, both ways; note what does not fit."""
    remedy = "the file belongs to another model or was changed; restore it from a copy"
    for key in sorted(set(here) - set(there)):
        problems.append(f"{name}: tensor {key} is missing; {remedy}")
    for key in sorted(set(there) - set(here)):
        problems.append(f"{name}: tensor {key} is not one of the model's; {remedy}")
    for key in sorted(set(there) & set(here)):
        if there[key].shape != here[key].shape or there[key].dtype != here[key].dtype:
            expected = f"{tuple(here[key].shape)} {here[key].dtype}"
            found = f"{tuple(there[key].shape)} {there[key].dtype}"
            problems.append(f"{name}: tensor {key}: expected {expected}, found {found}; {remedy}")
        else:
            pairs.append((there[key], here[key]))


# ---- checkpoints from before manifests ----


def _is_legacy(folder: Path) -> bool:
    """No manifest, and files that only the earlier format has or an adapters folder with its router."""
    if not folder.is_dir() or (folder / formats.MANIFEST).exists():
        return False
    has_router = (folder / formats.LEGACY_ROUTER).is_file() or (folder / formats.ROUTER).is_file()
    config = folder / formats.CONFIG
    try:
        versioned = config.is_file() and "format_version" in read_json(config)
    except (FileProblem, TypeError):
        versioned = True
    return has_router and (folder / formats.ADAPTERS).is_dir() and not versioned


def _load_legacy(folder: Path, base: PreTrainedModel | None, **options) -> DyLoRAMoE:
    if base is None:
        name = read_json(folder / formats.CONFIG).get("base_model_name_or_path")
        if not name:
            raise UsageError(f"{folder} is from before manifests and names no base model; pass base=")
        base = _load_base(name, **options)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    names = sorted(
        (p.name for p in (folder / formats.ADAPTERS).iterdir() if p.is_dir()), key=lambda n: int(n.rpartition("_")[2])
    )
    if names != [expert_name(i) for i in range(len(names))] or not names:
        raise CheckpointError(folder, [f"{formats.ADAPTERS}: expected expert_0, expert_1, ..., found {names}"])
    model = DyLoRAMoE(base, [_adapter_config(folder, name) for name in names])
    pairs: list = []
    problems: list[str] = []
    for index, name in enumerate(names):
        where = _legacy_weights(files, name)
        _match(where, _read_tensors(folder / where), model.expert_tensors(index), pairs, problems)
    router = formats.ROUTER if formats.ROUTER in files else formats.LEGACY_ROUTER
    gate = _read_tensors(folder / router)
    if len(gate) == 1:  # the one matrix of a gate, whatever it was called
        gate = {formats.GATE: next(iter(gate.values()))}
    _match(router, gate, dict(model.router.named_parameters()), pairs, problems)
    if problems:
        raise CheckpointError(folder, problems)
    with torch.no_grad():
        for there, here in pairs:
            here.copy_(there)
    model.set_expert_states(["mature"] * len(names))
    warnings.warn(
        f"{folder} is from before manifests: nothing but names and shapes could be checked; save it again to make it sound",
        stacklevel=4,
    )
    return model


def _legacy_weights(files: set[str], name: str) -> str:
    for folder in (formats.expert_folder(name), f"{formats.ADAPTERS}/{name}"):
        for leaf in (formats.ADAPTER_WEIGHTS, formats.LEGACY_ADAPTER_WEIGHTS):
            if f"{folder}/{leaf}" in files:
                return f"{folder}/{leaf}"
    raise CheckpointError(name, [f"no {formats.ADAPTER_WEIGHTS} or {formats.LEGACY_ADAPTER_WEIGHTS} for {name}"])


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what pickle, zipfile and itself do
        raise CheckpointError(path, [f"cannot be read as tensors only: {type(error).__name__}"]) from None
