"""Where a base model comes from: hub id, local folder, GGUF file, or an architecture preset that ships here.

`find_base` decides, without loading anything, which weights can be had; `load_base` builds the model:

- pretrained: the real weights, from a folder, the hub (through its cache) or a GGUF file;
- random: the same architecture with seeded weights, one tensor per parameter of a decoder layer, shared by all layers;
- none: parameters on the `meta` device, buffers real; costs no memory.

Code that comes with a model is never run, and no name that looks like a path ever turns into a download.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora_moe.errors import UsageError, listed
from dylora_moe.machine import need_disk, need_memory

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "google/codegemma-2b"
WEIGHTS = ("auto", "pretrained", "random", "none")
PRESETS = Path(__file__).parent / "presets"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES |= {name: name for name in DTYPES.values()}

REMEDY = "    export HF_TOKEN=your_token"
HUB_SECONDS = 2.5  # an unreachable hub is to be known within 3
FILE_SECONDS = 30.0  # for one small file from a hub that has answered

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WEIGHT_FILES = SINGLE_FILES + INDEX_FILES
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_PATTERNS = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_PATTERNS += ["spiece.model", "tekken.json", "chat_template*", "config.json"]

MAX_CONFIG_BYTES = 16 << 20
# What a config may ask for. Far above any model there is; below what would hang or exhaust a machine.
LIMITS = (
    (r"(num_hidden_layers|num_layers|n_layers?|num_decoder_layers|num_encoder_layers)", 1, 1_000),
    (r"(hidden_size|n_embd|d_model|intermediate_size|n_inner|ffn_dim|head_dim|\w+_dim|vocab_size)", 1, 1 << 24),
    (r"(num_attention_heads|num_key_value_heads|n_heads?|num_heads)", 1, 1 << 16),
    (r"(max_position_embeddings|n_positions|max_seq_len|seq_length)", 1, 1 << 28),
    (r"(num_experts|num_local_experts|n_routed_experts)", 0, 1 << 14),
)
LONG_POSITIONS = 1 << 16  # beyond this, a model that keeps a positions-by-positions mask is looked for
MAX_BUFFER_BYTES = 1 << 30
NOT_CAUSAL = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")

NOISE_PERIOD = 1_048_573  # a prime, so that no two rows of a matrix start at the same place of the noise
BLOCKS, BLOCK = 8, 32  # what weights_fingerprint reads of a large parameter


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
    name = os.fspath(name)
    path = Path(name).expanduser()
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
    known = _checked_config(preset["config"], hub_id) if preset else None
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
    return _replace(base, note=note), "random"


def _folder_base(name: str, folder: Path) -> Base:
    if not (folder / "config.json").is_file():
        hint = " (it is a LoRA adapter; give its base model)" if (folder / "adapter_config.json").exists() else ""
        raise UsageError(
            f"The folder {name} is not a base model: it has no config.json{hint}. "
            "Give a folder as save_pretrained writes it, or a hub id."
        )
    return Base(name, "folder", str(folder), None, _folder_config(folder), _has_weights(folder))


def _gguf_base(name: str, path: Path) -> Base:
    if path.suffix.lower() != ".gguf" or not path.is_file():
        raise UsageError(f"{name} is a file but not a .gguf model: give a model's folder, a .gguf file or a hub id.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(f"{name} is not a GGUF file: expected it to begin with b'GGUF', found {magic!r}.")
    _need_gguf(name)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with _quiet(), _refused(f"The GGUF file {name} cannot be read", "Download it again."):
        raw = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    return Base(name, "gguf", str(path), None, _checked_config(raw, name), True)


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
    folder = _cached(hub_id, revision)
    if folder is None:
        try:
            folder = _ask_hub(hub_id, revision, token, access=False)[1]
        except _HubError as error:
            raise UsageError(error.with_remedy()) from error
    return Base(hub_id, "hub", str(folder), folder.name, _folder_config(folder, hub_id), _has_weights(folder))


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
        commit, folder = _ask_hub(hub_id, revision, token)
        config = _folder_config(folder, hub_id)
        return Base(hub_id, "hub", str(folder), commit, config, True, token=token), "pretrained"
    except _HubError as error:
        problem = error
    folder = _cached(hub_id, revision)
    stand_in = offline_ok or not problem.unreachable
    if folder is not None and _has_weights(folder) and stand_in:
        return Base(hub_id, "hub", str(folder), folder.name, _folder_config(folder, hub_id), True), "pretrained"
    if folder is not None and known is None:
        known = _folder_config(folder, hub_id)
    if weights == "pretrained" or known is None or not stand_in:
        raise UsageError(problem.with_remedy()) from problem
    note = (
        f"{problem.sentence.rstrip('.')}: random weights of the same architecture are used; "
        f"set HF_TOKEN to use the real ones (export HF_TOKEN=your_token)"
    )
    location = str(folder) if folder is not None else None
    commit = folder.name if folder is not None else None
    kind = "hub" if folder is not None else "preset"
    return Base(hub_id, kind, location, commit, known, False, note=note), "random"


def _replace(base: Base, **changes: Any) -> Base:
    import dataclasses

    return dataclasses.replace(base, **changes)


# ---------------------------------------------------------------------------------------------- the hub


class _HubError(Exception):
    """Why the hub does not give the model. `sentence` is one line; `advice` says what to do."""

    def __init__(self, sentence: str, advice: str, unreachable: bool = False):
        super().__init__(sentence)
        self.sentence, self.advice, self.unreachable = sentence, advice, unreachable

    def with_remedy(self) -> str:
        return f"{self.sentence} {self.advice}\n{REMEDY}"


def _ask_hub(hub_id: str, revision: str | None, token: str | None, access: bool = True) -> tuple[str, Path]:
    """The commit and the snapshot folder, with its config.json in it. `access`: weights exist and may be read."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise _HubError(
            f"{hub_id} was not asked of the hub, because HF_HUB_OFFLINE is set, and its weights are not in the cache.",
            "Unset HF_HUB_OFFLINE, or give a local folder; for a gated model also",
            unreachable=True,
        )
    token = _token(token)
    sent = token if token is not None else False  # False: huggingface_hub adds none of its own
    api = huggingface_hub.HfApi()
    asked = functools.partial(api.model_info, hub_id, revision=revision, token=sent, timeout=HUB_SECONDS)
    with _quiet(), _hub_errors(hub_id, revision, token):
        info = _within(HUB_SECONDS, asked)
        files = {sibling.rfilename for sibling in info.siblings or []}
        weights = [name for name in WEIGHT_FILES if name in files]
        if access and weights:
            url = huggingface_hub.hf_hub_url(hub_id, weights[0], revision=info.sha)
            # A HEAD: a cached config.json would otherwise hide that the weights are gated.
            head = functools.partial(huggingface_hub.get_hf_file_metadata, url, token=sent, timeout=HUB_SECONDS)
            _within(FILE_SECONDS, head)
        small = functools.partial(huggingface_hub.hf_hub_download, hub_id, "config.json", revision=info.sha, token=sent)
        folder = Path(_within(FILE_SECONDS, small)).parent
        _note_revision(hub_id, revision, info.sha)
    if access and not weights:
        raise _HubError(
            f"{hub_id} holds no weights on the hub that can be used: expected {' or '.join(WEIGHT_FILES)}.",
            "Give a model that has them, or use --weights random or none; if yours are private also",
        )
    return info.sha, folder


