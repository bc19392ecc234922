"""Several experts in one: as one LoRA, or in the weights of the base model.

Side by side, the matrices of several experts are one LoRA, whose rank is the sum of theirs. Its update is exactly the
weighted sum of their updates: sum_i w_i scaling_i B_i A_i (`combination_type="cat"` of PEFT's `add_weighted_adapter`).
If that rank is too much, the truncated singular value decomposition gives the nearest update of a smaller one
(https://doi.org/10.1007/BF02288367; "svd" of PEFT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.structure import quantization
from ..constants import IGNORED_LABEL, IMMATURE, MATURE, NEW, expert_name
from ..data.documents import Document
from ..errors import UsageError
from ..mixture.config import MoELoraConfig
from ..mixture.expert_matrices import weight_of
from ..mixture.model import Mixture
from ..mixture.targets import replace_config
from .batches import BlockCollator
from .evaluate import Evaluation

M = TypeVar("M", bound=Mixture)
Factors = tuple[torch.Tensor, torch.Tensor]  # B (d_out, R) and A (R, d_in)
ROW_TOKENS = 1024  # the most of a row on which a loss is measured


class Expert(NamedTuple):
    """What makes an expert: its tensors by the names that they have in a PEFT file, and its state."""

    config: MoELoraConfig
    tensors: Mapping[str, torch.Tensor]
    state: str


class Cost(NamedTuple):
    """The loss of a mixture in nats per token, and that of the one LoRA that its experts were merged into."""

    mixture: float
    merged: float


def experts_of(model: Mixture) -> list[Expert]:
    """Return the experts of a mixture. The tensors are its own."""
    states = zip(model.expert_configs, model.expert_states, strict=True)
    return [Expert(config, model.expert_tensors(index), state) for index, (config, state) in enumerate(states)]


@torch.no_grad()
def rebuilt(model: M, experts: Sequence[Expert]) -> M:
    """Return a mixture of these experts, with a fresh router, on the base model of another one.

    It shares the tensors of the base model, and nothing else.
    """
    configs = [replace_config(expert.config) for expert in experts]
    smoothing = model.label_smoothing
    new = type(model)(model.fresh_base(), configs, router=model.router.config, label_smoothing=smoothing)
    new.base_revision, new.generation_of_base = model.base_revision, model.generation_of_base
    for index, expert in enumerate(experts):
        for name, parameter in new.expert_tensors(index).items():
            parameter.copy_(expert.tensors[name])
    new.set_expert_states([expert.state for expert in experts])
    return new


def checked_weights(model: Mixture, weights: Sequence[float] | None) -> dict[int, float]:
    """Return the weights of the experts that are merged.

    Args:
        weights: one for each expert; None: the same for all that were trained, which sum to 1.

    Raises:
        UsageError: if they are not one finite number for each expert, if all are 0, or if no expert was trained.
    """
    if weights is None:
        trained = [index for index, state in enumerate(model.expert_states) if state != NEW]
        if not trained:
            raise UsageError("no expert of this mixture was trained: there is nothing to merge")
        return dict.fromkeys(trained, 1 / len(trained))
    if len(weights) != model.num_experts or not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise UsageError(
            f"expected a weight for each of the {model.num_experts} experts, finite numbers that are not all 0; got "
            f"{', '.join(f'{weight:g}' for weight in weights) or 'none'}"
        )
    return {index: float(weight) for index, weight in enumerate(weights) if weight}


# ---- as one LoRA ----


@torch.no_grad()
def combined(model: Mixture, weights: Mapping[int, float], rank: int | None = None) -> tuple[Expert, float]:
    """Return the weighted sum of some experts as one expert.

    Args:
        weights: of the experts, by their indices.
        rank: the most that the expert may have; by default the largest of theirs. Where the ranks of all together are
            less, it has these, and is exact.

    Returns:
        The expert, whose B has the whole size of the update, and the share of the sum's squared Frobenius norm that it
        holds; 1 if it is exact.
    """
    configs, states = model.expert_configs, model.expert_states
    layers = _factors(model, weights)
    exact = max(a.shape[0] for _, a in layers.values())
    r = min(rank or max(configs[index].r for index in weights), exact)
    first = configs[min(weights)]
    scaling = first.lora_alpha / (math.sqrt(first.r) if first.use_rslora else first.r)
    tensors, held, total = {}, 0.0, 0.0
    for path, factors in layers.items():
        (b, a), part, whole = _of_rank(factors, r)
        held, total = held + part, total + whole
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.float()
        tensors[f"base_model.model.{path}.lora_B.weight"] = (b / scaling).float()
    alpha = scaling * r
    config = replace_config(first, r=r, lora_alpha=round(alpha) if alpha.is_integer() else alpha, use_rslora=False)
    if any(_place(configs[index]) != _place(first) for index in weights):
        config = replace_config(config, target_modules=sorted(layers), exclude_modules=None)
    state = MATURE if all(states[index] == MATURE for index in weights) else IMMATURE
    return Expert(config, tensors, state), held / total if total else 1.0


def _place(config: MoELoraConfig) -> tuple:
    """Return what tells on which layers an expert is."""
    return config.target_modules, config.exclude_modules


def _factors(model: Mixture, weights: Mapping[int, float]) -> dict[str, Factors]:
    """Return the factors of the exact sum, in float64 on the CPU, by the name of the layer."""
    found = {}
    for path, layer in model.routed_layers():
        here = [(expert_name(i), weight) for i, weight in weights.items() if expert_name(i) in layer.lora_A]
        if here:
            b = [weight * layer.scaling[name] * weight_of(layer.lora_B[name]).double().cpu() for name, weight in here]
            a = [weight_of(layer.lora_A[name]).double().cpu() for name, _ in here]
            found[path] = torch.cat(b, 1), torch.cat(a)
    return found


def _of_rank(factors: Factors, r: int) -> tuple[Factors, float, float]:
    """Return factors of rank r of the nearest update, and the squared Frobenius norms of it and of the whole update."""
    b, a = factors
    (q, left), (p, right) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(left @ right.T)  # b a = q u s v p^T
    total = held = float(s.square().sum())
    if a.shape[0] > r:
        b, a, held = (q @ u[:, :r]) * s[:r], v[:r] @ p.T, float(s[:r].square().sum())
    missing = r - a.shape[0]
    return (F.pad(b, (0, missing)), F.pad(a, (0, 0, 0, missing))), held, total


# ---- in the weights of the base model ----


@torch.no_grad()
def merged_into_base(model: Mixture, weights: Mapping[int, float]) -> PreTrainedModel:
    """Return the base model with the weighted sum of some experts in its weights.

    The mixture and its base model are left as they are: the matrices that experts are on are copied.

    Raises:
        UsageError: if the base model is quantized or sharded, or has no weights.
    """
    if not model.has_base_weights:
        raise UsageError("the base model has no weights here to merge the experts into; load it with them")
    if model.sharded or quantization(model.base) is not None:
        kind = "sharded" if model.sharded else "quantized"
        raise UsageError(
            f"the base model is {kind}: its weights cannot take up the experts; collapse() makes one LoRA of them, or "
            f"load the checkpoint on a base model that is not {kind}"
        )
    merged = model.fresh_base()
    for path, layer in model.routed_layers():
        here = [(expert_name(i), weight) for i, weight in weights.items() if expert_name(i) in layer.lora_A]
        linear = merged.get_submodule(path)
        old = weight_of(linear)
        total = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
        for name, weight in here:
            update = weight_of(layer.lora_B[name]) @ weight_of(layer.lora_A[name])  # (d_out, d_in)
            update = update * (weight * layer.scaling[name])
            total += update.T if isinstance(linear, Conv1D) else update
        linear.weight = nn.Parameter(total.to(old.dtype), requires_grad=False)
    return merged


# ---- what it costs ----


def rows_of(documents: Sequence[Document], model: Mixture) -> list[dict[str, list[int]]]:
    """Return rows of some documents, each in pieces of as many tokens as a loss is measured on."""
    most = getattr(model.base.config.get_text_config(), "max_position_embeddings", None) or ROW_TOKENS
    most = min(most, ROW_TOKENS)
    rows = []
    for document in documents:
        for start in range(0, len(document), most):
            ids, learned = (part[start : start + most] for part in (document.ids, document.learned))
            if learned[1:].any():
                labels = [i if keep else IGNORED_LABEL for i, keep in zip(ids.tolist(), learned.tolist(), strict=True)]
                rows.append({"input_ids": ids.tolist(), "labels": labels, "position_ids": list(range(len(ids)))})
    return rows


def cost(model: Mixture, merged: Mixture, rows: Sequence[Mapping[str, list[int]]]) -> Cost:
    """Measure the loss of a mixture, and of one that its experts were merged into, on some rows.

    Raises:
        UsageError: if nothing in the rows is to be predicted.
    """
    if not rows:
        raise UsageError("a loss cannot be measured: there is no document of two tokens or more to be predicted")
    of_mixture, of_merged = (Evaluation(each, BlockCollator(), 1).loss(rows)[0] for each in (model, merged))
    return Cost(of_mixture, of_merged)
