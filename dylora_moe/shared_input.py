"""What the routed layers of a decoder layer share: the mixes of the moment, and the work on an input they all read.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

The A of all experts, and of all layers that read the same x, are one matrix, and so are the B of a layer's experts.

Shapes: S tokens (batch times sequence), R the sum of the ranks of a mix's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .errors import UsageError
from .mix import Mix, Way
from .ways import ByExpert, Few, Scratch, can_be_grouped, join

if TYPE_CHECKING:
    from .layers import RoutedLinear


Expert = int | tuple[int, ...] | None


class LayerSlot:
    """What the routed layers of one decoder layer do in the forward pass that is under way.

    They add one expert (`expert` is its index; NO_EXPERT: none; a tuple: one for each row of the batch), the sum of
    `mixes`, or both. With neither, a routed layer is PEFT's own layer with its active adapters.

    Args:
        scratch: where hidden units are put; all slots of a model share it.
    """

    __slots__ = ("_shared", "_terms", "expert", "mixes", "scratch", "settled", "source")

    def __init__(self, scratch: Scratch):
        self.scratch = scratch
        self.set()

    def set(self, expert: Expert = None, mixes: tuple[Mix, ...] | None = None, settled: object | None = None) -> None:
        """settled: while it is the same object, no parameter has changed; None where that is not known."""
        self.expert, self.mixes, self.settled = expert, mixes, settled
        self.source = self._shared = None
        self._terms: list[tuple[Mix, Term]] = []

    def terms(self, layer: RoutedLinear, x: torch.Tensor) -> list[Term]:
        """The terms of a layer's sum, one for each mix, worked out once for all layers that share the input x."""
        if self.source is not x or self._shared is not layer.shared:
            self.source, self._shared, self._terms = x, layer.shared, []
        return [self._term(layer, x, mix) for mix in self.mixes]

    def _term(self, layer: RoutedLinear, x: torch.Tensor, mix: Mix) -> Term:
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
    parts: dict[RoutedLinear, tuple[torch.Tensor, torch.Tensor] | None]

    def add(self, total: torch.Tensor, layer: RoutedLinear, in_place: bool) -> torch.Tensor:
        """total (S, d_out) of a layer -> (S, d_out). in_place: total may be written to."""
        if self.way is None:
            return total
        part, b = self.parts[layer]
        return self.way.add(total, part, b, in_place)

    def sum(self, layer: RoutedLinear, dtype: torch.dtype) -> torch.Tensor | None:
        """The term of a layer (S, d_out), a new tensor; None where it is worked out only while it is added, or in
        another dtype."""
        if not isinstance(self.way, ByExpert):
            return None
        part, b = self.parts[layer]
        return self.way.sum(part, b) if b.dtype == dtype else None


class SharedInput:
    """Routed layers of a decoder layer that read the same input: the A of all are one matrix.

    Whether they do is not found out while running: what is computed must not depend on how often a model was asked.
    A member that is given another input than the member before it has the A of all work on that, and is right.

    In evaluation the matrices are kept, while the parameters stay what they are, from the second forward pass on: one
    pass needs no memory for them.
    """

    def __init__(self, members: Sequence[RoutedLinear]):
        self.members = tuple(members)
        self.kept: dict[tuple, Matrices] = {}

    def term(self, layer: RoutedLinear, x: torch.Tensor, mix: Mix, slot: LayerSlot) -> Term:
        """The term of the layer, and with it those of the members that have the same experts; x (..., d_in)."""
        found = self._matrices(layer, mix.experts, slot.settled)
        if not found.names:
            return Term(None, {layer: None})
        x = x.flatten(0, -2).to(found.dtype)  # (S, d_in)
        if mix.num_tokens != x.shape[0]:
            given = f"a routed layer was given {x.shape[0]} tokens, the router saw {mix.num_tokens}"
            raise UsageError(f"{given}: not supported")
        if found.dropout.training:
            x = found.dropout(x)
        way = mix.way(found.layout, found.can_be_grouped)
        # What lies in the scratch is good until the next call: only where no other is made for these layers.
        alone = slot.settled is not None and len(found.members) == len(self.members)
        parts = way.hidden(x, found.a(way.arrange), slot.scratch if alone else None)
        b = found.b_by_expert() if isinstance(way, Few) else found.b()
        return Term(way, dict(zip(found.members, zip(parts, b, strict=True), strict=True)))

    def _matrices(self, layer: RoutedLinear, experts: tuple[int, ...], settled: object | None) -> Matrices:
        if settled is None:
            self.kept = {}
            return Matrices(layer, experts)
        found = self.kept.get((layer, experts))
        if found is None or found.settled is not settled:
            found = self.kept[layer, experts] = Matrices(layer, experts, settled)
        else:
            found.are_kept = True
        return found

    def __getstate__(self) -> dict:
        return {"members": self.members, "kept": {}}


class Matrices:
    """The matrices of some experts in a layer, and in those that share its input and have the same of them.

    Args:
        settled: while it is the same object, no parameter has changed; None where that is not known.
    """

    def __init__(self, layer: RoutedLinear, experts: tuple[int, ...], settled: object | None = None):
        self.settled, self.are_kept = settled, False
        self.names, self.layout = found = layer.experts_of(experts)
        self.members = [m for m in layer.shared.members if m is layer or m.experts_of(experts) == found]
        if self.names:
            a = layer.lora_A[self.names[0]].weight
            self.dtype = a.dtype
            self.dropout = layer.lora_dropout[self.names[0]]
            rank = self.layout[1][0]
            self.can_be_grouped = can_be_grouped(a.dtype, a.shape[1], rank * len(self.members))
        self._a: dict[Callable, torch.Tensor | Sequence[torch.Tensor]] = {}
        self._b: list[torch.Tensor] | None = None
        self._b_by_expert: list[list[torch.Tensor]] | None = None

    def a(self, arrange: Callable) -> torch.Tensor | Sequence[torch.Tensor]:
        """Of all members, arranged as a way wants it."""
        if arrange in self._a:
            return self._a[arrange]
        made = arrange([self._weights(member.lora_A) for member in self.members])
        if self.are_kept:
            self._a[arrange] = made
        return made

    def b(self) -> list[torch.Tensor]:
        """Of each member, transposed, one below the other: (R, d_out)."""
        if self._b is not None:
            return self._b
        stacks = [self._weights(member.lora_B) for member in self.members]
        made = [join(b, dim=1).t() for b in stacks]
        if self.settled is not None:
            made = [b.contiguous() for b in made]  # kept or not: some processors add up a transposed one otherwise
        if self.are_kept:
            self._b = made
        return made

    def b_by_expert(self) -> list[list[torch.Tensor]]:
        """Of each member, the B of each expert, transposed: (r, d_out). Nothing is copied."""
        if self._b_by_expert is None:
            self._b_by_expert = [[b.t() for b in self._weights(member.lora_B)] for member in self.members]
        return self._b_by_expert

    def _weights(self, holder: nn.ModuleDict) -> list[torch.Tensor]:
        return [holder[name].weight for name in self.names]
