"""A run that was stopped and resumed is the run that was never stopped: byte for byte, wherever it was stopped."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import train
from dylora_moe.base.preserve import seeded
from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.checkpoint.write import save_checkpoint, write_files
from dylora_moe.reporting.results import read_results
from dylora_moe.store.publish import seal
from dylora_moe.training import run as run_module
from dylora_moe.training.prepare import load_model
from dylora_moe.training.trainer import MoETrainer

from ..support.faults import full_disk
from ..support.hub_folders import in_hub_cache
from ..support.runs import (
    UNMEASURED,
    arguments,
    assert_same,
    contents,
    material,
    newest,
    signal_at,
    states,
    steps,
    trainer_state,
)

ROOT = Path(__file__).parents[2]
PLAIN = ()
JOINT = ("--route", "joint")
ACCUMULATED = ("--batch-size", "4", "--grad-accum", "3")  # 4 steps an epoch, the last of one micro-batch
EVALUATED = ("--eval-steps", "3", "--label-smoothing", "0.1", "--top-k", "1", "--experts", "3")
STOPPING = (*JOINT, "--eval-steps", "2", "--early-stopping", "2")
LOSSES = {0: 1.5, 2: 4.0, 4: 4.5, 6: 4.6, 8: 3.0, 10: 2.0, 12: 1.0}  # with STOPPING the run ends at 6


@functools.cache
def uninterrupted(*flags: str) -> Path:
    """The run folder of a run that was never stopped."""
    folder = Path(tempfile.mkdtemp(dir=material()))
    assert train.main(arguments(folder / "run", *flags)) == 0
    return folder / "run"


def scripted_losses(monkeypatch) -> None:
    """Evaluation finds what LOSSES says."""
    monkeypatch.setattr(MoETrainer, "_evaluate_one", lambda self, rows: (LOSSES[self.state.global_step], None))


def stop_and_resume(run_dir: Path, *flags: str, code: int = 143) -> None:
    assert train.main(arguments(run_dir, *flags)) == code
    assert train.main(arguments(run_dir, *flags, "--resume")) == 0


@pytest.fixture(autouse=True)
def handlers():
    """A script on its way out leaves its handlers; the tests go on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- stopped by a signal ----


@pytest.mark.parametrize(
    ("flags", "event", "after", "saved"),
    [
        pytest.param(PLAIN, "on_step_begin", 0, 1, id="first step"),
        pytest.param(PLAIN, "on_step_begin", 6, 7, id="mid-epoch", marks=pytest.mark.slow),
        pytest.param(PLAIN, "on_step_begin", 4, 5, id="end of an epoch"),
        pytest.param(JOINT, "on_epoch_begin", 5, 6, id="begin of an epoch"),
        pytest.param(PLAIN, "on_step_begin", 3, 4, id="at a save"),
        pytest.param(PLAIN, "on_step_begin", 10, 11, id="one before the end", marks=pytest.mark.slow),
        pytest.param(ACCUMULATED, "on_substep_end", 4, 5, id="within accumulation"),
        pytest.param(ACCUMULATED, "on_step_begin", 7, 8, id="end of an epoch, accumulated", marks=pytest.mark.slow),
        pytest.param(EVALUATED, "on_step_begin", 4, 5, id="between evaluations", marks=pytest.mark.slow),
        pytest.param(EVALUATED, "on_step_begin", 5, 6, id="after a new best"),
        pytest.param(EVALUATED, "on_prediction_step", 6, 6, id="during an evaluation"),
    ],
)
def test_stopped_and_resumed_is_uninterrupted(monkeypatch, tmp_path, capsys, flags, event, after, saved):
    whole = uninterrupted(*flags)
    with monkeypatch.context() as patch:
        signal_at(patch, event, after)
        assert train.main(arguments(tmp_path / "run", *flags)) == 143
    assert steps(tmp_path / "run")[-1] == saved
    assert set(states(newest(tmp_path / "run"))) <= {"immature", "new"}
    out = capsys.readouterr().out
    assert f"stopped by SIGTERM at step {saved}; saved {tmp_path / 'run'}/checkpoint-{saved}" in out
    assert "go on with: python train.py" in out
    assert train.main(arguments(tmp_path / "run", *flags, "--resume")) == 0
    assert steps(tmp_path / "run") == sorted({4, 8, 12, saved})
    for step in steps(whole):
        if step != saved:
            assert_same(whole / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    assert states(newest(tmp_path / "run")) == states(newest(whole)) == ["mature"] * len(states(newest(whole)))
    resumed = capsys.readouterr().out
    assert f"resuming from {tmp_path / 'run'}/checkpoint-{saved}" in resumed


def test_the_stop_checkpoint_is_that_of_the_run(monkeypatch, tmp_path):
    """A stop where the run saves anyway changes nothing in what is saved but that a stop was asked for."""
    whole = uninterrupted()
    signal_at(monkeypatch, "on_step_begin", 3)
    train.main(arguments(tmp_path / "run"))
    one, other = whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "router.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_base_whose_documents_have_a_block_each(monkeypatch, tmp_path, capsys):
    """Training, evaluation, the fingerprint of the data, and the resumption of a run that pads."""
    tokenizer = byte_tokenizer()
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with seeded(0):
        OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = ("--model", str(tmp_path / "base"), "--eval-steps", "4", "--block-size", "64", "--max-steps", "8")
    assert train.main(arguments(tmp_path / "whole", *flags)) == 0
    out = capsys.readouterr().out
    said = (
        "OPTForCausalLM (opt, attention sdpa) lets documents of one block see each other: each document has a block of "
    )
    assert re.search(re.escape(said) + r"its own, and \d+ % of the blocks is padding\n", out)
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 5)
        assert train.main(arguments(tmp_path / "run", *flags)) == 143
    assert train.main(arguments(tmp_path / "run", *flags, "--resume")) == 0
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "run"))
    with monkeypatch.context() as patch:  # as if a later version of Transformers kept them apart
        patch.setattr("dylora_moe.training.prepare.why_not_packed", lambda model: None)
        more = ("--resume", "--max-steps", "12")
        assert train.main(arguments(tmp_path / "run", *flags, *more)) == 2
    err = capsys.readouterr().err
    assert "data: what " in err and "has changed" in err


