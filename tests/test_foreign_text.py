"""Foreign text, from each of its sources, reaches the terminal and GitHub Actions in printable form only.

And a secret reaches neither them nor a file.
"""

from __future__ import annotations

import ast
import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train
from dylora_moe.cli.main import main as dylora_moe
from dylora_moe.errors import CheckpointError, UsageError, printable, shown

from .support.base_folders import isolate, tiny_folder
from .support.runs import arguments, material, signal_at
from .support.scripts import ROOT, copy_of, full, minimal, rewrite_manifest
from .support.tiny import tiny_base

EVIL = "evil\x1b[31m\x07\r\n::error::spoofed\n  ::add-mask::x\n✓ SPOOFED\n##[error]y\x9b\u202e\u2028"
TOKEN = "hf_SECRETsecretSECRETsecret"


def dirty(text: str) -> list[str]:
    """The lines that act on a terminal or on GitHub Actions, or that look like a verdict."""
    lines = text.split("\n")
    ours = ("::error title=minimal", "::error title=save_load")
    return [
        line
        for line in lines
        if not line.isprintable()
        or "##[" in line
        or (line.lstrip().startswith("::") and not line.startswith(ours))
        or line.strip() == "✓ SPOOFED"
    ]


def test_what_is_dirty_is_seen():
    assert len(dirty(EVIL)) == 5
    assert dirty("::error title=minimal save::evil\n✓ PASS: save") == []


def test_printable():
    assert printable("a b\n  - ä✓: 1::2") == "a b\n  - ä✓: 1::2"
    assert dirty(printable("x\n" + EVIL)) == ["✓ SPOOFED"]  # a line break of ours is not told from others
    assert dirty(printable(shown(EVIL, most=None))) == []
    assert printable(printable(EVIL)) == printable(EVIL)
    for error in (UsageError(EVIL), CheckpointError(EVIL, [EVIL])):
        assert dirty(str(error)) in ([], ["✓ SPOOFED"])
    assert printable(f"Illegal header value b'Bearer {TOKEN} x' here") == "Illegal header value b'Bearer ***' here"


# ---- each source ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    material()
    tiny_base("llama").save_pretrained(folder / "tiny")
    assert minimal.main(["--model", str(folder / "tiny"), "--output-dir", str(folder)]) == 0
    return folder / "checkpoint"


def with_config(saved, tmp_path, change) -> Path:
    folder = copy_of(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    rewrite_manifest(folder)
    return folder


def all_on(folder: Path) -> list:
    """Everything that reads a checkpoint."""
    return [
        lambda: minimal.main(["--checkpoint", str(folder)]),
        lambda: full.main(["--checkpoint", str(folder)]),
        lambda: dylora_moe(["verify", str(folder)]),
        lambda: dylora_moe(["list", str(folder.parent)]),
        lambda: dylora_moe(["inspect", str(folder)]),
        lambda: dylora_moe(["route", str(folder), "a"]),
        lambda: train.main(arguments(folder.parent, "--resume")),
    ]


def base_name(saved, tmp_path):
    return all_on(with_config(saved, tmp_path, lambda config: config["base_model"].update(name=EVIL)))


def expert_name(saved, tmp_path):
    return all_on(with_config(saved, tmp_path, lambda config: config["experts"][0].update(name=EVIL)))


def checkpoint_folder(saved, tmp_path):
    folder = tmp_path / EVIL / "checkpoint-7"
    shutil.copytree(saved, folder)
    (folder / "router.safetensors").unlink()
    return all_on(folder)


def hub_id(saved, tmp_path):
    return [
        lambda: minimal.main(["--model", f"{EVIL}/{EVIL}"]),
        lambda: train.main(["--model", EVIL, "--data", str(material() / "one.jsonl"), "--output-dir", str(tmp_path)]),
        lambda: train.main(["--model", "a/b", "--data", EVIL, "--output-dir", str(tmp_path)]),
    ]


def architectures(saved, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [f"{EVIL}MaskedLM"]}))
    return [lambda: minimal.main(["--model", str(folder)])]


