"""Where a base model comes from: hub id, local folder, GGUF file, or an architecture preset that ships here.

`find_base` decides, without loading anything, which weights can be had; `load_base` builds the model:

- pretrained: the real weights, from a folder, the hub (through its cache) or a GGUF file;
- random: the same architecture with seeded weights, which take little memory (`random_weights`);
- none: parameters on the `meta` device, buffers real; costs no memory.

Code that comes with a model is never run, and no name that looks like a path ever turns into a download.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ..errors import UsageError
from . import hub
from .config import checked_config, folder_config
from .quiet import quiet, refused
from .source import WEIGHT_FILES, Base, has_weights, need_gguf

DEFAULT_MODEL = "google/codegemma-2b"
WEIGHTS = ("auto", "pretrained", "random", "none")
PRESETS = Path(__file__).parent / "presets"


# ---------------------------------------------------------------------------------------------- finding


def find_base(
    name: str | os.PathLike,
    *,
    weights: str = "auto",
    token: str | None = None,
    revision: str | None = None,
    offline_ok: bool = True,
) -> tuple[Base, str]:
    """The base model of that name, and the weights to be used: "pretrained", "random" or "none".

    Loads no weights. "none" and "random" touch no network for a preset, a folder or a GGUF file. With
    offline_ok=False neither cached nor random weights stand in for a hub that cannot be reached.
    Raises UsageError for whatever cannot be had.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"Unknown weights {weights!r}: expected one of {', '.join(WEIGHTS)}.")
    if not isinstance(name, (str, os.PathLike)):
        raise UsageError(
            f"A base model is found by a name or path, got {type(name).__name__}; "
            "DyLoRAMoE(model, experts) takes one that is loaded."
        )
    name = os.fspath(name)
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
    if weights != "auto" or base.has_weights:
        used = "pretrained" if weights == "auto" else weights
        if used == "pretrained" and not base.has_weights:
            raise UsageError(
                f"{base.location} holds no weights: expected {' or '.join(WEIGHT_FILES)}, found only a config.json. "
                "Add the weights, or use --weights random or none."
            )
        return base, used
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
def _presets() -> dict[str, dict]:
    """By lower-case hub id, and by its last part."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PRESETS.glob("*.json"))]
    return {key.lower(): preset for preset in found for key in (preset["id"], preset["id"].split("/")[-1])}


def _architecture_base(hub_id: str, known: PreTrainedConfig | None, token: str | None, revision: str | None) -> Base:
    """For "none" and "random": a preset as it is; otherwise the config from the cache or, alone, from the hub."""
    if known is not None:
        return Base(hub_id, "preset", None, None, known, False)
    folder = hub.cached(hub_id, revision)
    if folder is None:
        folder = hub.ask(hub_id, revision, token)[1]
    return Base(hub_id, "hub", str(folder), folder.name, folder_config(folder, hub_id), has_weights(folder))


def _weights_base(
    hub_id: str,
    known: PreTrainedConfig | None,
    weights: str,
    token: str | None,
    revision: str | None,
    offline_ok: bool,
) -> tuple[Base, str]:
    """For "pretrained" and "auto": the hub, else its cache, else (auto) random weights of a known architecture."""
    try:
        commit, folder = hub.ask(hub_id, revision, token, WEIGHT_FILES)
        config = folder_config(folder, hub_id)
        return Base(hub_id, "hub", str(folder), commit, config, True, token=token), "pretrained"
    except hub.HubError as error:
        problem = error
    folder = hub.cached(hub_id, revision)
    stand_in = offline_ok or not problem.unreachable
    if folder is not None and has_weights(folder) and stand_in:
        return Base(hub_id, "hub", str(folder), folder.name, folder_config(folder, hub_id), True), "pretrained"
    if folder is not None and known is None:
        known = folder_config(folder, hub_id)
    if weights == "pretrained" or known is None or not stand_in:
        raise problem
    note = (
        f"{problem.sentence.rstrip('.')}: random weights of the same architecture are used; "
        f"set HF_TOKEN to use the real ones (export HF_TOKEN=your_token)"
    )
    location = str(folder) if folder is not None else None
    commit = folder.name if folder is not None else None
    kind = "hub" if folder is not None else "preset"
    return Base(hub_id, kind, location, commit, known, False, note=note), "random"
