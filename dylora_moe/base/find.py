"""Finding a base model by its name: a hub id, a local folder, a GGUF file, or a preset that ships with this package.

`find_base` decides which weights to use, without loading any. `load_base` in load.py then builds the model from

- pretrained weights: from a folder, from the hub through its cache, or from a GGUF file;
- random weights: the same architecture with seeded weights that take little memory (random_weights.py);
- none: all parameters are on the `meta` device and take no memory, buffers are real.

Code that comes with a model is never run, and a name that looks like a path is never looked for on the hub.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ..errors import UsageError, has_controls
from . import hub
from .config import checked_config, folder_config
from .quiet import quiet, refused
from .source import WEIGHT_FILES, Base, has_weights, need_gguf

DEFAULT_MODEL = "google/codegemma-2b"
WEIGHTS = ("auto", "pretrained", "random", "none")
PRESETS = Path(__file__).parent / "presets"


def find_base(
    name: str | os.PathLike,
    *,
    weights: str = "auto",
    token: str | None = None,
    revision: str | None = None,
    offline_ok: bool = True,
) -> tuple[Base, str]:
    """Find a base model and decide which of its weights to use. No weights are loaded.

    Args:
        name: a hub id, a folder as `save_pretrained` writes it, a GGUF file, or the name of a preset.
        weights: "pretrained", "random", "none", or "auto" for pretrained ones where they can be had and random ones
            otherwise. "none" and "random" need no network for a preset, a folder or a GGUF file.
        token: of the hub; default HF_TOKEN, or the stored login.
        revision: a branch, tag or commit on the hub.
        offline_ok: whether cached or random weights may replace those of a hub that cannot be reached.

    Returns:
        The base model, and "pretrained", "random" or "none".

    Raises:
        UsageError: if there is no such model, or not with these weights.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"Unknown weights {weights!r}: expected one of {', '.join(WEIGHTS)}.")
    if not isinstance(name, (str, os.PathLike)):
        raise UsageError(
            f"A base model is found by a name or path, got {type(name).__name__}; "
            "DyLoRAMoE(model, experts) takes one that is loaded."
        )
    name = os.fspath(name)
    if has_controls(name):
        raise UsageError(f"A base model's name has no control characters or line breaks, got {name!r}: rename it.")
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return _local(_folder_base(name, path), weights)
    if name and path.exists():
        return _local(_gguf_base(name, path), weights)
    if _looks_like_path(name):
        raise UsageError(
            f"There is no file or folder {name!r}. It looks like a path, so it was not looked for on the hub; "
            "give an existing folder or .gguf file, or a hub id such as google/codegemma-2b."
        )
    preset = _presets().get(name.lower())
    if preset is None:
        _check_hub_id(name)
    hub_id = preset["id"] if preset else name
    known = checked_config(preset["config"], hub_id) if preset else None
    if weights in ("none", "random"):
        return _architecture_base(hub_id, known, token, revision), weights
    return _weights_base(hub_id, known, weights, token, revision, offline_ok)


def _local(base: Base, weights: str) -> tuple[Base, str]:
    if base.has_weights:
        return base, "pretrained" if weights == "auto" else weights
    if weights == "pretrained":
        raise UsageError(
            f"{base.location} holds no weights: expected {' or '.join(WEIGHT_FILES)}, found only a config.json. "
            "Add the weights, or use --weights random or none."
        )
    if weights != "auto":
        return base, weights
    note = f"{base.location} holds a config.json but no weights: random weights of the same architecture are used"
    return replace(base, note=note), "random"


def _folder_base(name: str, folder: Path) -> Base:
    if not (folder / "config.json").is_file():
        hint = " (it is a LoRA adapter; give its base model)" if (folder / "adapter_config.json").exists() else ""
        raise UsageError(
            f"The folder {name} is not a base model: it has no config.json{hint}. "
            "Give a folder as save_pretrained writes it, or a hub id."
        )
    return Base(name, "folder", str(folder), None, folder_config(folder), has_weights(folder))


def _gguf_base(name: str, path: Path) -> Base:
    if path.suffix.lower() != ".gguf" or not path.is_file():
        raise UsageError(f"{name} is a file but not a .gguf model: give a model's folder, a .gguf file or a hub id.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(f"{name} is not a GGUF file: expected it to begin with b'GGUF', found {magic!r}.")
    need_gguf(name)
    with quiet(), refused(f"The GGUF file {name} cannot be read", "Download it again."):
        raw = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    return Base(name, "gguf", str(path), None, checked_config(raw, name), True)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(("/", ".gguf"))


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
        if not name:
            raise HFValidationError("it is empty")
    except HFValidationError as error:
        raise UsageError(
            f"{name!r} is neither a local folder or file nor a hub id ({str(error).splitlines()[0].rstrip('.')}). "
            "A hub id reads owner/model, for example google/codegemma-2b."
        ) from error


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    """Return the presets by their hub ids in lower case, and by the last parts of these."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PRESETS.glob("*.json"))]
    return {key.lower(): preset for preset in found for key in (preset["id"], preset["id"].split("/")[-1])}


def _architecture_base(hub_id: str, known: PreTrainedConfig | None, token: str | None, revision: str | None) -> Base:
    """Return the base for "none" and "random": a preset as it is, or the config from the cache or the hub."""
    if known is not None:
        return Base(hub_id, "preset", None, None, known, False)
    return _hub_base(hub_id, hub.cached(hub_id, revision) or hub.ask(hub_id, revision, token))


def _hub_base(hub_id: str, folder: Path, known: PreTrainedConfig | None = None) -> Base:
    """Return the base whose files are in a snapshot folder of the cache, which is named like the commit."""
    config = known or folder_config(folder, hub_id)
    return Base(hub_id, "hub", str(folder), folder.name, config, has_weights(folder))


def _weights_base(
    hub_id: str,
    known: PreTrainedConfig | None,
    weights: str,
    token: str | None,
    revision: str | None,
    offline_ok: bool,
) -> tuple[Base, str]:
    """Return the base for "pretrained" and "auto": from the hub, or its cache, or (auto) with random weights."""
    try:
        folder = hub.ask(hub_id, revision, token, WEIGHT_FILES)
        return replace(_hub_base(hub_id, folder), has_weights=True, token=token), "pretrained"
    except hub.HubError as error:
        problem = error
    found = hub.cached(hub_id, revision)
    if problem.unreachable and not offline_ok:
        raise problem
    if found is not None and has_weights(found):
        return _hub_base(hub_id, found), "pretrained"
    if weights == "pretrained":
        raise problem
    if found is not None:
        base = _hub_base(hub_id, found, known)
    elif known is not None:
        base = Base(hub_id, "preset", None, None, known, False)
    else:
        raise problem
    note = (
        f"{problem.sentence.rstrip('.')}: random weights of the same architecture are used; "
        f"set HF_TOKEN to use the real ones (export HF_TOKEN=your_token)"
    )
    return replace(base, note=note), "random"