def tensor_of_a_base(saved, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[EVIL] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return [lambda: full.main(["--model", str(folder)])]


def data_column(saved, tmp_path):
    rows = [json.loads(line) | {EVIL: "x"} for line in (material() / "one.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [lambda: train.main([*arguments(tmp_path / "run", steps=1)[:2], *short(tmp_path / "rows.jsonl", tmp_path)])]


def data_file(saved, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"{EVIL}.jsonl").write_text("{")
    base = arguments(tmp_path / "run")[:2]
    return [lambda data=data: train.main([*base, *short(data, tmp_path)]) for data in (folder, *folder.iterdir())]


def short(data: Path, tmp_path: Path) -> list[str]:
    words = "--block-size 32 --batch-size 2 --max-steps 1 --lora-r 2 --device cpu"
    return ["--data", str(data), "--output-dir", str(tmp_path / "run"), *words.split()]


SOURCES = [
    base_name, expert_name, checkpoint_folder, hub_id, architectures, tensor_of_a_base, data_column, data_file
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_foreign_text_is_shown_in_printable_form(source, saved, tmp_path, capfd, monkeypatch):
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    calls, told = source(saved, tmp_path), 0
    capfd.readouterr()
    for number, call in enumerate(calls):
        call()
        said = "".join(capfd.readouterr())
        told += "evil" in said or "control characters" in said
        assert dirty(said) == [], (number, said)
    assert told, "the text was not shown at all: nothing was tested"
    if (tmp_path / "summary.md").exists():
        assert dirty((tmp_path / "summary.md").read_text()) == []


def test_everything_is_printed_in_one_place():
    """By `say` and `annotate` of system/command_line.py."""
    files = [*(ROOT / "dylora_moe").rglob("*.py"), *ROOT.glob("*.py")]
    calls = [
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "traceback.print_exception")
    ]
    assert calls == ["command_line.py"] * 2


# ---- secrets ----


def files_with(token: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_a_token_is_neither_shown_nor_saved(tmp_path, capfd, monkeypatch):
    isolate(monkeypatch, tmp_path)
    run = tmp_path / "runs"
    yaml = tmp_path / "settings.yaml"
    yaml.write_text(f"hf_token: {TOKEN}\n")
    given = ("--hf-token", TOKEN)
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_end", 1, signal.SIGINT)
        assert train.main(arguments(run / "stopped", f"--hf_token={TOKEN}", steps=3)) == 130
    out = capfd.readouterr().out
    assert "\ngo on with: python train.py --model" in out and TOKEN not in out
    demo = ["--demo", "--max-steps", "1", "--block-size", "32", "--output-dir", str(run / "demo"), *given]
    assert train.main([*demo, "--logging-steps", "1"]) == 0
    out = capfd.readouterr().out
    assert "\ntrain on: python train.py --demo" in out and TOKEN not in out
    assert train.main(arguments(run / "yaml", "--config", str(yaml), steps=1)) == 0
    for script in (minimal, full):
        words = ["--model", str(material() / "base"), "--json", str(run / f"{script.__name__}.json"), *given]
        assert script.main([*words, "--output-dir", str(run / script.__name__)]) == 0
    assert TOKEN not in "".join(capfd.readouterr())
    assert [path.name for path in files_with(TOKEN, tmp_path)] == ["settings.yaml"]  # so that it would be found


def test_an_error_does_not_show_a_token(tmp_path, capfd, monkeypatch):
    isolate(monkeypatch, tmp_path)

    def config(text: str) -> list[str]:
        (tmp_path / "settings.yaml").write_text(text)
        return ["--config", str(tmp_path / "settings.yaml")]

    remote = ["--model", "some/model", "--data", "x", "--output-dir", str(tmp_path / "run")]
    wrong = [
        [*remote, "--hf-token", TOKEN],
        [*remote, "--hf-token", TOKEN, "--experts", "0"],
        [*remote, "--hf-token", f"{TOKEN} \n x"],
        [*remote, "--hf-tok", TOKEN],
        [*remote, f"--hf-tok={TOKEN}"],
        [*remote, "--hf-tokne", TOKEN, "--lerning-rate", "1"],
        [*remote, *config(f"hf_token: [{TOKEN}]")],
        [*remote, *config(f"hf_token: {{a: {TOKEN}}}")],
        [*remote, *config(f"hf_token: '{TOKEN}\nexperts: 2")],
        [*remote, *config(f"hf_token: {TOKEN}: x")],
        [*remote, *config(f"hf_token: {TOKEN}\nexperts: 0")],
        [*remote, *config(f"hf_token: {TOKEN}\nhf-token: {TOKEN}")],
    ]
    for words in wrong:
        assert train.main(words) == 2
        said = "".join(capfd.readouterr())
        assert "train.py: " in said and TOKEN not in said, words
    for words in (wrong[0], wrong[3]):
        assert minimal.main([*words[:2], "--weights", "random", *words[-2:]]) == 2
        assert TOKEN not in "".join(capfd.readouterr())
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} {TOKEN}")
    assert train.main(remote) == 2
    assert TOKEN not in "".join(capfd.readouterr())
