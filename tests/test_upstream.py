"""The private names of torch, Transformers and PEFT that the package relies on are still there.

Such a name may change with any release. Each row says where it is, what the package uses it for, and what to look at
when it is gone. A name that the package uses without a row here is found, too.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

PACKAGE = Path(__file__).parents[1] / "dylora_moe"


@dataclass(frozen=True)
class Upstream:
    """A private name.

    Args:
        owner: the class or module that has it, or whose source sets it on an instance.
        used_for: what the package does with it.
        look_at: what to look at in the library when it is gone.
        takes: of a method that is overridden or called: the names of its parameters that are relied on.
    """

    owner: object
    used_for: str
    look_at: str
    takes: tuple[str, ...] = ()


CHECKPOINTS = "Trainer: how a checkpoint is saved and resumed from"
NAMES = {
    # Transformers: the Trainer
    "_save_checkpoint": Upstream(Trainer, "the Trainer must write nothing itself", CHECKPOINTS, ("model", "trial")),
    "_load_from_checkpoint": Upstream(
        Trainer, "experts and router are read by our reader", CHECKPOINTS, ("resume_from_checkpoint", "model")
    ),
    "_load_optimizer_and_scheduler": Upstream(Trainer, "moments are bound to names", CHECKPOINTS, ("checkpoint",)),
    "_load_rng_state": Upstream(Trainer, "generators are read without unpickling", CHECKPOINTS, ("checkpoint",)),
    "_load_callback_state": Upstream(Trainer, "early stopping goes on counting", CHECKPOINTS),
    "_finalize_training": Upstream(Trainer, "it would delete the last checkpoint, or load the best", CHECKPOINTS),
    "_maybe_log_save_evaluate": Upstream(Trainer, "a signal cuts an evaluation short, and saves", CHECKPOINTS),
    "_evaluate": Upstream(
        Trainer, "an evaluation is made again on resume", CHECKPOINTS, ("trial", "ignore_keys_for_eval")
    ),
    "_determine_best_metric": Upstream(
        Trainer, "an evaluation is made again on resume", CHECKPOINTS, ("metrics", "trial")
    ),
    "_init_training_state": Upstream(Trainer, "steps and epochs follow the new settings", CHECKPOINTS, ("max_steps",)),
    "_move_model_to_device": Upstream(
        Trainer, "a sharded base is there already", "Trainer.__init__", ("model", "device")
    ),
    "_wrap_model": Upstream(Trainer, "DDP around a sharded base", "Accelerator.prepare_model", ("model", "training")),
    "_remove_unused_columns": Upstream(
        Trainer, "an evaluation reads what training reads", "Trainer._get_dataloader", ("dataset", "description")
    ),
    "_tr_loss": Upstream(Trainer, "the loss since the last log goes on", "Trainer._maybe_log_save_evaluate"),
    "_total_loss_scalar": Upstream(Trainer, "the mean loss of a run goes on", "Trainer._finalize_training"),
    "_globalstep_last_logged": Upstream(
        Trainer, "the loss since the last log goes on", "Trainer._maybe_log_save_evaluate"
    ),
    "_train_batch_size": Upstream(Trainer, "a start at a later step", "Trainer._init_training_state"),
    "_n_gpu": Upstream(
        TrainingArguments, "one process uses one GPU: no DataParallel", "TrainingArguments._setup_devices"
    ),
    # Transformers: models
    "_gradient_checkpointing_func": Upstream(
        GradientCheckpointingLayer,
        "a layer is run again with the routing of its first run",
        "GradientCheckpointingLayer",
    ),
    "_init_weights": Upstream(
        PreTrainedModel, "random norms and biases are those of the model", "PreTrainedModel.init_weights"
    ),
    "_name_or_path": Upstream(PreTrainedConfig, "a checkpoint names its base model", "PreTrainedConfig.name_or_path"),
    "_attn_implementation": Upstream(
        PreTrainedConfig,
        "which attention packed documents are kept apart by",
        "PreTrainedModel.set_attn_implementation",
    ),
    # PEFT
    "_register_custom_module": Upstream(
        LoraConfig, "PEFT builds routed layers", "LoraModel._create_new_module, dispatch", ("mapping",)
    ),
    "_cast_input_dtype": Upstream(
        lora.Linear, "one expert alone has PEFT's bits", "lora.Linear.forward", ("x", "dtype")
    ),
    "_disable_adapters": Upstream(
        lora.Linear, "PEFT's disable_adapter is respected", "BaseTunerLayer.disable_adapters"
    ),
    "_move_adapter_to_device_of_base_layer": Upstream(
        lora.Linear, "adding an expert does not move the others", "LoraLayer.update_layer", ("adapter_name",)
    ),
    # torch
    "_C": Upstream(torch, "functions below", "torch/_C/__init__.pyi"),
    "_are_functorch_transforms_active": Upstream(torch._C, "vmap and grad see plain operations", "torch.func"),
    "_buffers": Upstream(nn.Module, "a fresh base shares the tensors", "torch.nn.Module"),
    "_parameters": Upstream(nn.Module, "a fresh base shares the tensors", "torch.nn.Module"),
    "_modules": Upstream(nn.Module, "the base layer without PEFT's attribute lookup", "torch.nn.Module"),
    "_forward_hooks": Upstream(nn.Module, "a result that a hook may keep is not written to", "torch.nn.Module"),
    "_global_forward_hooks": Upstream(
        nn.modules.module, "a result that a hook may keep is not written to", "torch.nn.Module._call_impl"
    ),
    "_len_torch_dispatch_stack": Upstream(
        torch._C, "a result that a dispatch mode may keep is not written to", "torch.utils._python_dispatch"
    ),
    "_version": Upstream(torch.Tensor, "whether parameters have changed", "torch.Tensor: version counter"),
    "_step_count": Upstream(LambdaLR, "a schedule that begins at a later step", "torch.optim.lr_scheduler.LRScheduler"),
    "_last_lr": Upstream(LambdaLR, "a schedule that begins at a later step", "torch.optim.lr_scheduler.LRScheduler"),
    "_set_params_and_buffers_to_ignore_for_model": Upstream(
        nn.parallel.DistributedDataParallel, "DDP averages experts and router only", "DistributedDataParallel"
    ),
}


def is_there(name: str, upstream: Upstream) -> bool:
    """Whether the owner has the name, or its source sets it on an instance."""
    owner = upstream.owner
    if hasattr(owner, name):
        return True
    if not inspect.isclass(owner):
        return False
    classes = [cls for cls in owner.__mro__ if cls.__module__.split(".")[0] in ("torch", "transformers", "peft")]
    return any(f"self.{name}" in inspect.getsource(cls) or f'"{name}"' in inspect.getsource(cls) for cls in classes)


def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_our_own(trees: dict[Path, ast.Module]) -> set[str]:
    """Functions, classes, variables and attributes that the package defines, without methods that are overridden."""
    found: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                is_own = isinstance(node, ast.Name) or (isinstance(node.value, ast.Name) and node.value.id == "self")
                found |= {node.id if isinstance(node, ast.Name) else node.attr} if is_own else set()
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return found


def names_used(trees: dict[Path, ast.Module]) -> Iterator[tuple[str, str]]:
    """(name, where) of each private name of others that the package uses."""
    own = names_of_our_own(trees)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [alias.name for alias in node.names if private(alias.name)]
            yield from ((name, f"{path.name}:{node.lineno}") for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_still_there(name):
    upstream = NAMES[name]
    assert is_there(name, upstream), f"{name} is gone: it is used for this: {upstream.used_for}; see {upstream.look_at}"
    if upstream.takes:
        found = list(inspect.signature(getattr(upstream.owner, name)).parameters)
        assert [parameter for parameter in upstream.takes if parameter not in found] == [], (found, upstream.look_at)


def test_every_private_name_that_is_used_has_a_row():
    assert [f"{name} in {where}" for name, where in names_used(sources()) if name not in NAMES] == []


def test_every_row_is_of_a_name_that_is_used():
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert [name for name in NAMES if name not in text] == []


def test_a_name_that_is_gone_is_seen():
    assert not is_there("_never_was", Upstream(Trainer, "", ""))
    assert not is_there("_never_was", Upstream(torch, "", ""))
    tree = ast.parse("from torch.nn import _hidden\nx._inside()\nself._own = 1\ny._own\n")
    assert [name for name, _ in names_used({Path("a.py"): tree})] == ["_hidden", "_inside"]
