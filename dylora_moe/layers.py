"""A linear layer with a routed sum of LoRA experts.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

The A of all experts are concatenated, and so are the B, so that the sum costs two matmuls however many experts there
are. The parameters stay in PEFT's own ModuleDicts: what PEFT saves is each expert as a plain LoRA.

Shapes: B batch, T tokens, N experts of a group, R = the sum of their ranks.
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

EXPERT_PREFIX = "expert_"


def expert_name(index: int) -> str:
    return f"{EXPERT_PREFIX}{index}"


class LayerSlot:
    """What the routed layers of one decoder layer do in the forward pass that is under way.

    Either one expert alone (`expert` is its index), or groups of experts with their weights:
    `groups` is a tuple of (expert indices, weights of shape (B, T, N) in float32). With neither, a routed layer is
    PEFT's own layer with its active adapters.
    """

    __slots__ = ("expert", "groups")

    def __init__(self, expert: int | None = None, groups: tuple | None = None):
        self.expert = expert
        self.groups = groups

    def take(self, other: LayerSlot) -> None:
        self.expert, self.groups = other.expert, other.groups

    def copy(self) -> LayerSlot:
        return LayerSlot(self.expert, self.groups)


class RoutedLinear(lora.Linear):
    """PEFT's LoRA layer, adding the experts by the weights that the router has put into `slot`.

    PEFT builds it for every target through `MoELoraConfig`. Without a slot it behaves as its parent.
    """

    slot: LayerSlot | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs):
        is_conv1d = isinstance(base_layer, Conv1D)
        kwargs.pop("device_map", None)
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)
        self.fan_in_fan_out = is_conv1d  # of the base weight; one config may serve layers of both kinds
        self._units: dict[tuple, tuple] = {}

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x (B, T, d_in) of the base's dtype -> (B, T, d_out) of the same dtype."""
        slot = self.slot
        plain = slot is None or (slot.expert is None and slot.groups is None)
        if plain or self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if slot.expert is not None:
            return self._add_one(result, x, expert_name(slot.expert))
        dropped = None
        total = result
        for experts, weights in slot.groups:
            units = self._hidden_units(experts, x.device)
            if units is None:
                continue
            names, column, scale = units
            if dropped is None:
                x = self._cast_input_dtype(x, self.lora_A[names[0]].weight.dtype)
                dropped = self.lora_dropout[names[0]](x)
            a = torch.cat([self.lora_A[name].weight for name in names])  # (R, d_in)
            b = torch.cat([self.lora_B[name].weight for name in names], dim=1)  # (d_out, R)
            gate = weights.index_select(-1, column) * scale  # (B, T, R)
            hidden = F.linear(dropped, a)  # (B, T, R)
            total = total + F.linear(hidden * gate.to(hidden.dtype), b)  # (B, T, d_out)
        return total.to(result.dtype)

    def _add_one(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """One expert alone, operation for operation as PEFT does it, so that the two agree to the bit."""
        if name not in self.lora_A:
            return result
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        delta = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return (result + delta).to(result.dtype)

    def _hidden_units(self, experts: tuple[int, ...], device: torch.device) -> tuple | None:
        """For each of the R hidden units of a group: its expert's column in the weights, and its scaling.

        Returns (names of the experts that this layer has, column (R,) int64, scale (R,) float32), or None where the
        layer has none of them: experts may have different targets and ranks.
        """
        key = (experts, device)
        if key not in self._units:
            here = [(i, expert_name(e)) for i, e in enumerate(experts) if expert_name(e) in self.lora_A]
            column = [i for i, name in here for _ in range(self.r[name])]
            scale = [self.scaling[name] for _, name in here for _ in range(self.r[name])]
            names = [name for _, name in here]
            tensors = (torch.tensor(column, device=device), torch.tensor(scale, dtype=torch.float32, device=device))
            self._units[key] = (names, *tensors) if here else None
        return self._units[key]

    def update_layer(self, *args, **kwargs) -> None:
        self._units = {}
        super().update_layer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._units = {}
        super().delete_adapter(adapter_name)
