"""The rules that check a checkpoint's config.json. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from ..constants import BITSANDBYTES, MAX_EXPERTS, MODEL_TYPE, STATES, expert_name
from . import formats
from .config import CheckpointConfig
from .findings import Contents, Rules, get, natural, nothing_or, number, short, text, texts

DTYPES = ("float32", "float64", "bfloat16", "float16")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def inspect_config(folder: str | os.PathLike) -> CheckpointConfig | None:
    """Return the config of a checkpoint, of which nothing else is read, or None if it is missing or wrong."""
    contents = Contents(Path(folder))
    contents.walk()
    return check_config(contents)


def check_config(contents: Contents) -> CheckpointConfig | None:
    """Report what is wrong with config.json. Returns its content, or None if others could not rely on it."""
    name = formats.CONFIG
    if name not in contents.files:
        if not contents.is_known(name):
            contents.report(name, "expected in every checkpoint, found nothing")
        return None
    found = contents.read_object(name)
    if found is None:
        return None
    version = found.get("format_version")
    if natural(version) and version != formats.FORMAT_VERSION:
        contents.is_old = version == formats.OLD_VERSION
        text = f"format_version: expected {formats.FORMAT_VERSION}, found {short(version)}"
        contents.report(name, text, _remedy(contents))
        return None
    right = _only_keys(contents, "", found, _CONFIG_RULES)
    right &= contents.follow(name, found, _CONFIG_RULES)
    if not right:
        return None
    experts = found["experts"]
    if len(experts) != found["num_experts"]:
        contents.expect(name, "experts", f"{found['num_experts']} as num_experts says", len(experts))
        return None
    for index, expert in enumerate(experts):
        right &= _check_expert_entry(contents, index, expert)
    return CheckpointConfig.from_json(found) if right else None


def _remedy(contents: Contents) -> str:
    if not contents.is_old:
        return "a later version of this package has written it: update, or restore it from a copy"
    convert = f"dylora-moe convert {shlex.quote(str(contents.folder))} NEW_FOLDER"
    return f"it is of DyLoRA-MoE 0.2.1, whose router read every layer: {convert}"


def _check_expert_entry(contents: Contents, index: int, expert: object) -> bool:
    if not isinstance(expert, dict):
        contents.expect(formats.CONFIG, f"experts[{index}]", "an object", short(expert))
        return False
    prefix, name = f"experts[{index}].", expert_name(index)
    rules = (("name", repr(name), lambda v: v == name), *_EXPERT_RULES)
    right = _only_keys(contents, prefix, expert, rules)
    return contents.follow(formats.CONFIG, expert, rules, prefix) and right


def _only_keys(contents: Contents, prefix: str, found: dict[str, Any], rules: Rules) -> bool:
    """Report unknown and missing keys: this version knows all keys of its format."""
    unknown, missing = [], []
    for group in sorted({path.rpartition(".")[0] for path, _, _ in rules} | {""}):
        inside = get(found, group) if group else found
        if not isinstance(inside, dict):
            continue  # the rules of its keys report it
        head = f"{group}." if group else ""
        known = {path.removeprefix(head).partition(".")[0] for path, _, _ in rules if path.startswith(head)}
        unknown += [f"{prefix}{head}{key[:200]}" for key in inside if key not in known]
        missing += [f"{prefix}{head}{key}" for key in known if key not in inside]
    contents.list(formats.CONFIG, unknown, lambda key: f"{key}: expected no such key")
    contents.list(formats.CONFIG, missing, lambda key: f"{key}: expected this key, found nothing")
    return not unknown and not missing


def _size(value: object) -> bool:
    return natural(value, 1)


def _sizes(value: object) -> bool:
    """Whether it is one size for all decoder layers, one for each, or none."""
    return value is None or _size(value) or (isinstance(value, list) and all(map(_size, value)))


def _quantization(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(key.startswith(BITSANDBYTES) for key in value)


def _sha256(value: object) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


_CONFIG_RULES: Rules = (
    ("model_type", repr(MODEL_TYPE), lambda v: v == MODEL_TYPE),
    ("format_version", f"{formats.FORMAT_VERSION}", lambda v: natural(v) and v == formats.FORMAT_VERSION),
    ("num_experts", f"1 to {MAX_EXPERTS}", lambda v: natural(v, 1, MAX_EXPERTS)),
    ("experts", "a list", lambda v: isinstance(v, list)),
    ("step", "a whole number", natural),
    ("probe", "true or false", lambda v: isinstance(v, bool)),
    ("versions", "an object of texts", lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values())),
    ("base_model.name", "a text or null", nothing_or(text)),
    ("base_model.revision", "a text or null", nothing_or(text)),
    ("base_model.dtype", "float32, float64, bfloat16 or float16", lambda v: v in DTYPES),
    ("base_model.quantization", "arguments of BitsAndBytesConfig or null", nothing_or(_quantization)),
    ("base_model.architecture.model_type", "a text", text),
    ("base_model.architecture.hidden_size", "a positive whole number or null", nothing_or(_size)),
    ("base_model.architecture.num_hidden_layers", "a positive whole number or null", nothing_or(_size)),
    ("base_model.architecture.num_attention_heads", "positive whole numbers or null", _sizes),
    ("base_model.architecture.intermediate_size", "positive whole numbers or null", _sizes),
    ("base_model.architecture.vocab_size", "a positive whole number or null", nothing_or(_size)),
    ("base_model.architecture.fingerprint", "a SHA-256", _sha256),
    ("base_model.architecture.settings", "an object or null", nothing_or(lambda v: isinstance(v, dict))),
    ("router.width", "a positive whole number", _size),
    ("router.temperature", "a positive number", lambda v: number(v) and v > 0),
    ("router.top_k", "null or a positive whole number", nothing_or(_size)),
    ("router.balance_coefficient", "a number of at least 0", lambda v: number(v) and v >= 0),
    ("router.decay", "a number above 0 and at most 1", lambda v: number(v) and 0 < v <= 1),
    ("router.prior_tokens", "a positive number", lambda v: number(v) and v > 0),
)
_EXPERT_RULES: Rules = (
    ("r", "a positive whole number", _size),
    ("lora_alpha", "a positive number", lambda v: number(v) and v > 0),
    ("use_rslora", "true or false", lambda v: isinstance(v, bool)),
    ("target_modules", "a sorted list of names", lambda v: texts(v) and v == sorted(set(v))),
    ("state", " or ".join(STATES), lambda v: isinstance(v, str) and v in STATES),
    ("tensors", "a positive even number", lambda v: natural(v, 2) and v % 2 == 0),
    ("parameters", "a positive whole number", _size),
    ("layout", "a SHA-256", _sha256),
)
