"""A linear layer with a routed sum of LoRA experts.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

The A of all experts are concatenated, and so are the B, so that the sum costs two matmuls however many experts there
are. The parameters stay in PEFT's own ModuleDicts: what PEFT saves is each expert as a plain LoRA.

Shapes: S tokens (batch times sequence), R the sum of the ranks of a mix's experts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .dispatch import Dispatch, add_product
from .errors import UsageError
from .mix import Layout, Mix

_version_of = operator.attrgetter("_version")
_address_of = torch.Tensor.data_ptr
EXPERT_PREFIX = "expert_"
NO_EXPERT = -1


def expert_name(index: int) -> str:
    return f"{EXPERT_PREFIX}{index}"


class LayerSlot:
    """What the routed layers of one decoder layer do in the forward pass that is under way.

    Either one expert alone (`expert` is its index; NO_EXPERT: the base layer alone), or the sum of `mixes`. With
    neither, a routed layer is PEFT's own layer with its active adapters.

    What can be computed once for all layers that are given the same input tensor (q, k and v; gate and up) is kept
    here: the input in the experts' dtype after dropout, and its rows in the order of a dispatch.
    """

    __slots__ = ("_dropped", "_gathered", "expert", "mixes", "settled", "source")

    def __init__(self):
        self.set()

    def set(
        self, expert: int | None = None, mixes: tuple[Mix, ...] | None = None, settled: object | None = None
    ) -> None:
        """settled: while it is the same object, no parameter changes; None where that is not known."""
        self.expert, self.mixes, self.settled = expert, mixes, settled
        self.source = self._dropped = self._gathered = None

    def input(self, x: torch.Tensor, dtype: torch.dtype, rate: float) -> torch.Tensor:
        """x (..., d_in) -> (S, d_in) in the experts' dtype, with dropout."""
        key = (x, dtype, rate)
        if self.source is None or self.source[0] is not x or self.source[1:] != key[1:]:
            flat = x.flatten(0, -2).to(dtype)
            self.source, self._gathered = key, None
            self._dropped = F.dropout(flat, rate) if rate else flat
        return self._dropped

    def gathered(self, dispatch: Dispatch) -> torch.Tensor:
        """The rows of the input, (S, d_in), at the places of a dispatch: (experts, places, d_in)."""
        if self._gathered is None or self._gathered[0] is not dispatch:
            self._gathered = (dispatch, dispatch.gather(self._dropped))
        return self._gathered[1]


@dataclass
class Kept:
    """The concatenations of an evaluation, and the parameters that they were made from, with their marks of then.

    The parameters are held so that no other tensor can have their address.
    """

    parameters: list[nn.Parameter]
    marks: tuple | None
    stacks: tuple[torch.Tensor, torch.Tensor] | None = None
    settled: object | None = None


