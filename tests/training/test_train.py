"""The command line of train.py: every flag does something, every mistake gets one clear message and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import test_checkpoint_minimal
import test_checkpoint_save_load
import train
from dylora_moe import DyLoRAMoE
from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base
from dylora_moe.checkpoint import formats
from dylora_moe.cli.main import main
from dylora_moe.errors import UsageError
from dylora_moe.store.lock import LOCK
from dylora_moe.system.settings import spelled
from dylora_moe.training.run import execute
from dylora_moe.training.settings import DEMO, TrainSettings, parse
from dylora_moe.training.trainer import MoETrainer

from ..support.runs import arguments, material, newest, states, steps, trainer_state

ROOT = Path(__file__).parents[2]


def run(words: list[str]) -> int:
    """The exit code of train.py."""
    try:
        return train.main(words)
    except SystemExit as stop:
        return stop.code


def without(words: list[str], flag: str) -> list[str]:
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


# ---- arguments ----


def test_help_lists_the_flags(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for each in fields(TrainSettings):
        assert spelled(each.name) in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--experts", "0"], "--experts: expected a whole number from 1 to 1024, got 0"),
        (["--experts", "-1"], "--experts: expected a whole number from 1 to 1024, got -1"),
        (["--experts", "1000000"], "--experts: expected a whole number from 1 to 1024, got 1000000"),
        (["--experts", "two"], "--experts: expected a whole number from 1 to 1024, got 'two'"),
        (["--lora-r", "0"], "--lora-r: expected a whole number of at least 1, got 0"),
        (["--lora-dropout", "1"], "--lora-dropout: expected a number from 0 to 0.99, got 1"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0, got nan"),
        (["--temperature", "0"], "--temperature: expected a number above 0, got 0"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got 0"),
        (["--block-size", "4"], "--block-size: expected a whole number of at least 8, got 4"),
        (["--max-steps", "0"], "--max-steps: expected a whole number of at least 1, got 0"),
        (["--max-steps", "1" + "0" * 12], "the order of the blocks in 1,000,000,000,000 steps (--max-steps): it needs"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295, got -1"),
        (["--seed", "4294967296"], "--seed: expected a whole number from 0 to 4294967295, got 4294967296"),
        (["--lr-schedule", "zigzag"], "invalid choice: 'zigzag'"),
        (["--weights", "none"], "invalid choice: 'none'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--exp", "3"], "unrecognized arguments: --exp (did you mean --experts?)"),
        (["--epochs", "2"], "--max-steps and --epochs contradict each other"),
        (["--targets", ","], "--targets: expected names of linear layers, got none"),
        (["--eval-data", "x", "--eval-fraction", "0.5"], "--eval-data and --eval-fraction contradict each other"),
        (["--top-k", "3"], "--top-k 3 and --experts 2 contradict each other"),
        (["--warmup", "2.5"], "--warmup 2.5: expected a whole number of steps, or a fraction below 1"),
        (["--early-stopping", "2"], "--early-stopping needs --eval-steps"),
        (["--resume-weights-only"], "--resume-weights-only needs --resume"),
        (["--report-to", "trackio"], "the package trackio is not installed"),
        (["--dtype", "float7"], "Unknown dtype 'float7'"),
        (["--device", "toaster"], "Unknown device 'toaster'"),
        (["--targets", "nothing_proj"], "no linear layer of LlamaForCausalLM is named nothing_proj"),
        (["--block-size", "65"], "--block-size 65: the base model has 64 positions"),
        (["--model", "./nowhere"], "There is no file or folder './nowhere'"),
        (["--model", "README.md"], "README.md"),
        (["--data", "./nothing.jsonl", "--experts", "3"], "./nothing.jsonl"),
        (["--data", "./nothing.jsonl"], "--experts 2: each of the 3 data sets needs an expert of its own"),
        (["--from", "x"], "--from needs --grow"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(monkeypatch, tmp_path, capsys, words, text):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("no model")
    assert run(arguments(tmp_path / "deep" / "run", *words)) == 2
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.jsonl", "", "empty.jsonl"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "broken.jsonl"),
        ("strange.jsonl", '{"left": "a", "right": "b"}\n' * 5, "left"),
        ("short.jsonl", '{"text": "ab"}\n{"text": "cd"}\n', "short.jsonl"),
        ("binary.parquet", "not a table", "binary.parquet"),
    ],
)
def test_bad_data(tmp_path, capsys, name, content, text):
    (tmp_path / name).write_text(content)
    words = without(without(arguments(tmp_path / "run"), "--data"), "--data")
    assert run([*words, "--data", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_base_does_not_know(tmp_path, capsys):
    """As after a chat token was added to a tokenizer, and the embedding was not resized."""
    shutil.copytree(material() / "base", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path / "base")
    assert run(arguments(tmp_path / "run", "--model", str(tmp_path / "base"))) == 2
    err = capsys.readouterr().err
    assert "one.jsonl: the tokenizer makes 1 token(s), in 6 document(s), that the base model does not know" in err
    assert "'<end>' (id 258)" in err and "resize_token_embeddings" in err and "Traceback" not in err


@pytest.mark.parametrize(("flag", "text"), [("--output-dir", "--output-dir is needed"), ("--data", "--data is needed")])
def test_what_is_needed(tmp_path, capsys, flag, text):
    words = arguments(tmp_path / "run")
    while flag in words:
        words = without(words, flag)
    assert run(words) == 2
    assert text in capsys.readouterr().err


def test_a_file_for_the_run_folder(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert run(arguments(tmp_path / "run")) == 2
    assert "expected a folder, found a file" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    make = os.mkdir

    def refuse(path, *args, **kwargs):
        if Path(path).name == "run":
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert run(arguments(tmp_path / "run")) == 2
    assert f"cannot create {tmp_path / 'run'}: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_is_full_at_the_first_save_leaves_nothing(tmp_path, capsys, monkeypatch, there):
    def full(folder, *args, **kwargs):
        (folder / "router.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder / "router.safetensors"))

    if there:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/notes.txt").write_text("mine")
    monkeypatch.setattr("dylora_moe.checkpoint.write.write_files", full)
    assert run(arguments(tmp_path / "run", steps=2)) == 2
    assert "No space left on device" in capsys.readouterr().err
    left = {path.name for path in tmp_path.glob("run/*")} - {LOCK}
    assert left == ({"notes.txt"} if there else set())
    assert (tmp_path / "run").exists() == there


def test_what_a_run_did_not_make_is_never_removed(tmp_path, capsys, monkeypatch):
    """Whatever the names of the files, and whenever they came there."""
    run_dir = tmp_path / "run"
    names = ("base", "code.jsonl", "tokenizer.json", ".base.partial")

    def mistake(settings, device):
        (run_dir / "base").mkdir()
        for name in names[1:]:
            (run_dir / name).write_text("mine")
        raise UsageError("a mistake")

    monkeypatch.setattr("dylora_moe.training.prepare.load_model", mistake)
    assert run(arguments(run_dir)) == 2
    assert {path.name for path in run_dir.iterdir()} == set(names)


def test_a_tokenizer_of_the_user_is_not_replaced(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tokenizer.json").write_text("mine")
    assert run(arguments(tmp_path / "run", steps=2)) == 2
    assert re.search(r"run holds already:\n.*tokenizer\.json: a file with another content", capsys.readouterr().err)
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_what_a_run_writes_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    """Beside the checkpoints, too: everything was renamed into place from a private folder, where it was flushed."""
    published, flushed = set(), set()
    rename, replace, fsync = os.rename, os.replace, os.fsync

    def noted(call):
        def renamed(source, target):
            if tmp_path / "run" not in Path(target).parents:
                return call(source, target)
            inside = Path(source)
            assert inside.name.startswith(".dylora-staging-") or inside.parent.name.startswith(".dylora-staging-")
            files = [inside] if inside.is_file() else [path for path in inside.rglob("*") if path.is_file()]
            assert {path.stat().st_ino for path in files} <= flushed, source
            published.add(Path(target))
            return call(source, target)

        return renamed

    monkeypatch.setattr(os, "rename", noted(rename))
    monkeypatch.setattr(os, "replace", noted(replace))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.add(os.fstat(descriptor).st_ino), fsync(descriptor)))
    assert run(["--demo", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    found = {path for path in (tmp_path / "run").iterdir() if path.name != LOCK}
    assert found == published
    names = {"base", "code.jsonl", "tokenizer.json", "checkpoint-1", "results.json", "report.html"}
    assert names <= {path.name for path in found}


@pytest.mark.parametrize("code", ["EROFS", "EACCES"])
def test_row_5_a_read_only_run_folder_is_known_before_anything_is_loaded(tmp_path, capsys, monkeypatch, code):
    """Injected, since root may write anywhere."""
    (tmp_path / "run").mkdir()
    number, real = getattr(errno, code), os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and tmp_path / "run" in Path(os.fsdecode(path)).parents:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr("dylora_moe.training.prepare.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run(arguments(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert f"cannot write in {tmp_path / 'run'}: {os.strerror(number)} ({code}); " in err
    assert "choose another output folder" in err
    assert list((tmp_path / "run").iterdir()) == []


def test_a_full_disk_is_known_before_the_first_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dylora_moe.system.machine.free_disk", lambda path: 1000)
    assert run(arguments(tmp_path / "run")) == 2
    assert "Not enough disk space for one checkpoint" in capsys.readouterr().err
    monkeypatch.undo()

    def full(run_dir):
        raise UsageError(f"cannot write in {run_dir}: No space left on device (ENOSPC); free space on that disk")

    monkeypatch.setattr("dylora_moe.store.run_folder.check_writable", full)
    assert run(arguments(tmp_path / "run")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


HOLD = """
import sys, time
from dylora_moe.store.lock import writer_lock
with writer_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_has_one_writer(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert run(arguments(tmp_path / "run")) == 2
    finally:
        holder.kill()
        holder.wait()
    assert f"another process writes checkpoints here (process {holder.pid} on" in capsys.readouterr().err


def test_the_run_folder_is_held_from_start_to_end(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    refused = []

    def try_lock(self, args, state, control, **kwargs):
        with open(Path(args.output_dir, LOCK), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(state.global_step)

    monkeypatch.setattr(train.PeftCheckpointCallback, "on_step_begin", try_lock)
    assert run(arguments(tmp_path / "run", steps=3)) == 0
    assert refused == [0, 1, 2]


# ---- settings from a file ----


def settings_file(folder: Path, name: str, **settings) -> str:
    dump = json.dumps if name.endswith(".json") else yaml.safe_dump
    (folder / name).write_text(dump(settings))
    return str(folder / name)


@pytest.mark.parametrize("name", ["settings.yaml", "settings.json"])
def test_a_settings_file_and_flags_that_win(tmp_path, name):
    numbers = {"experts": 3, "lora-r": 2, "learning_rate": 1e-3, "epochs": 2, "top_k": None}
    lists = {"data": ["a.jsonl=2", "b.jsonl"], "targets": ["q_proj", "v_proj"]}
    others = {"gradient_checkpointing": True, "output_dir": "runs/x", "resume": True}
    path = settings_file(tmp_path, name, **numbers, **lists, **others)
    args = parse(["--config", path, "--lora_r", "4"])
    assert (args.experts, args.lora_r, args.learning_rate, args.epochs) == (3, 4, 1e-3, 2)
    assert (args.data, args.targets) == (("a.jsonl=2", "b.jsonl"), ("q_proj", "v_proj"))
    assert (args.gradient_checkpointing, args.resume, args.top_k) == (True, "auto", None)
    args = parse(["--config", path, "--data", "c.jsonl", "--max-steps", "5"])
    assert (args.data, args.max_steps, args.epochs) == (("c.jsonl",), 5, None)


def test_folders_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings_file(tmp_path, "settings.yaml", data=["a.jsonl"], output_dir="~/run")
    args = parse(["--config=~/settings.yaml", "--resume=~/other"])
    assert (args.output_dir, args.resume) == (str(tmp_path / "run"), str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("experts: 0", "argument --experts: expected a whole number from 1 to 1024, got 0"),
        ("experts: [2, 3]", "experts: expected a value, got [2, 3]"),
        ("targets: {q_proj: 1}", "targets: expected a value, got {'q_proj': 1}"),
        ("max_steps: 2\nmax-steps: 3", "max_steps is there twice"),
        ("output_dir: ''", "--output-dir: expected a value, got an empty one"),
        ("expertz: 2", "there is no setting 'expertz' (did you mean experts?)"),
        ("lora: {r: 8}", "there is no setting 'lora'"),
        ("data: [{a: b}]", "data: expected a value, got [{'a': 'b'}]"),
        ("experts: " + "[" * 2000 + "]" * 2000, "is nested too deeply; expected one value for each setting"),
        ("- experts", "expected settings by name, found list"),
        ("experts: [", "is not valid YAML"),
        ("config: other.yaml", "there is no setting 'config'"),
    ],
)
def test_a_bad_settings_file(tmp_path, capsys, content, text):
    (tmp_path / "settings.yaml").write_text(content)
    command = arguments(tmp_path / "run", "--config", str(tmp_path / "settings.yaml"))
    capsys.readouterr()  # the first test that asks for the base model sees it being written
    assert run(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: --config ") and text in line
    assert run(arguments(tmp_path / "run", "--config", str(tmp_path / "nothing.json"))) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj,", "v_proj"], ["q_proj, v_proj"]])
def test_targets_with_and_without_commas(words):
    assert parse(["--demo", "--targets", *words]).targets == ("q_proj", "v_proj")


def test_the_demo_yields_to_flags_and_file(tmp_path):
    args = parse(["--demo"])
    assert {name: getattr(args, name) for name in DEMO} == DEMO
    assert (args.output_dir, args.model, args.data) == ("runs/demo", None, ())
    path = settings_file(tmp_path, "settings.json", demo=True, experts=5)
    args = parse(["--config", path, "--epochs", "0.1", "--lora-alpha", "3"])
    assert (args.experts, args.epochs, args.max_steps, args.lora_alpha) == (5, 0.1, None, 3)
    assert args.block_size == DEMO["block_size"]


# ---- what the flags do ----


def logged(run_dir: Path, key: str) -> list[float]:
    return [entry[key] for entry in trainer_state(newest(run_dir))["log_history"] if key in entry]


def config(run_dir: Path) -> dict:
    return json.loads((newest(run_dir) / "config.json").read_text())


def test_flags_of_the_mixture(tmp_path, capsys):
    words = (
        "--experts 3 --lora-r 2 --lora-alpha 5 --lora-dropout 0.2 --targets q_proj up_proj --top-k 1 --temperature 2"
    )
    more = [*words.split(), "--balance-coefficient", "0.5", "--dtype", "bfloat16", "--weights", "random"]
    assert run(arguments(tmp_path / "run", *more, steps=2)) == 0
    found = config(tmp_path / "run")
    assert (found["num_experts"], found["base_model"]["dtype"]) == (3, "bfloat16")
    assert {key: found["router"][key] for key in ("temperature", "top_k", "balance_coefficient")} == {
        "temperature": 2.0, "top_k": 1, "balance_coefficient": 0.5
    }  # fmt: skip
    adapter = json.loads(next(newest(tmp_path / "run").rglob("adapter_config.json")).read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (2, 5, 0.2)
    assert adapter["target_modules"] == ["q_proj", "up_proj"]
    assert "experts: 3 on q_proj, up_proj" in capsys.readouterr().out


def test_all_linear_and_one_expert(tmp_path, capsys):
    assert (
        run(arguments(tmp_path / "run", "--targets", "all-linear", "--experts", "1", "--route", "joint", steps=2)) == 0
    )
    assert len(config(tmp_path / "run")["experts"][0]["target_modules"]) == 7
    table = capsys.readouterr().out.partition("data set")[2].splitlines()
    assert table[0].split() == ["at", "the", "start", "held-out", "loss", "expert_0"]
    assert table[1].split()[3:] == ["100.0", "%"]


def test_what_is_not_learned_is_said(tmp_path, capsys):
    words = arguments(tmp_path / "run", "--dtype", "float16", steps=1)
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "float16: small gradients become zero" in out
    assert not any(text in out for text in ("are not used", "are left out", "are not learned", "are not trained on"))
    first = words.index("--data") + 1
    rows = [{"prompt": f"{i} " * 90, "completion": "yes", "id": i} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [
        {"messages": [{"role": "user", "content": f"{i}", "name": "x"}, {"role": "assistant", "content": "yes" * 9}]}
        for i in range(30)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, chats)))
    words[first], words[first + 2] = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    words[words.index("--output-dir") + 1] = str(tmp_path / "other")
    assert run([word for word in words if word not in ("--dtype", "float16")]) == 0
    out = capsys.readouterr().out
    assert "data: a: columns that are not used: id\n" in out
    assert "data: b: in its chats, nothing reads: name\n" in out
    assert re.search(
        r"data: a: [\d,]+ of [\d,]+ tokens lie in blocks without an answer, and are left out; a larger", out
    )
    assert "float16" not in out


def test_weights_of_the_data(tmp_path, capsys):
    assert run(arguments(tmp_path / "run", steps=1)) == 0
    drawn = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: ")]
    assert "23 drawn per epoch" in drawn[0]
    assert "16 drawn per epoch" in drawn[1]


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ("--lr-schedule constant --warmup 0", [1, 1, 1, 1]),
        ("--lr-schedule linear --warmup 0", [1, 0.75, 0.5, 0.25]),
        ("--lr-schedule constant_with_warmup --warmup 2", [0, 0.5, 1, 1]),
        ("--lr-schedule constant_with_warmup --warmup 0.5", [0, 0.5, 1, 1]),
        ("--lr-schedule cosine --warmup 0", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(tmp_path, words, rates):
    assert run(arguments(tmp_path / "run", *words.split(), "--logging-steps", "1", steps=4)) == 0
    assert logged(tmp_path / "run", "learning_rate") == pytest.approx([5e-3 * rate for rate in rates], rel=1e-4)


def test_label_smoothing_is_of_training_alone(tmp_path):
    quiet = ["--eval-steps", "1", "--learning-rate", "1e-9", "--logging-steps", "1", "--save-steps", "0"]
    for name, more in (("plain", []), ("smooth", ["--label-smoothing", "0.5"])):
        assert run(arguments(tmp_path / name, *quiet, *more, steps=1)) == 0
    plain, smooth = (logged(tmp_path / name, "loss")[0] for name in ("plain", "smooth"))
    assert abs(plain - smooth) > 1e-3
    plain, smooth = (logged(tmp_path / name, "eval_loss")[-1] for name in ("plain", "smooth"))
    assert plain == pytest.approx(smooth, abs=1e-5)


def test_weight_decay_and_seed_change_the_weights(tmp_path):
    found = set()
    for number, more in enumerate(([], ["--weight-decay", "0.5"], ["--seed", "1"], ["--grad-accum", "2"])):
        assert run(arguments(tmp_path / str(number), *more, steps=3)) == 0
        found.add((newest(tmp_path / str(number)) / "optimizer.pt").read_bytes())
        assert steps(tmp_path / str(number)) == [3]
    assert len(found) == 4


def test_accumulation_is_the_larger_batch(tmp_path):
    """Without dropout and balance loss, which sees the micro-batches one by one."""
    same = ["--route", "joint", "--lora-dropout", "0", "--balance-coefficient", "0", "--logging-steps", "1"]
    assert run(arguments(tmp_path / "one", *same, steps=3)) == 0
    assert run(arguments(tmp_path / "two", *same, "--batch-size", "4", "--grad-accum", "2", steps=3)) == 0
    assert logged(tmp_path / "one", "loss") == pytest.approx(logged(tmp_path / "two", "loss"), rel=1e-5)
    assert logged(tmp_path / "one", "grad_norm") == pytest.approx(logged(tmp_path / "two", "grad_norm"), rel=1e-4)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    assert run(arguments(tmp_path / "run", "--route", "joint", "--report-to", "tensorboard", steps=2)) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    event_file = next((tmp_path / "run").rglob("events.out.tfevents*"))
    tags = EventAccumulator(str(event_file.parent)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/balance", "train/usage/expert_0"} <= set(tags)


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    losses = {0: 0.5, 2: 5.0, 3: 1.0, 4: 3.0, 6: 4.0, 8: 4.5, 9: 2.0, 10: 6.0, 12: 6.0}
    monkeypatch.setattr(MoETrainer, "_evaluate_one", lambda self, rows: (losses[self.state.global_step], None))
    limits = ["--save-total-limit", "2", "--save-steps", "2"]
    assert run(arguments(tmp_path / "run", *limits, "--eval-steps", "2")) == 0
    assert steps(tmp_path / "run") == [4, 12]
    assert run(arguments(tmp_path / "other", *limits, "--eval-steps", "3")) == 0  # 3 and 9 were never saved
    assert steps(tmp_path / "other") == [6, 12]


def test_only_the_end_is_saved_with_save_steps_0(tmp_path):
    assert run(arguments(tmp_path / "run", "--save-steps", "0", steps=5)) == 0
    assert steps(tmp_path / "run") == [5]


def test_what_a_run_says(tmp_path, capsys):
    assert run(arguments(tmp_path / "run", "--eval-steps", "6")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"loading {material() / 'base'}"
    assert lines[1] == f"base: {material() / 'base'} (34,080 parameters, float32, frozen)"
    assert lines[2].startswith("experts: 2 on k_proj, o_proj, q_proj, v_proj (4,096 parameters trained")
    assert sum(line.startswith("data: ") for line in lines) == 2
    assert {"skill: one: trains expert_0", "skill: two: trains expert_1"} < set(lines)
    assert any(line.startswith("step  5/12  loss ") and "balance " not in line for line in lines)
    assert any(line.startswith("step  6/12  held out: one ") for line in lines)
    assert f"saved {tmp_path / 'run'}/checkpoint-12" in lines
    assert f"read about it: {tmp_path / 'run'}/report.html" in lines
    assert f"validate it: python test_checkpoint_save_load.py --checkpoint {tmp_path / 'run'}/checkpoint-12" in lines
    assert "--resume" in lines[-1]
    assert "warn" not in err.lower()
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_what_a_joint_run_says(tmp_path, capsys):
    assert run(arguments(tmp_path / "run", "--route", "joint")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("experts: 2 on k_proj, o_proj, q_proj, v_proj (4,164 parameters trained")
    assert "skill: one: trains all experts" in lines
    assert any(line.startswith("step  5/12  loss ") and "balance " in line and "usage " in line for line in lines)


def test_the_library_returns_how_the_run_ended_and_prints_the_progress_only(tmp_path, capsys):
    said = []
    result = execute(parse(arguments(tmp_path / "run", steps=2)), said.append, said.append)
    assert (result.step, result.saved) == (2, tmp_path / "run" / "checkpoint-2")
    assert (result.stopped_by, result.nothing_left) == (None, False)
    assert [found.name for found in result.held_out] == ["one", "two"]
    for found in result.held_out:
        assert found.before > 0 < found.after
        assert len(found.shares) == 2 and sum(found.shares) == pytest.approx(1)
    assert said[0].startswith("loading ")
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith("step ")] == []
    assert err == ""


def test_settings_are_checked_and_frozen():
    with pytest.raises(UsageError, match="--top-k 3 and --experts 2 contradict each other"):
        TrainSettings(output_dir="x", data=("a", "b"), top_k=3)
    with pytest.raises(UsageError, match="--experts 1: each of the 2 data sets needs an expert of its own"):
        TrainSettings(output_dir="x", data=("a", "b"), experts=1)
    with pytest.raises(UsageError, match="--update needs --grow"):
        TrainSettings(output_dir="x", data=("a",), update=True)
    settings = TrainSettings(output_dir="x", data=("a",))
    with pytest.raises(FrozenInstanceError):
        settings.top_k = 3
    with pytest.raises(UsageError, match="--early-stopping needs --eval-steps"):
        replace(settings, early_stopping=1)


def test_the_scripts_pass_on_what_training_wrote(tmp_path, capsys):
    assert run(arguments(tmp_path / "run", "--experts", "3", steps=4)) == 0
    assert states(newest(tmp_path / "run")) == ["mature"] * 3
    for script in (test_checkpoint_minimal, test_checkpoint_save_load):
        assert script.main(["--checkpoint", str(newest(tmp_path / "run"))]) == 0, capsys.readouterr()


def test_a_run_folder_with_its_base_in_it_can_be_moved(tmp_path, capsys):
    """Validated, loaded, resumed and listed where it is now; the base model is named as the checkpoint sees it."""
    shutil.copytree(material() / "base", tmp_path / "run" / "base")
    words = arguments(tmp_path / "run", steps=4)
    words[1] = str(tmp_path / "run" / "base")
    assert run(words) == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    checkpoint = newest(moved)
    assert json.loads((checkpoint / "config.json").read_text())["base_model"]["name"] == "../base"
    adapter = json.loads((checkpoint / "peft_adapters/expert_0/expert_0/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "run" / "base")  # stock PEFT knows no other form
    for script in (test_checkpoint_minimal, test_checkpoint_save_load):
        assert script.main(["--checkpoint", str(checkpoint)]) == 0, capsys.readouterr()
    assert main(["verify", str(checkpoint)]) == main(["list", str(moved)]) == 0
    assert DyLoRAMoE.from_checkpoint(checkpoint).base.config._name_or_path == str(moved / "base")
    words = arguments(moved, "--resume", "--accept-changes", steps=8)
    words[1] = str(moved / "base")
    assert run(words) == 0
    assert steps(moved) == [4, 8]
    (moved / "base").rename(tmp_path / "base")
    capsys.readouterr()
    assert test_checkpoint_save_load.main(["--checkpoint", str(newest(moved))]) == 2
    assert f"no file or folder '{moved / 'base'}'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="say with base= where that model is now"):
        DyLoRAMoE.from_checkpoint(newest(moved))
    found = DyLoRAMoE.from_checkpoint(newest(moved), base=str(tmp_path / "base"))
    assert found.base.config._name_or_path == str(tmp_path / "base")


# ---- never a merged model ----


class Watch(threading.Thread):
    """Notes every name that is ever seen below a folder."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.names, self.ended = folder, set(), threading.Event()

    def run(self):
        while not self.ended.is_set():
            for _, _, names in os.walk(self.folder):
                self.names.update(names)
            time.sleep(0.0005)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()


def slow_rename(monkeypatch) -> None:
    """So that what stands in the staging folder is seen."""
    rename = os.rename

    def slow(*args, **kwargs):
        time.sleep(0.02)
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "rename", slow)


def test_no_merged_model_is_ever_written(tmp_path, monkeypatch):
    slow_rename(monkeypatch)
    with Watch(tmp_path / "run") as watch:
        assert run(arguments(tmp_path / "run", "--eval-steps", "4", "--save-total-limit", "1")) == 0
    assert {"router.safetensors", "adapter_model.safetensors", "manifest.json"} <= watch.names
    assert [name for name in watch.names if formats.is_merged_model(name)] == []


def test_the_watch_sees_what_a_stock_trainer_writes(tmp_path):
    from transformers import Trainer, TrainingArguments

    base = load_base(find_base(str(material() / "base"))[0], "pretrained")
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "report_to": "none", "use_cpu": True}
    settings = TrainingArguments(output_dir=str(tmp_path / "run"), remove_unused_columns=False, **options)
    with Watch(tmp_path / "run") as watch:
        Trainer(model=base.requires_grad_(True), args=settings, train_dataset=rows).train()
        time.sleep(0.05)
    assert [name for name in watch.names if formats.is_merged_model(name)] == ["model.safetensors"]


# ---- light ----

LIGHT = """
import sys
from train import PeftCheckpointCallback
heavy = [name for name in ("transformers.trainer", "datasets", "tensorboard") if name in sys.modules]
assert PeftCheckpointCallback.on_save and not heavy, heavy
"""


def test_the_callback_is_light():
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
