"""The README's blocks run as they stand, in order, in an empty folder beside which there is a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base, load_tokenizer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What a command begins with -> why it is not run here.
NOT_RUN = {
    "make check": "runs the minimal script, as a later block does",
    "make test": "runs this test",
    "pip install .": "tests/test_package.py installs the package",
    "python train.py --model google/codegemma-2b": "needs gated weights and a data set of the Hub",
    "python train.py --grow --output-dir runs/first": "tests/stages/test_growth.py grows mixtures",
    "python test_checkpoint_save_load.py --model google/codegemma-2b": "tests/validation/test_scripts.py runs it",
    "torchrun": "tests/training/test_distributed.py starts two processes",
    "accelerate launch": "tests/training/test_distributed.py starts two processes",
    "dylora-moe generate runs/pirate/checkpoint-8    #": "tests/cli/test_shell.py chats",
    "export HF_TOKEN=": "there is no token",
    "dylora-moe generate runs/pirate/checkpoint-8 --prompt": "tests/cli/test_shell.py answers prompts",
    "dylora-moe eval": "tests/cli/test_shell.py evaluates",
    "dylora-moe run lm_eval": "tests/cli/test_programs.py runs it on tasks of this machine",
    "dylora-moe run transformers serve": "tests/cli/test_programs.py asks such a server",
    "dylora-moe experts collapse": "tests/cli/test_experts.py runs it",
    "dylora-moe gateway": "tests/serving serves it in front of a server of its own",
    "curl http://127.0.0.1:8080": "asks that server",
    "dylora-moe push": "tests/sharing pushes to a Hub on this machine",
    "dylora-moe pull": "tests/sharing pulls from a Hub on this machine",
    "dylora-moe experts import": "tests/cli/test_experts.py runs it",
    "dylora-moe experts merge": "tests/cli/test_experts.py runs it",
    "dylora-moe experts remove": "tests/cli/test_experts.py runs it",
    "dylora-moe experts rename": "tests/cli/test_experts.py runs it",
}


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README.read_text(encoding="utf-8")) if name == language]


def commands(block: str) -> list[str]:
    """The commands of a bash block: lines, with those that a backslash or a here-document continues."""
    found: list[str] = []
    end: str | None = None
    for line in block.splitlines():
        if end is not None or (found and found[-1].endswith("\\")):
            found[-1] += "\n" + line
            end = None if line == end else end
        else:
            found.append(line)
            here = re.search(r"<< '(\w+)'$", line)
            end = here[1] if here else None
    return found


def reason_not_to_run(command: str) -> str | None:
    return next((begin for begin in NOT_RUN if command.startswith(begin)), None)


def model_folder(folder: Path, gguf: Path) -> None:
    """The model of the first example under its hub id, so that the same command finds it without the Hub."""
    source, weights = find_base(str(gguf))
    load_base(source, weights, dtype="float32").save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which everything of the clone lies, and which is nobody's home."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("dylora_moe", "train.py", *(path.name for path in ROOT.glob("test_checkpoint_*.py"))):
        (place / name).symlink_to(ROOT / name)
    (place / "bin").mkdir()
    for name, command in (("python", '"$@"'), ("dylora-moe", '-m dylora_moe "$@"')):
        script = place / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {command}\n')
        script.chmod(0o755)
    yield place
    shutil.rmtree(place, ignore_errors=True)  # the model takes half a GB


def run(place: Path, command: list[str]) -> str:
    environment = os.environ | {
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(place / "home"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(place),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.real
@pytest.mark.slow  # minutes: `make docs-check` and `make test-all` run it
def test_every_block_runs_as_it_stands(smollm_gguf, place):
    model_folder(place / MODEL, smollm_gguf)
    out = ""
    for language, text in BLOCK.findall(README.read_text(encoding="utf-8")):
        if language == "python":
            out += run(place, [str(place / "bin" / "python"), "-c", text])
        for command in commands(text) if language == "bash" else ():
            if reason_not_to_run(command) is None:
                out += run(place, ["bash", "-euo", "pipefail", "-c", command])
    for line in ("✓ ALL TESTS PASSED", "✓ ALL QUICK TESTS PASSED", "saved runs/pirate/checkpoint-8"):
        assert line in out, line
    assert re.search(r"^pirate +3\.\d+ +2\.\d+ ", out, re.MULTILINE), out  # it learns, as the table of the README says
    assert sorted(path.name for path in (place / "pirate-lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (place / "runs/mine/checkpoint-2/manifest.json").is_file()


def test_what_is_not_run_is_there():
    """A reason not to run something goes when it goes."""
    found = [command for block in blocks("bash") for command in commands(block)]
    assert {reason_not_to_run(command) for command in found} - {None} == set(NOT_RUN)
    assert len([command for command in found if reason_not_to_run(command) is None]) > 6
    assert len(blocks("python")) > 3


def test_commands_are_told_apart():
    assert commands("a\nb \\\n  c\ncat > x << 'EOF'\n1\n2\nEOF\nd\n") == [
        "a",
        "b \\\n  c",
        "cat > x << 'EOF'\n1\n2\nEOF",
        "d",
    ]


def test_a_block_that_fails_is_seen(place):
    with pytest.raises(AssertionError, match="No module named 'nothing'"):
        run(place, [str(place / "bin" / "python"), "-c", "import nothing"])