def test_ctrl_c_exits_130(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 6, signal.SIGINT)
        assert train.main(arguments(tmp_path / "run")) == 130
    out = capsys.readouterr()
    assert "stopped by SIGINT at step 7" in out.out
    assert "SIGINT: saving at the end of this step; once more stops at once" in out.err
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    assert_same(newest(uninterrupted()), newest(tmp_path / "run"))


def test_a_second_ctrl_c_stops_at_once(monkeypatch, tmp_path):
    def send_twice(self, args, state, control, **kwargs):
        if state.global_step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second signal was not heard")

    monkeypatch.setattr(train.PeftCheckpointCallback, "on_step_begin", send_twice)
    assert train.main(arguments(tmp_path / "run")) == 130
    assert steps(tmp_path / "run") == [4]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_leaves_nothing(monkeypatch, tmp_path, capsys, number, code):
    monkeypatch.setattr("dylora_moe.training.prepare.load_model", lambda *_: signal.raise_signal(number))
    assert train.main(arguments(tmp_path / "run")) == code
    assert list(tmp_path.iterdir()) == []
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_stopped_twice(monkeypatch, tmp_path):
    for after in (1, 8):
        with monkeypatch.context() as patch:
            signal_at(patch, "on_step_begin", after)
            resume = ["--resume"] if after > 1 else []
            assert train.main(arguments(tmp_path / "run", *resume)) == 143
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    assert_same(newest(uninterrupted()), newest(tmp_path / "run"))


def test_a_signal_in_the_last_step_does_not_spoil_the_end(monkeypatch, tmp_path, capsys):
    whole = newest(uninterrupted())
    capsys.readouterr()
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 11)
        assert train.main(arguments(tmp_path / "run")) == 143
    assert_same(whole, newest(tmp_path / "run"), but=UNMEASURED)
    assert "held-out loss" not in capsys.readouterr().out  # the evaluation at the end is not waited for
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    out = capsys.readouterr().out
    assert "there is nothing left to train" in out
    assert "held-out loss" in out


@pytest.mark.parametrize(
    ("step", "expected"), [pytest.param(6, ["immature", "new"], marks=pytest.mark.slow), (12, ["mature"] * 2)]
)  # 6: of the trunk
def test_an_evaluation_is_cut_short_and_made_again(monkeypatch, tmp_path, capsys, step, expected):
    line = rf"^step +{step}/12  held out: one .*, two "
    run_dir, flags = tmp_path / "run", ("--eval-steps", "6", "--batch-size", "1")
    with monkeypatch.context() as patch:
        signal_at(patch, "on_prediction_step", step)
        assert train.main(arguments(run_dir, *flags)) == 143
    assert (newest(run_dir).name, states(newest(run_dir))) == (f"checkpoint-{step}", expected)
    out = capsys.readouterr().out
    assert f"stopped by SIGTERM at step {step}; saved {newest(run_dir)}" in out
    assert re.search(line, out, re.MULTILINE) is None
    assert train.main(arguments(run_dir, *flags, "--resume")) == 0
    lines = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == (1 if step < 12 else 0)  # a run that has ended shows its table only
    evaluated = [entry["step"] for entry in trainer_state(newest(run_dir))["log_history"] if "eval_loss" in entry]
    assert evaluated == ([0, 6, 12] if step < 12 else [0, 6])


def test_a_signal_in_the_evaluation_at_the_start_leaves_nothing(monkeypatch, tmp_path, capsys):
    signal_at(monkeypatch, "on_prediction_step", 0)
    assert train.main(arguments(tmp_path / "run")) == 143
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: terminated"


def test_a_signal_during_a_save_stops_behind_it(monkeypatch, tmp_path):
    def save(target, *args, **kwargs):
        if target.name == "checkpoint-8":
            signal.raise_signal(signal.SIGTERM)
        return save_checkpoint(target, *args, **kwargs)

    monkeypatch.setattr("dylora_moe.training.checkpoint_callback.save_checkpoint", save)
    assert train.main(arguments(tmp_path / "run")) == 143
    assert steps(tmp_path / "run") == [4, 8]
    assert_same(uninterrupted() / "checkpoint-8", newest(tmp_path / "run"))


