"""A linear layer with a routed sum of LoRA experts.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

The parameters stay in PEFT's own ModuleDicts: what PEFT saves is each expert as a plain LoRA.

Shapes: B batch, T tokens, S = B * T.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.nn.modules.module import _global_forward_hooks
from transformers.pytorch_utils import Conv1D

from ..constants import expert_name
from ..errors import UsageError
from .dispatch import RoutingWeights
from .expert_matrices import stack_of, weight_of
from .forward_pass import CurrentPass, ForwardPass, Term

_unsafe_view = torch.ops.aten._unsafe_view.default


class RoutedLinear(lora.Linear):
    """PEFT's LoRA layer, adding the experts by the weights of the forward pass under way.

    PEFT builds it for every target through `MoELoraConfig`. Outside of a mixture it behaves as its parent.
    """

    current: CurrentPass | None = None  # set by Routing, and so is:
    sharing: tuple[RoutedLinear, ...] = ()  # the layers that read the same input, itself included
    _is_adding = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        is_conv1d = isinstance(base_layer, Conv1D)
        kwargs.pop("device_map", None)
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)
        self.fan_in_fan_out = is_conv1d  # of the base weight; one config may serve layers of both kinds

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., d_in) of the base's dtype -> (..., d_out) of the same dtype."""
        state = None if self.current is None else self.current.state
        by_peft = self._disable_adapters or self.merged_adapters or kwargs.get("adapter_names") is not None
        if by_peft or self.current is None:
            return super().forward(x, *args, **kwargs)
        if state is None or state.routing is None:
            raise UsageError("a layer with experts was called by itself: it is routed only inside the model's forward")
        result = self.base_layer(x, *args, **kwargs)
        if isinstance(state.expert, tuple):
            return self._add_by_row(result, x, state.expert)
        if state.expert is not None:
            result = self._add_one(result, x, expert_name(state.expert))
        terms = [term for routing in state.routing if (term := self._term(x, routing, state)) is not None]
        return self._add_terms(result, terms, self._owns(result, state)) if terms else result

    # ---- the routed sum ----

    def _term(self, x: torch.Tensor, routing: RoutingWeights, state: ForwardPass) -> Term | None:
        """The term of these experts, computed once for all layers that read x; None if the layer has none of them."""
        for term in state.terms:
            if term.layer is self and term.routing is routing and term.x is x:
                return term
        stack = stack_of(self, self.sharing, routing.experts, state.unchanged)
        if not stack.names:
            return None
        rows = x.flatten(0, -2).to(stack.dtype)  # (S, d_in)
        given, seen = rows.shape[0], routing.weights.shape[0]
        if given != seen:
            raise UsageError(f"a routed layer was given {given} tokens, the router saw {seen}: not supported")
        if stack.dropout.training:
            rows = stack.dropout(rows)
        dispatch = state.dispatch(routing, stack.layout, stack.groupable, rows.device)
        hidden = dispatch.hidden(rows, stack.a(dispatch.arrange))
        found = [
            Term(layer, routing, x, dispatch, part, stack.b(layer))
            for layer, part in zip(stack.layers, hidden, strict=True)
        ]
        state.terms = [term for term in state.terms if term.x is x] + found
        return next(term for term in found if term.layer is self)

    def _add_terms(self, result: torch.Tensor, terms: list[Term], in_place: bool) -> torch.Tensor:
        """result (..., d_out) -> the same shape and dtype. With in_place, result may be written to."""
        # As a view of the result, what is added in place would be recorded as a change of a part of it.
        as_rows = in_place and torch.is_grad_enabled()
        total = _unsafe_view(result, (-1, result.shape[-1])) if as_rows else result.flatten(0, -2)  # (S, d_out)
        for term in terms:
            total = term.dispatch.combine(total, term.hidden, term.b, in_place)
        return total.view(result.shape).to(result.dtype)

    def _owns(self, result: torch.Tensor, state: ForwardPass) -> bool:
        """Whether nobody has seen what the base layer has just computed, nor needs it for the backward pass."""
        base = self.base_layer
        if base._forward_hooks or _global_forward_hooks or type(base) not in (nn.Linear, Conv1D):
            return False
        if state.unchanged is not None:  # there is no backward pass, and nothing is compiled
            return True
        # A dispatch mode, as that of selective checkpointing, may keep what each operation returned.
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return type(base.weight) is nn.Parameter and type(result) is torch.Tensor and not watched

    # ---- one expert ----

    def _add_one(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """Add one expert, operation for operation as PEFT does, so that the two agree to the bit."""
        if name not in self.lora_A:
            return result
        return (result + self._delta(x, name)).to(result.dtype)

    def _add_by_row(self, result: torch.Tensor, x: torch.Tensor, experts: tuple[int, ...]) -> torch.Tensor:
        """Add one expert to each row of the batch, operation for operation as PEFT's batch of several adapters.

        Some models flatten the batch before a linear layer: x (B * T, d_in), which PEFT refuses.
        """
        rows = result.reshape(len(experts), -1, result.shape[-1])  # (B, T, d_out)
        x = x.reshape(len(experts), -1, x.shape[-1])  # (B, T, d_in)
        added = []
        for row, part, expert in zip(rows, x, experts, strict=True):
            name = expert_name(expert)
            added.append(row if name not in self.lora_A else row + self._delta(part, name).to(row.dtype))
        return torch.stack(added).view(result.shape)

    def _delta(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = self._cast_input_dtype(x, weight_of(self.lora_A[name]).dtype)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]

    # ---- adding an adapter ----

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Add an adapter, not active yet, with its parameters where they were made.

        `update_layer` alone would activate and move all adapters of the layer, each time.
        """
        self._is_adding = True
        try:
            self.update_layer(adapter_name, config.r, lora_alpha=config.lora_alpha, config=config)
        finally:
            self._is_adding = False

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_adding:
            super().set_adapter(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_adding:
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)
