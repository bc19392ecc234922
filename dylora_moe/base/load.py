"""Loading a base model that `find_base` has found, and its tokenizer."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import quantization_config

from ..errors import UsageError, listed, shown
from ..system import machine
from . import hub
from .config import read_object
from .quiet import quiet, refused
from .random_weights import random_model, shared_bytes
from .source import INDEX_FILES, SINGLE_FILES, WEIGHT_FILES, Base, has_weights, need_gguf, need_package
from .structure import skeleton

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
DTYPES |= {name: name for name in DTYPES.values()}
GGUF_EMBEDDINGS = "token_embd.weight"  # in every architecture
SHOWN_NAMES = 3  # of tensors, in a line
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_PATTERNS = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_PATTERNS += ["spiece.model", "tekken.json", "chat_template*", "config.json"]


def load_base(
    base: Base,
    weights: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = "cpu",
    seed: int = 0,
    compact: bool = False,
) -> PreTrainedModel:
    """Load a base model, in eval mode and with all parameters frozen.

    Args:
        weights: "pretrained", "random" or "none", as `find_base` returned it. With "none" all parameters are on the
            `meta` device and buffers are real.
        dtype: default that of the config.
        device: None and "auto" choose the best one.
        seed: of random weights.
        compact: whether random weights are stored compactly, see `random_weights.random_model`.

    Returns:
        The model. Its attribute `notes` has lines for the user, which a mixture takes over.

    Raises:
        UsageError: if the model cannot be loaded. Missing weights are never initialised.
    """
    notes: list[str] = []
    if base.quantization and weights != "pretrained":
        raise UsageError(
            f"{base.name} is to be quantized with bitsandbytes: {weights} weights cannot be, real ones can."
        )
    dtype = resolve_dtype(dtype, base.config)
    device = resolve_device(device)
    if weights == "none":
        model = skeleton(base.config, dtype)
    elif weights == "random":
        model = random_model(base.config, dtype, device, seed, compact=compact)
    elif weights == "pretrained":
        model, notes = _pretrained(base, dtype, device)
    else:
        raise UsageError(f"Unknown weights {weights!r}: expected pretrained, random or none.")
    # A checkpoint takes the name of its base from here, and must find it from any working directory.
    model.config._name_or_path = str(base.path.resolve()) if base.kind in ("folder", "gguf") else base.name
    cast(Any, model).notes = notes
    model.requires_grad_(False)
    return model.eval()


def load_embeddings(base: Base, *, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Load the input embeddings of a base model; its other parameters are on the `meta` device.

    Of files in safetensors or GGUF nothing else is read. From other files, and where the table cannot be told by its
    name, the whole model is loaded.

    Raises:
        UsageError: as `load_base`.
    """
    model = load_base(base, "none", dtype=dtype)
    embeddings: Any = model.get_input_embeddings()
    name = next(name for name, parameter in model.named_parameters() if parameter is embeddings.weight)
    with quiet(), refused(f"The weights of {base.name} cannot be loaded", "Restore the files from their source."):
        found = _gguf_embeddings(base) if base.kind == "gguf" else _safetensors_embeddings(base, name)
    if found is None or found.shape != embeddings.weight.shape:
        return load_base(base, "pretrained", dtype=dtype)
    embeddings.weight = nn.Parameter(found.to(embeddings.weight.dtype), requires_grad=False)
    return model


def _safetensors_embeddings(base: Base, name: str) -> torch.Tensor | None:
    """Return the tensor of this name, before which a prefix of the model may be or lack; None if it cannot be told."""
    folder = _weights_folder(base)
    _check_weight_files(folder)
    found = []
    for shard in _shard_names(folder):
        if not shard.endswith(".safetensors"):
            return None
        with safe_open(folder / shard, framework="pt") as file:
            known = list(file.keys())
            keys = [key for key in known if f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")]
            found += [file.get_tensor(key) for key in keys]
    return found[0] if len(found) == 1 else None


def _gguf_embeddings(base: Base) -> torch.Tensor | None:
    need_gguf(base.name)
    import gguf  # optional

    found = [tensor for tensor in gguf.GGUFReader(base.path).tensors if tensor.name == GGUF_EMBEDDINGS]
    return torch.from_numpy(gguf.dequantize(found[0].data, found[0].tensor_type)) if found else None


def resolve_dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig | None = None) -> torch.dtype:
    """Return the dtype of a name in `DTYPES`. None means that of the config, or float32."""
    if dtype is None and config is not None:
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    name = str(dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    return getattr(torch, DTYPES[name])


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device if this machine has it. None and "auto" choose the best one."""
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"Unknown device {device!r}: expected cpu, cuda, cuda:0, mps or auto.") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(found.type, False):
        usable = [name for name in ("cpu", "mps") if available[name]]
        usable += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise UsageError(f"The device {device} is not available on this machine. Available: {', '.join(usable)}.")
    return found


def load_tokenizer(base: Base, token: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, with further `options` of its class. Raises UsageError if it has none."""
    source, extra = _tokenizer_source(base, token)
    with quiet(), refused(f"The tokenizer of {base.name} cannot be loaded", "Restore its files."):
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False, **extra, **options)


