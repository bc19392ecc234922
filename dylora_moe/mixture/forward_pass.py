"""The state of a forward pass: set before it, read by every layer, gone after it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .dispatch import Dispatch, Layout, RoutingWeights, choose_dispatch
from .expert_matrices import Unchanged

# The only expert of every token (NO_EXPERT: the base alone); a tuple: of every token in that row of the batch.
Expert = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Participants:
    """Which experts take part in a forward pass, and how.

    `new` experts were never trained. They are left out of the softmax of the others (`trained`), and their own weight
    counts the others in. Since their B is zero they change no output, but they receive a gradient. Their sum is kept
    apart from that of the others, so that adding it (zero) leaves the others' bits.
    """

    trained: tuple[int, ...]
    new: tuple[int, ...]
    sparse: bool  # each token has its top-k experts only

    @property
    def only(self) -> int | None:
        """The only expert in its softmax: its weight is 1 whatever the router says."""
        normalised = self.trained or self.new
        return normalised[0] if len(normalised) == 1 else None


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
        participants: the experts that are routed over; None if all tokens go to `expert`.
        unchanged: what was derived from the parameters; None in training, where they change.
        recorded: the routing probabilities (B, T, N) of each decoder layer, if somebody wants them.
        linear: a context for the operations of the pass.
        routing: of the decoder layer that is running: weights of the experts whose sum is added. None outside of one.
        lasts: False if the pass was begun by a decoder layer, and ends with it.
    """

    expert: Expert
    participants: Participants | None = None
    unchanged: Unchanged | None = None
    recorded: list[torch.Tensor] | None = None
    linear: AbstractContextManager = field(default_factory=nullcontext)
    routing: tuple[RoutingWeights, ...] | None = None
    lasts: bool = True
    terms: list[Term] = field(default_factory=list)
    _dispatches: list[tuple[RoutingWeights, Layout, bool, Dispatch]] = field(default_factory=list)

    def enter_layer(self, routing: tuple[RoutingWeights, ...]) -> None:
        self.routing, self.terms, self._dispatches = routing, [], []

    def leave_layer(self) -> None:
        self.routing, self.terms, self._dispatches = None, [], []

    def dispatch(self, routing: RoutingWeights, layout: Layout, groupable: bool) -> Dispatch:
        """The dispatch of these experts, made once for all routed layers of the decoder layer that are alike."""
        for known, of_layout, grouped, dispatch in self._dispatches:
            if known is routing and of_layout == layout and grouped == groupable:
                return dispatch
        dispatch = choose_dispatch(routing, layout, groupable)
        self._dispatches.append((routing, layout, groupable, dispatch))
        return dispatch

    def again(self) -> ForwardPass:
        """The pass as it is now, for a layer that is run again in the backward pass.

        What the first run derived is derived, and saved for backward, again. Probabilities are recorded again for the
        same reason, but into a list of their own: they count once.
        """
        recorded: list[torch.Tensor] | None = None if self.recorded is None else []
        return replace(self, recorded=recorded, terms=[], _dispatches=[])


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
