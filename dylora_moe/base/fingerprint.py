"""What tells one base model from another: its architecture, the values of its config, and its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig

from ..errors import UsageError
from ..store.files import parallel
from .hankel import HankelMatrix
from .structure import skeleton, without_adapters

# Values of a config that do not change what the model computes for given tokens. All others are compared.
NOT_COMPUTED = frozenset((
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dtype",
    "eos_token_id", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_factor", "initializer_range", "is_encoder_decoder", "label2id", "num_labels", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "prefix", "problem_type", "quantization_config",
    "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "unk_token_id",
    "use_cache",
))  # fmt: skip
BLOCKS, BLOCK = 8, 32  # what a sample has of a large parameter
PART_BYTES = 1 << 22  # hashed by one thread


# ---- architecture ----


def architecture(config_or_model: PreTrainedConfig | nn.Module) -> dict[str, Any]:
    """Identify an architecture: its sizes, a SHA-256 over the names and shapes of all parameters, and its settings.

    The settings are all values of the config that change what the model computes, as JSON has them; for a multimodal
    model, those of its text model. Adapters, dtype, device and the sharing of tensors do not change the result.
    """
    model: Any = config_or_model
    if not isinstance(model, nn.Module):
        model = skeleton(model, torch.float32)
    config = model.config
    text = config.get_text_config()
    shapes = [[name, list(_shape(parameter))] for name, parameter in _parameters(model)]
    digest = hashlib.sha256(json.dumps([config.model_type, shapes]).encode()).hexdigest()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    found = {"model_type": config.model_type} | {size: getattr(text, size, None) for size in sizes}
    values = json.loads(text.to_json_string(use_diff=False))
    settings = {k: v for k, v in values.items() if not (k in found or k in NOT_COMPUTED or k.startswith("_"))}
    return found | {"fingerprint": digest, "settings": settings}


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of the base model, sorted by the names without PEFT; tied ones under each name."""
    return sorted(
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in without_adapters(model).named_parameters(remove_duplicate=False)
        if "lora_" not in name
    )


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, also of one that bitsandbytes has packed into bytes."""
    return getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of the base model. Tied ones count once, those that random weights share do not.

    Decoder layers with random weights share their tensors (random_weights.py), though the model has more parameters.
    """
    tied = getattr(without_adapters(model), "all_tied_weights_keys", {})
    return sum(_shape(parameter).numel() for name, parameter in _parameters(model) if name not in tied)


# ---- weights ----


def weights_fingerprint(model: nn.Module) -> str:
    """Identify the weights of a base model by "dtype:sample:whole", to be compared by `same_weights`.

    `sample` is a SHA-256 over samples of every parameter: the same values give the same text in any dtype that holds
    them, on any device. `whole` is a SHA-256 over every byte of the parameters and persistent buffers; it is left out
    for compact random weights, whose matrices are nowhere in memory. A tensor is read again only if it has changed.
    All ranks must call this for a sharded base.

    Raises:
        UsageError: if the model has no weights.
    """
    stored = without_adapters(model).state_dict(keep_vars=True).items()  # first: it shards what a pass has gathered
    parameters = dict(_parameters(model))
    others = {name.replace(".base_layer.", "."): value for name, value in stored if "lora_" not in name}
    sampled, whole, compact = hashlib.sha256(), hashlib.sha256(), False
    for name, tensor in sorted((others | parameters).items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise UsageError(f"There are no weights to fingerprint: {name} is on the meta device (--weights none).")
        compact |= isinstance(tensor, HankelMatrix)
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor holds only a part
        sample = _sample(full.detach()).to(torch.float32).cpu().contiguous().numpy().tobytes()
        if name in parameters:
            sampled.update(f"{name}{tuple(tensor.shape)}".encode() + sample)
        if not compact:
            whole.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + _digest(tensor, full, sample))
    dtype = next(model.parameters()).dtype if not hasattr(model, "dtype") else model.dtype
    texts = [str(dtype).removeprefix("torch."), sampled.hexdigest(), *([] if compact else [whole.hexdigest()])]
    return ":".join(texts)


def same_weights(a: str, b: str) -> bool:
    """Return whether two fingerprints agree in what both have: some have no `whole`."""
    return all(mine == yours for mine, yours in zip(a.split(":"), b.split(":"), strict=False))


def _digest(tensor: torch.Tensor, full: torch.Tensor, sample: bytes) -> bytes:
    """Return a SHA-256 over the bytes of a tensor, which are read if there is a sign that they have changed."""
    version = None if tensor.is_inference() else tensor._version
    state = (version, tensor.data_ptr() if tensor is full else None, sample)
    known = _digests.get(tensor)
    if known is None or known[0] != state:
        parts = full.detach().reshape(-1).split(max(1, PART_BYTES // full.element_size()))
        digest = hashlib.sha256(b"".join(parallel(_sha256, parts))).digest()
        _digests[tensor] = known = (state, digest)
    return known[1]


_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (its state, SHA-256)


def _sha256(part: torch.Tensor) -> bytes:
    return hashlib.sha256(part.cpu().contiguous().view(torch.uint8).numpy().data).digest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a small tensor flattened, and (8, 32) numbers of a large one, from the first to the last."""
    size = tensor.numel()
    if size <= 2 * BLOCKS * BLOCK:
        return tensor.reshape(-1)
    stride = (size - BLOCK) // (BLOCKS - 1)
    positions = torch.arange(BLOCKS).unsqueeze(1) * stride + torch.arange(BLOCK)  # (8, 32), as if it were flat
    indices = []
    for length in reversed(tensor.shape):
        indices.append((positions % length).to(tensor.device))
        positions = positions // length
    return tensor[tuple(reversed(indices))]  # flattening a Hankel matrix would copy it at full size
