"""The link between the router and the routed layers during a forward pass.

A pre-forward hook on every decoder layer computes the routing weights from the layer's input and puts them into the
state of the pass, where the layer's routed layers read them; a forward hook removes them.

Gradient checkpointing runs a decoder layer again during the backward pass. It then finds the state of its own first run
(`CheckpointedLayer`), also if other passes have run since.

Shapes: B batch, T tokens, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .dispatch import RoutingWeights
from .expert_matrices import Watch
from .experts import ExpertStates
from .forward_pass import CurrentPass, Expert, ForwardPass, Participants
from .routed_linear import RoutedLinear
from .router import Router

# Linear layers of one module that read the same input.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Routing:
    """Begins forward passes, and computes the routing weights of every decoder layer.

    Args:
        router: the gate.
        layers: the decoder layers.
        watch: tells whether parameters have changed.
        states: tell which experts take part in a pass.
    """

    def __init__(
        self,
        router: Router,
        layers: nn.ModuleList,
        watch: Watch,
        states: ExpertStates,
    ):
        self.router = router
        self.watch = watch
        self.states = states
        self.current = CurrentPass()
        self.forced: Expert = None
        for layer in layers:
            layer.register_forward_pre_hook(EnterLayer(self), with_kwargs=True)
            layer.register_forward_hook(LeaveLayer(self), always_call=True)
        self.attach(layers)

    def attach(self, layers: nn.ModuleList) -> None:
        """Connect the routed layers; again after an expert has brought new ones."""
        routed = []
        for layer in layers:
            sharing: dict[tuple, list[RoutedLinear]] = {}
            for name, module in layer.named_modules():
                if isinstance(module, RoutedLinear):
                    parent, _, leaf = name.rpartition(".")
                    family = next((family for family in SAME_INPUT if leaf in family), leaf)
                    sharing.setdefault((parent, family, module.in_features), []).append(module)
            for members in sharing.values():
                for module in members:
                    module.current, module.sharing = self.current, tuple(members)
                routed += members
        self.watch.watch(routed)

    # ---- passes ----

    @contextmanager
    def run(
        self, expert: Expert = None, *, record: bool = False, linear: AbstractContextManager | None = None
    ) -> Iterator[ForwardPass]:
        """Inside is one forward pass, or all of one generation: no parameter changes.

        Args:
            expert: an expert that every token goes to, instead of the one of `force`.
            record: whether to record the probabilities of every decoder layer, if the tokens are routed.
            linear: a context for the operations of the pass.
        """
        with self.current.turn():
            state = self._begin(expert, record)
            state.linear = linear or state.linear
            with self.current.running(state):
                yield state

    def _begin(self, expert: Expert = None, record: bool = False) -> ForwardPass:
        unchanged = self.watch.look()
        expert = self.forced if expert is None else expert
        if expert is not None:
            return ForwardPass(expert)
        participants = self.states.participants(unchanged, self.router.training)
        return ForwardPass(participants.only, participants, unchanged, [] if record else None)

    @contextmanager
    def force(self, expert: Expert) -> Iterator[None]:
        """Inside, every token goes to one expert, with weight 1; NO_EXPERT leaves the base model alone.

        It holds for the passes of all threads that begin inside.
        """
        with self.current.turn():
            before, self.forced = self.forced, expert
        try:
            yield
        finally:
            with self.current.turn():
                self.forced = before

    def enter_layer(self, hidden: torch.Tensor) -> None:
        """Compute the weights of a decoder layer whose input is `hidden` (B, T, hidden_size)."""
        state = self.current.state
        if state is None:  # the base, or one of its decoder layers, was called by itself
            state = self.current.state = self._begin()
            state.lasts = False
        state.enter_layer(() if state.participants is None else self._weights(state, state.participants, hidden))

    def leave_layer(self) -> None:
        state = self.current.state
        if state is not None:
            state.leave_layer()
            if not state.lasts:
                self.current.state = None

    # ---- weights ----

    def _weights(
        self, state: ForwardPass, participants: Participants, hidden: torch.Tensor
    ) -> tuple[RoutingWeights, ...]:
        """The weights of the trained experts, and in training those of the new ones.

        An expert that is the only one in its softmax has none: it is added as PEFT adds it, whether or not there are
        new ones beside it.
        """
        trained, new = participants.trained, participants.new
        trains, recorded = torch.is_grad_enabled(), state.recorded
        if self.router.num_experts == 1 or (len(trained) <= 1 and not trains and recorded is None):
            return ()
        if not trained or not new:
            logits = self.router.logits(hidden)  # (B, T, N)
            routing = self._softmax(trained or new, logits, participants.sparse)
            if recorded is not None:
                recorded.append(logits.softmax(-1) if routing.index is not None else routing.weights.view_as(logits))
            return (routing,)
        logits = self.router.logits(hidden, trained)  # (B, T, N trained)
        weights: tuple[RoutingWeights, ...] = ()
        if participants.only is None:
            weights = (self._softmax(trained, logits, participants.sparse),)
        if not trains and recorded is None:  # what the new ones add is zero
            return weights
        of_new = self.router.logits(hidden, new)  # (B, T, N new)
        if trains:
            own = torch.sigmoid(of_new - logits.logsumexp(-1, keepdim=True))  # e^l / (sum over trained + e^l)
            weights += (RoutingWeights(new, own.flatten(0, -2)),)
        if recorded is not None:
            order = torch.tensor(trained + new, device=of_new.device).argsort()
            recorded.append(torch.cat([logits, of_new], -1).softmax(-1).index_select(-1, order))
        return weights

    def _softmax(self, experts: tuple[int, ...], logits: torch.Tensor, sparse: bool) -> RoutingWeights:
        """logits (B, T, N)"""
        rows = logits.flatten(0, -2)  # (B * T, N)
        top = self.router.top(rows) if sparse else None
        if top is None:
            return RoutingWeights(experts, rows.softmax(-1))
        index, weights = top
        return RoutingWeights(experts, weights, index)

    # ---- gradient checkpointing ----

    def wrap_checkpointing(self, layers: nn.ModuleList) -> None:
        """Make gradient checkpointing, where it is on, run each layer again with the state of its first run."""
        for layer in layers:
            function = layer.__dict__.get("_gradient_checkpointing_func")
            if function is None or isinstance(function, CheckpointedLayer):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise UsageError("gradient checkpointing of a mixture needs use_reentrant=False")
            layer.__dict__["_gradient_checkpointing_func"] = CheckpointedLayer(self.current, function)


class EnterLayer:
    """The pre-forward hook of one decoder layer. A class, so that a model can be copied and pickled."""

    def __init__(self, routing: Routing):
        self.routing = routing

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.routing.enter_layer(args[0] if args else kwargs["hidden_states"])


class LeaveLayer:
    """The forward hook of one decoder layer."""

    def __init__(self, routing: Routing):
        self.routing = routing

    def __call__(self, module: nn.Module, args: tuple, result: object) -> None:
        self.routing.leave_layer()


class CheckpointedLayer:
    """Stands in for a decoder layer's `_gradient_checkpointing_func`: checkpoints the layer with the state of its pass.

    Whether the layer's hooks run again in the backward pass depends on the version of Transformers: if they do not, the
    weights are those that the state has now; if they do, they compute the same weights again.
    """

    def __init__(self, current: CurrentPass, checkpoint: Callable):
        self.current = current
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        state = self.current.state
        if state is None:
            return self.checkpoint(function, *args, **kwargs)
        first, state = state, state.again()

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.current.state is first:
                return function(*args, **kwargs)
            with self.current.running(state.again()):
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)
