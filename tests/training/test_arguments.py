"""Every setting of TrainingArguments, MoETrainer and Accelerate's environment: honoured, without effect, or refused.

A new setting of a later version of Transformers or Accelerate is in none of the tables: decide what becomes of it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from pathlib import Path

import accelerate
import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from transformers import Trainer, TrainingArguments

import train
from dylora_moe.errors import UsageError
from dylora_moe.training import arguments
from dylora_moe.training.trainer import MoETrainer

from ..support import runs
from .test_trainer import seeded_mixture, steps, trainer

# What honours a setting, or why it has no effect -> the settings.
HONOURED = {
    "Trainer, in its loop and in what it starts": """
        output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps max_grad_norm
        average_tokens_across_devices neftune_noise_alpha torch_empty_cache_steps ignore_data_skip debug
        skip_memory_metrics include_num_input_tokens_seen""",
    "Trainer.create_scheduler, with a LambdaLR": "lr_scheduler_type lr_scheduler_kwargs warmup_steps",
    "MoETrainer.create_optimizer": "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon optim",
    "Mixture.activation_checkpointing_enable": """
        activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
        gradient_checkpointing_kwargs""",
    "torch.compile of a mixture: test_a_compiled_mixture_trains_alike": """
        torch_compile torch_compile_backend torch_compile_mode""",
    "TrainingArguments itself, for the process": """
        tf32 full_determinism seed use_cpu ddp_backend ddp_timeout log_level log_level_replica accelerator_config""",
    "Trainer.log and the callbacks of Transformers": """
        logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter disable_tqdm report_to
        run_name project trackio_space_id trackio_bucket_id trackio_static_space_id""",
    "DefaultFlowCallback": "eval_strategy eval_steps eval_delay save_steps save_strategy",
    "MoETrainer.evaluate": "per_device_eval_batch_size eval_on_start",
    "PeftCheckpointCallback": "save_only_model save_total_limit metric_for_best_model greater_is_better",
    "MoETrainer._finalize_training": "load_best_model_at_end",
    "the data loader for training": """
        data_seed dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
        train_sampling_strategy length_column_name""",
    "DistributedDataParallel": """
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph""",
}
WITHOUT_EFFECT = {
    "a forward pass with labels never uses a cache": "use_cache",
    "MoETrainer's evaluation collects losses and no predictions; compute_metrics is refused": """
        prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
        batch_eval_metrics""",
    "read with a setting that is refused": """
        liger_kernel_config hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
        fsdp_config""",
    "for scripts; no Trainer reads it": "do_train do_eval do_predict resume_from_checkpoint local_rank",
    "a mixture takes its labels from `labels`": "label_names",
}
# A value of each setting that is refused with MoETrainer, and with a stock Trainer.
REFUSED = {
    "auto_find_batch_size": True, "bf16": True, "bf16_full_eval": True, "dataloader_in_order": False,
    "deepspeed": {"zero_optimization": {"stage": 2}}, "enable_jit_checkpoint": True, "fp16": True,
    "fp16_full_eval": True, "fsdp": True, "label_smoothing_factor": 0.1, "lr_scheduler_type": "reduce_lr_on_plateau",
    "optim": "adafactor", "optim_args": "rank=4", "optim_target_modules": ["q_proj"], "parallelism_config": object(),
    "push_to_hub": True, "restore_callback_states_from_checkpoint": True, "save_on_each_node": True,
    "save_strategy": "best", "train_sampling_strategy": "group_by_length", "use_liger_kernel": True,
}  # fmt: skip
REFUSED_BY_A_STOCK_TRAINER = {"load_best_model_at_end": True, "save_strategy": "steps"}


def names_in(table: dict[str, str]) -> set[str]:
    return {name for names in table.values() for name in names.split()}


@pytest.fixture(scope="module")
def plain() -> TrainingArguments:
    return TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", save_strategy="steps")


def changed(args: TrainingArguments, **values) -> TrainingArguments:
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


# ---- the tables ----


def test_every_field_has_been_decided_on():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    tables = names_in(HONOURED), names_in(WITHOUT_EFFECT), set(REFUSED)
    assert sorted(fields - set.union(*tables)) == []
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # of Transformers 5.23, not of 5.20
    assert sorted(set.union(*tables) - fields - newer) == []
    assert names_in(HONOURED) & names_in(WITHOUT_EFFECT) == set()


def test_every_refusal_has_a_case():
    of_fields = arguments.WITH_EVERY_TRAINER | arguments.WITH_MOE_TRAINER
    assert set(of_fields) - {"n_gpu", "accelerator_config"} == set(REFUSED)
    assert set(arguments.WITH_A_STOCK_TRAINER) == set(REFUSED_BY_A_STOCK_TRAINER)


def test_every_argument_of_the_trainer_has_been_decided_on():
    parameters = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    honoured = {"model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "callbacks"}
    refused = {*arguments.OF_MOE_TRAINER, "optimizers"} - {"optimizer", "lr_scheduler"}
    assert parameters == honoured | refused


def test_every_variable_of_accelerate_has_been_decided_on():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(accelerate.__file__).parent.rglob("*.py"))
    found = {name for name in re.findall(r"\bACCELERATE_[A-Z0-9_]*[A-Z0-9]\b", source)}
    belongs_to_a_refused_one = re.compile("ACCELERATE_(DEEPSPEED|DYNAMO|FP8|CONFIG_DS|ALLOW_CP|GRADIENT_CLIPPING)")
    where_it_runs = re.compile("ACCELERATE_(USE_CPU|TORCH_DEVICE|CPU_AFFINITY|NUM_PROCESSES|DOWNCAST_BF16|IN_TPU_POD)")
    not_of_training = re.compile(
        "ACCELERATE_(.*SAGEMAKER.*|DEBUG.*|ENABLE_RICH|INIT_INCLUDE_BUFFERS|BYPASS.*|LOG_LEVEL)"
    )
    decided = (belongs_to_a_refused_one, where_it_runs, not_of_training)
    assert len(found) > 20
    left = {name for name in found if name not in arguments.ENVIRONMENT and not any(p.match(name) for p in decided)}
    assert left == set()


# ---- refusing ----


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_is_refused_by_name(plain, name):
    arguments.check_arguments(plain)
    with pytest.raises(UsageError, match=rf"cannot be trained with these settings:\n  - {name}(=.*)?: .+$"):
        arguments.check_arguments(changed(plain, **{name: REFUSED[name]}))


@pytest.mark.parametrize("name", REFUSED_BY_A_STOCK_TRAINER)
def test_a_field_is_refused_by_name_with_a_stock_trainer(plain, name):
    stock = changed(plain, save_strategy="no")
    arguments.check_arguments(stock, stock=True)
    with pytest.raises(UsageError, match=rf"\n  - {name}=.*: .*dylora_moe.MoETrainer"):
        arguments.check_arguments(changed(stock, **{name: REFUSED_BY_A_STOCK_TRAINER[name]}), stock=True)


def test_all_are_named_together(plain):
    plain = changed(plain, label_smoothing_factor=0.1, optim="sgd", _n_gpu=2)
    config = copy.copy(plain.accelerator_config)
    config.use_seedable_sampler = False
    with pytest.raises(UsageError) as error:
        arguments.check_arguments(changed(plain, accelerator_config=config))
    names = [re.match(r"  - (\w+)", line)[1] for line in str(error.value).splitlines()[1:]]
    assert names == ["accelerator_config", "label_smoothing_factor", "n_gpu", "optim"]


def test_a_stock_trainer_has_its_own_optimizer(plain):
    stock = {"optim": "adafactor", "lr_scheduler_type": "reduce_lr_on_plateau", "save_strategy": "no"}
    arguments.check_arguments(changed(plain, **stock), stock=True)


@pytest.mark.parametrize("kind", [MoETrainer, Trainer])
def test_nothing_is_trained_with_a_setting_that_is_refused(tmp_path, kind):
    made = trainer(
        tmp_path / "run", kind, label_smoothing_factor=0.1, save_strategy="no" if kind is Trainer else "steps"
    )
    with pytest.raises(UsageError, match=r"label_smoothing_factor=0.1: .* label_smoothing="):
        made.train()
    assert made.state.global_step == 0
    assert steps(tmp_path / "run") == []


def test_arguments_that_would_have_no_effect_are_refused(tmp_path):
    made = trainer(tmp_path / "run")
    made.compute_metrics = made.compute_loss_func = made.preprocess_logits_for_metrics = print
    made.optimizer_cls_and_kwargs, made.model_init = (torch.optim.SGD, {}), seeded_mixture
    made.optimizer = torch.optim.AdamW(made.mixture.trained_parameters().values())
    made.lr_scheduler = StepLR(made.optimizer, 1)
    made.eval_dataset = {"a": iter(())}
    with pytest.raises(UsageError) as error:
        made.train()
    names = [re.match(r"  - (\w+)", line)[1] for line in str(error.value).splitlines()[1:]]
    assert names == sorted(arguments.OF_MOE_TRAINER)


def test_an_optimizer_with_names_is_resumed(tmp_path):
    """The one that the refusal advises."""
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        mixture = seeded_mixture()
        optimizer = torch.optim.RAdam(list(mixture.trained_parameters().items()), lr=1e-2)
        made = trainer(
            tmp_path / ("other" if resume else "run"), mixture=mixture, optimizers=(optimizer, None), max_steps=4
        )
        made.train(resume)
    for step in (tmp_path / "run/checkpoint-4", tmp_path / "other/checkpoint-4"):
        assert (step / "optimizer.pt").is_file()
    assert (tmp_path / "run/checkpoint-4/optimizer.pt").read_bytes() == (
        tmp_path / "other/checkpoint-4/optimizer.pt"
    ).read_bytes()


def test_a_save_that_would_never_be_made_is_refused(tmp_path):
    for callbacks, strategy in (([], "steps"), (None, "no")):
        with pytest.raises(UsageError, match="save_strategy: nothing would be saved"):
            trainer(tmp_path / "run", callbacks=callbacks, save_strategy=strategy).train()
    trainer(tmp_path / "run", callbacks=[], save_strategy="no", max_steps=1).train()


def test_another_model_than_a_mixture_is_refused(tmp_path):
    made = trainer(tmp_path / "run", Trainer, save_strategy="no")
    made.model = made.model_wrapped = made.model.peft_model
    with pytest.raises(
        UsageError, match="PeftCheckpointCallback saves a DyLoRAMoE, the Trainer has a PeftModelForCausalLM"
    ):
        made.train()


# ---- the environment ----

IN_THE_ENVIRONMENT = {
    "ACCELERATE_DYNAMO_BACKEND": "inductor", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
}  # fmt: skip


@pytest.mark.parametrize("name", arguments.ENVIRONMENT)
def test_a_variable_is_refused_by_name(plain, monkeypatch, name):
    monkeypatch.setenv(name, IN_THE_ENVIRONMENT[name])
    for stock in (False, True):
        with pytest.raises(UsageError, match=rf"\n  - {name}='{IN_THE_ENVIRONMENT[name]}': .+$"):
            arguments.check_arguments(changed(plain, save_strategy="no"), stock=stock)


def test_what_accelerate_launch_sets_by_itself_is_honoured(plain, monkeypatch):
    launched = {"DYNAMO_BACKEND": "NO", "MIXED_PRECISION": "no", "USE_CPU": "True", "DYNAMO_MODE": "default"}
    for name, value in launched.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    arguments.check_arguments(plain)


@pytest.mark.parametrize("name", ["ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED"])
def test_row_43_train_py_refuses_it_before_anything_is_made(tmp_path, capsys, monkeypatch, name):
    words = runs.arguments(tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setenv(name, IN_THE_ENVIRONMENT[name])
    assert train.main(words) == 2
    assert f"  - {name}='{IN_THE_ENVIRONMENT[name]}': " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- honouring ----


def losses(made: Trainer) -> list[float]:
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_gradient_checkpointing_and_neftune_are_honoured(tmp_path):
    settings = {"max_steps": 2, "logging_steps": 1}
    expected = losses(trainer(tmp_path / "plain", **settings))
    made = trainer(tmp_path / "checkpointed", gradient_checkpointing=True, **settings)
    assert losses(made) == expected
    assert made.mixture.is_activation_checkpointing
    noisy = trainer(tmp_path / "noisy", neftune_noise_alpha=5.0, **settings)
    assert losses(noisy)[0] != expected[0]
    assert not noisy.mixture.get_input_embeddings()._forward_hooks
    with pytest.raises(UsageError, match="use_reentrant=False"):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        trainer(tmp_path / "reentrant", **options, **settings).train()


@pytest.mark.slow
def test_a_compiled_mixture_trains_alike(tmp_path):
    settings = {"max_steps": 3, "logging_steps": 1}
    expected = losses(trainer(tmp_path / "plain", **settings))
    assert losses(trainer(tmp_path / "compiled", torch_compile_backend="aot_eager", **settings)) == pytest.approx(
        expected, abs=1e-5
    )


def test_save_only_model_saves_no_training_state(tmp_path):
    trainer(tmp_path / "run", save_only_model=True, max_steps=2).train()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"router.safetensors", "manifest.json"} <= names
    assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} & names


def test_save_steps_may_be_a_part_of_all_steps(tmp_path):
    for name, kind, strategy in (("ours", MoETrainer, "steps"), ("stock", Trainer, "no")):
        trainer(tmp_path / name, kind, save_strategy=strategy, save_steps=0.5, max_steps=4).train()
        assert steps(tmp_path / name) == [2, 4]


def test_a_checkpoint_of_each_epoch_and_the_last_one_mature(tmp_path):
    trainer(tmp_path / "run", save_strategy="epoch", max_steps=-1, num_train_epochs=2).train()
    assert steps(tmp_path / "run") == [2, 4]
    assert runs.states(runs.newest(tmp_path / "run")) == ["mature", "mature"]
