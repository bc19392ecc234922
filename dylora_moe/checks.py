"""The checks that the three scripts share. Each returns a `CheckResult`; none prints, none ends the program."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from . import formats, verify
from .errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .model import DyLoRAMoE

MIB = 1 << 20
TOLERANCE = 1e-5
INPUT_TOKENS = 12
NOT_APPLICABLE = "not applicable"


@dataclass
class CheckResult:
    """What one check found: problems (none: passed), lines for people, and figures."""

    name: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measures: dict = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems


def timed(check: Callable[..., CheckResult], *args, **kwargs) -> CheckResult:
    started = time.perf_counter()
    result = check(*args, **kwargs)
    result.seconds = time.perf_counter() - started
    return result


# ---- quick ----


def check_peft() -> CheckResult:
    """PEFT builds routed layers from a MoELoraConfig, saves it as plain LoRA, and does not without it."""
    import peft
    import torch

    from .config import MoELoraConfig
    from .layers import RoutedLinear

    result = CheckResult("peft", notes=[f"peft {peft.__version__}, torch {torch.__version__}"])

    def routed(config) -> bool:
        module = torch.nn.Sequential(torch.nn.Linear(4, 4))
        return isinstance(peft.inject_adapter_in_model(config, module)[0], RoutedLinear)

    config = MoELoraConfig(r=2, target_modules=["0"], task_type=None)
    if not routed(config):
        result.problems.append(
            f"peft {peft.__version__} does not build routed layers from a MoELoraConfig; install the versions of requirements.txt"
        )
    if routed(peft.LoraConfig(r=2, target_modules=["0"])):
        result.problems.append("a plain LoraConfig builds routed layers: this check could not fail")
    saved = config.to_dict()
    if getattr(saved["peft_type"], "value", saved["peft_type"]) != "LORA":
        result.problems.append(
            f"a MoELoraConfig is saved as {saved['peft_type']}, expected LORA, as other PEFT users read it"
        )
    result.notes.append("MoELoraConfig builds routed layers; a plain LoraConfig does not")
    return result


def check_safetensors() -> CheckResult:
    """A tensor comes back from a safetensors file to the bit; a file that is cut off is refused."""
    import safetensors
    import torch
    from safetensors.torch import load_file, save_file

    from .tensorfile import FileProblem, read_header

    result = CheckResult("safetensors", notes=[f"safetensors {safetensors.__version__}"])
    with Scratch() as folder:
        path = folder / "probe.safetensors"
        tensor = torch.linspace(-1, 1, 64).reshape(8, 8)
        save_file({"x": tensor}, path, metadata={"format": "pt"})
        if not torch.equal(load_file(path)["x"], tensor):
            result.problems.append("a tensor changed between saving and loading; reinstall safetensors")
        read_header(path)
        path.write_bytes(path.read_bytes()[:-1])
        try:
            read_header(path)
            result.problems.append("a file that was cut off was not refused")
        except FileProblem:
            result.notes.append("a tensor comes back to the bit; a file that is cut off is refused")
    return result


def check_quick_structure(save: Callable) -> CheckResult:
    """A tiny mixture is saved and its folder verified; the same folder without one file is refused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from .config import MoELoraConfig
    from .model import DyLoRAMoE, seeded

    result = CheckResult("structure")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 64,
    }
    with Scratch() as folder, seeded(0):
        model = DyLoRAMoE(LlamaForCausalLM(LlamaConfig(**sizes)), 2, lora=MoELoraConfig(r=2))
        fill_experts(model, seed=0)
        checkpoint = folder / "checkpoint"
        save(model, checkpoint)
        result.problems.extend(verify.verify(checkpoint))
        files = sorted(p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())
        result.notes.extend(files)
        (checkpoint / formats.ROUTER).unlink(missing_ok=True)
        if not any(formats.ROUTER in problem for problem in verify.verify(checkpoint)):
            result.problems.append(f"a checkpoint without {formats.ROUTER} was not refused: this check could not fail")
        else:
            result.notes.append(f"without {formats.ROUTER} it is refused")
    return result


class Scratch:
    """A temporary folder that is gone afterwards, as a Path."""

    def __enter__(self) -> Path:
        self.folder = Path(tempfile.mkdtemp(prefix="dylora_checkpoint_quick_"))
        return self.folder

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# ---- save, structure, size ----


