"""Sparse routing in evaluation: each expert works on its own tokens only.

Tokens are brought together by expert, in as many places for each as the most wanted of them has tokens, so that two
batched matmuls serve them all. Where a few experts take most of the tokens, that would leave most places empty: those
few work on all tokens instead, as in the dense sum. What is cheapest for the tokens at hand is decided by counting.

Shapes: S tokens, N experts of rank r, k experts per token, E experts that are dispatched to, C places for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from .layers import LayerSlot

# What fetching a token to a place and adding its result back costs, in hidden units worked out for a token. Tried on
# SmolLM2-135M with 16 and 64 experts, 256 tokens, CPU: from 9 to 27 all do equally well, 2 and 5 do worse.
PLACE_COST = 20


class Dispatch:
    """Which experts work on all tokens, and which on their own.

    Args:
        hot: (H,) experts that work on all tokens; None where there are none.
        hot_gate: (S, H * r) their weights for each hidden unit.
        cold: (E,) experts that have places for their own tokens; None: all of them, some with empty places.
        tokens: (E * C,) the token at each place.
        places: (S, k) the place where each of a token's experts has put its result; None where none has places.
        weights: (S, k) their weights; zero where the expert is a hot one.
    """

    def __init__(self, num_experts: int, rank: int):
        self.num_experts = num_experts
        self.rank = rank
        self.hot = self.hot_gate = self.cold = self.tokens = self.places = self.weights = None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (S, d_in) -> (E, C, d_in)."""
        experts = self.num_experts if self.cold is None else len(self.cold)
        return x.index_select(0, self.tokens).view(experts, -1, x.shape[-1])

    def add(
        self, total: torch.Tensor, x: torch.Tensor, slot: LayerSlot, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """total (S, d_out), x (S, d_in), a (N * r, d_in), b (N * r, d_out) -> (S, d_out)."""
        a = a.view(self.num_experts, self.rank, -1)  # (N, r, d_in)
        b = b.view(self.num_experts, self.rank, -1)  # (N, r, d_out)
        if self.places is not None:
            cold_a, cold_b = (a, b) if self.cold is None else (t.index_select(0, self.cold) for t in (a, b))
            hidden = torch.bmm(slot.gathered(self), cold_a.transpose(1, 2))  # (E, C, r)
            out = torch.bmm(hidden, cold_b).flatten(0, 1)  # (E * C, d_out)
            # In place on what is new here: nobody else has seen it, and there are no gradients.
            out = F.embedding_bag(self.places, out, per_sample_weights=self.weights.to(out.dtype), mode="sum")
            total = out.add_(total) if out.dtype == total.dtype else total + out  # (S, d_out)
        if self.hot is not None:
            hidden = F.linear(x, a.index_select(0, self.hot).flatten(0, 1))  # (S, H * r)
            total = add_product(
                total, hidden * self.hot_gate.to(hidden.dtype), b.index_select(0, self.hot).flatten(0, 1)
            )
        return total


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total (S, d) + left (S, R) @ right (R, d), in the wider dtype."""
    if total.dtype == left.dtype == right.dtype:
        return torch.addmm(total, left, right)
    return total + left @ right


def plan_dispatch(index: torch.Tensor, weights: torch.Tensor, num_experts: int, rank: int) -> Dispatch | None:
    """index (S, k) int64 and weights (S, k) -> the cheapest dispatch; None where the dense sum is as cheap."""
    tokens, k = index.shape
    if num_experts * rank <= k * (rank + PLACE_COST):
        return None  # not even an even load would pay; and no look at the device
    if tokens == 1:  # as in generation: its experts, without counting
        result = Dispatch(num_experts, rank)
        result.hot = index[0]
        result.hot_gate = weights.unsqueeze(-1).expand(-1, -1, rank).flatten(1)  # (1, k * r)
        return result
    counts = torch.bincount(index.flatten(), minlength=num_experts).tolist()
    hot, cold = split_by_cost(counts, tokens, rank)
    if len(hot) == num_experts:
        return None
    result = Dispatch(num_experts, rank)
    if hot:
        result.hot = torch.tensor(hot, device=index.device)
        chosen = (index.unsqueeze(-1) == result.hot).to(weights.dtype)  # (S, k, H)
        gate = (weights.unsqueeze(-1) * chosen).sum(1)  # (S, H)
        result.hot_gate = gate.unsqueeze(-1).expand(-1, -1, rank).flatten(1)  # (S, H * r)
    if cold:
        _place(result, index, weights, cold, [counts[e] for e in cold])
    return result


def split_by_cost(counts: list[int], tokens: int, rank: int) -> tuple[list[int], list[int]]:
    """The experts that work on all tokens, and those that work on their own, each sorted; unwanted ones are in neither.

    With the h most wanted working on all tokens, a unit of work being one hidden unit for one token:
    h * tokens * rank + (wanted - h) * (the most tokens that one of the rest has) * (rank + PLACE_COST).
    """
    wanted = sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e])

    def cost(h: int) -> int:
        most = counts[wanted[h]] if h < len(wanted) else 0
        return h * tokens * rank + (len(wanted) - h) * most * (rank + PLACE_COST)

    h = min(range(len(wanted) + 1), key=cost)
    return sorted(wanted[:h]), sorted(wanted[h:])


def _place(result: Dispatch, index: torch.Tensor, weights: torch.Tensor, cold: list[int], counts: list[int]) -> None:
    """Give each token a place at each of its cold experts; counts: how many tokens want each of them."""
    device, k, most = index.device, index.shape[1], max(counts)
    n = result.num_experts
    sparse = 2 * len(cold) <= n  # otherwise empty places cost less than fetching the matrices of those that have some
    result.cold = torch.tensor(cold, device=device) if sparse else None
    row_of, start_of = [n] * n, [0] * (n + 1)  # an expert's row of places; how many tokens come before its own
    before = 0
    for i, (expert, count) in enumerate(zip(cold, counts, strict=True)):
        row_of[expert] = i if sparse else expert
        start_of[row_of[expert]] = before
        before += count
    rows = torch.tensor(row_of, device=device)[index]  # (S, k); n: not a cold one
    sorted_rows, order = rows.flatten().sort(stable=True)
    sorted_rows, order = sorted_rows[:before], order[:before]  # (cold choices,)
    starts = torch.tensor(start_of, device=device)
    place = sorted_rows * most + torch.arange(before, device=device) - starts[sorted_rows]
    result.tokens = torch.zeros((len(cold) if sparse else n) * most, dtype=torch.int64, device=device)
    result.tokens[place] = order // k
    places = torch.zeros(index.numel(), dtype=torch.int64, device=device)
    places[order] = place
    result.places = places.view(index.shape)
    result.weights = torch.where(rows == n, 0.0, weights)
