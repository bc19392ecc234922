"""The weights with which a decoder layer adds up its experts, for its tokens, in one forward pass.

Shapes: S tokens, N experts of a mix, k experts per token, R the sum of the experts' ranks.
"""

from __future__ import annotations

import torch

from .dispatch import Dispatch, Fetch, plan_dispatch

# Of a mix's experts in one layer: their columns in the weights, their ranks, their scalings.
Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


class Mix:
    """Experts that share a normaliser, and each token's weights for them.

    All routed layers of a decoder layer use the same mix, so that what they derive from it is computed once.

    Args:
        experts: their indices in the mixture.
        weights: (S, N) in float32; of a sparse mix only the shape and the dtype are looked at.
        top: of a sparse mix, which experts each token uses, (S, k), and their weights, (S, k).
    """

    __slots__ = ("_dispatches", "_gates", "_weights", "experts", "top")

    def __init__(self, experts: tuple[int, ...], weights: torch.Tensor, top: tuple | None = None):
        self.experts = experts
        self._weights = weights
        self.top = top
        self._gates: dict[Layout, torch.Tensor] = {}
        self._dispatches: dict[Layout, Dispatch | Fetch | None] = {}

    def fresh(self) -> Mix:
        """The same weights, with nothing derived from them yet."""
        return Mix(self.experts, self._weights, self.top)

    def gate(self, layout: Layout) -> torch.Tensor:
        """The weight of each hidden unit, scaling included: (S, R)."""
        if layout not in self._gates:
            self._gates[layout] = self._expand(*layout)
        return self._gates[layout]

    def _expand(self, columns: tuple[int, ...], ranks: tuple[int, ...], scales: tuple[float, ...]) -> torch.Tensor:
        weights = self._weights
        if self.top is not None:
            weights = torch.zeros_like(weights).scatter_(-1, *self.top)
        if columns != tuple(range(len(self.experts))):
            weights = weights[:, list(columns)]  # (S, experts here)
        weights = weights * (scales[0] if len(set(scales)) == 1 else weights.new_tensor(scales))
        if len(set(ranks)) == 1:
            return weights.unsqueeze(-1).expand(-1, -1, ranks[0]).flatten(1)  # (S, R)
        return weights.repeat_interleave(torch.tensor(ranks, device=weights.device), dim=1)

    def dispatch(self, layout: Layout) -> Dispatch | Fetch | None:
        """Which tokens go to which experts, where working out only those pays; None where it does not."""
        if self.top is None:
            return None
        if layout not in self._dispatches:
            self._dispatches[layout] = self._plan_dispatch(*layout)
        return self._dispatches[layout]

    def _plan_dispatch(self, columns: tuple, ranks: tuple, scales: tuple) -> Dispatch | Fetch | None:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        everywhere = len(columns) == len(self.experts)
        if not everywhere or len(set(ranks)) > 1 or len(set(scales)) > 1:
            return None
        index, weights = self.top
        return plan_dispatch(index, weights, len(self.experts), ranks[0], scales[0])
