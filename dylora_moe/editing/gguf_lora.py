"""An expert as a GGUF file, as llama.cpp's own convert_lora_to_gguf.py writes a LoRA of PEFT (checked at its version
b11549, October 2026).

- A file is of the type "adapter", with the architecture of the base model and alpha: llama.cpp scales an update by
  alpha / r. For a rank-stabilized LoRA, which is scaled by alpha / sqrt(r), alpha is therefore written times sqrt(r).
- Each A (r, d_in) and B (d_out, r) is in float32 under the name that the layer has in the base's GGUF file.
- In the files of some families, the rows of q and k are in another order: Transformers rotates the first half of a
  head's rows with the second half, llama.cpp neighbours. The rows of B go the same way as those of the base model's
  weight, and A stays as it is. The families that this holds for are those that llama.cpp converts as it does Llama.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from safetensors.numpy import load_file

from ..checkpoint.config import ArchitectureEntry
from ..checkpoint.verify import SoundCheckpoint
from ..checkpoint.verify_tensors import TENSOR_NAME
from ..errors import UsageError, listed, shown

LLAMA_LIKE = {"llama": "LLAMA", "mistral": "LLAMA", "smollm3": "SMOLLM3", "granite": "GRANITE"}  # q and k are permuted
OTHERS = {"qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3"}


class Heads(NamedTuple):
    """The attention heads of a base model."""

    q: int
    k: int


def llama_cpp_name(architecture: ArchitectureEntry, where: str) -> str:
    """Return the name that the `gguf` package has for an architecture, such as "LLAMA".

    Raises:
        UsageError: if it is none of those whose experts can be written.
    """
    known = LLAMA_LIKE | OTHERS
    kind = architecture.model_type
    if kind not in known:
        raise UsageError(
            f"{where}: experts on a base model of the type {shown(kind)} cannot be written for llama.cpp, those on "
            f"{', '.join(known)} can"
        )
    return known[kind]


def write_lora(path: Path, checkpoint: SoundCheckpoint, index: int) -> None:
    """Write one expert of a checkpoint to a GGUF file.

    Raises:
        UsageError: if the base model's heads are not known, or llama.cpp has no layer of a name.
    """
    architecture, expert = checkpoint.config.base_model.architecture, checkpoint.config.experts[index]
    arch = gguf.MODEL_ARCH[llama_cpp_name(architecture, str(checkpoint.folder))]
    names = gguf.get_tensor_name_map(arch, architecture.num_hidden_layers or 0)
    heads = heads_of(architecture, str(checkpoint.folder)) if architecture.model_type in LLAMA_LIKE else None
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = expert.lora_alpha * (math.sqrt(expert.r) if expert.use_rslora else 1)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    unknown = []
    for name, tensor in sorted(load_file(checkpoint.folder / checkpoint.adapter(index)).items()):
        match = TENSOR_NAME.fullmatch(name)
        assert match is not None  # it was verified
        layer = names.get_name(match["module"])
        if layer is None:
            unknown.append(match["module"])
            continue
        if heads is not None and match["side"] == "B":
            tensor = _in_order(tensor, match["module"], heads)
        writer.add_tensor(f"{layer}.weight.lora_{match['side'].lower()}", np.ascontiguousarray(tensor))
    if unknown:
        raise UsageError(
            f"{checkpoint.folder}: llama.cpp has no layers of these names:\n{listed(sorted(set(unknown)))}"
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def heads_of(architecture: ArchitectureEntry, where: str) -> Heads:
    """Return the heads of a base model. Raises UsageError if they are not known, or not the same in all layers."""
    heads, settings = architecture.num_attention_heads, architecture.settings or {}
    groups = settings.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(groups, int) or not settings:
        raise UsageError(
            f"{where}: config.json does not say how many attention heads the base model has, the same in all layers; "
            "load the checkpoint and save it again, if it was converted from version 0.2.1"
        )
    return Heads(heads, groups)


def _in_order(b: np.ndarray, module: str, heads: Heads) -> np.ndarray:
    """Return the rows of a B (d_out, r) in the order of llama.cpp, which only those of q and k are not in."""
    number = {"q_proj": heads.q, "k_proj": heads.k}.get(module.rpartition(".")[-1])
    if number is None:
        return b
    # (heads, half of a head, rows of it, r): row i of the first half goes before row i of the second one.
    return b.reshape(number, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
