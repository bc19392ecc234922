"""The Trainer of a mixture, and the checkpoint callback in a stock Trainer."""

from __future__ import annotations

import random
import signal
import threading

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import train
from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import seeded
from dylora_moe.errors import UsageError
from dylora_moe.training.batches import BlockCollator
from dylora_moe.training.callbacks import StopSignals, log_line
from dylora_moe.training.trainer import MoETrainer
from train import PeftCheckpointCallback

from ..support.runs import arguments, newest, states, steps
from ..support.tiny import random_ids, tiny_base


def rows(number: int = 8, seed: int = 0) -> list[dict]:
    ids = random_ids(number, 16, seed=seed).tolist()
    return [{"input_ids": row, "labels": row, "position_ids": list(range(16))} for row in ids]


def seeded_mixture() -> DyLoRAMoE:
    with seeded(0):
        return DyLoRAMoE(tiny_base(), 2)


def trainer(folder, kind=MoETrainer, callbacks=None, optimizers=(None, None), mixture=None, **settings) -> Trainer:
    options = {"max_steps": 5, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4} | settings
    quiet = {"use_cpu": True, "remove_unused_columns": False, "label_names": ["labels"], "report_to": "none"}
    return kind(
        model=mixture or seeded_mixture(),
        args=TrainingArguments(output_dir=str(folder), **quiet, **options),
        train_dataset=rows(),
        eval_dataset={"a": rows(seed=1), "b": rows(seed=2)},
        data_collator=BlockCollator(),
        callbacks=[PeftCheckpointCallback()] if callbacks is None else callbacks,
        optimizers=optimizers,
    )


# ---- the callback in a stock Trainer ----


def test_a_stock_trainer_would_write_the_merged_model(tmp_path):
    with pytest.raises(UsageError, match="would write the merged model into every checkpoint"):
        trainer(tmp_path / "run", Trainer).train()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_the_callback_saves_by_itself_in_a_stock_trainer(tmp_path):
    trainer(tmp_path / "run", Trainer, save_strategy="no", save_total_limit=2).train()
    assert steps(tmp_path / "run") == [4, 5]
    assert states(tmp_path / "run" / "checkpoint-4") == ["immature", "immature"]
    assert states(newest(tmp_path / "run")) == ["mature", "mature"]
    mixture = DyLoRAMoE.from_checkpoint(newest(tmp_path / "run"), base=tiny_base())
    assert mixture.expert_states == ["mature", "mature"]
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"checkpoint-4", "checkpoint-5"}


def test_its_last_step_is_saved_once_and_mature(tmp_path):
    trainer(tmp_path / "run", Trainer, save_strategy="no", max_steps=4).train()
    assert steps(tmp_path / "run") == [2, 4]
    assert states(newest(tmp_path / "run")) == ["mature", "mature"]


# ---- what must train, trains ----


def test_an_optimizer_without_an_expert_is_refused(tmp_path):
    mixture = DyLoRAMoE(tiny_base(), 2)
    some = [tensor for name, tensor in mixture.trained_parameters().items() if "expert_1" not in name]
    with pytest.raises(UsageError, match="expert_1 has parameters that the optimizer does not hold"):
        trainer(tmp_path / "run", optimizers=(torch.optim.AdamW(some), None), mixture=mixture).train()
    assert steps(tmp_path / "run") == []


def test_experts_that_peft_froze_train_again(tmp_path):
    mixture = DyLoRAMoE(tiny_base(), 2)
    mixture.peft_model.set_adapter("expert_1")
    before = {name: tensor.detach().clone() for name, tensor in mixture.named_parameters()}
    made = trainer(tmp_path / "run", mixture=mixture)
    made.train()
    moved = {name for name, tensor in mixture.named_parameters() if not torch.equal(before[name], tensor)}
    assert moved == set(mixture.trained_parameters())
    names = {name for group in made.optimizer.param_groups for name in group["param_names"]}
    assert names == moved


# ---- evaluation ----


def test_evaluation_leaves_everything_as_found(tmp_path):
    made = trainer(tmp_path / "run")
    made.mixture.train()
    made.mixture.reset_usage()
    generators = [lambda: torch.rand(3).tolist(), lambda: random.random(), lambda: float(np.random.rand())]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    expected = [draw() for draw in generators]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    metrics = made.evaluate()
    assert [draw() for draw in generators] == expected
    assert made.mixture.training
    assert made.mixture.usage().total.tolist() == [0, 0]
    assert metrics["eval_loss"] == pytest.approx((metrics["eval_a_loss"] + metrics["eval_b_loss"]) / 2)


def test_the_loss_of_a_data_set_is_per_token(tmp_path):
    """Not the mean over batches, of which some have fewer labels."""
    made = trainer(tmp_path / "run", per_device_eval_batch_size=3)
    uneven = rows()
    for row in uneven[:3]:
        row["labels"] = [-100] * 12 + row["labels"][12:]
    found = made.evaluate({"uneven": uneven})["eval_uneven_loss"]
    whole = made.mixture.eval()(**BlockCollator()(uneven))
    assert found == pytest.approx(whole.lm_loss.item(), rel=1e-5)


def test_the_best_model_is_loaded_and_the_last_one_stays(tmp_path, monkeypatch):
    losses = {2: 1.0, 4: 2.0}
    monkeypatch.setattr(MoETrainer, "_evaluate_one", lambda self, rows: (losses[self.state.global_step], None))
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    made = trainer(
        tmp_path / "run", eval_strategy="steps", eval_steps=2, save_total_limit=1, max_steps=4, **settings
    )  # fmt: skip
    made.train()
    assert made.state.best_global_step == 2
    assert steps(tmp_path / "run") == [2, 4]
    best = DyLoRAMoE.from_checkpoint(tmp_path / "run" / "checkpoint-2", base=tiny_base())
    for name, tensor in best.trained_parameters().items():
        assert torch.equal(tensor, made.mixture.trained_parameters()[name])


def test_save_model_is_a_checkpoint(tmp_path):
    made = trainer(tmp_path / "run")
    made.save_model(str(tmp_path / "mine"))
    assert DyLoRAMoE.from_checkpoint(tmp_path / "mine", base=tiny_base()).num_experts == 2


# ---- signals ----


def test_handlers_are_there_inside_only():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(print) as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_trainer_in_a_thread_has_no_handlers():
    failures = []

    def enter():
        try:
            with StopSignals(print):
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == []


# ---- lines ----


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            {"loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.25, "balance": 1.5, "usage/expert_0": 0.25,
             "usage/expert_1": 0.75, "epoch": 0.1},
            "step  7/12  loss 2.0000  lr 1.00e-04  grad 0.25  balance 1.500  usage 25/75 %",
        ),
        (
            {"eval_a_loss": 1.0, "eval_loss_loss": 3.0, "eval_loss": 2.0, "epoch": 0.1},
            "step  7/12  held out: a 1.0000, loss 3.0000, mean 2.0000",
        ),
        (
            {"train_loss": 2.5, "train_runtime": 3.0, "train_steps_per_second": 4.0},
            "step  7/12  mean training loss 2.5000, 3.0 s, 4 steps/s without evaluations",
        ),
        ({"final_a_loss": 1.0, "final_loss": 1.0}, None),
    ],
)  # fmt: skip
def test_log_line(logs, line):
    assert log_line(logs, 7, 12) == line


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert train.main(arguments(tmp_path / "run", "--eval-steps", "6")) == 0
    out, err = capsys.readouterr()
    assert "12/12" in err
    assert "step  5/12  loss" in out