def _note_revision(hub_id: str, revision: str | None, commit: str) -> None:
    """Bind the branch to its commit in the cache, so that the same name finds the same files without a network."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    branch = revision or "main"
    if branch == commit or ".." in branch:
        return
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model") / "refs" / branch
    with contextlib.suppress(OSError):  # a cache that others own
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _token(token: str | None) -> str | None:
    """The argument, then HF_TOKEN, then the stored login (get_token knows both)."""
    from huggingface_hub import get_token

    return token or os.environ.get("HF_TOKEN") or get_token()


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result, or TimeoutError. A thread, because name resolution and slow senders heed no timeout."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:  # handed over to the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome["result"]


@contextlib.contextmanager
def _hub_errors(hub_id: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Each way in which the hub can refuse, as its own first sentence."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        sent = "with the token that was sent" if token else "and no token was sent"
        raise _HubError(
            f"{hub_id} is gated: only those who accepted its terms may read it, {sent}.",
            f"Accept the terms at {hub}/{hub_id}, then",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise _HubError(
            f"{hub_id} has no revision {revision!r} on {hub}.", "Check the revision; if the model is private also"
        ) from error
    except errors.EntryNotFoundError as error:
        raise _HubError(
            f"{hub_id} on {hub} has no config.json.", "Give a model in the transformers format; if it is private also"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(hub_id, hub, token, error) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise _unreachable(hub_id, hub, error) from error
        raise _HubError(
            f"The cache of the hub cannot be written: {error}.",
            "Make room, or set HF_HOME to a folder that can be written; for a gated model also",
        ) from error
    except Exception as error:  # httpx, sockets, our own TimeoutError, a proxy's HTML instead of JSON
        raise _unreachable(hub_id, hub, error) from error


def _unreachable(hub_id: str, hub: str, error: Exception) -> _HubError:
    cause = str(error).strip().splitlines()
    return _HubError(
        f"The hub at {hub} cannot be reached ({cause[0] if cause else type(error).__name__}).",
        f"Check the network, or give a local folder instead of {hub_id}; for a gated model also",
        unreachable=True,
    )


def _refusal(hub_id: str, hub: str, token: str | None, error: Exception) -> _HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and token:
        return _HubError(
            f"The hub at {hub} refuses the token that was sent for {hub_id} (HTTP 401).",
            "Make a new one in your settings there, then",
        )
    if status in (401, 404):
        seen = "with this token" if token else "without a token"
        near = f" (nor is there a folder {hub_id} here)" if Path(hub_id).parent.is_dir() else ""
        return _HubError(
            f"There is no model {hub_id} on {hub} that may be seen {seen}{near}.",
            "Check the spelling; if it is private,",
        )
    if status == 403:
        return _HubError(
            f"The hub at {hub} forbids access to {hub_id} with what was sent (HTTP 403).",
            "Use a token that may read it:",
        )
    return _HubError(
        f"The hub at {hub} answered with an error for {hub_id} (HTTP {status}).",
        "Try again later, or give a local folder; for a gated model also",
        unreachable=True,
    )


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot folder in the local cache that has a config.json, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def _download(base: Base, patterns: list[str], token: str | None) -> Path:
    """The snapshot folder with the files of those patterns in it."""
    from huggingface_hub import constants, snapshot_download

    if constants.is_offline_mode():
        return Path(base.location)
    token = _token(token)
    with _quiet(), _as_usage_error(), _hub_errors(base.name, base.revision, token):
        sent = token if token is not None else False
        folder = snapshot_download(base.name, revision=base.revision, allow_patterns=patterns, token=sent)
    return Path(folder)


@contextlib.contextmanager
def _as_usage_error() -> Iterator[None]:
    try:
        yield
    except _HubError as error:
        raise UsageError(error.with_remedy()) from error


# ---------------------------------------------------------------------------------------------- configs


def _folder_config(folder: Path, hub_id: str | None = None) -> PreTrainedConfig:
    raw = _read_json(folder / "config.json")
    # A hub config often names code beside a class that transformers has: the class is used, the code never.
    # A local folder that asks for code is refused, as its owner can mend it.
    if "auto_map" in raw and hub_id is None:
        raise UsageError(
            f"{folder / 'config.json'} asks for code of its own to be run (auto_map), which is never done. "
            "Remove the auto_map entry if transformers knows this model_type; use another model otherwise."
        )
    return _checked_config({key: value for key, value in raw.items() if key != "auto_map"}, hub_id or str(folder))


def _read_json(path: Path) -> dict:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes, more than {MAX_CONFIG_BYTES}")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"expected an object, found {type(raw).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}. Restore the file from its source.") from error
    return raw


def _checked_config(raw: dict, where: str) -> PreTrainedConfig:
    """The config object, after its numbers and its kind were checked; nothing large is made before that."""
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        what = "a DyLoRA-MoE checkpoint, not a base model" if model_type == "dylora-moe" else "not known"
        raise UsageError(
            f"The config of {where} cannot be used: model_type {model_type!r} is {what} to this transformers. "
            "Expected a causal language model that transformers knows without extra code."
        )
    problems = sorted(_absurdities(raw))
    if problems:
        raise UsageError(f"The config of {where} asks for what cannot be:\n{listed(problems)}\nCorrect the config.")
    if raw.get("quantization_config"):
        raise UsageError(f"{where} is quantized (quantization_config), which is not supported: give its original.")
    with _quiet(), _refused(f"The config of {where} is not a valid {model_type} config", "Correct the config."):
        config = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(raw))
    _check_causal(config, raw.get("architectures"), where)
    return config


def _absurdities(raw: dict, prefix: str = "") -> Iterator[str]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _absurdities(value, f"{prefix}{key}.")
            continue
        for pattern, low, high in LIMITS:
            if re.fullmatch(pattern, str(key)):
                for number in value if isinstance(value, list) else [value]:
                    if number is not None and (type(number) is not int or not low <= number <= high):
                        yield f"{prefix}{key}: expected a whole number from {low} to {high}, found {str(number)[:40]}"
                break


def _check_causal(config: PreTrainedConfig, architectures: Any, where: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = config.model_type
    encoder = kind in MASKED and not getattr(config, "is_decoder", False)
    named = [name for name in architectures or [] if str(name).endswith(NOT_CAUSAL)]
    if kind not in CAUSAL or encoder or getattr(config, "is_encoder_decoder", False) or named:
        found = ", ".join(named) or f"model_type {kind}"
        raise UsageError(
            f"{where} is not a causal language model (found {found}). "
            "Expected a decoder that predicts the next token, such as Gemma, Llama, Qwen or GPT-2."
        )


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in WEIGHT_FILES)


# ---------------------------------------------------------------------------------------------- loading


def load_base(
    base: Base,
    weights: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """The model in eval mode with every parameter frozen.

    weights: "pretrained", "random" or "none", as find_base returned it. dtype: default the config's. With "none"
    parameters are on `meta`, buffers real. Raises UsageError; weights that are missing are never made up.
    """
    dtype = resolve_dtype(dtype, base.config)
    device = resolve_device(device)
    if weights == "none":
        model = _skeleton(base.config, dtype)
    elif weights == "random":
        model = _random(base.config, dtype, device, seed)
    elif weights == "pretrained":
        model = _pretrained(base, dtype, device)
    else:
        raise UsageError(f"Unknown weights {weights!r}: expected pretrained, random or none.")
    model.config._name_or_path = base.name
    model.requires_grad_(False)
    return model.eval()


def resolve_dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig | None = None) -> torch.dtype:
    """float32, bfloat16, float16 (or fp32, bf16, fp16); None means the config's, else float32."""
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
    with _quiet(), _refused(f"The tokenizer of {base.name} cannot be loaded", "Restore its files."):
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False, **extra)