# ---- early stopping ----


@pytest.fixture
def stopped_early(monkeypatch, tmp_path_factory) -> Path:
    scripted_losses(monkeypatch)
    run_dir = tmp_path_factory.mktemp("early") / "run"
    assert train.main(arguments(run_dir, *STOPPING)) == 0
    return run_dir


def test_early_stopping_saves_its_end_once_and_mature(stopped_early):
    assert steps(stopped_early) == [4, 6]
    assert states(newest(stopped_early)) == ["mature", "mature"]
    assert states(stopped_early / "checkpoint-4") == ["immature", "immature"]


def test_a_signal_does_not_wait_for_the_last_measurements(tmp_path, capsys, monkeypatch):
    real, measured = run_module.set_losses, []

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        measured.append(real(*args))
        return measured[-1]

    words = arguments(tmp_path / "run", steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "set_losses", interrupted)
        assert train.main(words) == 143
    assert measured == [{}] and states(tmp_path / "run" / "checkpoint-4") == ["mature"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "held_out_results", lambda trainer: signal.raise_signal(signal.SIGINT))
        assert train.main([*words, "--resume"]) == 130
    assert "its results are not complete: the same command with --resume measures them" in capsys.readouterr().out
    assert train.main([*words, "--resume"]) == 0
    assert read_results(tmp_path / "run").stages[0].evaluation.keys() == {"one", "two"}


@pytest.mark.parametrize(("event", "after"), [("on_step_begin", 2), ("on_step_begin", 4)])
def test_early_stopping_counts_on(monkeypatch, tmp_path, stopped_early, event, after):
    with monkeypatch.context() as patch:
        signal_at(patch, event, after)
        assert train.main(arguments(tmp_path / "run", *STOPPING)) == 143
    assert train.main(arguments(tmp_path / "run", *STOPPING, "--resume")) == 0
    assert_same(newest(stopped_early), newest(tmp_path / "run"))
    assert newest(tmp_path / "run").name == "checkpoint-6"


def test_a_signal_in_the_step_that_stops_early_anyway(monkeypatch, tmp_path, stopped_early):
    signal_at(monkeypatch, "on_step_begin", 5)
    assert train.main(arguments(tmp_path / "run", *STOPPING)) == 143
    assert_same(newest(stopped_early), newest(tmp_path / "run"), but=UNMEASURED)


def test_a_run_that_stopped_early_has_ended(stopped_early, capsys):
    assert train.main(arguments(stopped_early, *STOPPING, "--resume")) == 0
    assert "a run that has ended: there is nothing left to train" in capsys.readouterr().out
    assert steps(stopped_early) == [4, 6]


# ---- the end ----


def test_a_finished_run_is_not_trained_on(tmp_path, capsys):
    run_dir = shutil.copytree(uninterrupted(), tmp_path / "run")
    before = newest(run_dir).stat().st_mtime_ns
    assert train.main(arguments(run_dir, "--resume")) == 0
    out = capsys.readouterr().out
    assert "checkpoint-12 is the last checkpoint of a run that has ended: there is nothing left to train" in out
    assert "held-out loss" in out
    assert re.search(r"^one +\d\.\d{4} +\d\.\d{4} ", out, re.MULTILINE)  # before and after
    assert (steps(run_dir), newest(run_dir).stat().st_mtime_ns) == ([4, 8, 12], before)


def test_a_finished_run_goes_on_with_more_steps(tmp_path, capsys):
    run_dir = shutil.copytree(uninterrupted(), tmp_path / "run")
    more = ["--resume", "--max-steps", "18"]
    assert train.main(arguments(run_dir, *more)) == 2
    assert "max_steps: 12 there, 18 here" in capsys.readouterr().err
    assert train.main(arguments(run_dir, *more, "--accept-changes")) == 0
    assert steps(run_dir) == [4, 8, 12, 16, 18]
    assert states(newest(run_dir)) == ["mature", "mature"]
    assert states(run_dir / "checkpoint-16") == ["immature", "immature"]


def test_fewer_steps_than_are_done(tmp_path, capsys):
    run_dir = shutil.copytree(uninterrupted(), tmp_path / "run")
    assert train.main(arguments(run_dir, "--resume", "--max-steps", "10", "--accept-changes")) == 2
    assert "there is nothing left to train: step 12 of 10 is reached" in capsys.readouterr().err


@pytest.mark.parametrize(("epochs", "last"), [pytest.param("2", 10, marks=pytest.mark.slow), ("1.5", 8)])
def test_epochs_end_with_one_mature_checkpoint(monkeypatch, tmp_path, epochs, last):
    def flags(run_dir, *more):
        words = arguments(run_dir, "--epochs", epochs, *more)
        at = words.index("--max-steps")
        return words[:at] + words[at + 2 :]

    assert train.main(flags(tmp_path / "whole")) == 0
    assert steps(tmp_path / "whole") == sorted({4, 8, last})
    assert states(newest(tmp_path / "whole")) == ["mature", "mature"]
    signal_at(monkeypatch, "on_step_begin", 4)
    assert train.main(flags(tmp_path / "run")) == 143
    assert train.main(flags(tmp_path / "run", "--resume")) == 0
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "run"))


