"""The Trainer of a mixture, and the checkpoint callback in a stock Trainer."""

from __future__ import annotations

import random
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import train
from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import seeded
from dylora_moe.errors import CheckpointError, UsageError
from dylora_moe.stages.batches import BlockCollator
from dylora_moe.system.interrupts import Interrupted
from dylora_moe.training.callbacks import EarlyStopping, EvaluationStopped, StopSignals, log_line
from dylora_moe.training.trainer import MoETrainer
from train import PeftCheckpointCallback

from ..support.runs import arguments, assert_same, contents, newest, states, steps
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


def test_a_stock_trainer_would_add_files_to_the_checkpoints(tmp_path):
    with pytest.raises(UsageError, match="would add files to every checkpoint, which its manifest does not list"):
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
    some = [(name, tensor) for name, tensor in mixture.trained_parameters().items() if "expert_1" not in name]
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
    with pytest.raises(UsageError, match=r"nothing was saved: .*mine is a checkpoint already"):
        made.save_model(str(tmp_path / "mine"))


def test_columns_that_training_leaves_out_are_left_out_of_evaluations_too(tmp_path):
    made = trainer(tmp_path / "run")
    made.args.remove_unused_columns = True
    expected = made.evaluate()
    made.eval_dataset = {
        name: Dataset.from_list([row | {"text": "x", "source_id": 3} for row in some])
        for name, some in made.eval_dataset.items()
    }
    collate = made.data_collator

    def strict(some: list[dict]) -> dict:
        assert all(row.keys() == {"input_ids", "labels", "position_ids"} for row in some)
        return collate(some)

    made.data_collator = strict
    assert made.evaluate() == pytest.approx(expected, abs=1e-6)


def test_a_run_that_trained_some_experts_is_resumed_with_the_same_choice(tmp_path):
    def made(*experts: int) -> MoETrainer:
        mixture = seeded_mixture()
        mixture.train_only(experts or range(2))
        return trainer(tmp_path / "run", mixture=mixture, max_steps=4)

    made(1).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(CheckpointError, match="which the run did not train: choose what it did with train_only"):
        made().train(resume_from_checkpoint=True)
    made(1).train(resume_from_checkpoint=True)
    assert steps(tmp_path / "run") == [2, 4]


# ---- where a run begins ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainer(folder).train()
    assert steps(folder) == [2, 4, 5]
    return folder