def _tokenizer_source(base: Base, token: str | None) -> tuple[str, dict]:
    if base.kind == "gguf":
        path = Path(base.location)
        _need_gguf(base.name)
        return str(path.parent), {"gguf_file": path.name}
    folder = Path(base.location) if base.location else _cached(base.name, base.revision)
    if base.kind != "folder" and not _has_tokenizer(folder):
        with _as_usage_error():
            commit, folder = _ask_hub(base.name, base.revision, token or base.token, access=False)
        here = _replace(base, revision=commit, location=str(folder))
        folder = _download(here, TOKENIZER_PATTERNS, token or base.token)
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
    with _quiet(), _refused(f"The weights of {base.name} cannot be loaded", "Restore the files from their source."):
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
    if _has_weights(folder) and not _missing_shards(folder):
        return folder
    from huggingface_hub import constants

    need_disk(parameter_bytes(base.config), constants.HF_HUB_CACHE, f"the download of {base.name}")
    safe = _download(base, ["model.safetensors", "model.safetensors.index.json", *_shards("safetensors")], base.token)
    if _has_weights(safe):
        return safe
    return _download(base, ["pytorch_model.bin", "pytorch_model.bin.index.json", *_shards("bin")], base.token)


def _shards(suffix: str) -> list[str]:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    return [f"{stem}-*-of-*.{suffix}", "generation_config.json", "config.json"]


