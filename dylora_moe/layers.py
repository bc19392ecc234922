"""A linear layer with a routed sum of LoRA experts.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

The A of all experts are concatenated, and so are the B, so that the sum costs two matmuls however many experts there
are. The parameters stay in PEFT's own ModuleDicts: what PEFT saves is each expert as a plain LoRA.

Shapes: S tokens (batch times sequence), R the sum of the ranks of a mix's experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .dispatch import Dispatch, add_product, can_be_grouped
from .errors import UsageError
from .mix import Layout, Mix

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

    Args:
        scratch: where those rows are put; all slots of a model share it.
    """

    __slots__ = ("_dropped", "_gathered", "expert", "mixes", "scratch", "settled", "source")

    def __init__(self, scratch: Scratch):
        self.scratch = scratch
        self.set()

    def set(
        self, expert: int | None = None, mixes: tuple[Mix, ...] | None = None, settled: object | None = None
    ) -> None:
        """settled: while it is the same object, no parameter has changed; None where that is not known."""
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
        """The rows of the input, (S, d_in), in the order of a dispatch: (S * k, d_in)."""
        if self._gathered is None or self._gathered[0] is not dispatch:
            self._gathered = (dispatch, self.scratch.rows_of(self._dropped, dispatch.tokens))
        return self._gathered[1]


class Scratch:
    """Memory that every decoder layer of a forward pass uses again: fresh pages take longer to get than to fill."""

    SMALLEST = 1 << 17  # bytes; below, an allocator has them at hand

    def __init__(self):
        self.buffer: torch.Tensor | None = None

    def rows_of(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """x (S, d), index (n,) -> (n, d), good until the next call."""
        return torch.index_select(x, 0, index, out=self._take(x, len(index), x.shape[1]))

    def product(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """x (S, d), a (R, d) -> x a^T (S, R), good until the next call."""
        if len(x) * len(a) * x.element_size() < self.SMALLEST:
            return F.linear(x, a)
        return torch.mm(x, a.t(), out=self._take(x, len(x), len(a)))

    def _take(self, like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        buffer, size = self.buffer, rows * columns
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            self.buffer = buffer = like.new_empty(size)
        return buffer[:size].view(rows, columns)

    def clear(self) -> None:
        self.buffer = None


@dataclass
class Kept:
    """The concatenations of an evaluation: those of the parameters as they were while `settled` stood for them."""

    settled: object
    stacks: tuple[torch.Tensor, torch.Tensor] | None = None


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
        flat = total = result.flatten(0, -2)  # (S, d_out)
        for mix in slot.mixes:
            names, layout = self._experts_of(mix)
            if names:
                total = self._add(total, x, mix, names, layout)
        if total is flat and flat.data_ptr() == result.data_ptr():  # nothing was added, or all of it in place
            return result
        return total.view(result.shape).to(result.dtype)

    def _add(self, total: torch.Tensor, x: torch.Tensor, mix: Mix, names: list[str], layout: Layout) -> torch.Tensor:
        """total (S, d_out), x (..., d_in) -> (S, d_out)."""
        a, b = self._stacks(mix.experts, names)  # (R, d_in), (R, d_out)
        dropout = self._modules["lora_dropout"]._modules[names[0]]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        x = self.slot.input(x, a.dtype, rate)
        dispatch = mix.dispatch(layout)
        if dispatch is not None and can_be_grouped(a, b):
            return dispatch.add(total, x, self.slot, a, b)
        gate = mix.gate(layout)  # (S, R)
        if gate.shape[0] != x.shape[0]:
            raise UsageError(
                f"a routed layer was given {x.shape[0]} tokens, the router saw {gate.shape[0]}: not supported"
            )
        if self.slot.settled is None:
            return add_product(total, F.linear(x, a) * gate.to(x.dtype), b)
        hidden = self.slot.scratch.product(x, a).mul_(gate)  # (S, R)
        return add_product(total, hidden, b, in_place=self._owns_its_result())

    def _owns_its_result(self) -> bool:
        """Whether nobody but this layer has seen what the base layer has just computed."""
        base = self._modules["base_layer"]
        return not base._forward_hooks and isinstance(base, (nn.Linear, Conv1D))

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
        settled = self.slot.settled
        if settled is None:
            self._kept = {}
            return self._stack(names)
        kept = self._kept.get(experts)
        if kept is None or kept.settled is not settled:
            self._kept[experts] = Kept(settled)  # kept from the second time on: one pass needs no memory
            return self._stack(names)
        if kept.stacks is None:
            a, b = self._stack(names)
            kept.stacks = a, b.contiguous()
        return kept.stacks

    def _stack(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ([holder[name].weight for name in names] for holder in (self.lora_A, self.lora_B))
        if len(names) == 1:
            return a[0], b[0].t()
        return torch.cat(a), torch.cat(b, dim=1).t()

    def train(self, mode: bool = True):
        self._kept = {}
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._kept = {}
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
        self._kept = {}
        super().update_layer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._members = {}
        self._kept = {}
        super().delete_adapter(adapter_name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": {}}