def fill_experts(model: DyLoRAMoE, seed: int) -> None:
    """Give every B and the gate seeded values that are not zero, as if trained: zeros would hide what is not saved."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for index in range(model.num_experts):
            for name, tensor in model.expert_tensors(index).items():
                if name.endswith(".lora_B.weight"):
                    tensor.copy_(_noise(tensor, generator).mul_(0.05))
        gate = model.router.gate.weight
        gate.copy_(torch.randn(gate.shape, generator=generator).mul_(gate.shape[1] ** -0.5))


def _noise(tensor: torch.Tensor, generator) -> torch.Tensor:
    import torch

    return torch.empty(tensor.shape).uniform_(-1, 1, generator=generator)


def save_with(callback_class: type) -> Callable[[DyLoRAMoE, Path], None]:
    """A function that saves a mixture as training does: through the callback's `on_save`."""
    from .skills import EMBEDDING_DIM, SkillLibrary

    def save(model: DyLoRAMoE, target: Path) -> None:
        import torch

        skills = SkillLibrary()
        for index in range(min(2, model.num_experts)):
            skills.add(f"skill_{index}", torch.eye(EMBEDDING_DIM)[index], expert=index)
        callback = callback_class(skills=skills, name=target.name)
        args = SimpleNamespace(output_dir=str(target.parent), should_save=True, save_total_limit=None)
        state = SimpleNamespace(global_step=0, best_global_step=None)
        control = SimpleNamespace(should_training_stop=False)
        callback.on_save(args, state, control, model=model)

    return save


def check_save(model: DyLoRAMoE, target: Path, save: Callable[[DyLoRAMoE, Path], None]) -> CheckResult:
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
        result.problems.append(
            "saving changed the model: mode, requires_grad, active experts or random state are not as found"
        )
    compared = 0
    for index in range(model.num_experts):
        name = f"{formats.expert_folder(f'expert_{index}')}/{formats.ADAPTER_WEIGHTS}"
        compared += _compare_file(target, name, model.expert_tensors(index), result)
    compared += _compare_file(target, formats.ROUTER, dict(model.router.named_parameters()), result)
    result.measures["tensors_compared"] = compared
    counts = model.parameter_counts()
    result.notes.append(
        f"{model.num_experts} experts, {counts['experts']:,} parameters, and a router of {counts['router']:,}"
    )
    result.notes.append(f"{compared} tensors on disk equal those in memory")
    return result


def _compare_file(folder: Path, name: str, tensors: dict, result: CheckResult) -> int:
    from safetensors import SafetensorError, safe_open

    import torch

    try:
        with safe_open(folder / name, framework="pt") as file:
            names = set(file.keys())
            for key in sorted(set(tensors) ^ names):
                result.problems.append(f"{name}: tensor {key} is {'missing' if key in tensors else 'not the model`s'}")
            for key in sorted(set(tensors) & names):
                if not torch.equal(file.get_tensor(key), tensors[key].detach().cpu()):
                    result.problems.append(f"{name}: tensor {key} on disk is not the one in memory")
            return len(names)
    except (OSError, SafetensorError) as error:
        result.problems.append(f"{name}: cannot be read back: {error}")
        return 0


def _fingerprint(model: DyLoRAMoE) -> tuple:
    import torch

    return (
        tuple(module.training for module in model.modules()),
        tuple(parameter.requires_grad for parameter in model.parameters()),
        tuple(model.peft_model.active_adapters),
        tuple(torch.get_rng_state().tolist()[:64]),
    )


def check_structure(folder: Path) -> CheckResult:
    """Everything that verify.py compares."""
    result = CheckResult("structure")
    contents = verify.inspect(folder)
    result.problems = contents.problems
    result.measures["files"] = len(contents.files)
    if contents.config:
        for expert in contents.config["experts"]:
            result.notes.append(f"{expert['name']}: {expert['tensors']} tensors, r={expert['r']}, {expert['state']}")
        router = contents.config["router"]
        result.notes.append(f"router: {contents.config['num_experts']} x {router['hidden_size']}")
    result.notes.append(f"{len(contents.files)} files, their SHA-256 as in {formats.MANIFEST}" if result.passed else "")
    result.notes = [note for note in result.notes if note]
    return result


def check_size(folder: Path, max_size_mb: float) -> CheckResult:
    """The bytes of all files, in MiB as the guide counts, against a limit; what is not adapters stays small."""
    result = CheckResult("size")
    sizes = {p.relative_to(folder).as_posix(): p.lstat().st_size for p in folder.rglob("*") if p.is_file()}
    total = sum(sizes.values())
    adapters = sum(size for name, size in sizes.items() if name.startswith(formats.ADAPTERS + "/"))
    training = sum(size for name, size in sizes.items() if verify.is_training_file(name))
    result.measures = {
        "total_bytes": total,
        "adapter_bytes": adapters,
        "training_bytes": training,
        "router_bytes": sizes.get(formats.ROUTER, 0),
        "max_bytes": int(max_size_mb * MIB),
    }
    result.notes.append(f"adapters {adapters / MIB:.1f} MB, router {sizes.get(formats.ROUTER, 0) / 1024:.1f} KB")
    if training:
        result.notes.append(f"training state {training / MIB:.1f} MB")
    if total >= max_size_mb * MIB:
        largest = max(sizes, key=sizes.get)
        result.problems.append(
            f"the checkpoint has {total / MIB:.1f} MB, expected less than {max_size_mb:g} MB; the largest file is {largest} "
            f"({sizes[largest] / MIB:.1f} MB); --max-size-mb raises the limit"
        )
    return result