# ---- killed, and failing saves ----

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train
from dylora_moe.checkpoint import write as checkpoint
from dylora_moe.store import run_folder
write, remove = checkpoint.write_files, run_folder.remove
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def write_files(folder, model, *, step, **options):
    written = write(folder, model, step=step, **options)
    step == 8 and die()
    return written
def half_removed(path):
    if ".dylora-trash-" in path.name:
        (path / "manifest.json").unlink()
        die()
    remove(path)
if sys.argv[2] == "within the save":
    checkpoint.write_files = write_files
else:
    run_folder.remove = half_removed
train.main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("when", "left", "hidden"),
    [
        ("within the save", [4], ".dylora-staging-*"),
        pytest.param("within the rotation", [8], ".dylora-trash-*", marks=pytest.mark.slow),
    ],
)
def test_rows_1_2_killed_and_resumed_is_uninterrupted(tmp_path, when, left, hidden):
    run_dir = tmp_path / "run"
    words = arguments(run_dir, "--save-total-limit", "1")
    done = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), when, *words], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert steps(run_dir) == left
    assert_same(uninterrupted() / f"checkpoint-{left[-1]}", newest(run_dir))
    assert list(run_dir.glob(hidden)) != []
    assert train.main(arguments(run_dir, "--resume", "--save-total-limit", "1")) == 0
    assert steps(run_dir) == [12]
    assert_same(newest(uninterrupted()), newest(run_dir))
    assert list(run_dir.glob(".dylora-[st]*")) == []


