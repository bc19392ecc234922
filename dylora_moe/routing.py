"""The link between the router and the routed layers during a forward pass.

A pre-forward hook on every decoder layer computes the routing weights from the layer's input and leaves them in that
layer's slot, where its routed layers read them. One slot per decoder layer, not one in all: gradient checkpointing
runs a layer again during the backward pass, when a common slot would hold the last layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .layers import LayerSlot, RoutedLinear
from .router import Router


@dataclass(frozen=True)
class Plan:
    """Which experts take part in a forward pass, and how.

    `new` experts were never trained: they are left out of the normaliser of the others (`trained`), and their own
    weight counts them in. Since their B is zero they change no output, but they receive a gradient. Their sum is kept
    apart from that of the others, so that adding it (zero) leaves the others' bits.
    """

    trained: tuple[int, ...]
    new: tuple[int, ...]
    sparse: bool


class Routing:
    """Computes and holds the routing weights of every decoder layer.

    Args:
        router: the gate.
        layers: the decoder layers; a slot is made for each and given to the routed layers inside.
        make_plan: called at the first decoder layer of every forward pass.
    """

    def __init__(self, router: Router, layers: nn.ModuleList, make_plan: Callable[[], Plan]):
        self.router = router
        self.make_plan = make_plan
        self.slots = [LayerSlot() for _ in layers]
        self.forced: int | None = None
        self.recorded: list[torch.Tensor] | None = None
        self.plan: Plan | None = None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(LayerHook(self, index), with_kwargs=True)
        self.attach(layers)

    def attach(self, layers: nn.ModuleList) -> None:
        """Give each decoder layer's slot to its routed layers; again after an expert has brought new ones."""
        for layer, slot in zip(layers, self.slots, strict=True):
            for module in layer.modules():
                if isinstance(module, RoutedLinear):
                    module.slot = slot

    @contextmanager
    def force(self, expert: int | None) -> Iterator[None]:
        """Every token to one expert, with weight 1; None routes."""
        before, self.forced = self.forced, expert
        try:
            yield
        finally:
            self.forced = before

    @contextmanager
    def record(self) -> Iterator[list[torch.Tensor]]:
        """Collects the probabilities (B, T, N) of every decoder layer of the forward passes inside."""
        before, self.recorded = self.recorded, []
        try:
            yield self.recorded
        finally:
            self.recorded = before

    def enter_layer(self, index: int, hidden: torch.Tensor) -> None:
        """Set the slot of decoder layer `index`, whose input is `hidden` (B, T, hidden_size)."""
        if index == 0 or self.plan is None:
            self.plan = self.make_plan()
        plan, slot = self.plan, self.slots[index]
        alone = 0 if self.router.num_experts == 1 else None
        slot.expert = alone if self.forced is None else self.forced
        slot.groups = None if slot.expert is not None else self._groups(plan, hidden)

    def _groups(self, plan: Plan, hidden: torch.Tensor) -> tuple:
        differentiable = torch.is_grad_enabled()
        if not plan.trained or not plan.new:
            if not plan.trained and not differentiable and self.recorded is None:
                return ()  # only new experts: their terms are zero
            logits = self.router.logits(hidden)  # (B, T, N)
            weights = self.router.weights(logits, sparse=plan.sparse)
            self._note(logits.softmax(-1) if plan.sparse and self.recorded is not None else weights)
            return ((plan.trained or plan.new, weights),)
        trained = self.router.logits(hidden, plan.trained)  # (B, T, N trained)
        groups = ((plan.trained, self.router.weights(trained, sparse=plan.sparse)),)
        if differentiable or self.recorded is not None:
            new = self.router.logits(hidden, plan.new)  # (B, T, N new)
            own = torch.sigmoid(new - trained.logsumexp(-1, keepdim=True))  # e^l / (sum over trained + e^l)
            groups += ((plan.new, own),)
            order = torch.tensor(plan.trained + plan.new, device=new.device).argsort()
            self._note(torch.cat([trained, new], -1).softmax(-1).index_select(-1, order))
        return groups

    def _note(self, probs: torch.Tensor) -> None:
        if self.recorded is not None:
            self.recorded.append(probs)

    def replaying(self, index: int, function: Callable) -> Callable:
        """`function`, which runs decoder layer `index`, bound to the routing of this moment.

        Gradient checkpointing calls it once now and once in the backward pass, by when another forward pass may have
        changed the slot, the forced expert and the plan. Whether the layer's hooks run again then depends on the
        version of transformers: if not, the weights of the slot are those of now; if they do, they recompute the
        same. Probabilities are recorded the first time only.
        """
        slot, forced, plan = self.slots[index].copy(), self.forced, self.plan
        runs = 0

        def run(*args, **kwargs):
            nonlocal runs, plan
            runs += 1
            if runs == 1:
                result = function(*args, **kwargs)
                plan = self.plan  # where the hook runs inside, layer 0 has just made it
                return result
            before = self.slots[index].copy(), self.forced, self.plan, self.recorded, self.make_plan
            self.slots[index].take(slot)
            self.forced, self.plan, self.recorded, self.make_plan = forced, plan, None, lambda: plan
            try:
                return function(*args, **kwargs)
            finally:
                self.slots[index].take(before[0])
                self.forced, self.plan, self.recorded, self.make_plan = before[1:]

        return run


class LayerHook:
    """The pre-forward hook of one decoder layer. A class, so that a model can be copied and pickled."""

    def __init__(self, routing: Routing, index: int):
        self.routing = routing
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.routing.enter_layer(self.index, args[0] if args else kwargs["hidden_states"])


class RoutedCheckpointing:
    """Stands in for a decoder layer's `_gradient_checkpointing_func`: checkpoints the layer with its routing."""

    def __init__(self, routing: Routing, index: int, checkpoint: Callable):
        self.routing = routing
        self.index = index
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        return self.checkpoint(self.routing.replaying(self.index, function), *args, **kwargs)
