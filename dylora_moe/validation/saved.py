"""The checks that the scripts share: what was saved, its structure and its size.

Each check returns a `CheckResult`; none prints, none ends the program. Those of a reload are in checks_reload.py, those
of the environment in checks_quick.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import formats
from ..checkpoint.probe import expert_tensors
from ..checkpoint.verify import inspect_checkpoint
from ..constants import MIB
from ..mixture.model import Mixture
from ..skills.library import EMBEDDING_DIM, SkillLibrary
from ..store import run_folder
from ..store.files import parallel
from ..store.manifest import MANIFEST
from .report import CheckResult

NOISE = 0.05  # of the B that stand for trained ones: large enough to be seen in bfloat16 logits


# ---- save ----


def fill_experts(model: Mixture, seed: int) -> None:
    """Give every B and the gate seeded values that are not zero, as if trained: zeros would hide what is not saved."""

    experts = expert_tensors(model)

    @torch.no_grad()
    def fill(index: int) -> None:
        generator = torch.Generator().manual_seed(seed + 1 + index)
        for name, tensor in experts[index].items():
            if name.endswith(".lora_B.weight"):
                tensor.copy_(torch.empty(tensor.shape).uniform_(-NOISE, NOISE, generator=generator))

    parallel(fill, range(len(experts)))
    gate, generator = model.router.gate.weight, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.copy_(torch.randn(gate.shape, generator=generator).mul_(gate.shape[1] ** -0.5))


def save_with(callback_class: type) -> Callable[[Mixture, Path], None]:
    """A function that saves a mixture as training does: through the callback's `on_save`."""

    def save(model: Mixture, target: Path) -> None:
        skills = SkillLibrary()
        for index in range(min(2, model.num_experts)):
            skills.add(f"skill_{index}", torch.eye(EMBEDDING_DIM)[index], expert=index)
        callback = callback_class(skills=skills, name=target.name)
        args = SimpleNamespace(output_dir=str(target.parent), should_save=True, save_total_limit=None)
        state = SimpleNamespace(global_step=0, best_global_step=None)
        control = SimpleNamespace(should_training_stop=False)
        callback.on_save(args, state, control, model=model)

    return save


def check_save(model: Mixture, target: Path, save: Callable[[Mixture, Path], None]) -> CheckResult:
    """What was saved is what is in memory, tensor by tensor, and the model is as it was."""
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
    compared, problems = compare_tensors(target, model)
    result.problems.extend(problems)
    result.measures["tensors_compared"] = compared
    counts = model.parameter_counts()
    result.notes.append(
        f"{model.num_experts} experts, {counts['experts']:,} parameters, and a router of {counts['router']:,}"
    )
    if not problems:
        result.notes.append(f"{compared} tensors on disk equal those in memory")
    return result


def compare_tensors(folder: Path, model: Mixture) -> tuple[int, list[str]]:
    """How many tensors of the experts and the router were compared with their files, and each difference."""
    adapters = folder / formats.ADAPTERS
    files = {path.relative_to(folder).as_posix() for path in adapters.rglob("*")}

    todo = [
        (f"{formats.adapter_folder(files, f'expert_{index}')}/{formats.ADAPTER_WEIGHTS}", tensors)
        for index, tensors in enumerate(expert_tensors(model))
    ]
    todo.append((formats.ROUTER, dict(model.router.named_parameters())))
    found = parallel(lambda item: _compare_file(folder, *item), todo)
    return sum(compared for compared, _ in found), [text for _, problems in found for text in problems]


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


def _fingerprint(model: Mixture) -> tuple:

    return (
        tuple(module.training for module in model.modules()),
        tuple((parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()),
        tuple(model.peft_model.active_adapters),
        torch.get_rng_state().numpy().tobytes(),
    )


# ---- structure, size ----


def check_structure(folder: Path) -> CheckResult:
    """Everything that verify.py compares."""
    result = CheckResult("structure")
    contents = inspect_checkpoint(folder)
    result.problems = [_as_in_the_guide(problem) for problem in contents.problems]
    result.measures["files"] = len(contents.files)
    if contents.config:
        for expert in contents.config["experts"]:
            result.notes.append(f"{expert['name']}: {expert['tensors']} tensors, r={expert['r']}, {expert['state']}")
        router = contents.config["router"]
        result.notes.append(f"router: {contents.config['num_experts']} x {router['hidden_size']}")
    if result.passed:
        result.notes.append(f"{len(contents.files)} files, their SHA-256 as in {MANIFEST}")
    return result


def _as_in_the_guide(problem: str) -> str:
    """The guide shows the finding of a merged model as a line of its own: the remedy goes below it."""
    return problem.replace("; ", "\n  ", 1) if problem.startswith("Found merged model file: ") else problem


def check_size(folder: Path, max_size_mb: float) -> CheckResult:
    """The bytes of all files, in MiB as the guide counts, against a limit."""
    result = CheckResult("size")
    sizes = run_folder.file_sizes(folder)
    total = sum(sizes.values())
    adapters = sum(size for name, size in sizes.items() if name.startswith(formats.ADAPTERS + "/"))
    training = sum(size for name, size in sizes.items() if formats.is_training_file(name))
    router = sizes.get(formats.ROUTER, 0)
    result.measures = {
        "total_bytes": total,
        "adapter_bytes": adapters,
        "training_bytes": training,
        "router_bytes": router,
        "max_bytes": int(max_size_mb * MIB),
    }
    result.notes.append(f"adapters {adapters / MIB:.1f} MB, router {router / 1024:.1f} KB")
    if training:
        result.notes.append(f"training state {training / MIB:.1f} MB")
    if not total:
        result.problems.append("the checkpoint has no files; save it again")
    if total >= max_size_mb * MIB:
        largest = max(sizes, key=sizes.get)
        result.problems.append(
            f"the checkpoint has {total / MIB:.1f} MB, expected less than {max_size_mb:g} MB; the largest file is "
            f"{largest} ({sizes[largest] / MIB:.1f} MB); --max-size-mb raises the limit"
        )
    return result
