"""`python train.py --demo`: under a minute, two saves, and how to go on. And the same on real SmolLM2 weights."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test_checkpoint_minimal
import train
from dylora_moe.training.run import DEMO_BASE, DEMO_TEXTS

from ..support.runs import assert_same, newest, signal_at, states, steps


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> tuple[Path, str]:
    """The run folder, and what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        patch.setattr("sys.argv", ["train.py", "--demo", "--output-dir", str(folder)])
        assert train.main(["--demo", "--output-dir", str(folder)]) == 0
    return folder, "\n".join(said)


def test_the_demo_saves_twice(demo_run):
    folder, _ = demo_run
    assert steps(folder) == [30, 60]
    assert states(folder / "checkpoint-30") == ["immature", "new"]  # at the end of the trunk
    assert states(folder / "checkpoint-60") == ["mature", "mature"]


def test_its_loss_falls(demo_run):
    losses = [float(loss) for loss in re.findall(r"step +\d+/60  loss ([\d.]+)", demo_run[1])]
    assert losses[-1] < losses[0] - 1.5
    table = re.findall(r"^(code|prose) +([\d.]+) +([\d.]+) +([\d.]+) % +([\d.]+) %$", demo_run[1], re.MULTILINE)
    assert [row[0] for row in table] == ["code", "prose"]
    for _, before, after, *shares in table:
        assert float(before) == pytest.approx(losses[0], abs=0.5)
        assert float(after) < float(before) - 1
        assert sum(map(float, shares)) == pytest.approx(100, abs=0.2)
        assert min(map(float, shares)) > 5


def test_it_says_how_to_validate(demo_run, capsys):
    line = re.search(r"^validate it: python test_checkpoint_save_load.py (.*)$", demo_run[1], re.MULTILINE)
    assert test_checkpoint_minimal.main(shlex.split(line[1])) == 0
    assert "ALL TESTS PASSED" in capsys.readouterr().out


@pytest.mark.slow
def test_it_says_how_to_go_on(demo_run, tmp_path):
    folder, said = demo_run
    moved = shutil.copytree(folder, tmp_path / "run")
    line = re.search(r"^train on: python train.py (.*)$", said, re.MULTILINE)[1].replace(str(folder), str(moved))
    assert train.main([*shlex.split(line), "--max-steps", "64"]) == 0
    assert steps(moved) == [30, 60, 64]


@pytest.mark.slow
def test_the_demo_can_be_stopped_and_resumed(demo_run, tmp_path, monkeypatch, capsys):
    words = ["--demo", "--output-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 44, signal.SIGINT)
        assert train.main(words) == 130
    assert train.main([*words, "--resume"]) == 0
    assert steps(tmp_path / "run") == [30, 45, 60]
    assert_same_weights(newest(demo_run[0]), newest(tmp_path / "run"))


def assert_same_weights(one: Path, other: Path) -> None:
    for path in [*one.rglob("adapter_model.safetensors"), one / "router.safetensors", one / "optimizer.pt"]:
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


def test_a_mistake_leaves_nothing_of_the_demo(tmp_path, capsys):
    for words in (["--data", "nothing.jsonl"], ["--targets", "nothing"], ["--block-size", "513"]):
        assert train.main(["--demo", "--output-dir", str(tmp_path / "run"), *words]) == 2
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert train.main(["--demo", "--output-dir", str(tmp_path / "run"), "--targets", "nothing"]) == 2
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "mine.txt" in left
    assert not left & {DEMO_BASE, *DEMO_TEXTS}
    assert not [name for name in left if name.startswith(".dylora")]


# ---- real weights ----

REAL_FLAGS = "--batch-size 1 --block-size 256 --lora-r 8 --max-steps 12 --save-steps 0 --warmup 0 --logging-steps 1"


def real_arguments(folder: Path, run_dir: Path, gguf: Path) -> list[str]:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)][:40]
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--model", str(gguf), "--data", str(folder / "prose.jsonl"), "--output-dir", str(run_dir)]
    return [*words, *REAL_FLAGS.split()]


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_learns_and_resumes(smollm_gguf, tmp_path, monkeypatch, capsys):
    words = [real_arguments(tmp_path, tmp_path / name, smollm_gguf) for name in ("whole", "run")]
    assert train.main(words[0]) == 0
    before, after = re.search(r"^prose +([\d.]+) +([\d.]+)", capsys.readouterr().out, re.MULTILINE).groups()
    assert float(after) < float(before) - 0.1  # held out
    for path in newest(tmp_path / "whole").rglob("adapter_model.safetensors"):
        moved = [tensor.any() for name, tensor in load_file(path).items() if "lora_B" in name]
        assert torch.stack(moved).all(), path
    with monkeypatch.context() as patch:
        signal_at(patch, "on_step_begin", 4)
        assert train.main(words[1]) == 143
    assert train.main([*words[1], "--resume"]) == 0
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "run"))
