"""How the experts of a layer are applied to its tokens: all of them to every token, or each to its own tokens only.

    sum_i w_i(t) scaling_i B_i A_i x_t

A dispatch has two halves. `hidden` applies A and the routing weights, once for all layers that read the same input.
`combine` applies one layer's B, and adds the result to what the base layer has computed.

- `Dense`: every expert on every token, in two matmuls.
- `Grouped`: the tokens' choices, sorted by expert; one grouped matmul serves all experts however uneven their load is.
- `Gathered`: for a few tokens, as in generation; the A of the experts that each token has chosen are copied together.

The last two are for evaluation, where a token has k experts. They are chosen where they are cheaper than `Dense`.

Shapes: S tokens, N experts of rank r, k experts per token, M layers that read the same input, R the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

# In hidden units computed for one token: the cost of fetching a token for one of its experts and adding the result
# back, and the cost of a grouped dispatch whatever its size. Fitted on SmolLM2's layers with 8 to 64 experts and 32 to
# 1024 tokens, CPU, 2 threads; `python -m benchmarks.scaling` shows the choice beside the sum over all experts.
PLACE_COST = 60
DISPATCH_COST = 10_000
EXPERTS_PER_CHOICE = 4  # with this many experts for each of the tokens' choices, gathering their matrices pays
ALIGNED_BYTES = 16  # of a row in a grouped matmul


class Layout(NamedTuple):
    """The experts of one layer among those that are routed over; targets, ranks and scalings may differ."""

    columns: tuple[int, ...]  # of the routing weights
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class RoutingWeights:
    """Experts that share a softmax, and each token's weights for them, in float32.

    Args:
        experts: their indices in the mixture, N of them.
        weights: (S, N), or (S, k) where a token has only the k experts of `index`.
        index: (S, k) int64, the places of those in `experts`.
    """

    experts: tuple[int, ...]
    weights: torch.Tensor
    index: torch.Tensor | None = None

    def to(self, device: torch.device) -> RoutingWeights:
        """Return the weights on the device of a layer; a base may be spread over several."""
        if self.weights.device == device:
            return self
        index = None if self.index is None else self.index.to(device)
        return RoutingWeights(self.experts, self.weights.to(device), index)

    def dense(self) -> torch.Tensor:
        """(S, N), zero for the experts that a token does not have."""
        if self.index is None:
            return self.weights
        return self.weights.new_zeros(self.weights.shape[0], len(self.experts)).scatter(1, self.index, self.weights)


@dataclass(frozen=True, eq=False)
class Dense:
    """Every expert on every token. gate: (S, R), the weight of each hidden unit, scaling included."""

    gate: torch.Tensor

    @staticmethod
    def arrange(a: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """The A (r, d_in) by layer and expert, as `hidden` takes them -> (M * R, d_in)"""
        return join([matrix for layer in a for matrix in layer])

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
        """x (S, d_in) -> the weighted hidden units of M layers, (S, R) each"""
        units = F.linear(x, a).view(x.shape[0], -1, self.gate.shape[1])  # (S, M, R)
        return (units * self.gate.unsqueeze(1).to(x.dtype)).unbind(1)

    def combine(self, total: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, in_place: bool) -> torch.Tensor:
        """total (S, d_out), which may be written to if `in_place`, b (R, d_out) -> (S, d_out)"""
        if total.dtype == hidden.dtype == b.dtype:
            return (total.addmm_ if in_place else total.addmm)(hidden, b)
        return total + hidden @ b  # in the wider dtype


@dataclass(frozen=True, eq=False)
class Sparse:
    """Each token's own experts only: B is read where they are.

    gate: (S * k, 1), the weight of each choice, scaling included, in the order of the hidden units.
    rows: (S * k * r,) int64, the rows of B that a token's hidden units are for.
    starts: (S,) int64, where those of each token start.
    """

    rank: int
    gate: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor

    @staticmethod
    def arrange(a: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """The A (r, d_in) by layer and expert -> (N, d_in, M * r)"""
        return torch.stack([torch.cat(matrices) for matrices in zip(*a, strict=True)]).transpose(1, 2).contiguous()

    def combine(self, total: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, in_place: bool) -> torch.Tensor:
        """hidden: (S * k, r), in the order of the tokens."""
        # F.embedding_bag would check the starts again in every layer.
        added = torch.embedding_bag(b.contiguous(), self.rows, self.starts, per_sample_weights=hidden.flatten())[0]
        return added.add_(total) if added.dtype == total.dtype else total + added

    def _by_layer(self, units: torch.Tensor) -> Sequence[torch.Tensor]:
        """(S * k, M * r) -> M times (S * k, r)"""
        return units.view(units.shape[0], -1, self.rank).unbind(1)


@dataclass(frozen=True, eq=False)
class Gathered(Sparse):
    """A few tokens. index: (S, k) int64, their experts."""

    index: torch.Tensor

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
        gathered = a.index_select(0, self.index.flatten()).view(*self.index.shape, *a.shape[1:])  # (S, k, d_in, M * r)
        units = torch.matmul(x[:, None, None], gathered).flatten(0, 2)  # (S * k, M * r)
        return self._by_layer(units * self.gate.to(x.dtype))


@dataclass(frozen=True, eq=False)
class Grouped(Sparse):
    """The tokens' choices, sorted by expert.

    tokens: (S * k,) int64, the token of each choice.
    ends: (N,) int32, where the choices of each expert end.
    places: (S * k,) int64, the place of each of a token's choices among the sorted ones.
    """

    tokens: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
        units = F.grouped_mm(x.index_select(0, self.tokens), a, offs=self.ends).mul_(self.gate)  # (S * k, M * r)
        return self._by_layer(units)

    def combine(self, total: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, in_place: bool) -> torch.Tensor:
        return super().combine(total, hidden.index_select(0, self.places), b, in_place)


Dispatch = Dense | Gathered | Grouped


def choose_dispatch(routing: RoutingWeights, layout: Layout, groupable: bool) -> Dispatch:
    """Choose the cheapest dispatch. groupable: whether a grouped matmul takes the layers' A."""
    columns, ranks, scalings = layout
    uniform = len(columns) == len(routing.experts) and len(set(ranks)) == len(set(scalings)) == 1
    evaluates = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if routing.index is not None and groupable and uniform and evaluates:
        sparse = sparse_dispatch(routing.index, routing.weights * scalings[0], len(columns), ranks[0])
        if sparse is not None:
            return sparse
    return Dense(_gate(routing.dense(), layout))


