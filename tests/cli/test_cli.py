"""python -m dylora_moe verify, list and report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import test_checkpoint_minimal as minimal
from dylora_moe.cli.main import COMMANDS, main
from dylora_moe.reporting.publish import write_results

from ..support.results import sample
from ..support.scripts import ROOT, copy_of
from ..support.tiny import tiny_base


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_base("llama").save_pretrained(folder / "tiny")
    assert minimal.main(["--model", str(folder / "tiny"), "--output-dir", str(folder)]) == 0
    return folder / "checkpoint"


def test_verify_sound(saved, capsys):
    assert main(["verify", str(saved)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"✓ {saved}: complete and sound, step 0, 0.1 MB in 8 files, 2 experts (immature)")
    assert out.count("\n") == 1


def test_verify_lists_every_problem(saved, tmp_path, capsys):
    folder = copy_of(saved, tmp_path)
    (folder / "router.safetensors").unlink()
    (folder / "model.safetensors").touch()
    assert main(["verify", str(folder), "--json", str(tmp_path / "x.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("✗ router.safetensors: ") for line in lines)
    assert any(line.startswith("✗ Found merged model file: model.safetensors") for line in lines)
    assert lines[-1].startswith(f"✗ {folder}: not complete and sound, ")
    result = json.loads((tmp_path / "x.json").read_text())
    assert (result["passed"], result["exit_code"], len(result["problems"])) == (False, 1, len(lines) - 1)


def test_verify_json_to_standard_output(saved, capsys):
    assert main(["verify", str(saved), "--json", "-"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["experts"], result["states"], result["step"]) == (2, ["immature"] * 2, 0)
    assert captured.err.startswith("✓")


@pytest.mark.parametrize("command", ["verify", "list", "report"])
@pytest.mark.parametrize("what", ["nothing", "a file"])
def test_not_a_folder(command, what, tmp_path, capsys):
    path = tmp_path / "x"
    if what == "a file":
        path.touch()
    assert main([command, str(path)]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "list"])
def test_the_home_of_nobody(command, capsys):
    assert main([command, "~nosuch/x"]) == 2
    assert "~nosuch/x" in capsys.readouterr().err


def test_a_checkpoint_is_not_a_run_folder(capsys, saved):
    assert main(["list", str(saved)]) == 2
    assert f"found a checkpoint; to look into it\n    python -m dylora_moe verify {saved}" in capsys.readouterr().err


def test_bad_flags(capsys, saved):
    inside = ["verify", str(saved), "--json", str(saved / "config.json")]
    for argv in ([], ["nosuch"], ["verify"], ["verify", "a", "b"], ["list", "--json"], inside):
        assert main(argv) == 2


def test_list(saved, tmp_path, capsys):
    for step in (10, 9, 100):
        folder = copy_of(saved, tmp_path)
        folder.rename(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-9" / "manifest.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    assert main(["list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert "incomplete: manifest.json" in lines[0]
    assert lines[1].split("  ")[-2:] == ["2 experts (immature)", "complete"]


def test_list_of_nothing(tmp_path, capsys):
    assert main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no checkpoints\n"


def test_report(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    write_results(run, sample(2))
    page = run / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert page.read_bytes() == before


def test_report_without_results(tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "expected results.json, found none; train.py writes one" in capsys.readouterr().err
    (tmp_path / "first").mkdir()
    write_results(tmp_path / "first", sample(1, 0))
    for folder, near in (("run", "first"), (".", "first"), ("first/checkpoint-2", "first")):
        (tmp_path / folder).mkdir(exist_ok=True)
        assert main(["report", str(tmp_path / folder)]) == 2
        assert f"found none; these folders have one:\n  - {tmp_path / near}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "results.json: expected JSON, found something else"),
        ('{"kind": "dylora-moe results", "step": 4}', "results.json: expected format_version 1, found none"),
        ("[]", "results.json: expected the results of a run"),
    ],
)
def test_report_of_broken_results(content, problem, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_report_leaves_a_page_of_the_user(tmp_path, capsys):
    write_results(tmp_path, sample(1, 0))
    (tmp_path / "report.html").write_text("mine")
    assert main(["report", str(tmp_path)]) == 2
    assert "report.html: expected what a run wrote" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"


def test_starts_without_torch(saved, tmp_path):
    """Neither do the flags of any command need torch, and what lists checkpoints needs no numpy either."""
    code = """
import contextlib, sys
from dylora_moe.cli.main import COMMANDS, main
assert main(["list", sys.argv[2]]) == 0 and "numpy" not in sys.modules
for command in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
assert main(["inspect", sys.argv[1]]) == main(["verify", sys.argv[1]]) == 0
assert main(["generate", sys.argv[1], "--prompt", ""]) == main(["route", sys.argv[1], ""]) == 2
assert "numpy" in sys.modules and "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(saved), str(saved.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module = [sys.executable, "-m", "dylora_moe", "list", str(saved.parent)]
    assert subprocess.run(module, cwd=ROOT, capture_output=True).returncode == 0


def test_a_module_is_loaded_when_its_command_is_called():
    code = "import sys; from dylora_moe.cli.main import build_parser; build_parser(sys.argv[1:]); print(*sys.modules)"
    for words in (["--help"], ["list", "x"]):
        out = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True).stdout
        loaded = [name for name in out.split() if name.startswith("dylora_moe.cli.commands.")]
        assert loaded == [f"dylora_moe.cli.commands.{word}" for word in words if word in COMMANDS]


@pytest.mark.parametrize(
    ("line", "offered"), [("dylora-moe ge", {"generate"}), ("dylora-moe generate x --show-", {"--show-routing"})]
)
def test_tab_completes_commands_and_flags(line, offered, tmp_path):
    """As argcomplete calls the program when the shell asks."""
    pytest.importorskip("argcomplete")
    told = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered")}
    environment = os.environ | told | {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    done = subprocess.run([sys.executable, "-m", "dylora_moe"], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert set((tmp_path / "offered").read_text().split()) == offered


def test_every_command_writes_json(saved, tmp_path, capsys):
    folder = copy_of(saved, tmp_path)
    write_results(tmp_path, sample(2))
    (tmp_path / "checkpoint-9").mkdir()
    assert main(["list", str(tmp_path), "--json", "-"]) == 0
    captured = capsys.readouterr()
    incomplete, sound = json.loads(captured.out)["checkpoints"][::-1]
    assert (sound["name"], sound["complete"], sound["states"]) == ("checkpoint-7", True, ["immature"] * 2)
    assert (incomplete["name"], incomplete["complete"], incomplete["states"]) == ("checkpoint-9", False, [])
    assert captured.err.splitlines()[0].startswith("checkpoint-7  ")
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["report"] == str(tmp_path / "report.html")
    assert main(["report", str(tmp_path), "--json", str(folder / "x.json")]) == 2
    assert "lies in a checkpoint" in capsys.readouterr().err