def _shard_names(folder: Path) -> list[str]:
    """The files that hold the weights, as transformers would choose them: safetensors first."""
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).exists():
            return [single]
        if (folder / index).exists():
            shards = _read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not all(_plain(name) for name in shards.values()):
                raise UsageError(f"{folder / index} is damaged: expected a weight_map to plain file names.")
            return sorted(set(shards.values()))
    raise UsageError(f"{folder} holds no weights: expected {' or '.join(WEIGHT_FILES)}.")


def _plain(name: Any) -> bool:
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


# ---------------------------------------------------------------------------------------------- none and random


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Parameters on `meta`, buffers (rotary frequencies, embedding scales) real. Tied weights are tied."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    def build(include_buffers: bool) -> PreTrainedModel:
        with init_empty_weights(include_buffers=include_buffers):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)

    what = f"transformers cannot build this {config.model_type} architecture"
    with _quiet(), _refused(what, "Correct the config."), torch.random.fork_rng(devices=[]):
        if (getattr(config.get_text_config(), "max_position_embeddings", None) or 0) > LONG_POSITIONS:
            size = sum(buffer.nbytes for buffer in build(True).buffers())
            if size > MAX_BUFFER_BYTES:
                raise ValueError(f"its buffers alone would take {size} bytes; lower max_position_embeddings")
        model = build(False)
        model.tie_weights()  # init_empty_weights makes each parameter anew, which unties
    return model.requires_grad_(False)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The one ModuleList of the decoder that has num_hidden_layers entries; PEFT's wrapping may be around it."""
    from torch import nn

    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for modules in (decoder.children(), decoder.modules()):  # a layer may itself hold lists of that length
        found = [module for module in modules if isinstance(module, nn.ModuleList) and len(module) == count]
        if len(found) == 1:
            return found[0]
    raise UsageError(
        f"The decoder layers of {type(model).__name__} cannot be told: expected one ModuleList of {count} entries "
        f"in {type(decoder).__name__}, found {len(found)}. This architecture is not supported."
    )


