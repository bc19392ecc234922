"""The checks of the quick script: is this environment able to save checkpoints? No model is loaded.

Each check imports the libraries that it needs itself, since a library that is missing or broken is a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import formats
from ..checkpoint.safetensors_file import read_header
from ..checkpoint.verify import find_problems, inspect_checkpoint
from ..errors import UsageError
from ..store.files import FileProblem
from ..system import machine
from . import workspace
from .report import CheckResult
from .run import Run

TINY_LLAMA: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64
}  # fmt: skip
QUICK_BYTES = 1 << 20
INSTALL = "pip install -r requirements.txt"


def check_environment(run: Run) -> None:
    """Make the checks of the quick script."""
    machine.need_disk(QUICK_BYTES, workspace.temporary_root(), "a checkpoint of a tiny mixture")
    with workspace.temporary(run.script.folder_prefix) as folder:
        run.step("peft", _finding, check_peft)
        run.step("safetensors", _finding, lambda: check_safetensors(folder))
        run.step("structure", _finding, lambda: check_tiny_checkpoint(folder, run.checkpoint_callback()))


def _finding(check: Callable[[], CheckResult]) -> CheckResult:
    """Report an exception as a problem of the installation, unless the disk is its cause."""
    try:
        return check()
    except Exception as error:
        if isinstance(error, UsageError) or getattr(error, "errno", None) is not None:
            raise
        return CheckResult("", problems=[f"{type(error).__name__}: {error}; install the tested versions: {INSTALL}"])


def check_peft() -> CheckResult:
    """Check that PEFT builds routed layers from a MoELoraConfig, and only from that, and saves it as plain LoRA."""
    import peft
    import torch

    from ..mixture.config import MoELoraConfig
    from ..mixture.routed_linear import RoutedLinear

    result = CheckResult("peft", notes=[f"peft {peft.__version__}, torch {torch.__version__}"])

    def routed(config: peft.LoraConfig) -> bool:
        module = torch.nn.Sequential(torch.nn.Linear(4, 4))
        return isinstance(peft.inject_adapter_in_model(config, module).get_submodule("0"), RoutedLinear)

    config = MoELoraConfig(r=2, target_modules=["0"], task_type=None)
    if not routed(config):
        text = f"peft {peft.__version__} does not build routed layers from a MoELoraConfig"
        result.problems.append(f"{text}; install the tested versions: {INSTALL}")
    if routed(peft.LoraConfig(r=2, target_modules=["0"])):
        result.problems.append("a plain LoraConfig builds routed layers: this check could not fail")
    saved = config.to_dict()["peft_type"]
    saved = getattr(saved, "value", saved)
    if saved != "LORA":
        result.problems.append(f"a MoELoraConfig is saved as {saved}, expected LORA, as other PEFT users read it")
    if result.passed:
        result.notes.append("MoELoraConfig builds routed layers; a plain LoraConfig does not")
    return result


def check_safetensors(folder: Path) -> CheckResult:
    """Check that a tensor comes back from a safetensors file to the bit, and that a file that is cut off is refused."""
    import safetensors
    import torch
    from safetensors.torch import load_file, save_file

    result = CheckResult("safetensors", notes=[f"safetensors {safetensors.__version__}"])
    path = folder / "probe.safetensors"
    tensor = torch.linspace(-1, 1, 64).reshape(8, 8)
    save_file({"x": tensor}, path, metadata={"format": "pt"})
    if not torch.equal(load_file(path)["x"], tensor):
        result.problems.append(f"a tensor changed between saving and loading; reinstall safetensors: {INSTALL}")
    read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    try:
        read_header(path)
        result.problems.append("a file that was cut off was not refused: this check could not fail")
    except FileProblem:
        result.notes.append("a tensor comes back to the bit; a file that is cut off is refused")
    return result


def check_tiny_checkpoint(folder: Path, callback_class: type) -> CheckResult:
    """Save a tiny mixture and verify its folder; check that the same folder without one file is refused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..base.preserve import seeded
    from ..mixture.config import MoELoraConfig
    from ..mixture.model import Mixture
    from .saved import fill_experts, save_with

    result = CheckResult("structure")
    checkpoint = folder / "checkpoint"
    with seeded(0):
        model = Mixture(LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)), 2, lora=MoELoraConfig(r=2))
        fill_experts(model, seed=0)
        save_with(callback_class)(model, checkpoint)
    contents = inspect_checkpoint(checkpoint)
    result.problems.extend(contents.problems)
    result.notes.extend(sorted(contents.files))
    (checkpoint / formats.ROUTER).unlink(missing_ok=True)
    if not any(formats.ROUTER in problem for problem in find_problems(checkpoint)):
        result.problems.append(f"a checkpoint without {formats.ROUTER} was not refused: this check could not fail")
    else:
        result.notes.append(f"without {formats.ROUTER} it is refused")
    return result
