"""A linear layer with a routed sum of LoRA experts.

    y = W x + sum_i w_i(token) * scaling_i * B_i A_i x          (LoRA: https://huggingface.co/papers/2106.09685)

The A of all experts are concatenated, and so are the B, so that the sum costs two matmuls however many experts there
are. The parameters stay in PEFT's own ModuleDicts: what PEFT saves is each expert as a plain LoRA.

Shapes: S tokens (batch times sequence), R the sum of the ranks of a mix's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import UsageError
from .mix import Layout, Mix, Way
from .ways import Scratch, can_be_grouped

EXPERT_PREFIX = "expert_"
NO_EXPERT = -1


def expert_name(index: int) -> str:
    return f"{EXPERT_PREFIX}{index}"


class LayerSlot:
    """What the routed layers of one decoder layer do in the forward pass that is under way.

    Either one expert alone (`expert` is its index; NO_EXPERT: the base layer alone), or the sum of `mixes`. With
    neither, a routed layer is PEFT's own layer with its active adapters.

    Args:
        scratch: where hidden units are put; all slots of a model share it.
    """

    __slots__ = ("_shared", "_terms", "expert", "mixes", "scratch", "settled", "source")

    def __init__(self, scratch: Scratch):
        self.scratch = scratch
        self.set()

    def set(
        self, expert: int | None = None, mixes: tuple[Mix, ...] | None = None, settled: object | None = None
    ) -> None:
        """settled: while it is the same object, no parameter has changed; None where that is not known."""
        self.expert, self.mixes, self.settled = expert, mixes, settled
        self.source = self._shared = None
        self._terms: list[Term] = []

    def terms(self, layer: RoutedLinear, x: torch.Tensor) -> list[Term]:
        """The terms of a layer's sum, one for each mix, worked out once for all layers that share the input x."""
        if self.source is not x or self._shared is not layer.shared:
            self.source, self._shared, self._terms = x, layer.shared, []
        found = [term for term in self._terms if layer in term.parts]
        if not found:
            found = [layer.shared.term(layer, x, mix, self) for mix in self.mixes]
            self._terms += found
        return found


@dataclass(frozen=True)
class Term:
    """One mix's term in the sums of some layers: by layer, what its A has made of the input, and its B (R, d_out)."""

    way: Way | None  # None without experts
    parts: dict[RoutedLinear, tuple[torch.Tensor, torch.Tensor] | None]
    in_place: bool

    def add(self, total: torch.Tensor, layer: RoutedLinear) -> torch.Tensor:
        """total (S, d_out) of a layer -> (S, d_out)."""
        if self.way is None:
            return total
        part, b = self.parts[layer]
        return self.way.add(total, part, b, self.in_place and layer.owns_its_result())


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
            return Term(None, {layer: None}, False)
        x = x.flatten(0, -2).to(found.dtype)  # (S, d_in)
        if len(mix) != len(x):
            raise UsageError(f"a routed layer was given {len(x)} tokens, the router saw {len(mix)}: not supported")
        if found.dropout.training:
            x = found.dropout(x)
        way = mix.way(found.layout, found.can_be_grouped)
        settled = slot.settled is not None
        # What lies in the scratch is good until the next call: only where no other is made for these layers.
        alone = len(slot.mixes) == 1 and len(found.members) == len(self.members)
        parts = way.hidden(x, found.a(way.arrange), slot.scratch if settled and alone else None)
        return Term(way, dict(zip(found.members, zip(parts, found.b(), strict=True), strict=True)), settled)

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
        self._a: dict[Callable, torch.Tensor] = {}
        self._b: list[torch.Tensor] | None = None

    def a(self, arrange: Callable[[list], torch.Tensor]) -> torch.Tensor:
        """Of all members, arranged as a way wants it."""
        if arrange in self._a:
            return self._a[arrange]
        made = arrange([self._weights(member.lora_A) for member in self.members])
        if self.are_kept:
            self._a[arrange] = made = made.contiguous()
        return made

    def b(self) -> list[torch.Tensor]:
        """Of each member, transposed, one below the other: (R, d_out)."""
        if self._b is not None:
            return self._b
        stacks = [self._weights(member.lora_B) for member in self.members]
        made = [(torch.cat(b, dim=1) if len(b) > 1 else b[0]).t() for b in stacks]
        if self.are_kept:
            self._b = made = [b.contiguous() for b in made]
        return made

    def _weights(self, holder: nn.ModuleDict) -> list[torch.Tensor]:
        return [holder[name].weight for name in self.names]


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
        result = self._modules["base_layer"](x, *args, **kwargs)
        if slot.expert is not None:
            return self._add_one(result, x, expert_name(slot.expert))
        flat = total = result.flatten(0, -2)  # (S, d_out)
        for term in slot.terms(self, x):
            total = term.add(total, self)
        if total is flat and flat.data_ptr() == result.data_ptr():  # nothing was added, or all of it in place
            return result
        return total.view(result.shape).to(result.dtype)

    def owns_its_result(self) -> bool:
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
