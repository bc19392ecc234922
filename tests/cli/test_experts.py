"""dylora-moe experts ... and dylora-moe export: what they print, their JSON, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dylora_moe.checkpoint.verify import find_problems
from dylora_moe.cli.main import main

from ..support.edits import checkpoint, joint, skills, text_of
from ..support.scripts import ROOT


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list(capsys):
    code, out, _ = run(capsys, "experts", "list", checkpoint())
    assert code == 0
    assert out.splitlines()[1].startswith("expert_1  mature    r=4, alpha=8, ")
    assert out.splitlines()[1].endswith("parameters  two (960 tokens, held-out loss 2.0000)")
    code, out, err = run(capsys, "experts", "list", joint(), "--json", "-")
    found = json.loads(out)
    assert [each["state"] for each in found["experts"]] == ["immature", "new"]
    assert err.splitlines()[1].endswith("no skill")


def test_remove(capsys, tmp_path):
    code, out, _ = run(capsys, "experts", "remove", checkpoint(), tmp_path / "new", "expert_0", "2", "--device", "cpu")
    assert code == 0
    assert out.splitlines()[:3] == [
        f"✓ {tmp_path / 'new'}: 1 expert",
        "  with expert_0, expert_2 went the skills one, three",
        "  expert_1 is now expert_0",
    ]
    assert "not with --resume" in out
    assert find_problems(tmp_path / "new") == [] and list(skills(tmp_path / "new")) == ["two"]


def test_import_merge_and_rename(capsys, tmp_path):
    lora, text = tmp_path / "lora", tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": bytes(ids).decode("latin1")}) + "\n" for ids in text_of(1)))
    new = [tmp_path / f"checkpoint-{i}" for i in range(3)]
    assert run(capsys, "experts", "export", checkpoint(), "expert_1", lora)[0] == 0
    json_flag = ["--json", tmp_path / "made.json"]
    words = ["import", checkpoint(), new[0], lora, "--data", text, "--name", "again", *json_flag]
    code, out, _ = run(capsys, "experts", *words)
    assert (code, out.splitlines()[0]) == (0, f"✓ {new[0]}: 4 experts")
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["numbering"] == {f"expert_{i}": f"expert_{i}" for i in range(3)}
    code, out, _ = run(capsys, "experts", "merge", new[0], new[1], "1", "3", "--rank", "8")
    assert code == 0 and "expert_1, expert_3 are one expert of rank 8, which holds 100.0% of their mean" in out
    code, out, _ = run(capsys, "experts", "rename", new[1], new[2], "again", "zwei")
    assert code == 0 and "the skill again is now zwei" in out
    assert {name: expert for name, (expert, _) in skills(new[2]).items()} == {"one": 0, "two": 1, "three": 2, "zwei": 1}


def test_collapse(capsys, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "some words that are held out"}) + "\n")
    words = ["collapse", checkpoint(), tmp_path / "one", "--weights", "1", "-1", "0.5", "--data", text, "--json", "-"]
    code, out, err = run(capsys, "experts", *words)
    found, lines = json.loads(out), err.splitlines()
    assert (code, found["weights"], found["rank"]) == (0, [1, -1, 0.5], 4)
    assert lines[0].startswith(f"✓ {tmp_path / 'one'}: one LoRA of rank 4, which holds ")
    assert lines[0].endswith("% of 1.00 expert_0, -1.00 expert_1, 0.50 expert_2")
    assert lines[1].split() == ["held-out", "loss", "mixture", "one", "LoRA", "base"]
    assert lines[2].split() == [
        "text",
        *(f"{found['losses']['text'][each]:.4f}" for each in ("mixture", "merged", "base")),
    ]
    code, out, _ = run(capsys, "experts", "collapse", checkpoint(), tmp_path / "two")
    assert code == 0 and "What it costs was not measured: there is no held-out text" in out


@pytest.mark.parametrize(("server", "program"), [("vllm", "vllm serve "), ("llama.cpp", "llama-server -m BASE.gguf ")])
def test_export(server, program, capsys, tmp_path):
    target = tmp_path / "served"
    code, out, err = run(capsys, "export", checkpoint(), target, "--to", server, "--json", "-")
    found = json.loads(out)
    assert code == 0 and err.startswith(f"✓ {target}: 3 experts for {server}; to serve them\n\n    {program}")
    assert found["command"].startswith(program) and len(list(target.iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["experts"], "the following arguments are required"),
        (["experts", "nosuch"], "invalid choice"),
        (["experts", "list", "{no}"], "expected a checkpoint folder, found nothing"),
        (["experts", "remove", "{old}", "{new}", "x"], "expected an expert like expert_1 or 1, got 'x'"),
        (["experts", "remove", "{old}", "{new}", "expert_7"], "has no expert_7, only expert_0 to expert_2"),
        (["experts", "remove", "{old}", "{old}", "1"], "exists already: name a new folder"),
        (["experts", "merge", "{old}", "{new}", "1"], "expected two experts or more to merge, got 1"),
        (["experts", "merge", "{old}", "{new}", "0", "1", "--rank", "0"], "expected a whole number of at least 1"),
        (["experts", "rename", "{old}", "{new}", "four", "five"], "there is no skill 'four'"),
        (["experts", "import", "{old}", "{new}", "{no}", "--data", "{no}"], "found nothing"),
        (["experts", "import", "{old}", "{new}", "{no}"], "the following arguments are required: --data"),
        (["experts", "collapse", "{old}", "{new}", "--weights", "1"], "expected a weight for each of the 3 experts"),
        (["experts", "remove", "{old}", "{new}", "1", "--base", "{no}"], "There is no file or folder"),
        (["export", "{old}", "{new}", "--to", "ollama"], "invalid choice"),
        (["export", "{old}", "{old}/x", "--to", "vllm"], "is inside the checkpoint"),
    ],
)
def test_bad_input(words, problem, capsys, tmp_path):
    names = {"old": checkpoint(), "new": tmp_path / "new", "no": tmp_path / "nothing"}
    code, out, err = run(capsys, *(word.format(**names) for word in words))
    assert (code, out) == (2, "") and problem in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_sound(capsys, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "router.safetensors").touch()
    code, _, err = run(capsys, "experts", "remove", tmp_path / "old", tmp_path / "new", "1")
    assert code == 1 and "is not a sound checkpoint" in err and not (tmp_path / "new").exists()


def test_what_needs_no_torch_does_not_load_it(tmp_path):
    code = "import sys; from dylora_moe.__main__ import main\n"
    code += "for i, words in enumerate(sys.argv[1:]): assert main(words.split()) == 0, words\n"
    code += "assert 'torch' not in sys.modules"
    commands = [f"experts list {checkpoint()}", f"experts export {checkpoint()} 0 {tmp_path / 'a'}"]
    commands += [f"export {checkpoint()} {tmp_path / to} --to {to}" for to in ("vllm", "llama.cpp")]
    done = subprocess.run([sys.executable, "-c", code, *commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
