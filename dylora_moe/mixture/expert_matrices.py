"""The matrices of a layer's experts, side by side, and whether parameters have changed since they were laid out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..constants import expert_name
from .dispatch import Layout, can_be_grouped, join

_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# A fused optimizer (torch._fused_adamw_) writes without changing a tensor's version.
register_optimizer_step_post_hook(_count_step)

_version_of = operator.attrgetter("_version")
_address_of = torch.Tensor.data_ptr


def weight_of(linear: nn.Module) -> nn.Parameter:
    """Return the weight of a linear layer. torch's types say of every attribute that it is a tensor or a module."""
    return cast(nn.Parameter, linear.weight)


class Unchanged:
    """What was derived from parameters that have not changed since; a copy holds nothing.

    `looks` counts how often the parameters were found as they are.
    """

    def __init__(self) -> None:
        self.looks = 0
        self.stacks: dict[Hashable, Stack] = {}

    def __reduce__(self) -> tuple:
        return Unchanged, ()


class Watch:
    """Tells whether the experts' parameters and scalings have changed: the one place that remembers it.

    It looks at version counters and addresses, which costs as much as a few small operations; so it is asked once per
    forward pass. A write through `.data` is seen only after `forget`.
    """

    def __init__(self) -> None:
        self._layers: list[lora.Linear] = []
        self.forget()

    def watch(self, layers: Iterable[lora.Linear]) -> None:
        self._layers = list(layers)
        self.forget()

    def forget(self) -> None:
        """Take it that everything has changed."""
        self._marks: list | None = None
        self._weights: list[torch.Tensor] = []  # held, so that no other tensor can have their address
        self._unchanged: Unchanged | None = None

    def look(self) -> Unchanged | None:
        """Return the same object as the last time if nothing has changed, and a fresh one otherwise.

        None if parameters may change before the end of the forward pass, or if it cannot be told.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.forget()
            return None
        # nn.Module's __getattr__ takes ten times as long as the dictionaries behind it.
        holders: list[Any] = [layer._modules[kind] for layer in self._layers for kind in ("lora_A", "lora_B")]
        weights = [linear._parameters["weight"] for holder in holders for linear in holder._modules.values()]
        try:
            marks = [list(map(_version_of, weights)), list(map(_address_of, weights)), _steps]
        except RuntimeError:  # inference tensors have no version
            self.forget()
            return None
        marks += [list(layer.scaling.values()) for layer in self._layers]
        unchanged = self._unchanged
        if unchanged is None or marks != self._marks:
            unchanged = Unchanged()
            self._weights, self._marks, self._unchanged = weights, marks, unchanged
        unchanged.looks += 1
        return unchanged

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_weights": [], "_marks": None, "_unchanged": None}


class Stack:
    """The matrices of some experts in a layer, and in those layers that read the same input and have the same experts.

    Args:
        layer: the layer.
        sharing: all layers that read its input, itself included.
        experts: the indices of the experts; the layer may have some of them.
        evaluates: whether no parameter changes during the pass.

    With `keeps`, matrices that are laid out are kept.
    """

    keeps = False

    def __init__(
        self,
        layer: lora.Linear,
        sharing: Sequence[lora.Linear],
        experts: tuple[int, ...],
        evaluates: bool,
    ):
        self.names, self.layout = found = _experts_of(layer, experts)
        self.layers = [other for other in sharing if other is layer or _experts_of(other, experts) == found]
        self._evaluates = evaluates
        self._kept: dict[Hashable, torch.Tensor] = {}
        if self.names:
            a = weight_of(layer.lora_A[self.names[0]])
            self.dtype = a.dtype
            self.dropout = layer.lora_dropout[self.names[0]]
            self.groupable = can_be_grouped(a.dtype, a.shape[1], self.layout.ranks[0] * len(self.layers))

    def a(self, arrange: Callable[[Sequence[Sequence[torch.Tensor]]], torch.Tensor]) -> torch.Tensor:
        """Return the A of all layers as a dispatch arranges them."""
        return self._keep(arrange, lambda: arrange([self._weights(layer.lora_A) for layer in self.layers]))

    def b(self, layer: lora.Linear) -> torch.Tensor:
        """Return the B of one layer, transposed, one below the other: (R, d_out)."""
        return self._keep(layer, lambda: self._joined_b(layer))

    def _joined_b(self, layer: lora.Linear) -> torch.Tensor:
        b = join(self._weights(layer.lora_B), dim=1).t()
        # In evaluation the layout is the same whether it is kept or not: some processors add up a transposed matrix in
        # another order.
        return b.contiguous() if self._evaluates else b

    def _keep(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key in self._kept:
            return self._kept[key]
        made = make()
        if self.keeps:
            self._kept[key] = made
        return made

    def _weights(self, holder: nn.ModuleDict) -> list[torch.Tensor]:
        return [weight_of(holder[name]) for name in self.names]


def stack_of(
    layer: lora.Linear, sharing: Sequence[lora.Linear], experts: tuple[int, ...], unchanged: Unchanged | None
) -> Stack:
    """Return the stack of these experts, the one of an earlier pass if nothing has changed since.

    It keeps its matrices from the second pass with the same parameters on: a single pass needs no memory for them.
    """
    if unchanged is None:
        return Stack(layer, sharing, experts, evaluates=False)
    key = layer, experts
    if key not in unchanged.stacks:
        unchanged.stacks[key] = Stack(layer, sharing, experts, evaluates=True)
    stack = unchanged.stacks[key]
    stack.keeps = unchanged.looks > 1
    return stack


def _experts_of(layer: lora.Linear, experts: tuple[int, ...]) -> tuple[list[str], Layout]:
    """The names of those experts that a layer has, and their layout."""
    here = [(i, expert_name(e)) for i, e in enumerate(experts) if expert_name(e) in layer.lora_A]
    names = [name for _, name in here]
    ranks, scalings = (tuple(values[name] for name in names) for values in (layer.r, layer.scaling))
    return names, Layout(tuple(i for i, _ in here), ranks, scalings)
