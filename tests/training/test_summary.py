"""What a run says at its end, what it writes into results.json, and how it goes on after a restart by torchrun."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from dylora_moe.system.settings import spelled
from dylora_moe.training.run import resuming_after_restart
from dylora_moe.training.settings import TrainSettings, parse
from dylora_moe.training.summary import LEFT_OUT, resume_command

from ..support.runs import TEXT, arguments, material, newest, signal_at, steps

ROOT = Path(__file__).parents[2]


# ---- the command to go on with ----


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("--data 'a b=2' --output-dir x", "--data 'a b=2' --output-dir x --resume"),
        ("--output-dir x --resume", "--output-dir x --resume"),
        ("--resume=auto --output-dir x", "--output-dir x --resume"),
        ("--resume x/checkpoint-4 --resume_weights_only --output-dir x", "--output-dir x --resume"),
        ("--lora_r 4 --lora-r=8 --demo", "--lora-r=8 --demo --resume"),
        ("--data a --data b=2 --eval-data c --eval-data d", "--data a --data b=2 --eval-data c --eval-data d --resume"),
        ("--targets q_proj v_proj --targets k_proj --demo", "--targets k_proj --demo --resume"),
        ("--hf-token SECRET --hf_token=SECRET --demo", "--demo --resume"),
    ],
)
def test_each_flag_once(words, command):
    assert resume_command(shlex.split(words)) == f"python train.py {command}"


def test_a_command_that_was_said_does_not_grow():
    command = resume_command(["--demo"], "--max-steps 120", "--accept-changes")
    assert command == "python train.py --demo --resume --max-steps 120 --accept-changes"
    again = resume_command(shlex.split(command)[2:], "--max-steps 240", "--accept-changes")
    assert again == "python train.py --demo --resume --max-steps 240 --accept-changes"
    assert parse(shlex.split(again)[2:]).max_steps == 240


def test_what_is_left_out_are_flags():
    assert {spelled(name) for name in LEFT_OUT} <= {spelled(name) for name in TrainSettings.__dataclass_fields__}


def test_paths_with_blanks_are_quoted(tmp_path, capsys):
    words = arguments(tmp_path / "my run", steps=1)
    assert train.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("validate it: ")]
    assert shlex.split(line)[-1] == str(tmp_path / "my run" / "checkpoint-1")


# ---- results.json ----


def results(run_dir: Path) -> dict:
    return json.loads((run_dir / "results.json").read_text())


def test_the_results_are_those_of_the_table(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", steps=2)) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = results(tmp_path / "run")
    assert (found["step"], found["checkpoint"], found["stopped_by"]) == (2, "checkpoint-2", None)
    assert (found["route"], found["experts"], found["parameters"]["base"]) == ("specialised", 2, 34_080)
    assert [(each["name"], each["expert"], each["data"]) for each in found["skills"]] == [
        ("one", 0, [str(material() / "one.jsonl")]), ("two", 1, [str(material() / "two.jsonl")]),
    ]  # fmt: skip
    (stage,) = found["stages"]
    for skill in found["skills"]:
        loss = stage["evaluation"][skill["name"]]
        (row,) = [row for row in table if row and row[0] == skill["name"]]
        assert row[1:3] == [f"{loss['base']:.4f}", f"{loss['routed']:.4f}"]
        assert row[3::2] == [f"{100 * share:.1f}" for share in skill["usage"]]
        assert loss["best"] <= loss["own"] <= loss["base"]
    assert "hf_token" not in (tmp_path / "run" / "results.json").read_text()


def test_a_run_that_goes_on_replaces_them(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 1)
        assert train.main(arguments(tmp_path / "run", steps=4)) == 143
    found = results(tmp_path / "run")
    assert (found["step"], found["stopped_by"], found["checkpoint"]) == (2, "SIGTERM", "checkpoint-2")
    assert [(stage["last_step"], stage["evaluation"]) for stage in found["stages"]] == [(2, {})]
    assert train.main([*arguments(tmp_path / "run", steps=4), "--resume"]) == 0
    found = results(tmp_path / "run")
    assert (found["step"], found["stopped_by"]) == (4, None)
    assert [(stage["first_step"], stage["last_step"]) for stage in found["stages"]] == [(0, 4)]


@pytest.mark.parametrize("content", ["[1, 2]", "mine", '{"kind": "benchmark"}', None])
def test_a_results_file_of_the_user_is_left_alone(tmp_path, capsys, content):
    mine = tmp_path / "run" / "results.json"
    mine.parent.mkdir()
    mine.mkdir() if content is None else mine.write_text(content)
    assert train.main(arguments(tmp_path / "run", steps=1)) == 2
    assert "results.json: expected what a run wrote" in capsys.readouterr().err
    assert mine.is_dir() if content is None else mine.read_text() == content


# ---- what is said of the data ----


def test_how_often_blocks_are_repeated_and_what_is_evaluated(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "equal", steps=1)) == 0
    out = capsys.readouterr().out
    assert "23 drawn per epoch (1.4 times each); held out: 1 document (" in out
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    more = ["--mixing", "proportional", "--eval-data", str(tmp_path / "test.jsonl")]
    assert train.main(arguments(tmp_path / "proportional", *more, steps=1)) == 0
    out = capsys.readouterr().out
    assert "data: two: 6 documents" in out
    assert out.count("held out: nothing") == 2
    assert "evaluation: test: 4 blocks\n" in out
    assert results(tmp_path / "proportional")["stages"][0]["evaluation"] == {}  # it tells nothing of the skills


def test_a_skill_is_measured_on_evaluation_data_of_its_name_or_on_the_only_ones(tmp_path):
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    assert train.main(arguments(tmp_path / "named", "--eval-data", str(tmp_path / "two.jsonl"), steps=1)) == 0
    assert results(tmp_path / "named")["stages"][0]["evaluation"].keys() == {"two"}
    (tmp_path / "two.jsonl").rename(tmp_path / "test.jsonl")
    words = arguments(tmp_path / "only", "--eval-data", str(tmp_path / "test.jsonl"), steps=1)
    place = words.index("--data")
    assert train.main([*words[:place], *words[place + 2 :], "--experts", "1"]) == 0
    assert results(tmp_path / "only")["stages"][0]["evaluation"].keys() == {"two"}


def test_flags_without_effect_are_said(tmp_path, capsys):
    more = ["--temperature", "2", "--balance-coefficient", "0"]
    assert train.main(arguments(tmp_path / "run", *more, steps=1)) == 0
    assert "without effect: --temperature, --balance-coefficient; with --route specialised" in capsys.readouterr().out
    assert train.main(arguments(tmp_path / "joint", *more, "--route", "joint", steps=1)) == 0
    assert "without effect" not in capsys.readouterr().out


def test_another_mixing_is_another_run(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", steps=1)) == 0
    more = ["--resume", "--mixing", "proportional", "--max-steps", "2"]
    assert train.main(arguments(tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert "mixing: 'equal' there, 'proportional' here" in err
    assert "data:" not in err


def test_a_run_of_an_earlier_version_had_the_defaults_of_new_settings():
    from dylora_moe.training.resume import differences

    here = {"mixing": "equal", "eval_data": [], "seed": 3, "data_fingerprint": "a"}
    assert list(differences({"seed": 3, "data_fingerprint": "b"}, here).values()) == [
        "data: what None holds has changed"
    ]
    assert list(differences({"seed": 3, "data_fingerprint": "b"}, here | {"mixing": "proportional"}).values()) == [
        "mixing: 'equal' there, 'proportional' here"
    ]
    before, after = here | {"held_out": {"a": "1"}}, here | {"held_out": {"b": "2"}, "eval_data": ["b"]}
    assert list(differences(before, after).values()) == ["data: other documents are held out or evaluated"]
    assert list(differences(before, after | {"data_fingerprint": "b"}).values()) == [
        "eval_data: [] there, ['b'] here",
        "data: other documents are held out or evaluated",
    ]


# ---- a restart ----


def test_a_restart_by_torchrun_resumes(tmp_path, capsys, monkeypatch):
    words = arguments(tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 6)
        assert train.main(words) == 143
    assert train.main(words) == 2  # the negative control: without a restart it is refused
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(words) == 0
    line = f"restarted by torchrun (restart 1): resuming from the newest checkpoint of {tmp_path / 'run'}"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("restarts", "words", "saved", "resume"),
    [
        ("0", [], False, None),
        ("0", ["--resume", "x"], True, "x"),
        ("1", [], False, "auto"),  # which begins where there is no checkpoint yet
        ("2", ["--resume", "x"], False, "x"),
        ("2", ["--resume", "x"], True, "auto"),
    ],
)
def test_what_a_restart_resumes_from(tmp_path, monkeypatch, restarts, words, saved, resume):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    monkeypatch.setattr("dylora_moe.store.run_folder.checkpoints", lambda run_dir: [run_dir] * saved)
    settings, said = parse(["--demo", *words]), []
    assert resuming_after_restart(settings, said.append).resume == resume
    assert len(said) == (resume == "auto")


def test_a_restart_takes_only_the_weights_until_the_run_has_saved_a_checkpoint(tmp_path, monkeypatch):
    source, run_dir = tmp_path / "source", tmp_path / "run"
    assert train.main(arguments(source)) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    shutil.copytree(source, run_dir)

    def weights_only(resume: str) -> bool:
        words = [*arguments(run_dir, "--resume", resume, "--resume-weights-only")]
        return resuming_after_restart(parse(words), lambda line: None).resume_weights_only

    named = newest(run_dir)
    assert weights_only(str(named)) and weights_only("auto")  # nothing was saved yet
    assert not weights_only(str(newest(source)))
    assert train.main(arguments(run_dir, "--resume", "--resume-weights-only", steps=16)) == 0
    assert not weights_only(str(named)) and not weights_only("auto")


FAILING_ONCE = """
import os, signal, sys
import train

def fail(self, args, state, control, **kwargs):
    if state.global_step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

train.PeftCheckpointCallback.on_step_begin = fail
raise SystemExit(train.main())
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING_ONCE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    words = [sys.executable, *launch, str(tmp_path / "failing.py"), *arguments(tmp_path / "run", "--batch-size", "4")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("restarted by torchrun (restart 1)") == 1
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-4'}" in done.stdout
    assert steps(tmp_path / "run") == [4, 8, 12]
