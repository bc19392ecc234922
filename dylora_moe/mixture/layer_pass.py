"""What the routed layers of a decoder layer share in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from peft.tuners.lora import LoraLayer

from .expert_sum import Dense, Dispatch, Fetch, count_to, sparse_way, sum_rows

# Of a mix's experts in one layer: their columns in the weights, their ranks, their scalings.
Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]
Way = Dense | Dispatch | Fetch


Expert = int | tuple[int, ...] | None


class Mix:
    """Experts that share a normaliser, and each token's weights for them.

    All routed layers of a decoder layer use the same mix, so that what they derive from it is computed once.

    Args:
        experts: their indices in the mixture.
        weights: (S, N) in float32; of a sparse mix only the shape and the dtype are looked at.
        top: of a sparse mix, which experts each token uses, (S, k), and their weights, (S, k).
    """

    __slots__ = ("_ways", "_weights", "experts", "top")

    def __init__(self, experts: tuple[int, ...], weights: torch.Tensor, top: tuple | None = None):
        self.experts = experts
        self._weights = weights
        self.top = top
        self._ways: list[tuple[Layout, bool, Way]] = []

    @property
    def num_tokens(self) -> int:
        """S."""
        return self._weights.shape[0]  # Tensor.__len__ is written in Python, and slow

    def fresh(self) -> Mix:
        """The same weights, with nothing derived from them yet."""
        return Mix(self.experts, self._weights, self.top)

    def way(self, layout: Layout, groupable: bool) -> Way:
        """How to add up these experts in layers of that layout; groupable: whether a grouped matmul takes their A."""
        for known, grouped, way in self._ways:  # nearly always one; a layout takes longer to hash than to compare
            if grouped == groupable and known == layout:
                return way
        way = (self._sparse_way(*layout) if groupable else None) or Dense(self._gate(*layout))
        self._ways.append((layout, groupable, way))
        return way

    def _gate(self, columns: tuple[int, ...], ranks: tuple[int, ...], scales: tuple[float, ...]) -> torch.Tensor:
        """The weight of each hidden unit, scaling included: (S, R)."""
        if self.top is not None:
            index, weights = self.top
            table = _units_of(len(self.experts), columns, ranks, scales, weights.device)
            begins = count_to(index.numel(), index.device, index.shape[1])
            return sum_rows(table, index.flatten(), begins, weights.flatten())
        weights = self._weights
        if columns != tuple(range(len(self.experts))):
            weights = weights[:, list(columns)]  # (S, experts here)
        weights = weights * (scales[0] if len(set(scales)) == 1 else weights.new_tensor(scales))
        if len(set(ranks)) == 1:
            return weights.unsqueeze(-1).expand(-1, -1, ranks[0]).flatten(1)  # (S, R)
        return weights.repeat_interleave(torch.tensor(ranks, device=weights.device), dim=1)

    def _sparse_way(self, columns: tuple, ranks: tuple, scales: tuple) -> Way | None:
        if self.top is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        everywhere = len(columns) == len(self.experts)
        if not everywhere or len(set(ranks)) > 1 or len(set(scales)) > 1:
            return None
        index, weights = self.top
        return sparse_way(index, weights, len(self.experts), ranks[0], scales[0])


@lru_cache(maxsize=64)
def _units_of(num_experts: int, columns: tuple, ranks: tuple, scales: tuple, device: torch.device) -> torch.Tensor:
    """(N, R) float32: at an expert's hidden units its scaling, elsewhere zero."""
    with torch.inference_mode(False):
        table = torch.zeros(num_experts, sum(ranks), device=device)
        begin = 0
        for column, rank, scale in zip(columns, ranks, scales, strict=True):
            table[column, begin : begin + rank] = scale
            begin += rank
        return table


class LayerSlot:
    """What the routed layers of one decoder layer do in the forward pass that is under way.

    They add one expert (`expert` is its index; NO_EXPERT: none; a tuple: one for each row of the batch), the sum of
    `mixes`, or both. With neither, a routed layer is PEFT's own layer with its active adapters.
    """

    __slots__ = ("_shared", "_terms", "expert", "mixes", "settled", "source")

    def __init__(self):
        self.set()

    def set(self, expert: Expert = None, mixes: tuple[Mix, ...] | None = None, settled: object | None = None) -> None:
        """settled: while it is the same object, no parameter has changed; None where that is not known."""
        self.expert, self.mixes, self.settled = expert, mixes, settled
        self.source = self._shared = None
        self._terms: list[tuple[Mix, Term]] = []

    def terms(self, layer: LoraLayer, x: torch.Tensor) -> list[Term]:
        """The terms of a layer's sum, one for each mix, worked out once for all layers that share the input x."""
        if self.source is not x or self._shared is not layer.shared:
            self.source, self._shared, self._terms = x, layer.shared, []
        return [self._term(layer, x, mix) for mix in self.mixes]

    def _term(self, layer: LoraLayer, x: torch.Tensor, mix: Mix) -> Term:
        for known, term in self._terms:
            if known is mix and layer in term.parts:
                return term
        term = layer.shared.term(layer, x, mix, self)
        self._terms.append((mix, term))
        return term


@dataclass(eq=False)
class Term:
    """One mix's term in the sums of some layers: by layer, what its A has made of the input, and its B (R, d_out)."""

    way: Way | None  # None without experts
    parts: dict[LoraLayer, tuple[torch.Tensor, torch.Tensor] | None]

    def add(self, total: torch.Tensor, layer: LoraLayer, in_place: bool) -> torch.Tensor:
        """total (S, d_out) of a layer -> (S, d_out). in_place: total may be written to."""
        if self.way is None:
            return total
        part, b = self.parts[layer]
        return self.way.add(total, part, b, in_place)