class RoutedLinear(lora.Linear):
    """PEFT's LoRA layer, adding the experts by the weights that the router has put into `slot`.

    PEFT builds it for every target through `MoELoraConfig`. Without a slot it behaves as its parent.

    In evaluation the concatenated matrices are kept while the parameters stay what they are. A write that neither
    PyTorch's version counter nor the address shows (through `.data`) is seen after the next `train()`, `eval()` or
    forward pass with gradients.
    """

    slot: LayerSlot | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs):
        is_conv1d = isinstance(base_layer, Conv1D)
        kwargs.pop("device_map", None)
        self._members: dict[tuple, tuple] = {}
        self._kept: dict[tuple, Kept] = {}
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)
        self.fan_in_fan_out = is_conv1d  # of the base weight; one config may serve layers of both kinds

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x (..., d_in) of the base's dtype -> (..., d_out) of the same dtype."""
        slot = self.slot
        idle = slot is None or (slot.expert is None and slot.mixes is None)
        if idle or self._disable_adapters or self.merged_adapters or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        result = self._modules["base_layer"](x, *args, **kwargs)
        if slot.expert is not None:
            return self._add_one(result, x, expert_name(slot.expert))
        total = result.flatten(0, -2)  # (S, d_out)
        for mix in slot.mixes:
            names, layout = self._experts_of(mix)
            if names:
                total = self._add(total, x, mix, names, layout)
        return total.view(result.shape).to(result.dtype)

    def _add(self, total: torch.Tensor, x: torch.Tensor, mix: Mix, names: list[str], layout: Layout) -> torch.Tensor:
        """total (S, d_out), x (..., d_in) -> (S, d_out)."""
        a, b = self._stacks(mix.experts, names)  # (R, d_in), (R, d_out)
        dropout = self._modules["lora_dropout"]._modules[names[0]]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        x = self.slot.input(x, a.dtype, rate)
        dispatch = mix.dispatch(layout)
        if dispatch is not None:
            return dispatch.add(total, x, self.slot, a, b)
        gate = mix.gate(layout)  # (S, R)
        if gate.shape[0] != x.shape[0]:
            raise UsageError(
                f"a routed layer was given {x.shape[0]} tokens, the router saw {gate.shape[0]}: not supported"
            )
        hidden = F.linear(x, a)  # (S, R)
        return add_product(total, hidden * gate.to(hidden.dtype), b)

    def _add_one(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """One expert alone, operation for operation as PEFT does it, so that the two agree to the bit."""
        if name not in self.lora_A:
            return result
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        delta = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return (result + delta).to(result.dtype)

    # ---- the experts' matrices ----

    def _experts_of(self, mix: Mix) -> tuple[list[str], Layout]:
        """The names of a mix's experts that this layer has (targets may differ), and their layout."""
        found = self._members.get(mix.experts)
        if found is None:
            here = [(i, expert_name(e)) for i, e in enumerate(mix.experts) if expert_name(e) in self.lora_A]
            columns, names = tuple(i for i, _ in here), [name for _, name in here]
            found = self._members[mix.experts] = (names, columns, tuple(self.r[name] for name in names))
        names, columns, ranks = found
        return names, (columns, ranks, tuple(map(self.scaling.__getitem__, names)))

    def _stacks(self, experts: tuple[int, ...], names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The A (R, d_in) and the B, transposed, (R, d_out) of these experts, one below the other."""
        varying = torch.is_grad_enabled() or torch.compiler.is_compiling()
        settled, kept = self.slot.settled, self._kept.get(experts)
        if not varying and settled is not None and kept is not None and kept.settled is settled:
            return kept.stacks
        parameters = self._parameters_of("lora_A", names) + self._parameters_of("lora_B", names)
        if varying:
            self._forget()
            return self._stack(parameters)
        now = marks(parameters)
        if kept is None or now is None or now != kept.marks:
            self._kept[experts] = Kept(parameters, now)  # kept from the second time on: one pass needs no memory
            return self._stack(parameters)
        if kept.stacks is None:
            a, b = self._stack(parameters)
            kept.stacks = a, b.contiguous()
        kept.settled = settled
        return kept.stacks

    def _parameters_of(self, holder: str, names: list[str]) -> list[nn.Parameter]:
        linear = self._modules[holder]._modules  # past nn.Module's __getattr__, which would take most of the time here
        return [linear[name]._parameters["weight"] for name in names]

    @staticmethod
    def _stack(parameters: list[nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(parameters) // 2
        if n == 1:
            return parameters[0], parameters[1].t()
        return torch.cat(parameters[:n]), torch.cat(parameters[n:], dim=1).t()

    def _forget(self) -> None:
        if self._kept:
            self._kept = {}

    def train(self, mode: bool = True):
        self._forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def update_layer(self, *args, **kwargs) -> None:
        self._members = {}
        self._forget()
        super().update_layer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._members = {}
        self._forget()
        super().delete_adapter(adapter_name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": {}}


def marks(tensors: Sequence[torch.Tensor]) -> tuple | None:
    """What changes with the tensors: version counters and addresses. None where that cannot be told."""
    try:
        return list(map(_version_of, tensors)), list(map(_address_of, tensors))
    except RuntimeError:  # inference tensors have no version
        return None
