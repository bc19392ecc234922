"""Linear layers of vLLM with a routed sum of LoRA experts.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

vLLM has one layer for linear layers that read the same input, such as qkv_proj; its output is that of all of them, side
by side. Every expert is computed for every token: one matmul with the A of all, and one with the B of each slice.

Shapes: T tokens, N experts that are routed over, r the largest rank, S slices that experts are on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase

Adapter = Mapping[str, Mapping[str, torch.Tensor]]  # "A" (r, d_in) and "B" (d_out, r), by the path of their layer


BY_HEAD = "query_key_value"  # of GPT-NeoX, Bloom and Falcon


class Place(NamedTuple):
    """Where vLLM has a linear layer of the base model: in the columns `begin` to `end` of the output of `layer`."""

    layer: LinearBase
    begin: int
    end: int


class RoutedLinear(LinearBase):
    """Is put in front of the class of a layer of vLLM, so that all but `forward` stays as it is.

    Attributes:
        expert_weights: (at least T, N) in float32, one tensor for all layers. It stays where it is, for CUDA graphs.
        expert_a: (d_in, S * N * r)
        expert_b_0, and so on: S times (N * r, d_out), scaling included.
        slices: where each of the S slices begins and ends.
    """

    expert_weights: torch.Tensor
    expert_a: torch.Tensor
    slices: tuple[tuple[int, int], ...]

    def forward(self, x: torch.Tensor) -> Any:
        """x (T, d_in) -> what the layer returns without experts; they are added to its output (T, d_out)."""
        result = super().forward(x)
        output = result[0] if isinstance(result, tuple) else result
        weights = self.expert_weights[: x.shape[0]].to(x.dtype)  # (T, N)
        units = (x @ self.expert_a).view(x.shape[0], len(self.slices), weights.shape[1], -1)  # (T, S, N, r)
        units = (units * weights[:, None, :, None]).flatten(2)  # (T, S, N * r)
        for i, (begin, end) in enumerate(self.slices):
            output[:, begin:end].addmm_(units[:, i], getattr(self, f"expert_b_{i}"))
        return result


@cache
def _routed(kind: type[LinearBase]) -> type[LinearBase]:
    return type(f"Routed{kind.__name__}", (RoutedLinear, kind), {})


def add_experts(
    model: nn.Module, adapters: list[Adapter], scalings: list[float], weights: torch.Tensor, packed: Mapping[str, list]
) -> None:
    """Put experts on the linear layers of a model of vLLM.

    Args:
        adapters: N of them.
        weights: (max tokens, N), which holds the weights of the experts in each pass.
        packed: which layers of the base model vLLM has made one, by the name of that one.

    Raises:
        ValueError: if the model does not have a layer that an expert is on, or has it with other sizes.
    """
    layers: dict[LinearBase, dict[Place, list[str]]] = {}
    for path in sorted({path for adapter in adapters for path in adapter}):
        place = _find(model, path, packed)
        layers.setdefault(place.layer, {}).setdefault(place, []).append(path)
    for layer, places in layers.items():
        parts = [[_checked(adapter, paths[0], place) for adapter in adapters] for place, paths in places.items()]
        rank = max(len(a) for part in parts for a, _ in part)
        a = torch.cat([_padded(a, rank) for part in parts for a, _ in part])  # (S * N * r, d_in)
        kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        layer.__class__ = _routed(type(layer))
        layer.register_buffer("expert_weights", weights, persistent=False)
        layer.register_buffer("expert_a", a.t().contiguous().to(**kind), persistent=False)
        layer.slices = tuple((place.begin, place.end) for place in places)
        for i, part in enumerate(parts):
            b = torch.cat([_padded(b.t() * scaling, rank) for (_, b), scaling in zip(part, scalings, strict=True)])
            layer.register_buffer(f"expert_b_{i}", b.contiguous().to(**kind), persistent=False)


def _padded(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """matrix (an expert's own rank, d) -> (rank, d), with rows of zeros"""
    return nn.functional.pad(matrix, (0, 0, 0, rank - len(matrix)))


def _checked(adapter: Adapter, path: str, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of an expert on a layer; with a rank of 0 if it is not on this one."""
    sizes = place.layer.input_size, place.end - place.begin
    found = adapter.get(path)
    if found is None:
        return torch.zeros(0, sizes[0]), torch.zeros(sizes[1], 0)
    a, b = found.get("A"), found.get("B")
    if a is None or b is None or (a.shape[1], b.shape[0]) != sizes or a.shape[0] != b.shape[1]:
        shapes = [None if each is None else tuple(each.shape) for each in (a, b)]
        raise ValueError(f"{path}: expected a LoRA from {sizes[0]} to {sizes[1]}, found A and B of {shapes}")
    return a, b


def _find(model: nn.Module, path: str, packed: Mapping[str, list[str]]) -> Place:
    """Find where vLLM has the layer of this path in Transformers' model."""
    parent, _, leaf = path.rpartition(".")
    if leaf == BY_HEAD:
        raise ValueError(
            f"an expert is on the layer {path}, whose rows vLLM has in another order than Transformers, which has the "
            "queries, keys and values of each head side by side: such a mixture is not supported"
        )
    for name, place, count in _candidates(leaf, packed):
        try:
            layer = model.get_submodule(f"{parent}.{name}")
        except AttributeError:
            continue
        sizes = getattr(layer, "output_partition_sizes", [])
        if isinstance(layer, LinearBase) and place is None:
            return Place(layer, 0, sum(sizes))
        if isinstance(layer, LinearBase) and len(sizes) == count:
            end = list(accumulate(sizes))[place]
            return Place(layer, end - sizes[place], end)
    raise ValueError(f"an expert is on the layer {path}, and {type(model).__name__} of vLLM has no linear layer for it")


def _candidates(leaf: str, packed: Mapping[str, list[str]]) -> Iterator[tuple[str, int | None, int]]:
    yield leaf, None, 1
    for name, leaves in packed.items():
        if leaf in leaves:
            yield name, leaves.index(leaf), len(leaves)
