"""Running the three scripts in this process on a tiny model, and spoiling what they wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

import test_checkpoint_minimal as minimal
import test_checkpoint_quick as quick
import test_checkpoint_save_load as full
from dylora_moe.store.manifest import MANIFEST

__all__ = ["full", "minimal", "quick"]

ROOT = Path(__file__).parents[2]
EXPERT_0 = "peft_adapters/expert_0/expert_0/adapter_model.safetensors"
EXPERT_1 = "peft_adapters/expert_1/expert_1/adapter_model.safetensors"
MINIMAL_LINES = ["✓ PASS: save", "✓ PASS: structure", "✓ PASS: size", "✓ ALL TESTS PASSED"]
FULL_LINES = ["✓ PASS: save", "✓ PASS: structure", "✓ PASS: load", "✓ PASS: consistency", "✓ PASS: size",
              "✓ ALL TESTS PASSED"]  # fmt: skip


class Outcome:
    """The exit code of a script and the lines it printed."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err
        self.lines = [line.rstrip() for line in out.splitlines()]

    def verdicts(self) -> list[str]:
        return [line for line in self.lines if line.startswith(("✓ PASS", "✗ FAIL", "✓ ALL", "✗ SOME"))]

    def failed(self) -> list[str]:
        return [line.removeprefix("✗ FAIL: ") for line in self.lines if line.startswith("✗ FAIL")]


def run(script, capsys, *args: object) -> Outcome:
    capsys.readouterr()
    code = script.main([str(arg) for arg in args])
    return Outcome(code, *capsys.readouterr())


def copy_of(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / "checkpoint-7"))


def rewrite_manifest(checkpoint: Path) -> None:
    """What a forger would do: the manifest fits what is there."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            content = path.read_bytes()
            name = path.relative_to(checkpoint).as_posix()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    value = {"format_version": 1, "files": files}
    (checkpoint / MANIFEST).write_text(json.dumps(value))


def edit_tensors(path: Path, change: Callable[[dict], None]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