def _places(model: PreTrainedModel) -> Iterator[tuple[Any, str, nn.Module, str, nn.Parameter]]:
    """Every (key, label, module, name, parameter). Same key: to be one tensor, being tied, or the same parameter of
    another decoder layer of the same shape. The label says where it is, without the number of the layer."""
    in_layer = {}
    for layer in decoder_layers(model):
        in_layer |= {id(module): name for name, module in layer.named_modules()}
    for path, module in model.named_modules():
        inside = id(module) in in_layer
        for name, parameter in module._parameters.items():
            if parameter is not None:
                label = f"layer.{in_layer[id(module)]}.{name}" if inside else f"{path}.{name}"
                yield (label, tuple(parameter.shape)) if inside else id(parameter), label, module, name, parameter


def _random(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """Matrices from seeded noise of the model's own spread; norms and biases as the model itself initialises them.

    Only integer random numbers and single IEEE operations are used, so that a seed gives the same bytes everywhere.
    """
    import torch

    model = _skeleton(config, dtype)
    if device.type == "cpu":
        need_memory(_shared_bytes(model), f"random weights of this {config.model_type} architecture")
    noise = _noise(seed, _spread(config), dtype)
    made: dict[Any, nn.Parameter] = {}
    plain = []
    with _quiet(), _refused("The random weights cannot be made", "Use --weights none, or a smaller model."):
        for key, label, module, name, parameter in list(
            _places(model)
        ):  # a list keeps the old ones alive: keys are ids
            if key not in made:
                made[key] = _filled(parameter, f"{seed}.{label}", noise, device)
                plain.append(module)
            module._parameters[name] = made[key]
        model.to(device)  # the buffers
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for module in plain:
                if all(parameter.ndim < 2 for parameter in module.parameters(recurse=False)):
                    model._init_weights(module)
    return model


def _spread(config: PreTrainedConfig) -> float:
    spread = getattr(config.get_text_config(), "initializer_range", None)
    return spread if isinstance(spread, float) and 0 < spread < 10 else 0.02


def _noise(seed: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    """(NOISE_PERIOD,) uniform numbers with that standard deviation. PCG64's raw stream is fixed by numpy's promise."""
    import numpy
    import torch

    raw = numpy.random.PCG64(seed).random_raw(-(-NOISE_PERIOD // 4)).astype("<u8").view("<i2")[:NOISE_PERIOD]
    centred = raw.astype(numpy.float32) + numpy.float32(0.5)
    return torch.from_numpy(centred * numpy.float32(spread * 12**0.5 / 65536)).to(dtype)


def _filled(parameter: nn.Parameter, label: str, noise: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A frozen parameter of that shape and dtype: noise from a place of its own for matrices, else one or zero."""
    import torch
    from torch import nn

    if parameter.ndim < 2:
        start = 0.0 if label.endswith("bias") else 1.0
        return nn.Parameter(torch.full(parameter.shape, start, dtype=parameter.dtype, device=device), False)
    filled = torch.empty(parameter.shape, dtype=parameter.dtype)
    flat = filled.view(-1)
    begin = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") % NOISE_PERIOD
    first = noise[begin : begin + flat.numel()]
    flat[: first.numel()] = first
    for at in range(first.numel(), flat.numel(), NOISE_PERIOD):
        rest = noise[: flat.numel() - at]
        flat[at : at + rest.numel()] = rest
    return nn.Parameter(filled.to(device), requires_grad=False)


# ---------------------------------------------------------------------------------------------- what it is


def architecture(config_or_model: PreTrainedConfig | nn.Module) -> dict:
    """What tells one architecture from another: sizes, and a sha256 over the sorted names and shapes of all parameters.

    Adapters, PEFT's wrapping, dtype, device and the sharing of tensors do not change it.
    """
    import torch
    from torch import nn

    model = config_or_model
    if not isinstance(model, nn.Module):
        model = _skeleton(model, torch.float32)
    return _describe(model.config, _base_parameters(model))


def _describe(config: PreTrainedConfig, parameters: list[tuple[str, nn.Parameter]]) -> dict:
    text = config.get_text_config()
    shapes = [[name, list(parameter.shape)] for name, parameter in parameters]
    digest = hashlib.sha256(json.dumps([config.model_type, shapes]).encode()).hexdigest()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {
        "model_type": config.model_type,
        **{size: getattr(text, size, None) for size in sizes},
        "fingerprint": digest,
    }


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the base alone, sorted, under the names it has without PEFT; tied ones under each name."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return sorted(
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if "lora_" not in name
    )


def weights_fingerprint(model: nn.Module) -> str:
    """ "dtype:sha256" over samples of every base parameter: whole if small, else 8 strided blocks of 32 numbers.

    The samples are hashed as float32, so the part after the colon is the same for the same values in any dtype that
    holds them, on any device. Raises UsageError for a model without weights.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model):
        if parameter.is_meta:
            raise UsageError(f"There are no weights to fingerprint: {name} is on the meta device (--weights none).")
        sample = _sample(parameter.detach()).to(torch.float32).cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    dtype = next(model.parameters()).dtype if not hasattr(model, "dtype") else model.dtype
    return f"{str(dtype).removeprefix('torch.')}:{digest.hexdigest()}"


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() <= 2 * BLOCKS * BLOCK:
        return flat
    stride = (flat.numel() - BLOCK) // (BLOCKS - 1)
    return flat.as_strided((BLOCKS, BLOCK), (stride, 1), flat.storage_offset())  # (8, 32): from the first to the last


def parameter_bytes(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> int:
    """Bytes of all parameters of the full model, tied ones once. Allocates nothing."""
    model = _skeleton(config, resolve_dtype(dtype, config))
    return sum(parameter.nbytes for parameter in model.parameters())


def shared_random_bytes(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> int:
    """Bytes of the parameters which weights="random" allocates, the decoder layers sharing theirs."""
    return _shared_bytes(_skeleton(config, resolve_dtype(dtype, config)))


def _shared_bytes(model: PreTrainedModel) -> int:
    return sum({key: parameter.nbytes for key, _, _, _, parameter in _places(model)}.values())


# ---------------------------------------------------------------------------------------------- silence


@contextlib.contextmanager
def _refused(what: str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong inside, as one UsageError that keeps the first line of the cause."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(f"{what}: {type(error).__name__}: {cause[:300]} {remedy}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of the libraries inside; all as found after."""
    import logging

    from huggingface_hub import utils as hub
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "accelerate")]
    levels, tqdm = [logger.level for logger in loggers], gguf.tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            transformers_logging.set_verbosity(transformers_logging.CRITICAL)
            transformers_logging.disable_progress_bar()
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            gguf.tqdm = functools.partial(tqdm, disable=True)
            yield
        finally:
            gguf.tqdm = tqdm
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
            if hub_bars:
                hub.enable_progress_bars()
            else:
                hub.disable_progress_bars()
            transformers_logging.set_verbosity(verbosity)
