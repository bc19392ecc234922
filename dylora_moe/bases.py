"""Where a base model comes from: hub id, local folder, GGUF file, or an architecture preset that ships here.

`find_base` decides, without loading anything, which weights can be had; `load_base` builds the model:

- pretrained: the real weights, from a folder, the hub (through its cache) or a GGUF file;
- random: the same architecture with seeded weights, which take little memory (`random_weights`);
- none: parameters on the `meta` device, buffers real; costs no memory.

Code that comes with a model is never run, and no name that looks like a path ever turns into a download.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dylora_moe import hub
from dylora_moe.base_config import checked_config, folder_config, read_object
from dylora_moe.errors import UsageError, listed
from dylora_moe.machine import need_disk
from dylora_moe.quiet import quiet, refused
from dylora_moe.random_weights import random_model, shared_bytes
from dylora_moe.skeleton import (  # noqa: F401 - for callers, who need not know where a base's structure is told
    architecture,
    decoder_layers,
    skeleton,
    weights_fingerprint,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "google/codegemma-2b"
WEIGHTS = ("auto", "pretrained", "random", "none")
PRESETS = Path(__file__).parent / "presets"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
DTYPES |= {name: name for name in DTYPES.values()}

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WEIGHT_FILES = SINGLE_FILES + INDEX_FILES
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_PATTERNS = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_PATTERNS += ["spiece.model", "tekken.json", "chat_template*", "config.json"]


@dataclass(frozen=True)
class Base:
    """A base model, found but not loaded."""

    name: str  # as the user gave it; a preset's full hub id
    kind: str  # "hub", "folder", "gguf" or "preset"
    location: str | None  # local folder or file; for the hub the cached snapshot, if any
    revision: str | None  # hub commit hash, when known
    config: PreTrainedConfig
    has_weights: bool
    note: str | None = None  # one line for the user when "auto" had to take random weights
    token: str | None = field(default=None, repr=False, compare=False)  # for the download; never shown


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
    return Base(name, "folder", str(folder), None, folder_config(folder), _has_weights(folder))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in WEIGHT_FILES)


def _gguf_base(name: str, path: Path) -> Base:
    if path.suffix.lower() != ".gguf" or not path.is_file():
        raise UsageError(f"{name} is a file but not a .gguf model: give a model's folder, a .gguf file or a hub id.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(f"{name} is not a GGUF file: expected it to begin with b'GGUF', found {magic!r}.")
    _need_gguf(name)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with quiet(), refused(f"The GGUF file {name} cannot be read", "Download it again."):
        raw = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    return Base(name, "gguf", str(path), None, checked_config(raw, name), True)


def _need_gguf(name: str) -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"Reading the GGUF file {name} needs the package gguf, which is not installed:\n    pip install gguf"
        )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(("/", ".gguf"))


def _check_hub_id(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

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
    return Base(hub_id, "hub", str(folder), folder.name, folder_config(folder, hub_id), _has_weights(folder))


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
    if folder is not None and _has_weights(folder) and stand_in:
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


# ---------------------------------------------------------------------------------------------- loading


def load_base(
    base: Base,
    weights: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = "cpu",
    seed: int = 0,
    compact: bool = False,
) -> PreTrainedModel:
    """The model in eval mode with every parameter frozen.

    weights: "pretrained", "random" or "none", as find_base returned it. dtype: default the config's. With "none"
    parameters are on `meta`, buffers real. compact: of random weights, as `random_weights.random_model` takes it.
    Raises UsageError; weights that are missing are never made up.
    """
    dtype = resolve_dtype(dtype, base.config)
    device = resolve_device(device)
    if weights == "none":
        model = skeleton(base.config, dtype)
    elif weights == "random":
        model = random_model(base.config, dtype, device, seed, compact=compact)
    elif weights == "pretrained":
        model = _pretrained(base, dtype, device)
    else:
        raise UsageError(f"Unknown weights {weights!r}: expected pretrained, random or none.")
    # A checkpoint takes its base's name from here, and must find it from any working directory.
    local = base.kind in ("folder", "gguf")
    model.config._name_or_path = str(Path(base.location).resolve()) if local else base.name
    model.requires_grad_(False)
    return model.eval()


def resolve_dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig | None = None) -> torch.dtype:
    """float32, bfloat16, float16, float64 (or fp32, bf16, fp16, fp64); None means the config's, else float32."""
    import torch

    if dtype is None and config is not None:
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    name = str(dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    return getattr(torch, DTYPES[name])


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device, if it is there; None and "auto" mean the best there is."""
    import torch

    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"Unknown device {device!r}: expected cpu, cuda, cuda:0, mps or auto.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(found.type, False):
        usable = [name for name in ("cpu", "mps") if there[name]]
        usable += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise UsageError(f"The device {device} is not available on this machine. Available: {', '.join(usable)}.")
    return found


def load_tokenizer(base: Base, token: str | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, from where its weights come from. Raises UsageError if there is none."""
    from transformers import AutoTokenizer

    source, extra = _tokenizer_source(base, token)
    with quiet(), refused(f"The tokenizer of {base.name} cannot be loaded", "Restore its files."):
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False, **extra)


