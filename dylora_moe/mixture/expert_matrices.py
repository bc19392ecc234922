"""The experts' matrices of routed layers, side by side, and whether they have changed since they were laid out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UsageError
from .expert_sum import can_be_grouped, join
from .layer_pass import LayerSlot, Mix, Term

_steps = 0


def _count_step(*_) -> None:
    global _steps
    _steps += 1


# A fused optimizer (torch._fused_adamw_) writes without a new version.
register_optimizer_step_post_hook(_count_step)

_version_of = operator.attrgetter("_version")
_address_of = torch.Tensor.data_ptr


def marks(tensors: Sequence[torch.Tensor]) -> tuple | None:
    """What changes with the tensors: version counters and addresses. None where that cannot be told."""
    try:
        return list(map(_version_of, tensors)), list(map(_address_of, tensors))
    except RuntimeError:  # inference tensors have no version
        return None


class Watch:
    """Looks at the weights of modules once per forward pass; looking costs as much as a few small operations.

    Args:
        modules: those whose `weight` is watched.
        scalings: of experts, watched as well.
    """

    def __init__(self, modules: Sequence[nn.Module], scalings: Sequence[dict[str, float]] = ()):
        self._scalings = scalings
        self._parameters = [module._parameters for module in modules]  # nn.Module's __getattr__ takes ten times as long
        self._weights: list[torch.Tensor] = []  # held, so that no other tensor can have their address
        self._marks: tuple | None = None
        self._token: object | None = None

    def look(self) -> object | None:
        """The same object as the last time if all is what it was then, otherwise another.

        None where weights may change between now and the end of the forward pass, or it cannot be told.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._marks = None
            return None
        weights = [parameters["weight"] for parameters in self._parameters]
        found = marks(weights)
        now = None if found is None else (*found, _steps, [list(scaling.values()) for scaling in self._scalings])
        if now is None or now != self._marks:
            self._weights, self._marks, self._token = weights, now, None if now is None else object()
        return self._token

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_weights": [], "_marks": None, "_token": None}


class SharedInput:
    """Routed layers of a decoder layer that read the same input: the A of all are one matrix.

    Whether they do is not found out while running: what is computed must not depend on how often a model was asked.
    A member that is given another input than the member before it has the A of all work on that, and is right.

    In evaluation the matrices are kept, while the parameters stay what they are, from the second forward pass on: one
    pass needs no memory for them.
    """

    def __init__(self, members: Sequence[LoraLayer]):
        self.members = tuple(members)
        self.kept: dict[tuple, Matrices] = {}

    def term(self, layer: LoraLayer, x: torch.Tensor, mix: Mix, slot: LayerSlot) -> Term:
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
        parts = way.hidden(x, found.a(way.arrange))
        return Term(way, dict(zip(found.members, zip(parts, found.b(), strict=True), strict=True)))

    def _matrices(self, layer: LoraLayer, experts: tuple[int, ...], settled: object | None) -> Matrices:
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

    def __init__(self, layer: LoraLayer, experts: tuple[int, ...], settled: object | None = None):
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

    def _weights(self, holder: nn.ModuleDict) -> list[torch.Tensor]:
        return [holder[name].weight for name in self.names]
