"""The workflow and the action of this repository: valid for GitHub, and their commands are those that are meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .support.scripts import ROOT

ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def validated(path: Path, schema: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.github-{schema}", path]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("path", "schema"), [(ACTION, "actions"), *((path, "workflows") for path in WORKFLOWS)])
def test_github_takes_it(path, schema, tmp_path):
    done = validated(path, schema)
    assert done.returncode == 0, done.stdout + done.stderr
    spoiled = tmp_path / path.name
    spoiled.write_text(path.read_text().replace("runs:", "run:").replace("runs-on:", "run-on:"))
    assert validated(spoiled, schema).returncode == 1


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, "test_checkpoint_minimal.py --model google/codegemma-2b --experts 2"),
        ({"experts": "4", "args": "--lora-r 8 --max-size-mb 100"},
         "test_checkpoint_minimal.py --model google/codegemma-2b --experts 4 --lora-r 8 --max-size-mb 100"),
        ({"experts": "4", "args": "--lora-r 8\n--max-size-mb 100\n"},
         "test_checkpoint_minimal.py --model google/codegemma-2b --experts 4 --lora-r 8 --max-size-mb 100"),
        ({"script": "quick"}, "test_checkpoint_quick.py"),
        ({"script": "quick", "checkpoint": "run"}, "test_checkpoint_quick.py --checkpoint run"),  # which it refuses
        ({"script": "save_load", "checkpoint": "run/a b"}, "test_checkpoint_save_load.py --checkpoint run/a b"),
        ({"model": "x; touch spoiled $(touch spoiled)"}, "--model x; touch spoiled $(touch spoiled) --experts 2"),
    ],
)  # fmt: skip
def test_the_action_runs_the_script_that_is_asked_for(inputs, expected, tmp_path):
    """Its last step runs with a python that prints what it is given."""
    action = yaml.safe_load(ACTION.read_text())
    step = action["runs"]["steps"][-1]
    values = {name: entry["default"] for name, entry in action["inputs"].items()} | inputs
    asked = {f"${{{{ inputs.{name} }}}}": value for name, value in values.items()}
    environment = {key: asked.get(value, str(ROOT)) for key, value in step["env"].items()}
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*"\n')
    (tmp_path / "python").chmod(0o755)
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(expected)
    assert not (tmp_path / "spoiled").exists()
    assert all((ROOT / f"test_checkpoint_{name}.py").exists() for name in ("quick", "minimal", "save_load"))