# ---- load, consistency ----


@dataclass
class Loaded:
    """A mixture read from a checkpoint into a fresh instance, and what that instance computed before."""

    model: DyLoRAMoE
    before: torch.Tensor  # (T, vocabulary) logits of the fresh instance


def fixed_input(model: DyLoRAMoE) -> torch.Tensor:
    """(1, 12) token ids, the same for every run with this vocabulary."""
    import torch

    embedding = model.base.get_input_embeddings()
    return (
        ((torch.arange(INPUT_TOKENS) * 6151 + 29) % embedding.num_embeddings).unsqueeze(0).to(embedding.weight.device)
    )


def logits(model: DyLoRAMoE, expert: int | None = None) -> torch.Tensor:
    """(T, vocabulary) logits of the fixed input, in the base's dtype; the model is left as found."""
    from .model import untouched

    with untouched(model):
        return model(fixed_input(model), expert=expert, use_cache=False).logits[0]


def check_load(folder: Path, base: PreTrainedModel) -> tuple[CheckResult, Loaded | None]:
    """The checkpoint goes into a fresh instance completely, and makes a difference to it."""
    from . import checkpoint
    from .errors import CheckpointError

    result = CheckResult("load")
    try:
        model = checkpoint.build(folder, base)
        loaded = Loaded(model, logits(model))
        skills = checkpoint.load_into(folder, model)
    except CheckpointError as error:
        result.problems = error.problems
        return result, None
    states = model.expert_states
    result.notes.append(f"{model.num_experts} experts ({', '.join(sorted(set(states)))}), router, {len(skills)} skills")
    return result, loaded


def check_consistency(
    loaded: Loaded, folder: Path, *, saved: DyLoRAMoE | None, weights: str, spare: PreTrainedModel
) -> CheckResult:
    """The loaded mixture computes what the saved one does, routed and for each expert alone; and spoiling is seen.

    Args:
        saved: the mixture that was saved; None where the checkpoint is somebody else's, and only its probe can speak.
        spare: another base model sharing the tensors, for stock PEFT.
    """
    result = CheckResult("consistency")
    model = loaded.model
    routed = logits(model)
    alone = [logits(model, expert) for expert in range(model.num_experts)]
    _compare_before(result, loaded, routed)
    if saved is not None:
        _compare_saved(result, saved, routed, alone)
    _compare_probe(result, model, folder, weights)
    _compare_stock_peft(result, folder, alone, spare, fixed_input(model))
    _spoil(result, model, routed, alone)
    return result


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    from .checkpoint import max_abs_difference

    return max_abs_difference(a, b)


def _compare_before(result: CheckResult, loaded: Loaded, routed: torch.Tensor) -> None:
    difference = _difference(loaded.before, routed)
    result.measures["max_abs_diff_before_load"] = difference
    only_new = set(loaded.model.expert_states) == {"new"}
    result.notes.append(f"before loading the fresh instance differs by {difference:.3g}")
    if only_new:
        result.notes[-1] += " (all experts are new: they have no effect yet)"
    elif not difference > TOLERANCE:
        result.problems.append(f"loading made no difference ({difference:.3g}): the checkpoint has no effect")


def _compare_saved(result: CheckResult, saved: DyLoRAMoE, routed: torch.Tensor, alone: list) -> None:
    difference = _difference(logits(saved), routed)
    per_expert = [_difference(logits(saved, i), here) for i, here in enumerate(alone)]
    result.measures["max_abs_diff"] = difference
    result.measures["max_abs_diff_per_expert"] = per_expert
    result.notes.append(
        f"after loading: routed {difference:.3g}, experts alone {max(per_expert):.3g} (tolerance {TOLERANCE:g})"
    )
    for name, value in [("routed", difference), *((f"expert_{i}", d) for i, d in enumerate(per_expert))]:
        if not value <= TOLERANCE:
            result.problems.append(
                f"{name}: logits differ by {value:.3g} after loading, expected at most {TOLERANCE:g}"
            )


