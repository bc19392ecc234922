"""Sparse routing in evaluation: each expert works on its own tokens only.

The tokens' choices are sorted by expert, so that two grouped matmuls serve all experts however unevenly they are
wanted. One token, as in generation, needs no sorting: the matrices of its experts are fetched instead. Where neither
is cheaper than the sum over all experts, there is no dispatch.

Shapes: S tokens, N experts of rank r, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from .layers import LayerSlot

# In hidden units worked out for one token: what fetching a token for one of its experts and adding the result back
# costs, and what a dispatch costs whatever its size. Tried on SmolLM2-135M with 4, 16 and 64 experts and 256 to 1024
# tokens, CPU, 2 threads: with 16 experts both ways take the same time, with 64 this one adds a third of the other's.
PLACE_COST = 112
DISPATCH_COST = 12_000
FETCHED_EXPERTS = 8  # times k: from that many on, fetching the matrices of one token's experts pays
ALIGNED_BYTES = 16  # of a grouped matmul's rows


@dataclass(frozen=True)
class Fetch:
    """One token's experts: index (k,) int64, and the weight of each hidden unit, gate (1, k * r)."""

    rank: int
    index: torch.Tensor
    gate: torch.Tensor

    def add(
        self, total: torch.Tensor, x: torch.Tensor, slot: LayerSlot, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """total (1, d_out), x (1, d_in), a (N * r, d_in), b (N * r, d_out) -> (1, d_out)."""
        a, b = (t.view(-1, self.rank, t.shape[-1]).index_select(0, self.index).flatten(0, 1) for t in (a, b))
        return add_product(total, F.linear(x, a) * self.gate.to(x.dtype), b)


@dataclass(frozen=True)
class Dispatch:
    """The tokens' choices, sorted by expert.

    tokens: (S * k,) int64, the token of each choice.
    ends: (N,) int32, where the choices of each expert end.
    places: (S * k,) int64, where each of a token's choices has come to stand.
    rows: (S, k * r) int64, the rows of B that a token's hidden units go to.
    gate: (S, k * r), the weights of these hidden units, scaling included.
    """

    rank: int
    tokens: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    gate: torch.Tensor

    def add(
        self, total: torch.Tensor, x: torch.Tensor, slot: LayerSlot, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """total (S, d_out), a (N * r, d_in), b (N * r, d_out) -> (S, d_out); x (S, d_in) is what the slot has."""
        a = a.view(-1, self.rank, a.shape[-1])  # (N, r, d_in)
        hidden = F.grouped_mm(slot.gathered(self), a.transpose(1, 2), offs=self.ends)  # (S * k, r)
        hidden = hidden.index_select(0, self.places).view(self.gate.shape) * self.gate.to(hidden.dtype)  # (S, k * r)
        out = F.embedding_bag(self.rows, b, per_sample_weights=hidden, mode="sum")
        # In place on what is new here: nobody else has seen it, and there are no gradients.
        return out.add_(total) if out.dtype == total.dtype else total + out  # (S, d_out)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """total (S, d) + left (S, R) @ right (R, d), in the wider dtype.

    in_place: total may be written to, where that has this dtype.
    """
    if total.dtype == left.dtype == right.dtype:
        return total.addmm_(left, right) if in_place else torch.addmm(total, left, right)
    return total + left @ right


def plan_dispatch(
    index: torch.Tensor, weights: torch.Tensor, num_experts: int, rank: int, scaling: float = 1.0
) -> Dispatch | Fetch | None:
    """index (S, k) int64 and weights (S, k) -> what is cheaper than the sum over all experts; None where nothing is."""
    tokens, k = index.shape
    if tokens == 1:
        if num_experts < FETCHED_EXPERTS * k:
            return None
        return Fetch(rank, index[0], (weights * scaling).repeat_interleave(rank, dim=1))
    spared = num_experts * rank - k * (rank + PLACE_COST)  # hidden units per token
    if tokens * spared < DISPATCH_COST or index.device.type not in ("cpu", "cuda"):
        return None
    device = index.device
    chosen, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, _count_to(num_experts, device), right=True, out_int32=True)
    places = torch.empty_like(order).scatter_(0, order, _count_to(len(order), device))
    rows = (index.unsqueeze(-1) * rank + _count_to(rank, device)).flatten(1)
    return Dispatch(rank, order // k, ends, places, rows, (weights * scaling).repeat_interleave(rank, dim=1))


@lru_cache(maxsize=16)
def _count_to(n: int, device: torch.device) -> torch.Tensor:
    """(n,) int64: 0, 1, ... Every decoder layer of a forward pass needs the same few."""
    with torch.inference_mode(False):
        return torch.arange(n, device=device)


def can_be_grouped(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a grouped matmul takes matrices of these rows and dtypes."""
    return a.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        t.shape[-1] * t.element_size() % ALIGNED_BYTES == 0 for t in (a, b)
    )