def _tokenizer_source(base: Base, token: str | None) -> tuple[str, dict[str, str]]:
    if base.kind == "gguf":
        need_gguf(base.name)
        return str(base.path.parent), {"gguf_file": base.path.name}
    folder = base.path if base.location else hub.cached(base.name, base.revision)
    if base.kind != "folder" and not has_tokenizer(folder):
        commit = hub.ask(base.name, base.revision, token or base.token).name
        folder = hub.download(base.name, commit, TOKENIZER_PATTERNS, token or base.token)
    if not has_tokenizer(folder):
        # transformers 5 would create an empty tokenizer of the model's class.
        raise UsageError(f"There is no tokenizer in {folder}: expected one of {', '.join(TOKENIZER_FILES)}.")
    return str(folder), {}


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)


def _pretrained(base: Base, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and what to tell the user about its files."""
    extra: dict[str, Any] = {}
    if base.kind == "gguf":
        need_gguf(base.name)
        folder, extra["gguf_file"] = base.path.parent, base.path.name
        if hasattr(quantization_config, "GgufConfig"):  # Transformers from 5.23 on may leave weights quantized
            extra["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    else:
        folder = _weights_folder(base)
        _check_weight_files(folder)
    if base.quantization:
        need_package("bitsandbytes", f"Quantizing {base.name}")
        extra["quantization_config"] = BitsAndBytesConfig(**base.quantization)
    if device.type != "cpu" or base.quantization:  # by themselves, quantized weights go to a GPU
        extra["device_map"] = {"": device}
    with quiet(), refused(f"The weights of {base.name} cannot be loaded", "Restore the files from their source."):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=copy.deepcopy(base.config),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_complete lists them with the other problems
            **extra,
        )
    model, info = loaded
    _check_complete(info, folder)
    return model, _surplus(info, folder)


def _weights_folder(base: Base) -> Path:
    folder = base.path
    if base.kind == "folder":
        if (folder / "adapter_config.json").exists():
            # transformers would load the base model of the adapter instead of this one, and the adapter too.
            raise UsageError(f"{folder} has an adapter_config.json beside the model: move the adapter elsewhere.")
        return folder
    if constants.is_offline_mode() or (has_weights(folder) and not _missing_shards(folder)):
        return folder
    machine.need_disk(parameter_bytes(base.config), hub.cache_folder(), f"the download of {base.name}")
    safe = hub.download(base.name, base.revision, _patterns("model", "safetensors"), base.token)
    if has_weights(safe):
        return safe
    return hub.download(base.name, base.revision, _patterns("pytorch_model", "bin"), base.token)


def _patterns(stem: str, suffix: str) -> list[str]:
    names = [f"{stem}.{suffix}", f"{stem}.{suffix}.index.json", f"{stem}-*-of-*.{suffix}"]
    return [*names, "generation_config.json", "config.json"]


def _shard_names(folder: Path) -> list[str]:
    """Return the files that hold the weights, as transformers chooses them: safetensors first."""
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).exists():
            return [single]
        if (folder / index).exists():
            shards = read_object(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not all(_is_file_name(name) for name in shards.values()):
                raise UsageError(f"{folder / index} is damaged: expected a weight_map to plain file names.")
            return sorted(set(shards.values()))
    raise UsageError(f"{folder} holds no weights: expected {' or '.join(WEIGHT_FILES)}.")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and "\\" not in name and name not in ("", ".", "..")


def _missing_shards(folder: Path) -> list[str]:
    return [name for name in _shard_names(folder) if not (folder / name).is_file()]


def _check_weight_files(folder: Path) -> None:
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


def _check_complete(info: dict[str, Any], source: Path) -> None:
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    for name, found, expected in sorted(info["mismatched_keys"]):
        problems.append(f"of another shape: {name}: expected {list(expected)}, found {list(found)}")
    if problems:
        raise UsageError(
            f"The weights in {source} are not those of its config.json:\n{listed(problems)}\n"
            "Missing weights are never made up; restore the files, or use --weights random."
        )


def _surplus(info: dict[str, Any], source: Path) -> list[str]:
    """Name, in at most one line, the tensors in the files that the model does not have: masks, other heads, vision."""
    names = sorted(info["unexpected_keys"])
    if not names:
        return []
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    shown_names = ", ".join(shown(name) for name in names[:SHOWN_NAMES])
    return [f"{source} holds tensors that this architecture does not have; they are not used: {shown_names}{more}"]


def parameter_bytes(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> int:
    """Return the bytes that all parameters of a model take, tied ones counted once. Allocates none of them."""
    model = skeleton(config, resolve_dtype(dtype, config))
    return sum(parameter.nbytes for parameter in model.parameters())


def compact_random_bytes(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> int:
    """Return the bytes that the parameters of a model with compact random weights take. Allocates none of them."""
    return shared_bytes(skeleton(config, resolve_dtype(dtype, config)), compact=True)
