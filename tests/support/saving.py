"""A small checkpoint without tensors, for the tests of the commit protocol and its manifest."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from dylora_moe.store import run_folder
from dylora_moe.store.files import explained
from dylora_moe.store.publish import staged

ROOT = Path(__file__).parents[2]
NESTED = "peft_adapters/expert_0/expert_0"
FILES = ["config.json", f"{NESTED}/adapter_config.json", f"{NESTED}/adapter_model.safetensors", "router.safetensors"]


def content(step: int, path: str) -> bytes:
    return f"{path} of step {step}\n".encode() * (1 + step % 7)


def write_files(folder: Path, step: int) -> None:
    """With plain `os` calls, so that the faults reach them."""
    for path in FILES:
        for parent in reversed(Path(path).parents[:-1]):
            with explained("create", folder / parent), suppress(FileExistsError):
                os.mkdir(folder / parent)
        with explained("write", folder / path):
            descriptor = os.open(folder / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.write(descriptor, content(step, path))
            finally:
                os.close(descriptor)


def save(run: Path, step: int) -> None:
    with staged(run / f"checkpoint-{step}") as folder:
        if folder is not None:
            write_files(folder, step)


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in run_folder.checkpoints(run)]


def tree(folder: Path) -> dict[str, object]:
    """Everything in a folder: path -> content, target of a link, or None for a folder."""

    def what(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(folder)): what(path) for path in sorted(folder.rglob("*"))}


def python(code: str, *args: object) -> subprocess.Popen:
    """Another process that imports the protocol alone."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
    head += "from dylora_moe.store.run_folder import *; from dylora_moe.store.publish import *\n"
    head += "from dylora_moe.store.lock import writer_lock\n"
    command = [sys.executable, "-S", "-E", "-c", head + code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
