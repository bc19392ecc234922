"""The check of a save: what was saved against what is in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import formats
from ..checkpoint.tensors import expert_tensors, router_tensors, tensor_digests
from ..constants import expert_name
from ..mixture.model import Mixture
from ..skills.library import Skill, SkillLibrary
from ..store.files import parallel
from ..store.manifest import survey
from .report import CheckResult

NOISE = 0.05  # the largest value of a B that stands for a trained one: large enough to show in bfloat16 logits


def fill_experts(model: Mixture, seed: int) -> None:
    """Fill every B and the router with seeded values, as if trained: zeros could be lost without a trace."""
    experts = expert_tensors(model)

    @torch.no_grad()
    def fill(index: int) -> None:
        generator = torch.Generator().manual_seed(seed + 1 + index)
        for name, tensor in experts[index].items():
            if name.endswith(".lora_B.weight"):
                tensor.copy_(torch.empty(tensor.shape).uniform_(-NOISE, NOISE, generator=generator))

    parallel(fill, range(len(experts)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in router_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).mul_(tensor.shape[-1] ** -0.5))


def save_with(callback_class: type) -> Callable[[Mixture, Path], None]:
    """Return a function that saves a mixture as training does: through the callback's `on_save`."""

    def save(model: Mixture, target: Path) -> None:
        skills = SkillLibrary()
        for index in range(min(2, model.num_experts)):
            skills.add(Skill(f"skill_{index}", expert=index))
        callback = callback_class(skills=skills, name=target.name)
        args = SimpleNamespace(output_dir=str(target.parent), should_save=True, save_total_limit=None)
        state = SimpleNamespace(global_step=0, best_global_step=None)
        control = SimpleNamespace(should_training_stop=False)
        callback.on_save(args, state, control, model=model)

    return save


def check_save(model: Mixture, target: Path, save: Callable[[Mixture, Path], None]) -> CheckResult:
    """Save, and check that each tensor was saved as it is in memory, and that the model is as it was before."""
    result = CheckResult("save")
    before = _fingerprint(model)
    started = time.perf_counter()
    save(model, target)
    result.measures["save_seconds"] = round(time.perf_counter() - started, 4)
    if not target.is_dir():
        result.problems.append(f"{target}: nothing was published by on_save")
        return result
    if _fingerprint(model) != before:
        what = "mode, requires_grad, gradients, active experts or random state are not as found"
        result.problems.append(f"saving changed the model: {what}")
    digests = {name: sha256 for name, (_, sha256) in survey(target)[2].items()}
    compared, problems = compare_tensors(target, digests, model)
    result.problems.extend(problems)
    result.measures["tensors_compared"] = compared
    counts = model.parameter_counts()
    result.notes.append(
        f"{model.num_experts} experts, {counts['experts']:,} parameters, and a router of {counts['router']:,}"
    )
    if not problems:
        result.notes.append(f"{compared} tensors on disk equal those in memory")
    return result


def compare_tensors(folder: Path, digests: Mapping[str, str], model: Mixture) -> tuple[int, list[str]]:
    """Compare the experts and the router of a mixture with their files.

    Args:
        digests: the SHA-256 of the files, by relative path. A file is opened only if this is not the SHA-256 of what a
            save of the tensors in memory would write.

    Returns:
        How many tensors were compared, and a text for each difference.
    """
    parts = [
        (f"{formats.adapter_folder(digests, expert_name(index))}/{formats.ADAPTER_WEIGHTS}", tensors)
        for index, tensors in enumerate(expert_tensors(model))
    ]
    parts.append((formats.ROUTER, router_tensors(model)))
    compared, problems = 0, []
    for (name, tensors), sha256 in zip(parts, tensor_digests(model), strict=True):
        if digests.get(name) == sha256:
            compared += len(tensors)
        else:
            count, found = _compare_file(folder, name, tensors)
            compared += count
            problems += found
    return compared, problems


def _compare_file(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
    problems = []
    try:
        with safe_open(folder / name, framework="pt") as file:
            names = set(file.keys())
            for key in sorted(set(tensors) - names):
                problems.append(f"{name}: tensor {key} is missing")
            for key in sorted(names - set(tensors)):
                problems.append(f"{name}: tensor {key} is not one of the model")
            both = sorted(names & set(tensors))
            for key in both:
                if not torch.equal(file.get_tensor(key), tensors[key].detach().cpu()):
                    problems.append(f"{name}: tensor {key} on disk is not the one in memory")
            return len(both), problems
    except (OSError, SafetensorError) as error:
        return 0, [f"{name}: cannot be read back: {error}"]


def _fingerprint(model: Mixture) -> tuple[object, ...]:
    return (
        tuple(module.training for module in model.modules()),
        tuple((parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()),
        tuple(model.peft_model.active_adapters),
        torch.get_rng_state().numpy().tobytes(),
    )