def _gate(weights: torch.Tensor, layout: Layout) -> torch.Tensor:
    """weights (S, N) -> the weight of each hidden unit, scaling included: (S, R)"""
    columns, ranks, scalings = layout
    if columns != tuple(range(weights.shape[1])):
        weights = weights[:, list(columns)]
    weights = weights * (scalings[0] if len(set(scalings)) == 1 else weights.new_tensor(scalings))
    if len(set(ranks)) == 1:
        return weights.unsqueeze(-1).expand(-1, -1, ranks[0]).flatten(1)
    return weights.repeat_interleave(torch.tensor(ranks, device=weights.device), dim=1)


def sparse_dispatch(
    index: torch.Tensor, weights: torch.Tensor, num_experts: int, rank: int
) -> Grouped | Gathered | None:
    """index (S, k) int64, weights (S, k) -> what is cheaper than the sum over all experts; None if nothing is."""
    num_tokens, k = index.shape
    device = index.device
    gathered = num_experts >= EXPERTS_PER_CHOICE * k * num_tokens
    spared = num_experts * rank - k * (rank + PLACE_COST)  # hidden units per token
    if device.type not in ("cpu", "cuda") or not (gathered or num_tokens * spared >= DISPATCH_COST):
        return None
    gate = weights.reshape(-1, 1)  # (S * k, 1)
    rows = torch.add(count_to(rank, device), index.unsqueeze(-1), alpha=rank).flatten()
    starts = count_to(len(rows), device, k * rank)
    if gathered:
        return Gathered(rank, gate, rows, starts, index)
    chosen, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, count_to(num_experts, device), right=True, out_int32=True)
    places = torch.empty_like(order).scatter_(0, order, count_to(len(order), device))
    return Grouped(rank, gate.index_select(0, order), rows, starts, order // k, ends, places)


def can_be_grouped(dtype: torch.dtype, *widths: int) -> bool:
    """Return whether a grouped matmul takes matrices with rows of these widths."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * dtype.itemsize % ALIGNED_BYTES == 0 for width in widths)


def join(matrices: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """As torch.cat, but a single matrix is not copied."""
    return torch.cat(list(matrices), dim) if len(matrices) > 1 else matrices[0]


@lru_cache(maxsize=16)
def count_to(n: int, device: torch.device, step: int = 1) -> torch.Tensor:
    """int64: 0, step, ... below n. Every decoder layer of a forward pass needs the same few."""
    with torch.inference_mode(False):
        return torch.arange(0, n, step, device=device)
