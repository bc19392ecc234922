"""`TrainingArguments` and the environment of Accelerate: how train.py sets them, and what a mixture cannot honour.

A setting that is taken without effect, or with a wrong one, is refused by name before the first step.
tests/training/test_arguments.py has a table of all settings, and of why those that are not refused here are honoured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from ..base.load import resolve_device
from ..distributed.sharding import is_set
from ..errors import UsageError, listed
from .settings import TrainSettings

if TYPE_CHECKING:
    from transformers import Trainer  # the callback does not need it

# A setting -> which of its values are honoured, and what to do instead of the others.
Refused = dict[str, tuple[Callable[[Any], bool], str]]


def _is_empty(value: Any) -> bool:
    return not value


def _have_lengths(data: Any) -> bool:
    some = data.values() if isinstance(data, dict) else [data]
    return all(each is None or isinstance(each, Sized) for each in some)


def _is_no(value: str) -> bool:
    return value.lower() in ("", "no")


HALF = (
    "the experts train in float32; leave it out, or set it to False where TRL turns it on by itself, and load the base "
    'model with dtype="bfloat16" (--dtype bfloat16)'
)
SHARDS = "would shard or wrap the experts with the base model; leave it out"
EVALUATES = "MoETrainer's evaluation is the loss of each data set; compute other metrics with trainer.mixture"

# ---- fields of TrainingArguments, and its property n_gpu ----

WITH_EVERY_TRAINER: Refused = {
    "accelerator_config": (
        lambda config: config.use_seedable_sampler and not config.use_configured_state,
        "a resumed run would see other data with use_seedable_sampler=False, and use_configured_state=True hides what "
        "Accelerate does; leave them out",
    ),
    "auto_find_batch_size": (
        _is_empty,
        "a second attempt would begin with the experts of the first; choose per_device_train_batch_size yourself",
    ),
    "bf16": (_is_empty, HALF),
    "bf16_full_eval": (_is_empty, f"it would round the experts; {HALF}"),
    "deepspeed": (_is_empty, f"DeepSpeed {SHARDS}"),
    "enable_jit_checkpoint": (
        _is_empty,
        "it does not save through PeftCheckpointCallback; use dylora_moe.training.callbacks.StopSignals",
    ),
    "fp16": (_is_empty, HALF),
    "fp16_full_eval": (_is_empty, f"it would round the experts; {HALF}"),
    "fsdp": (
        _is_empty,
        f"Accelerate {SHARDS}, and shard the mixture before, with dylora_moe.distributed.sharding.shard",
    ),
    "label_smoothing_factor": (
        _is_empty,
        "the Trainer would smooth labels that are not shifted, and drop the load-balancing loss; build the mixture "
        "with label_smoothing=",
    ),
    "n_gpu": (
        lambda number: number <= 1,
        "DataParallel would copy the mixture in each step; choose one GPU with CUDA_VISIBLE_DEVICES, or start one "
        "process for each GPU with torchrun",
    ),
    "parallelism_config": (_is_empty, f"Accelerate {SHARDS}"),
    "push_to_hub": (
        _is_empty,
        "checkpoints of PeftCheckpointCallback are not pushed; upload one afterwards with `hf upload`",
    ),
    "save_on_each_node": (_is_empty, "the first process writes the checkpoints; leave it out"),
    "use_liger_kernel": (_is_empty, "Transformers applies its kernels to plain models only; leave it out"),
}

WITH_MOE_TRAINER: Refused = {
    "dataloader_in_order": (bool, "a resumed run would see other data; leave it out"),
    "lr_scheduler_type": (
        lambda kind: kind not in ("reduce_lr_on_plateau", "greedy"),
        "its position cannot be resumed; use a schedule that depends on the step alone, such as cosine",
    ),
    "optim": (
        lambda name: name in ("adamw_torch", "adamw_torch_fused"),
        "MoETrainer would use AdamW; leave it out, or pass optimizers=(optimizer, None)",
    ),
    "optim_args": (_is_empty, "MoETrainer's AdamW does not read it; pass optimizers=(optimizer, None)"),
    "optim_target_modules": (_is_empty, "MoETrainer trains all experts and the router; leave it out"),
    "restore_callback_states_from_checkpoint": (
        _is_empty,
        "MoETrainer restores the state of early stopping, and of no other callback; leave it out",
    ),
    "save_strategy": (
        lambda strategy: strategy != "best",
        'the last checkpoint would be missing; use "steps" and save_total_limit, which keeps the best one too',
    ),
    "train_sampling_strategy": (
        lambda strategy: strategy in ("random", "sequential"),
        "a resumed run would see other data; use random or sequential",
    ),
}

WITH_A_STOCK_TRAINER: Refused = {
    "load_best_model_at_end": (_is_empty, "only dylora_moe.MoETrainer reads the checkpoints of a mixture; use it"),
    "save_strategy": (
        lambda strategy: strategy == "no",
        "this Trainer would add files to every checkpoint, which its manifest does not list: use dylora_moe.MoETrainer "
        'or save_strategy="no", with which PeftCheckpointCallback saves by itself every save_steps steps',
    ),
}

# ---- arguments of the Trainer ----

OF_MOE_TRAINER: Refused = {
    "compute_loss_func": (_is_empty, "the load-balancing loss would be missing; override compute_loss"),
    "compute_metrics": (_is_empty, EVALUATES),
    "eval_dataset": (_have_lengths, "a stream cannot be evaluated; load the data, or a part of them"),
    "lr_scheduler": (
        lambda scheduler: scheduler is None or isinstance(scheduler, LambdaLR),
        "its position cannot be resumed; pass a torch.optim.lr_scheduler.LambdaLR",
    ),
    "model_init": (_is_empty, "PeftCheckpointCallback saves one mixture; pass it as model="),
    "optimizer": (
        lambda optimizer: optimizer is None or all("param_names" in group for group in optimizer.param_groups),
        "its state could not be bound to parameters without their names; make it from "
        "list(mixture.trained_parameters().items())",
    ),
    "optimizer_cls_and_kwargs": (_is_empty, "MoETrainer would use AdamW; pass optimizers=(optimizer, None)"),
    "preprocess_logits_for_metrics": (_is_empty, EVALUATES),
}

# ---- what `accelerate launch` puts into the environment ----

ENVIRONMENT: Refused = {
    "ACCELERATE_DYNAMO_BACKEND": (_is_no, "a resumed run might round differently; use --dynamo_backend no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        lambda value: value in ("", "1"),
        "the Trainer does not read it; use gradient_accumulation_steps (--grad-accum)",
    ),
    "ACCELERATE_MIXED_PRECISION": (_is_no, f"{HALF}, with --mixed_precision no for accelerate launch"),
    "ACCELERATE_USE_DEEPSPEED": (lambda _: not is_set("ACCELERATE_USE_DEEPSPEED"), f"DeepSpeed {SHARDS}"),
    "ACCELERATE_USE_FSDP": (
        lambda _: not is_set("ACCELERATE_USE_FSDP"),
        f"Accelerate {SHARDS}, and shard the mixture before, with dylora_moe.distributed.sharding.shard",
    ),
    "ACCELERATE_USE_MEGATRON_LM": (lambda _: not is_set("ACCELERATE_USE_MEGATRON_LM"), f"Megatron-LM {SHARDS}"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        lambda _: not is_set("ACCELERATE_USE_PARALLELISM_CONFIG"),
        f"Accelerate {SHARDS}",
    ),
}


# ---- checking ----


def check_environment() -> None:
    """Check what `accelerate launch` asks for; `sharding.requested` hides FSDP from it.

    Raises:
        UsageError: For settings that a mixture cannot honour; it lists them.
    """
    _refuse(_of_environment())


def check_arguments(args: TrainingArguments, *, stock: bool = False) -> None:
    """Check every setting of a Trainer, and the environment.

    Args:
        stock: Whether it is not a `MoETrainer`.

    Raises:
        UsageError: For settings that a mixture cannot honour with this Trainer; it lists them.
    """
    _refuse(_of_environment() + _of_arguments(args, stock))


def check_trainer(trainer: Trainer) -> None:
    """Check the settings and the arguments of a `MoETrainer`.

    Raises:
        UsageError: For what it cannot honour, and if it would save nothing although it is asked to; it lists them.
    """
    problems = _problems(OF_MOE_TRAINER, lambda name: getattr(trainer, name))
    saves = any(hasattr(callback, "trainer_saves") for callback in trainer.callback_handler.callbacks)
    if saves != (trainer.args.save_strategy != "no"):
        problems.append(
            "save_strategy: nothing would be saved: it takes a PeftCheckpointCallback and a save_strategy that is not "
            '"no"; for a run without checkpoints, leave the callback out and use save_strategy="no"'
        )
    _refuse(_of_environment() + _of_arguments(trainer.args, stock=False) + problems)


def _of_environment() -> list[str]:
    return _problems(ENVIRONMENT, lambda name: os.environ.get(name, ""))


def _of_arguments(args: TrainingArguments, stock: bool) -> list[str]:
    table = WITH_EVERY_TRAINER | (WITH_A_STOCK_TRAINER if stock else WITH_MOE_TRAINER)
    return _problems(table, lambda name: getattr(args, name))


def _problems(table: Refused, value_of: Callable[[str], Any]) -> list[str]:
    problems = []
    for name, (is_honoured, remedy) in sorted(table.items()):
        value = value_of(name)
        value = getattr(value, "value", value)  # of an enumeration
        if not is_honoured(value):
            shown = f"{name}={value!r}" if isinstance(value, (str, int, float)) else name
            problems.append(f"{shown}: {remedy}")
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UsageError(f"a mixture cannot be trained with these settings:\n{listed(problems)}")


# ---- those of train.py ----


def training_arguments(settings: TrainSettings) -> TrainingArguments:
    """Return the settings as the Trainer takes them.

    Raises:
        UsageError: If the environment asks for what a mixture cannot honour.
    """
    check_environment()
    device = training_device(settings)
    on_cpu = device.type == "cpu"
    evaluates = settings.eval_steps > 0
    arguments = TrainingArguments(
        output_dir=settings.output_dir, seed=settings.seed, data_seed=settings.seed,
        max_steps=settings.max_steps or -1, num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum, remove_unused_columns=False, label_names=["labels"],
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=settings.warmup if settings.warmup < 1 else int(settings.warmup),
        eval_strategy="steps" if evaluates else "no", eval_steps=settings.eval_steps or None,
        metric_for_best_model="loss" if evaluates else None, greater_is_better=False if evaluates else None,
        save_strategy="steps", save_steps=settings.save_steps or sys.maxsize,
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.logging_steps, logging_first_step=True, logging_nan_inf_filter=False,
        report_to=settings.report_to, disable_tqdm=not sys.stderr.isatty(), log_level="error",
        use_cpu=on_cpu, dataloader_pin_memory=not on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None, 
        ddp_find_unused_parameters=settings.route == "specialised",  # a block trains one expert of several
    )  # fmt: skip
    if arguments.n_gpu > 1:  # one process uses one GPU: no DataParallel
        arguments._n_gpu = 1
    return arguments


def training_device(settings: TrainSettings) -> torch.device:
    """Return the device of --device; with several processes, each uses the GPU of its local rank."""
    device = resolve_device(settings.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index:
        raise UsageError(f"--device {device}: choose the GPU with CUDA_VISIBLE_DEVICES={device.index} --device cuda")
    return device