@pytest.mark.parametrize(
    ("kind", "settings", "remedy"),
    [
        (MoETrainer, {}, "resume_from_checkpoint=True"),
        (MoETrainer, {"save_total_limit": 1}, "resume_from_checkpoint=True"),
        (Trainer, {"save_strategy": "no"}, "dylora_moe.MoETrainer, which resumes runs"),
    ],
)
def test_row_45_a_second_run_into_a_used_folder_is_refused(trained, tmp_path, kind, settings, remedy):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    before = contents(run_dir)
    mixture = seeded_mixture()
    begin = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    text = rf"run already holds checkpoints \(newest: checkpoint-5\); go on with {remedy}, or start .* output_dir"
    with pytest.raises(UsageError, match=text):
        trainer(run_dir, kind, mixture=mixture, max_steps=3, **settings).train()
    (run_dir / "checkpoint-5" / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(UsageError, match=r"newest: checkpoint-4"):
        trainer(run_dir, kind, mixture=mixture, max_steps=3, **settings).train()
    (tmp_path / "manifest.json").rename(run_dir / "checkpoint-5" / "manifest.json")
    assert contents(run_dir) == before
    assert all(torch.equal(begin[name], tensor) for name, tensor in mixture.state_dict().items())


def test_going_on_from_python(trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(
        UsageError, match=r"resume_from_checkpoint=.*checkpoint-2: .*holds newer checkpoints \(checkpoint-4"
    ):
        trainer(run_dir).train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    with pytest.raises(UsageError, match="nowhere: expected a checkpoint folder, found nothing"):
        trainer(run_dir).train(resume_from_checkpoint=str(run_dir / "nowhere"))
    with pytest.raises(UsageError, match=r"there is no checkpoint in .* to go on from"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    (run_dir / "checkpoint-5" / "manifest.json").unlink()
    made = trainer(run_dir)
    with pytest.warns(UserWarning, match="passed over .*checkpoint-5: manifest.json"):
        made.train(resume_from_checkpoint=True)
    assert_same(trained / "checkpoint-5", run_dir / "checkpoint-5")
    assert (run_dir / "checkpoint-5.incomplete").is_dir()
    made = trainer(tmp_path / "elsewhere")
    made.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    assert_same(trained / "checkpoint-5", tmp_path / "elsewhere" / "checkpoint-5")
    with pytest.raises(UsageError, match="holds checkpoints of its own"):
        trainer(tmp_path / "elsewhere").train(resume_from_checkpoint=str(trained / "checkpoint-4"))


class SetsEverything(TrainerCallback):
    """What an integration may do, and a user who takes notes."""

    def __init__(self, best: Path, notes: Path):
        self.best, self.notes = str(best), notes

    def on_step_end(self, args, state, control, **kwargs):
        state.best_model_checkpoint = self.best
        self.notes.write_text("mine")

    def on_save(self, args, state, control, **kwargs):
        state.best_model_checkpoint = self.best


def test_row_40_only_our_rotation_deletes(trained, tmp_path):
    run_dir = shutil.copytree(
        trained, tmp_path / "run", ignore=lambda _, names: {"checkpoint-5", "checkpoint-4"} & {*names}
    )
    for name in ("checkpoint-5.bak", "checkpoint-7"):  # the latter is incomplete
        (run_dir / name).mkdir()
    callbacks = [SetsEverything(trained, run_dir / "checkpoint-2" / "notes.txt"), PeftCheckpointCallback()]
    with pytest.warns(UserWarning, match="passed over .*checkpoint-7"):
        trainer(run_dir, callbacks=callbacks, save_total_limit=1).train(resume_from_checkpoint=True)
    left = {path.name for path in run_dir.iterdir() if path.is_dir()}
    assert left == {"checkpoint-2", "checkpoint-5", "checkpoint-5.bak", "checkpoint-7"}


def test_a_step_that_was_saved_already_is_said(tmp_path):
    callback, made = PeftCheckpointCallback(), trainer(tmp_path / "run", max_steps=2)
    callback.on_save(made.args, made.state, made.control, model=made.mixture)
    with pytest.warns(UserWarning, match="checkpoint-0 has been saved at this step already"):
        callback.on_save(made.args, made.state, made.control, model=made.mixture)
    with pytest.raises(UsageError, match=r"nothing was saved: .*checkpoint-0 is a checkpoint already"):
        PeftCheckpointCallback().on_save(made.args, made.state, made.control, model=made.mixture)


def test_the_best_model_of_another_folder_is_not_loaded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(MoETrainer, "_evaluate_one", lambda self, rows: (float(self.state.global_step), None))
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    trainer(tmp_path / "run", **settings).train()
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    made = trainer(tmp_path / "other", max_steps=7, **settings)
    with pytest.warns(UserWarning, match="best model, of step 2, is not in .*other; that of step 6 is loaded"):
        made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))


# ---- speed ----


def test_evaluations_do_not_count_as_steps(tmp_path):
    made = trainer(tmp_path / "run")
    made.evaluate()
    assert made._evaluation_seconds > 0
    made._evaluation_seconds, made._total_loss_scalar = 3.0, 5.0
    logs = {"train_loss": 1.0, "train_runtime": 4.0, "train_steps_per_second": 1.0, "train_samples_per_second": 8.0}
    made.log(logs)
    assert (logs["train_runtime"], logs["train_steps_per_second"], logs["train_samples_per_second"]) == (4, 4, 32)


# ---- signals ----


def test_handlers_are_there_inside_only():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(print) as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert signal.getsignal(signal.SIGTERM) == before


def test_early_stopping_counts_from_the_branch_on():
    early = EarlyStopping(1, after=5)
    args = TrainingArguments("unused", eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", use_cpu=True)
    for step, stops in ((4, False), (5, True)):
        control = TrainerControl()
        state = TrainerState(global_step=step, best_metric=1.0)
        early.on_evaluate(args, state, control, {"eval_loss": 2.0})
        assert (control.should_training_stop, early.stopped) == (stops, stops)


def test_which_evaluations_are_cut_short():
    """Not one whose outcome decides whether the run ends, and none outside of training."""
    early = EarlyStopping(2)
    args = SimpleNamespace(device="cpu")

    def evaluated_at(step: int, stop: StopSignals) -> TrainerControl:
        control = TrainerControl()
        stop.on_prediction_step(args, TrainerState(global_step=step), control)
        return control

    with StopSignals(lambda line: None, early) as stop:
        evaluated_at(3, stop)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="terminated"):
            evaluated_at(0, stop)  # before the first step
        early.early_stopping_patience_counter = 1
        assert not evaluated_at(3, stop).should_training_stop
        early.early_stopping_patience_counter = 0
        with pytest.raises(EvaluationStopped):
            evaluated_at(3, stop)
        assert stop.received == signal.SIGTERM
        assert stop.ended_early()
        early.stopped = True
        assert not stop.ended_early()
    evaluated_at(3, stop)


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
    assert "| 0/2 [" in err  # a batch of each data set
    assert err.endswith("\r")  # that of the evaluation at the end is gone again
    assert "step  5/12  loss" in out
