"""A linear layer with a routed sum of LoRA experts.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

The A of all experts are concatenated, and so are the B (`shared_input`), so that the sum costs two matmuls however many
experts there are. The parameters stay in PEFT's own ModuleDicts: what PEFT saves is each expert as a plain LoRA.

Shapes: S tokens (batch times sequence).
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.pytorch_utils import Conv1D

from ..constants import expert_name
from .expert_matrices import SharedInput
from .layer_pass import LayerSlot, Layout, Term

_linear_forward = nn.Linear.forward
_unsafe_view = torch.ops.aten._unsafe_view.default


def _operations_are_watched() -> bool:
    """Whether something sees each operation and may keep what it returned: torch.compile, or a dispatch mode, as that
    of selective checkpointing."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling()


def _is_seen(module: nn.Module) -> bool:
    """Whether something may keep what the module returns."""
    return bool(module._forward_hooks or _global_forward_hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling it does no more than x W^T + bias, and nobody looks on."""
    if type(module) is not nn.Linear or "forward" in module.__dict__ or nn.Linear.forward is not _linear_forward:
        return False
    before = module._forward_pre_hooks or _global_forward_pre_hooks
    return not (before or _is_seen(module) or _operations_are_watched())


class RoutedLinear(lora.Linear):
    """PEFT's LoRA layer, adding the experts by the weights that the router has put into `slot`.

    PEFT builds it for every target through `MoELoraConfig`. Without a slot it behaves as its parent.

    In evaluation the concatenated matrices are kept while the parameters stay what they are (`watch.Watch`). A write
    that it does not see (through `.data`) is seen after the next `train()`, `eval()` or forward pass with gradients.
    """

    slot: LayerSlot | None = None
    _is_adding = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs):
        is_conv1d = isinstance(base_layer, Conv1D)
        kwargs.pop("device_map", None)
        self._members: dict[tuple, tuple] = {}
        self.shared = SharedInput([])
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)
        self.fan_in_fan_out = is_conv1d  # of the base weight; one config may serve layers of both kinds

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x (..., d_in) of the base's dtype -> (..., d_out) of the same dtype."""
        slot = self.slot
        idle = slot is None or (slot.expert is None and slot.mixes is None)
        if idle or self._disable_adapters or self.merged_adapters or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        result = base(x, *args, **kwargs)
        if isinstance(slot.expert, tuple):
            return self._add_by_row(result, x, slot.expert)
        if slot.expert is not None:
            result = self._add_one(result, x, expert_name(slot.expert))
            if not slot.mixes:
                return result
        return self._add_terms(result, slot.terms(self, x), self._owns_its_result(result, slot))

    def _add_terms(self, result: torch.Tensor, terms: list[Term], in_place: bool) -> torch.Tensor:
        """result (..., d_out) -> the same shape and dtype. in_place: result may be written to."""
        recorded = torch.is_grad_enabled()
        # As a view of the result, what is added in place would be recorded as a change of a part of it.
        rows = _unsafe_view(result, (-1, result.shape[-1])) if in_place and recorded else result.flatten(0, -2)
        total = rows  # (S, d_out)
        for term in terms:
            total = term.add(total, self, in_place)
        if total is rows and not recorded and rows.data_ptr() == result.data_ptr():
            return result  # nothing was added, or all of it in place
        total = total.view(result.shape)
        return total if total.dtype == result.dtype else total.to(result.dtype)

    def _owns_its_result(self, result: torch.Tensor, slot: LayerSlot) -> bool:
        """Whether nobody has seen what the base layer has just computed, nor needs it for the backward pass."""
        base = self._modules["base_layer"]
        if _is_seen(base) or type(base) not in (nn.Linear, Conv1D):
            return False
        if slot.settled is not None:  # there is no backward pass, and nothing is compiled
            return True
        return type(base.weight) is nn.Parameter and type(result) is torch.Tensor and not _operations_are_watched()

    def _add_one(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """One expert alone, operation for operation as PEFT does it, so that the two agree to the bit."""
        if name not in self.lora_A:
            return result
        return (result + self._delta(x, name)).to(result.dtype)

    def _add_by_row(self, result: torch.Tensor, x: torch.Tensor, experts: tuple[int, ...]) -> torch.Tensor:
        """One expert for each row of the batch, operation for operation as a PEFT batch of several adapters.

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
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]

    # ---- the experts' matrices ----

    def experts_of(self, experts: tuple[int, ...]) -> tuple[list[str], Layout]:
        """The names of those of a mix's experts that this layer has (targets may differ), and their layout."""
        found = self._members.get(experts)
        if found is None:
            here = [(i, expert_name(e)) for i, e in enumerate(experts) if expert_name(e) in self.lora_A]
            columns, names = tuple(i for i, _ in here), [name for _, name in here]
            found = self._members[experts] = (names, columns, tuple(self.r[name] for name in names))
        names, columns, ranks = found
        return names, (columns, ranks, tuple(map(self.scaling.__getitem__, names)))

    def train(self, mode: bool = True):
        self.shared.kept = {}
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.shared.kept = {}
        return super()._apply(*args, **kwargs)

    def add_adapter(self, adapter_name: str, config) -> None:
        """One adapter more, not active yet, and its parameters where they were made: `update_layer` alone would
        activate and move all that are there, again and again."""
        self._is_adding = True
        try:
            self.update_layer(adapter_name, config.r, lora_alpha=config.lora_alpha, config=config)
        finally:
            self._is_adding = False

    def set_adapter(self, *args, **kwargs) -> None:
        if not self._is_adding:
            super().set_adapter(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, *args, **kwargs) -> None:
        if not self._is_adding:
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)

    def update_layer(self, *args, **kwargs) -> None:
        self._members = {}
        self.shared.kept = {}
        super().update_layer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._members = {}
        self.shared.kept = {}
        super().delete_adapter(adapter_name)