def _compare_probe(result: CheckResult, model: DyLoRAMoE, folder: Path, weights: str) -> None:
    from . import checkpoint

    probe = checkpoint.read_probe(folder)
    if probe is None:
        result.notes.append("probe: none in this checkpoint (saved without base weights); not checked")
        return
    tensors, facts = probe
    here = checkpoint.probe_facts(model)
    if facts.get("base_weights") != here["base_weights"]:
        text = "probe: was computed with other base weights"
        if weights == "pretrained":
            result.problems.append(f"{text}, so that these are not those it was trained on; load the right base model")
        else:
            result.notes.append(f"{text}; not checked under random weights")
        return
    if facts.get("dtype") != here["dtype"]:
        result.notes.append(f"probe: was computed in {facts.get('dtype')}, this base is {here['dtype']}; not checked")
        return
    same = facts.get("machine") == here["machine"] and facts.get("device_type") == here["device_type"]
    tolerance = 0.0 if same else checkpoint.PROBE_TOLERANCE.get(here["dtype"], 0.25)
    difference = checkpoint.probe_difference(model, tensors)
    result.measures["max_abs_diff_probe"] = difference.largest
    result.measures.setdefault("max_abs_diff", difference.routed)
    result.measures.setdefault("max_abs_diff_per_expert", difference.experts)
    where = "on the machine that saved it" if same else "on another machine or number of threads"
    result.notes.append(f"probe: differs by {difference.largest:.3g} (tolerance {tolerance:g}, {where})")
    for name, value in [("routed", difference.routed), *((f"expert_{i}", d) for i, d in enumerate(difference.experts))]:
        if not value <= tolerance:
            result.problems.append(
                f"probe: {name} differs by {value:.3g} from what the saving process computed, expected at most {tolerance:g}: "
                "a tensor was changed after the save, or belongs to another one"
            )


def _compare_stock_peft(result: CheckResult, folder: Path, alone: list, spare, input_ids: torch.Tensor) -> None:
    """Each expert as stock PEFT loads it, as a LoRA of its own."""
    from .checkpoint import stock_peft_logits

    differences = []
    for index, theirs in enumerate(stock_peft_logits(folder, len(alone), spare, input_ids)):
        differences.append(_difference(theirs, alone[index]))
        if not differences[-1] <= TOLERANCE:
            result.problems.append(
                f"expert_{index}: stock PEFT computes logits that differ by {differences[-1]:.3g}, expected at most {TOLERANCE:g}"
            )
    result.measures["max_abs_diff_stock_peft"] = differences
    result.notes.append(f"each expert against stock PEFT: {max(differences):.3g}")


def _spoil(result: CheckResult, model: DyLoRAMoE, routed: torch.Tensor, alone: list) -> None:
    """Negative controls: with one expert or the router spoiled, the comparison must see it."""
    import torch

    spoiled: dict[str, float | str] = {}
    states = model.expert_states
    for index in range(model.num_experts):
        name = f"expert_{index}"
        if states[index] == "new":
            spoiled[name] = NOT_APPLICABLE
            continue
        tensors = [t for key, t in model.expert_tensors(index).items() if key.endswith("lora_B.weight")]
        with torch.no_grad():
            for tensor in tensors:
                tensor.neg_()  # exact, and so is doing it again
        try:
            spoiled[name] = _difference(logits(model, index), alone[index])
        finally:
            with torch.no_grad():
                for tensor in tensors:
                    tensor.neg_()
    if model.num_experts == 1 or set(states) == {"new"}:
        spoiled["router"] = NOT_APPLICABLE
    else:
        gate = model.router.gate.weight
        with torch.no_grad():
            gate.neg_()
        try:
            spoiled["router"] = _difference(logits(model), routed)
        finally:
            with torch.no_grad():
                gate.neg_()
    result.measures["spoiled"] = spoiled
    for name, difference in spoiled.items():
        if difference == NOT_APPLICABLE:
            result.notes.append(f"negative control, {name} spoiled: {NOT_APPLICABLE}")
            continue
        result.notes.append(f"negative control, {name} spoiled: differs by {difference:.3g}")
        if not difference > TOLERANCE:
            result.problems.append(f"spoiling {name} was not seen ({difference:.3g}): this comparison could not fail")


def existing_checkpoint(path: Path) -> Path:
    """The folder of --checkpoint.

    Raises:
        UsageError: where it is missing, a file, or the run folder around checkpoints.
    """
    from . import commit

    if not path.exists():
        raise UsageError(f"--checkpoint {path}: there is no such folder")
    if not path.is_dir():
        raise UsageError(f"--checkpoint {path}: expected a checkpoint folder, found a file")
    if not (path / formats.CONFIG).exists() and not (path / formats.MANIFEST).exists():
        inside = commit.checkpoints(path)
        if inside:
            raise UsageError(
                f"--checkpoint {path} is a run folder; its newest checkpoint is {inside[-1].path}: name that one"
            )
    return path
