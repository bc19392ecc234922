"""The config.json of a base model, which may be hostile: it is checked before anything large is built from it.

Code that it names is never run.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

from ..constants import MODEL_TYPE
from ..errors import UsageError, listed, shown
from .quiet import quiet, refused

MAX_CONFIG_BYTES = 16 << 20
OTHER_SIZES = r"\w+_dim"  # not all are sizes or whole numbers: rope_scaling has "mscale_all_dim": 1.0
# The least and the most that a config may ask for. Real models are far from it; beyond, building one could hang.
LIMITS = (
    (r"(num_hidden_layers|num_layers|n_layers?|num_decoder_layers|num_encoder_layers)", 1, 1_000),
    (r"(hidden_size|n_embd|d_model|intermediate_size|n_inner|ffn_dim|head_dim|vocab_size)", 1, 1 << 24),
    (r"(num_attention_heads|num_key_value_heads|n_heads?|num_heads)", 1, 1 << 16),
    (r"(max_position_embeddings|n_positions|max_seq_len|seq_length)", 1, 1 << 28),
    (r"(num_experts|num_local_experts|n_routed_experts)", 0, 1 << 14),
    (OTHER_SIZES, 1, 1 << 24),
)
NOT_CAUSAL = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


def folder_config(folder: Path, hub_id: str | None = None) -> PreTrainedConfig:
    """Read and check the config.json of a folder, or of a model of the hub in its cache. Raises UsageError."""
    raw = read_object(folder / "config.json")
    # Many configs on the hub name code for a model_type that transformers has: its class is used, the code never. A
    # local folder that asks for code is refused, because its owner can correct it.
    if "auto_map" in raw and hub_id is None:
        raise UsageError(
            f"{folder / 'config.json'} asks for code of its own to be run (auto_map), which is never done. "
            "Remove the auto_map entry if transformers knows this model_type; use another model otherwise."
        )
    return checked_config({key: value for key, value in raw.items() if key != "auto_map"}, hub_id or str(folder))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most `MAX_CONFIG_BYTES`. Raises UsageError."""
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


def checked_config(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    """Check the numbers and the type of a config and return it as an object. Raises UsageError naming `where`."""
    model_type = raw.get("model_type")
    if model_type == MODEL_TYPE:
        raise UsageError(
            f"{where} is a checkpoint of a mixture, not a base model: load it with DyLoRAMoE.from_pretrained, or give "
            "the base model that it was trained on."
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"The config of {where} cannot be used: model_type {model_type!r} is not known to this transformers. "
            "Expected a causal language model that transformers knows without extra code."
        )
    problems = sorted(_impossible_sizes(raw))
    if problems:
        raise UsageError(f"The config of {where} asks for what cannot be:\n{listed(problems)}\nCorrect the config.")
    if raw.get("quantization_config"):
        raise UsageError(f"{where} is quantized (quantization_config), which is not supported: give its original.")
    with quiet(), refused(f"The config of {where} is not a valid {model_type} config", "Correct the config."):
        config = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(raw))
    _check_causal(config, raw.get("architectures"), where)
    return config


def _impossible_sizes(raw: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _impossible_sizes(value, f"{prefix}{key}.")
            continue
        for pattern, low, high in LIMITS:
            if re.fullmatch(pattern, str(key)):
                for number in value if isinstance(value, list) else [value]:
                    if number is None or (pattern == OTHER_SIZES and type(number) is not int):
                        continue
                    if type(number) is not int or not low <= number <= high:
                        yield f"{prefix}{key}: expected a whole number from {low} to {high}, found {str(number)[:40]}"
                break


def _check_causal(config: PreTrainedConfig, architectures: Any, where: str) -> None:
    kind = config.model_type
    encoder = kind in MASKED and not getattr(config, "is_decoder", False)
    named = [shown(name) for name in architectures or [] if str(name).endswith(NOT_CAUSAL)]
    if kind not in CAUSAL or encoder or getattr(config, "is_encoder_decoder", False) or named:
        found = ", ".join(named) or f"model_type {kind}"
        raise UsageError(
            f"{where} is not a causal language model (found {found}). "
            "Expected a decoder that predicts the next token, such as Gemma, Llama, Qwen or GPT-2."
        )
