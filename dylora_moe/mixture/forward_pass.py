"""The state of a forward pass: set before it, read by every layer, gone after it."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .dispatch import Dispatch, Layout, RoutingWeights, choose_dispatch
from .expert_matrices import Unchanged

# The only expert of every token (NO_EXPERT: the base alone); a tuple: of every token in that row of the batch.
Expert = int | tuple[int, ...] | None
# The experts that are routed over: those that were trained, and those that were not. The latter are left out of the
# softmax of the others, and their own weight counts the others in. Since their B is zero they change no output, but
# they receive a gradient. Their sum is kept apart, so that adding it (zero) leaves the others' bits.
Groups = tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class Term:
    """What experts add in one layer: their B on the hidden units that their A and the weights make of x."""

    layer: nn.Module
    routing: RoutingWeights
    x: torch.Tensor
    dispatch: Dispatch
    hidden: torch.Tensor
    b: torch.Tensor


@dataclass(eq=False)
class ForwardPass:
    """What the layers of one forward pass share.

    Args:
        expert: an expert whose whole update every token gets, as PEFT computes it.
        groups: the experts that are routed over; none if all tokens go to a given expert.
        sparse: whether each token has its top-k experts only.
        unchanged: what was derived from the parameters; None in training, where they change.
        records: whether somebody wants the routing probabilities.
        returns_logits: whether the output of the decoder is to have `router_logits`.
        linear: a context for the operations of the pass.
        routing: the weights of the experts whose sum every layer adds; None outside of the decoder.
        probabilities: (B, T, N) over all experts, if `records` and the tokens are routed.
        sums: what a cache keeps of the tokens (`routing.RouteCache`), if they are routed.
        lasts: False if the pass was begun by the decoder, and ends with it.
    """

    expert: Expert
    groups: Groups = ()
    sparse: bool = False
    unchanged: Unchanged | None = None
    records: bool = False
    returns_logits: bool = False
    linear: AbstractContextManager = field(default_factory=nullcontext)
    routing: tuple[RoutingWeights, ...] | None = None
    probabilities: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    lasts: bool = True
    terms: list[Term] = field(default_factory=list)
    _dispatches: dict[Hashable, Dispatch] = field(default_factory=dict)

    def route(self, routing: tuple[RoutingWeights, ...] | None) -> None:
        """Let every layer add the experts by these weights, or refuse to run if there are none."""
        self.routing, self.terms, self._dispatches = routing, [], {}

    def dispatch(self, routing: RoutingWeights, layout: Layout, groupable: bool, device: torch.device) -> Dispatch:
        """Return the dispatch of these experts. In evaluation it is made once for all layers that are alike.

        With gradients each layer makes its own: under gradient checkpointing, a layer that is run again must repeat all
        that its first run did.
        """
        if self.unchanged is None:
            return choose_dispatch(routing.to(device), layout, groupable)
        key = (routing, layout, groupable, device)
        if key not in self._dispatches:
            self._dispatches[key] = choose_dispatch(routing.to(device), layout, groupable)
        return self._dispatches[key]

    def router_logits(self) -> tuple[torch.Tensor, ...]:
        """Return the logits (B * T, N) of the router, as Mixtral does for each layer; () if nothing was routed."""
        return () if self.probabilities is None else (self.probabilities.flatten(0, -2).log(),)

    def again(self) -> ForwardPass:
        """Return the pass as it is now, for a layer that is run again in the backward pass."""
        return replace(self, terms=[], _dispatches={})


class CurrentPass:
    """Where the layers of a model find the forward pass under way. Threads take turns. A copy is a fresh one."""

    def __init__(self) -> None:
        self.state: ForwardPass | None = None
        self._lock = threading.RLock()

    def turn(self) -> AbstractContextManager:
        """Return a context that no other thread enters meanwhile."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    @contextmanager
    def running(self, state: ForwardPass) -> Iterator[ForwardPass]:
        """Inside, `state` is the pass under way."""
        with self.turn():
            before, self.state = self.state, state
            try:
                with state.linear:
                    yield state
            finally:
                self.state = before

    def __reduce__(self) -> tuple:
        return CurrentPass, ()


@dataclass
class MixtureOutput(CausalLMOutputWithPast):
    """The output of a causal LM, with the parts of its loss.

    `loss` is what training minimises: `lm_loss`, in nats per labelled token, and in training the load-balancing loss
    times its coefficient. `balance_loss` is None if nothing was routed. `router_logits`, (B * T, N), are those of the
    one router, if `output_router_logits` asks for them.
    """

    lm_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


OUTPUT_FIELDS = {field.name for field in fields(MixtureOutput)}
