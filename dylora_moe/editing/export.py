"""The experts of a checkpoint for other programs, each as a plain LoRA of its own. Needs no base model, and no torch.

| program | what is written | which expert a request gets |
|---|---|---|
| PEFT, vLLM | `expert_0/adapter_config.json` and `adapter_model.safetensors`, and so on | `"model": "expert_0"` |
| llama.cpp | `expert_0.gguf`, and so on (gguf_lora.py) | `"lora": [{"id": 0, "scale": 1.0}]` |
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import formats
from ..checkpoint.config import encode
from ..checkpoint.safetensors_file import read_json
from ..checkpoint.verify import SoundCheckpoint
from ..constants import expert_name
from ..errors import UsageError
from ..store.files import explained
from ..store.whole_files import new_folder
from .checked import check_experts, sound
from .gguf_lora import llama_cpp_name, write_lora

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank
GGUF = ".gguf"


@dataclass(frozen=True)
class Exported:
    """What was written, and the command that serves it."""

    folder: Path
    adapters: dict[str, str]  # the name of each expert -> its folder or file
    command: str
    request: str  # what a request says to get expert_0


def export_one(folder: str | Path, expert: int, target: str | Path) -> Path:
    """Write one expert to a new folder, flat, as `PeftModel.from_pretrained` reads it.

    Raises:
        UsageError: if there is no such expert, or the folder exists already or cannot be written.
        CheckpointError: if the checkpoint is not sound.
    """
    checkpoint = sound(folder, target)
    check_experts(checkpoint, [expert])
    with new_folder(Path(target)) as new, checkpoint.held_still():
        _copy(checkpoint, expert, new)
    return Path(target)


def export_for_vllm(folder: str | Path, target: str | Path) -> Exported:
    """Write every expert to a folder of its own in a new folder, for vLLM. Raises as `export_one`."""
    checkpoint = sound(folder, target)
    largest = max(expert.r for expert in checkpoint.config.experts)
    if largest > VLLM_RANKS[-1]:
        raise UsageError(f"{folder}: vLLM serves LoRAs of at most rank {VLLM_RANKS[-1]}, found one of {largest}")

    def write(new: Path, index: int) -> str:
        _copy(checkpoint, index, new / expert_name(index))
        return expert_name(index)

    adapters = _write_all(checkpoint, Path(target), write)
    base, revision = checkpoint.config.base_model.located(checkpoint.folder), checkpoint.config.base_model.revision
    words = ["vllm", "serve", base or "BASE", *(["--revision", revision] if revision and base else [])]
    words += ["--enable-lora", "--max-loras", str(len(adapters))]
    words += ["--max-lora-rank", str(next(rank for rank in VLLM_RANKS if rank >= largest))]
    words += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    return Exported(Path(target), adapters, shlex.join(words), '"model": "expert_0"')


def export_for_llama_cpp(folder: str | Path, target: str | Path) -> Exported:
    """Write every expert to a GGUF file in a new folder, for llama.cpp.

    Raises:
        UsageError: as `export_one`, and if llama.cpp does not know the base model, or not by its layers' names.
    """
    checkpoint = sound(folder, target)
    llama_cpp_name(checkpoint.config.base_model.architecture, str(folder))

    def write(new: Path, index: int) -> str:
        name = expert_name(index) + GGUF
        new.mkdir(exist_ok=True)
        write_lora(new / name, checkpoint, index)
        return name

    adapters = _write_all(checkpoint, Path(target), write)
    base = checkpoint.config.base_model.located(checkpoint.folder) or ""
    words = ["llama-server", "-m", base if base.endswith(GGUF) else "BASE.gguf", "--lora-init-without-apply"]
    words += [word for path in adapters.values() for word in ("--lora", path)]
    return Exported(Path(target), adapters, shlex.join(words), '"lora": [{"id": 0, "scale": 1.0}]')


def _write_all(checkpoint: SoundCheckpoint, target: Path, write: Callable[[Path, int], str]) -> dict[str, str]:
    with new_folder(target) as new, checkpoint.held_still():
        names = [write(new, index) for index in range(checkpoint.config.num_experts)]
    return {expert_name(index): str(target / name) for index, name in enumerate(names)}


def _copy(checkpoint: SoundCheckpoint, index: int, new: Path) -> None:
    """Copy the two files of an expert. Its config names the base model by where it is now."""
    old = checkpoint.folder / checkpoint.adapter_folder(index)
    found = read_json(old / formats.ADAPTER_CONFIG)
    assert isinstance(found, dict)  # it was verified
    found |= {"base_model_name_or_path": checkpoint.config.base_model.located(checkpoint.folder)}
    with explained("write in", new):
        new.mkdir(parents=True)
        (new / formats.ADAPTER_CONFIG).write_bytes(encode(found))
        shutil.copyfile(old / formats.ADAPTER_WEIGHTS, new / formats.ADAPTER_WEIGHTS)