def test_a_save_that_fails_stops_the_run(monkeypatch, tmp_path, capsys):
    def full(folder, model, *, step, **options):
        if step == 8:
            (folder / "router.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device", str(folder / "router.safetensors"))
        return write(folder, model, step=step, **options)

    write = write_files
    with monkeypatch.context() as patch:
        patch.setattr("dylora_moe.checkpoint.write.write_files", full)
        assert train.main(arguments(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert "free space on that disk" in err
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-4"]
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    assert_same(newest(uninterrupted()), newest(tmp_path / "run"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("peft_adapters/expert_1/expert_1/adapter_model.safetensors", marks=pytest.mark.slow),
        "optimizer.pt",
        pytest.param("trainer_state.json", marks=pytest.mark.slow),
    ],
)
def test_rows_3_6_one_file_that_cannot_be_saved_stops_the_run_and_is_named(monkeypatch, tmp_path, capsys, name):
    whole = uninterrupted()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        full_disk(patch, name, after=1)  # the save at step 4 succeeds
        assert train.main(arguments(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^train.py: cannot write \S+/{re.escape(name)}: No space left on device \(ENOSPC\); free", err)
    assert "Traceback" not in err
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-4"]
    assert list((tmp_path / "run").glob(".dylora-staging-*")) == []
    assert_same(whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4")


def test_nan_is_never_saved(monkeypatch, tmp_path, capsys):
    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            with torch.no_grad():
                next(iter(model.expert_tensors(0).values()))[0, 0] = float("nan")

    monkeypatch.setattr(train.PeftCheckpointCallback, "on_step_begin", spoil)
    assert train.main(arguments(tmp_path / "run", "--logging-steps", "50")) == 2
    assert "training has diverged at step 8, nothing was saved" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [4]


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--learning-rate", "1e30", "--save-steps", "50")) == 2
    err = capsys.readouterr().err
    assert "training has diverged at step" in err
    assert "lower --learning-rate" in err
    assert train.main(arguments(tmp_path / "run", "--learning-rate", "1e30", "--logging-steps", "50", steps=3)) == 2
    assert "training has diverged" in capsys.readouterr().err  # also where only the end tells it
    assert steps(tmp_path / "run") == []


# ---- beside the checkpoints, and through the Hub ----


def test_a_tokenizer_that_cannot_be_written_leaves_the_good_one(run_dir, monkeypatch, capsys):
    """What the tokenizer's own writer reports on a full disk is no traceback, and touches nothing that is there."""
    before = {path: path.read_bytes() for path in run_dir.glob("*.json")}
    assert run_dir / "tokenizer.json" in before

    def full(self, folder, *args, **kwargs):
        for path in before:
            Path(folder, path.name).write_text("half")
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        assert train.main(arguments(run_dir, "--resume")) == 2
    err = capsys.readouterr().err
    assert re.match(rf"train.py: cannot write in {run_dir}: No space left on device \(ENOSPC\); free space", err)
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in run_dir.glob("*.json")} == before
    assert steps(run_dir) == [4, 8]
    (run_dir / "tokenizer.json").write_text("changed by its user")
    (run_dir / "tokenizer_config.json").unlink()
    assert train.main(arguments(run_dir, "--resume")) == 0
    assert f"kept in {run_dir}, which differ from the base model's: tokenizer.json\n" in capsys.readouterr().out
    assert (run_dir / "tokenizer.json").read_text() == "changed by its user"
    assert (run_dir / "tokenizer_config.json").read_bytes() == before[run_dir / "tokenizer_config.json"]


def test_a_checkpoint_that_came_through_the_hub_is_resumed(run_dir, tmp_path):
    (run_dir / "checkpoint-8/README.md").write_text("of the Hub")
    folder = in_hub_cache(run_dir, tmp_path / "cache") / "checkpoint-8"
    assert train.main(arguments(tmp_path / "other", "--resume", str(folder))) == 0
    assert_same(newest(uninterrupted()), newest(tmp_path / "other"))
    assert train.main(arguments(run_dir, "--resume")) == 0  # and one with such a file beside it
    assert_same(newest(uninterrupted()), newest(run_dir))


# ---- which checkpoint, and whether it may be ----


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run that was stopped at step 8: as if the save at 12 had never been."""
    folder = shutil.copytree(uninterrupted(), tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-12")
    return folder


def rewrite(folder: Path, *removed: str, **changed: bytes) -> None:
    """Change files of a checkpoint and make its manifest say so."""
    for name in removed:
        (folder / name).unlink()
    for name, data in changed.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    (folder / "manifest.json").unlink()
    seal(folder)


def test_without_resume_an_existing_run_is_refused(run_dir, capsys):
    assert train.main(arguments(run_dir)) == 2
    err = capsys.readouterr().err
    assert "already holds checkpoints (newest: checkpoint-8)" in err
    assert "--resume" in err
    assert "another --output-dir" in err


def test_resume_without_a_checkpoint_starts_afresh(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--resume", "auto")) == 0
    assert f"no checkpoint in {tmp_path / 'run'} yet: starting from the beginning" in capsys.readouterr().out
    assert_same(newest(uninterrupted()), newest(tmp_path / "run"))


def test_incomplete_checkpoints_are_passed_over(run_dir, capsys):
    (run_dir / "checkpoint-8" / "manifest.json").unlink()
    assert train.main(arguments(run_dir, "--resume")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("passed over")]
    assert len(lines) == 1
    assert str(run_dir / "checkpoint-8") in lines[0]
    assert "manifest.json" in lines[0]
    assert_same(newest(uninterrupted()), newest(run_dir))


def test_only_incomplete_checkpoints_are_an_error(run_dir, capsys):
    for step in (4, 8):
        (run_dir / f"checkpoint-{step}" / "manifest.json").unlink()
    assert train.main(arguments(run_dir, "--resume")) == 2
    err = capsys.readouterr().err
    assert "holds only incomplete checkpoints" in err
    assert "  - checkpoint-4: " in err
    assert "  - checkpoint-8: " in err


@pytest.mark.parametrize("damage", ["manifest.json", "router.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("more", [(), ("--accept-changes",), ("--resume-weights-only",)])
def test_row_13_an_incomplete_checkpoint_that_is_named_is_an_error(run_dir, capsys, damage, more):
    (run_dir / "checkpoint-8" / damage).unlink()
    weights_do = damage == "optimizer.pt" and more == ("--resume-weights-only",)
    before = contents(run_dir / "checkpoint-8")
    words = arguments(run_dir, "--resume", str(run_dir / "checkpoint-8"), *more)
    assert train.main(words) == (0 if weights_do else 2)
    if not weights_do:
        err = capsys.readouterr().err
        assert f"{run_dir / 'checkpoint-8'} is not a sound checkpoint" in err
        assert f"  - {damage}: expected" in err
        assert steps(run_dir) == [4]
    assert contents(run_dir / "checkpoint-8") == before


def test_what_is_only_named_like_a_checkpoint_is_left_alone(run_dir):
    others = ["checkpoint-10.tmp", "checkpoint-best", "old-checkpoint-30", "checkpoint-011"]
    for name in others:
        (run_dir / name).mkdir()
    (run_dir / "checkpoint-99").symlink_to(run_dir / "checkpoint-4")
    assert train.main(arguments(run_dir, "--resume", "--save-total-limit", "1")) == 0
    assert all((run_dir / name).is_dir() for name in others)
    assert (run_dir / "checkpoint-99").is_symlink()
    assert_same(newest(uninterrupted()), run_dir / "checkpoint-12")


@pytest.mark.parametrize(
    ("field", "code"),
    [("best_model_checkpoint", 2), ("best_global_step", 0), ("log_history", 0), ("stateful_callbacks", 0)],
)
def test_row_40_no_field_of_a_file_decides_what_is_deleted_or_loaded(run_dir, tmp_path, capsys, field, code):
    """Its manifest is rewritten: the fields name another folder, and steps that are not there."""
    other = tmp_path / "other"
    shutil.copytree(run_dir / "checkpoint-4", other / "checkpoint-4")
    shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-5.bak")
    shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-6")
    (run_dir / "checkpoint-6" / "manifest.json").unlink()
    state = trainer_state(run_dir / "checkpoint-8")
    state |= {
        "best_model_checkpoint": {"best_model_checkpoint": str(other)},
        "best_global_step": {"best_global_step": 6, "best_metric": -1.0},
        "log_history": {"log_history": [{"step": 6, "eval_loss": -9.0}, {"step": 10**9, "eval_loss": -9.0}]},
        "stateful_callbacks": {"stateful_callbacks": state["stateful_callbacks"] | {"Other": {"args": {"x": "/"}}}},
    }[field]
    rewrite(run_dir / "checkpoint-8", trainer_state__json=json.dumps(state).encode())
    kept = {path: contents(path) for path in (other, run_dir / "checkpoint-5.bak", run_dir / "checkpoint-6")}
    assert train.main(arguments(run_dir, "--resume", "--save-total-limit", "1", "--eval-steps", "12")) == code
    assert all(contents(path) == before for path, before in kept.items())
    if code:
        assert f"{field}: expected null, since no file decides what is" in capsys.readouterr().err
    assert steps(run_dir) == ([4, 8] if code else [12])


def test_the_step_number_decides_not_the_time(run_dir):
    for seconds, step in ((1, 8), (2_000_000_000, 4)):
        os.utime(run_dir / f"checkpoint-{step}", (seconds, seconds))
    assert train.main(arguments(run_dir, "--resume")) == 0
    assert_same(newest(uninterrupted()), newest(run_dir))


def test_a_named_checkpoint(run_dir, tmp_path, capsys):
    assert train.main(arguments(run_dir, "--resume", str(run_dir / "checkpoint-8"))) == 0
    assert_same(newest(uninterrupted()), newest(run_dir))
    assert train.main(arguments(run_dir, "--resume", str(run_dir / "checkpoint-4"))) == 2
    assert "holds newer checkpoints (checkpoint-8, checkpoint-12)" in capsys.readouterr().err
    assert train.main(arguments(run_dir, "--resume", str(run_dir / "checkpoint-5"))) == 2
    assert "expected a checkpoint folder, found nothing" in capsys.readouterr().err
    assert train.main(arguments(tmp_path / "none", "--resume", str(run_dir))) == 2
    assert f"is a run folder: name its newest checkpoint,\n    {run_dir / 'checkpoint-12'}" in capsys.readouterr().err
    other = tmp_path / "other"
    assert train.main(arguments(other, "--resume", str(run_dir / "checkpoint-4"))) == 0
    assert_same(newest(uninterrupted()), newest(other))
    assert train.main(arguments(other, "--resume", str(run_dir / "checkpoint-8"))) == 2
    assert "holds checkpoints of its own" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_training_state_missing_or_truncated(run_dir, capsys, name, content):
    """Behind a rewritten manifest, too: without, the sizes show it."""
    latest = run_dir / "checkpoint-8"
    data = (latest / name).read_bytes()
    if content == "missing":
        rewrite(latest, name)
    else:
        rewrite(latest, **{name.replace(".", "__"): data[: len(data) // 2]})
    assert train.main(arguments(run_dir, "--resume")) == 2
    err = capsys.readouterr().err
    assert name in err
    assert str(latest) in err
    assert "--resume-weights-only" in err
    assert steps(run_dir) == [4, 8]


def test_weights_without_training_state_are_trained_on(run_dir, capsys):
    rewrite(run_dir / "checkpoint-8", "optimizer.pt")
    assert train.main(arguments(run_dir, "--resume", "--resume-weights-only")) == 0
    out = capsys.readouterr().out
    assert "all else fresh, from step 8" in out
    assert steps(run_dir) == [4, 8, 12]
    with pytest.raises(AssertionError):  # what was left out does count
        assert_same(newest(uninterrupted()), newest(run_dir))
    (loss,) = re.findall(r"^step 10/12  loss ([\d.]+)", out, re.MULTILINE)
    (mean,) = re.findall(r"mean training loss ([\d.]+)", out)
    assert float(mean) == pytest.approx(float(loss), rel=0.1), "of the steps that it took itself"


def test_weights_only_into_a_new_folder_begins_at_step_0(run_dir, tmp_path, capsys):
    source = run_dir / "checkpoint-8"
    words = ["--resume", str(source), "--resume-weights-only", "--learning-rate", "1e-9", "--warmup", "0"]
    assert train.main(arguments(tmp_path / "new", *words, steps=3)) == 0
    assert "all else fresh, from step 0" in capsys.readouterr().out
    assert steps(tmp_path / "new") == [3]
    from safetensors.torch import load_file

    where = "peft_adapters/expert_1/expert_1/adapter_model.safetensors"
    old, new = load_file(source / where), load_file(newest(tmp_path / "new") / where)
    assert all(torch.allclose(old[key], new[key], atol=1e-6) for key in old)


def test_optimizer_of_other_parameters(run_dir, capsys):
    latest = run_dir / "checkpoint-8"
    state = torch.load(latest / "optimizer.pt", weights_only=True)
    names = state["param_groups"][0]["param_names"]
    victim = names[0]
    names[0] = "nobody"
    state["state"][1]["exp_avg"] = torch.zeros(3, 3)
    torch.save(state, latest / "optimizer.pt")
    rewrite(latest)
    assert train.main(arguments(run_dir, "--resume")) == 2
    err = capsys.readouterr().err
    assert f"has no moments for {victim}" in err
    assert "has moments for nobody, which is not trained here" in err
    assert f"exp_avg of {names[1]}: expected shape" in err


@pytest.mark.parametrize("moments_too", [False, True])
def test_optimizer_in_another_order(run_dir, capsys, moments_too):
    """Two of the same shape: without their moments, each would go on with the other's."""
    latest = run_dir / "checkpoint-8"
    state = torch.load(latest / "optimizer.pt", weights_only=True)
    names, moments = state["param_groups"][0]["param_names"], state["state"]
    one = 0
    two = next(i for i in range(1, len(names)) if moments[i]["exp_avg"].shape == moments[one]["exp_avg"].shape)
    names[one], names[two] = names[two], names[one]
    if moments_too:
        moments[one], moments[two] = moments[two], moments[one]
    torch.save(state, latest / "optimizer.pt")
    rewrite(latest)
    assert train.main(arguments(run_dir, "--resume")) == 2
    expected = f"optimizer.pt: another order: expected {names[two]} as parameter 0, found {names[one]}"
    assert expected in capsys.readouterr().err


def other_shapes(folder: Path) -> None:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][1]["exp_avg"] = torch.zeros(3, 3)
    torch.save(state, folder / "optimizer.pt")
    rewrite(folder)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


REFUSED = {  # row -> what is wrong with the checkpoint, more flags
    "13 incomplete": (lambda folder: (folder / "manifest.json").unlink(), ["--resume", "{}"]),
    "16 a file missing": (lambda folder: rewrite(folder, "scheduler.pt"), ["--resume"]),
    "16 a file truncated": (lambda folder: rewrite(folder, optimizer__pt=b"PK"), ["--resume"]),
    "17 moments of other shapes": (other_shapes, ["--resume"]),
    "18 another seed": (lambda folder: None, ["--resume", "--seed", "1"]),
    "18 another rank": (lambda folder: None, ["--resume", "--accept-changes", "--lora-r", "2"]),
    "21 a bit flipped": (lambda folder: flip_bit(folder / "router.safetensors"), ["--resume"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_resumption_that_is_refused_touches_nothing_in_the_model(run_dir, capsys, monkeypatch, case):
    """The model is looked at as it was made and as it is left."""
    spoil, flags = REFUSED[case]
    spoil(run_dir / "checkpoint-8")
    load, seen = load_model, []

    def watched(*args):
        model, tokenizer = load(*args)
        seen.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return model, tokenizer

    monkeypatch.setattr("dylora_moe.training.prepare.load_model", watched)
    words = [word.format(run_dir / "checkpoint-8") for word in flags]
    assert train.main(arguments(run_dir, *words)) == 2
    assert len(capsys.readouterr().err.splitlines()) > 1
    ((model, before),) = seen
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert set(model.expert_states) == {"new"}


# ---- changed settings ----

SHAPES = ("experts", "lora-r", "lora-alpha", "targets")
CHANGES = {
    "seed": "1",
    "batch-size": "4",
    "grad-accum": "2",
    "learning-rate": "1e-3",
    "lr-schedule": "linear",
    "warmup": "3",
    "weight-decay": "0.1",
    "label-smoothing": "0.1",
    "block-size": "16",
    "max-steps": "13",
    "temperature": "2.0",
    "top-k": "1",
    "balance-coefficient": "0",
    "lora-dropout": "0",
    "lora-alpha": "8",
    "lora-r": "2",
    "experts": "3",
    "targets": "q_proj",
}


def test_changed_settings_are_listed(run_dir, capsys):
    words = [word for name, value in CHANGES.items() for word in (f"--{name}", value)]
    assert train.main(arguments(run_dir, "--resume", *words)) == 2
    err = capsys.readouterr().err
    assert "... and " in err
    assert "experts, lora_alpha, lora_r, targets cannot change" in err
    for name, value in CHANGES.items():
        assert train.main(arguments(run_dir, "--resume", f"--{name}", value)) == 2, name
        err = capsys.readouterr().err
        assert f"  - {name.replace('-', '_')}: " in err
        assert ("accept the changes with --accept-changes" in err) == (name not in SHAPES)
    assert steps(run_dir) == [4, 8]


def test_changed_experts_are_never_accepted(run_dir, capsys):
    for words, text in (
        (("--experts", "3"), "experts: 2 there, 3 here"),
        (("--lora-r", "2"), "lora_r: 4 there, 2 here"),
        (("--lora-alpha", "8"), "lora_alpha: 32"),
        (("--targets", "q_proj"), "targets: ['k_proj', 'o_proj', 'q_proj', 'v_proj'] there, ['q_proj'] here"),
    ):
        for more in ((), ("--accept-changes",), ("--resume-weights-only",)):
            assert train.main(arguments(run_dir, "--resume", *words, *more)) == 2
            err = capsys.readouterr().err
            assert f"  - {text}" in err
            assert "--accept-changes" not in err
            assert "sound" not in err
            assert "--grow adds experts for new data" in err
    assert train.main(arguments(run_dir, "--resume", "--experts", "3", "--seed", "1")) == 2
    err = capsys.readouterr().err
    assert "  - experts: 2 there, 3 here\n" in err
    assert "  - seed: 0 there, 1 here\n" in err
    assert "another folder: experts cannot change" in err


def test_changed_data_is_found_by_its_content(run_dir, tmp_path, capsys):
    texts = (material() / "two.jsonl").read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join([texts[0].replace("router", "rooter"), *texts[1:]]) + "\n")
    words = arguments(run_dir, "--resume")
    words[words.index(str(material() / "two.jsonl"))] = str(tmp_path / "two.jsonl")
    assert train.main(words) == 2
    err = capsys.readouterr().err
    assert "data" in err
    assert train.main([*words, "--accept-changes"]) == 0
    assert steps(run_dir) == [4, 8, 12]


def test_the_same_data_and_model_elsewhere_are_the_same(run_dir, tmp_path):
    moved = shutil.copytree(material(), tmp_path / "moved", ignore=shutil.ignore_patterns("tmp*"))
    words = [word.replace(str(material()), str(moved)) for word in arguments(run_dir, "--resume")]
    assert str(moved) in words[1]
    assert train.main(words) == 0
    assert steps(run_dir) == [4, 8, 12]


def test_a_data_file_of_another_name_is_the_same_data(run_dir, tmp_path):
    words = arguments(run_dir, "--resume")
    at = words.index(str(material() / "two.jsonl"))
    words[at] = shutil.copy(words[at], tmp_path / "renamed.jsonl")
    assert train.main(list(map(str, words))) == 0
    assert steps(run_dir) == [4, 8, 12]


def test_files_that_take_over_the_names_of_others_train_what_they_did(run_dir, tmp_path):
    """`two.jsonl` has the content of `one.jsonl` now: what counts is the content."""
    words = [str(word) for word in arguments(run_dir, "--resume")]
    for old, new in (("one.jsonl", "two.jsonl"), ("two.jsonl", "three.jsonl")):
        shutil.copy(material() / old, tmp_path / new)
    names = {f"{material() / 'one.jsonl'}=2": f"{tmp_path / 'two.jsonl'}=2"}
    names |= {str(material() / "two.jsonl"): str(tmp_path / "three.jsonl")}
    assert train.main([names.get(word, word) for word in words]) == 0
    for name, data in contents(newest(uninterrupted())).items():  # but for what names the files
        assert name.endswith(".json") or contents(newest(run_dir))[name] == data, name


def test_an_accepted_learning_rate_is_used(run_dir):
    assert train.main(arguments(run_dir, "--resume", "--learning-rate", "1e-4", "--accept-changes")) == 0
    rates, old = (
        {e["step"]: e["learning_rate"] for e in trainer_state(newest(run))["log_history"] if "learning_rate" in e}
        for run in (run_dir, uninterrupted())
    )
    assert rates[5] == old[5]
    assert rates[10] == pytest.approx(old[10] * 1e-4 / 5e-3)


def test_what_changes_no_weights_may_change(run_dir):
    free = ["--save-steps", "3", "--logging-steps", "1", "--eval-steps", "6", "--save-total-limit", "9"]
    assert train.main(arguments(run_dir, "--resume", *free, "--gradient-checkpointing")) == 0
    assert steps(run_dir) == [4, 8, 9, 12]
    one, other = newest(uninterrupted()), newest(run_dir)
    for name in ("optimizer.pt", "rng_state.pth", "router.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    logged = [entry["step"] for entry in trainer_state(other)["log_history"] if "loss" in entry]
    assert logged == [1, 5, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ("model.embed_tokens.weight", "model: "),
        ("lm_head.weight", "model: "),
        ("model.layers.1.mlp.down_proj.weight", "model: "),
        ("rope_theta", "rope_parameters.rope_theta: 10000.0 there, 500000.0 here"),
        ("rms_norm_eps", "rms_norm_eps: 1e-06 there, 0.0005 here"),
    ],
)
def test_another_base_is_refused(run_dir, tmp_path, capsys, changed, text):
    """Also one that differs in one row of a matrix, which no sample has, or in a value of its config."""
    other = shutil.copytree(material() / "base", tmp_path / "base")
    if changed.endswith(".weight"):
        tensors = load_file(other / "model.safetensors")
        tensors[changed][1] *= -3
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((other / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] *= 50 if changed == "rope_theta" else 1
        config["rms_norm_eps"] = 5e-4 if changed == "rms_norm_eps" else config["rms_norm_eps"]
        (other / "config.json").write_text(json.dumps(config))
    words = arguments(run_dir, "--resume")
    words[1] = str(other)
    assert train.main(words) == 2
    assert text in capsys.readouterr().err
    assert steps(run_dir) == [4, 8]


def test_a_changed_checkpoint_is_named(run_dir, capsys):
    flip_bit(run_dir / "checkpoint-8" / "router.safetensors")
    assert train.main(arguments(run_dir, "--resume")) == 2
    err = capsys.readouterr().err
    assert "router.safetensors" in err
    assert "sha256" in err


def test_the_states_of_a_run_are_json(run_dir):
    """trainer_state.json has no NaN, no clock time and no path of the run folder."""
    text = (run_dir / "checkpoint-8" / "trainer_state.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert "runtime" not in text
    assert str(run_dir) not in text