def _tokenizer_source(base: Base, token: str | None) -> tuple[str, dict]:
    if base.kind == "gguf":
        path = Path(base.location)
        _need_gguf(base.name)
        return str(path.parent), {"gguf_file": path.name}
    folder = Path(base.location) if base.location else hub.cached(base.name, base.revision)
    if base.kind != "folder" and not _has_tokenizer(folder):
        commit, folder = hub.ask(base.name, base.revision, token or base.token)
        folder = hub.download(base.name, commit, TOKENIZER_PATTERNS, token or base.token)
    if not _has_tokenizer(folder):
        # Without this, transformers 5 makes an empty tokenizer of the model's class.
        raise UsageError(f"There is no tokenizer in {folder}: expected one of {', '.join(TOKENIZER_FILES)}.")
    return str(folder), {}


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)


# ---------------------------------------------------------------------------------------------- pretrained


def _pretrained(base: Base, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    source, extra = base.location, {}
    if base.kind == "gguf":
        _need_gguf(base.name)
        source, extra = str(Path(base.location).parent), {"gguf_file": Path(base.location).name}
    else:
        folder = _weights_folder(base)
        _check_weight_files(folder)
        source = str(folder)
    if device.type != "cpu":
        extra["device_map"] = {"": device}
    with quiet(), refused(f"The weights of {base.name} cannot be loaded", "Restore the files from their source."):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=copy.deepcopy(base.config),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed below, with the rest, instead
            **extra,
        )
    _check_complete(info, source)
    return model


def _weights_folder(base: Base) -> Path:
    if base.kind == "folder":
        folder = Path(base.location)
        if (folder / "adapter_config.json").exists():
            # transformers would load that adapter on top, and its base instead of this one.
            raise UsageError(f"{folder} has an adapter_config.json beside the model: move the adapter elsewhere.")
        return folder
    if base.kind != "hub":
        raise UsageError(f"{base.name} is a preset: it has an architecture but no weights. Use find_base to get them.")
    folder = Path(base.location)
    if hub.is_offline() or (_has_weights(folder) and not _missing_shards(folder)):
        return folder
    from huggingface_hub import constants

    need_disk(parameter_bytes(base.config), constants.HF_HUB_CACHE, f"the download of {base.name}")
    safe = hub.download(base.name, base.revision, _patterns("model", "safetensors"), base.token)
    if _has_weights(safe):
        return safe
    return hub.download(base.name, base.revision, _patterns("pytorch_model", "bin"), base.token)


def _patterns(stem: str, suffix: str) -> list[str]:
    names = [f"{stem}.{suffix}", f"{stem}.{suffix}.index.json", f"{stem}-*-of-*.{suffix}"]
    return [*names, "generation_config.json", "config.json"]


def _shard_names(folder: Path) -> list[str]:
    """The files that hold the weights, as transformers would choose them: safetensors first."""
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).exists():
            return [single]
        if (folder / index).exists():
            shards = read_object(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not all(_plain(name) for name in shards.values()):
                raise UsageError(f"{folder / index} is damaged: expected a weight_map to plain file names.")
            return sorted(set(shards.values()))
    raise UsageError(f"{folder} holds no weights: expected {' or '.join(WEIGHT_FILES)}.")


def _plain(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and "\\" not in name and name not in ("", ".", "..")


def _missing_shards(folder: Path) -> list[str]:
    return [name for name in _shard_names(folder) if not (folder / name).is_file()]


def _check_weight_files(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    problems = [f"{name}: missing" for name in _missing_shards(folder)]
    for name in _shard_names(folder):
        if name.endswith(".safetensors") and (folder / name).is_file():
            try:
                with safe_open(folder / name, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                problems.append(f"{name}: not a sound safetensors file ({str(error).splitlines()[0]})")
    if problems:
        raise UsageError(f"The weights in {folder} are damaged:\n{listed(problems)}\nRestore them from their source.")


def _check_complete(info: dict, source: str) -> None:
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected: {name}" for name in sorted(info["unexpected_keys"])]
    for name, found, expected in sorted(info["mismatched_keys"]):
        problems.append(f"of another shape: {name}: expected {list(expected)}, found {list(found)}")
    if problems:
        raise UsageError(
            f"The weights in {source} are not those of its config.json:\n{listed(problems)}\n"
            "Missing weights are never made up; restore the files, or use --weights random."
        )


# ---------------------------------------------------------------------------------------------- sizes


def parameter_bytes(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> int:
    """Bytes of all parameters of the full model, tied ones once. Allocates nothing."""
    model = skeleton(config, resolve_dtype(dtype, config))
    return sum(parameter.nbytes for parameter in model.parameters())


def compact_random_bytes(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> int:
    """Bytes of the parameters which weights="random" allocates with compact=True."""
    return shared_bytes(skeleton(config, resolve_dtype(dtype, config)), compact=True)
