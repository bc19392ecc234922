"""The ways to add up a mix's experts: over all of them, or each expert over its own tokens only.

A way has two halves. `hidden` is worked out once for all layers that read the same input: what the A make of it,
weighted. `add` puts one layer's B to its part of that. Between the halves a part has whatever form suits the way.

In evaluation with few experts per token, the tokens' choices are sorted by expert, so that one grouped matmul serves
all experts however unevenly they are wanted. A few tokens, as in generation, need no sorting: the A of the experts that
they chose are fetched. Where nothing is cheaper, the sum is over all.

Shapes: S tokens, N experts of rank r, k experts per token, M layers that read the same input, R the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional as F

# In hidden units worked out for one token: what fetching a token for one of its experts and adding the result back
# costs, and what a dispatch costs whatever its size. Fitted on SmolLM2's layers with 8 to 64 experts and 32 to 1024
# tokens, CPU, 2 threads; `python -m benchmarks.scaling` shows what is chosen beside the sum over all experts.
PLACE_COST = 60
DISPATCH_COST = 10_000
FETCHED_EXPERTS = 4  # for each choice of an expert: with that many, fetching the matrices of those chosen pays
ALIGNED_BYTES = 16  # of a grouped matmul's rows


@dataclass(eq=False)
class Dense:
    """The sum over all experts, in two matmuls. gate: (S, R), the weight of each hidden unit, scaling included."""

    gate: torch.Tensor

    @staticmethod
    def arrange(a: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """The A (r, d_in) by layer and expert -> (M * R, d_in)."""
        return join([matrix for layer in a for matrix in layer])

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
        """x (S, d_in) -> M parts (S, R)."""
        gate = self.gate.unsqueeze(1)  # (S, 1, R)
        shape = x.shape[0], -1, gate.shape[-1]
        return (F.linear(x, a).view(shape) * gate.to(x.dtype)).unbind(1)

    def add(self, total: torch.Tensor, part: torch.Tensor, b: torch.Tensor, in_place: bool) -> torch.Tensor:
        """total (S, d_out), b (R, d_out) -> (S, d_out)."""
        return add_product(total, part, b, in_place)


@dataclass(eq=False)
class ByExpert:
    """Each token's own experts: only the rows of B that they have are read.

    gate: (S * k, 1), the weight of each choice, scaling included, in the order of the units.
    rows: (S * k * r,) int64, the rows of B that a token's hidden units go to.
    begins: (S,) int64, where those of each token begin.
    """

    rank: int
    gate: torch.Tensor
    rows: torch.Tensor
    begins: torch.Tensor

    @staticmethod
    def arrange(a: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """The A (r, d_in) by layer and expert -> (N, d_in, M * r)."""
        return torch.stack([torch.cat(matrices) for matrices in zip(*a, strict=True)]).transpose(1, 2).contiguous()

    def parts(self, units: torch.Tensor) -> Sequence[torch.Tensor]:
        """(n, M * r) -> M parts (n, r)."""
        return units.view(len(units), -1, self.rank).unbind(1)  # Tensor.split is written in Python, and slow

    def in_order(self, part: torch.Tensor) -> torch.Tensor:
        """A part (S * k, r) of `hidden` -> (S * k, r) in the order of the tokens."""
        return part

    def add(self, total: torch.Tensor, part: torch.Tensor, b: torch.Tensor, in_place: bool) -> torch.Tensor:
        """total (S, d_out), b (N * r, d_out) -> (S, d_out)."""
        out = sum_rows(b.contiguous(), self.rows, self.begins, self.in_order(part).flatten())
        # In place on what is new here: nobody else has seen it, and there are no gradients.
        return out.add_(total) if out.dtype == total.dtype else total + out


@dataclass(eq=False)
class Fetch(ByExpert):
    """Few tokens' experts, their A copied together. index: (S, k) int64."""

    index: torch.Tensor

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
        """x (S, d_in) -> M parts (S * k, r)."""
        fetched = a.index_select(0, self.index.flatten()).view(*self.index.shape, *a.shape[1:])  # (S, k, d_in, M * r)
        units = torch.matmul(x[:, None, None], fetched).flatten(0, 2)  # (S * k, M * r)
        return self.parts(units * self.gate.to(x.dtype))


@dataclass(eq=False)
class Dispatch(ByExpert):
    """The tokens' choices, sorted by expert.

    tokens: (S * k,) int64, the token of each choice.
    ends: (N,) int32, where the choices of each expert end.
    places: (S * k,) int64, where each of a token's choices has come to stand.
    """

    tokens: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
        """x (S, d_in) -> M parts (S * k, r), in the order of the choices."""
        units = F.grouped_mm(x.index_select(0, self.tokens), a, offs=self.ends).mul_(self.gate)  # (S * k, M * r)
        return self.parts(units)

    def in_order(self, part: torch.Tensor) -> torch.Tensor:
        return part.index_select(0, self.places)


def join(matrices: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """As torch.cat, without a copy of a single matrix."""
    return torch.cat(matrices, dim) if len(matrices) > 1 else matrices[0]


def sum_rows(table: torch.Tensor, index: torch.Tensor, begins: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """For each of S tokens the weighted sum of the rows of table (R, d) that index (n,) names for it: (S, d).

    begins: (S,) int64, where the rows of each token begin. F.embedding_bag would count them out again for every layer.
    """
    return torch.embedding_bag(table, index, begins, per_sample_weights=weights)[0]


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, in_place: bool = False, weight: float = 1.0
) -> torch.Tensor:
    """total (S, d) + weight * left (S, R) @ right (R, d), in the wider dtype.

    in_place: total may be written to, where that has this dtype.
    """
    if total.dtype == left.dtype == right.dtype:
        return (total.addmm_ if in_place else total.addmm)(left, right, alpha=weight)
    return torch.add(total, left @ right, alpha=weight)


def sparse_way(
    index: torch.Tensor, weights: torch.Tensor, num_experts: int, rank: int, scaling: float = 1.0
) -> Dispatch | Fetch | None:
    """index (S, k) int64 and weights (S, k) -> what is cheaper than the sum over all experts; None where nothing is."""
    num_tokens, k = index.shape
    device = index.device
    fetched = num_experts >= FETCHED_EXPERTS * k * num_tokens
    spared = num_experts * rank - k * (rank + PLACE_COST)  # hidden units per token
    if device.type not in ("cpu", "cuda") or not (fetched or num_tokens * spared >= DISPATCH_COST):
        return None
    gate = weights.flatten() * scaling
    rows = torch.add(count_to(rank, device), index.unsqueeze(-1), alpha=rank).flatten()
    begins = count_to(len(rows), device, k * rank)
    if fetched:
        return Fetch(rank, gate.unsqueeze(1), rows, begins, index)
    chosen, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, count_to(num_experts, device), right=True, out_int32=True)
    gate = gate.index_select(0, order).unsqueeze(1)
    places = torch.empty_like(order).scatter_(0, order, count_to(len(order), device))
    return Dispatch(rank, gate, rows, begins, order // k, ends, places)


@lru_cache(maxsize=16)
def count_to(n: int, device: torch.device, step: int = 1) -> torch.Tensor:
    """int64: 0, step, ... below n. Every decoder layer of a forward pass needs the same few."""
    with torch.inference_mode(False):
        return torch.arange(0, n, step, device=device)


def can_be_grouped(dtype: torch.dtype, *widths: int) -> bool:
    """Whether a grouped matmul takes matrices of rows of these widths."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * dtype.itemsize % ALIGNED_BYTES == 0 for width in widths)
