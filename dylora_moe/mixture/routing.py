"""The link between the router and the routed layers during a forward pass.

A pre-forward hook on every decoder layer computes the routing weights from the layer's input and leaves them in that
layer's slot, where its routed layers read them; a forward hook clears the slot. One slot per decoder layer, not one in
all: gradient checkpointing runs a layer again during the backward pass, when a common slot would hold the last layer's
weights.

Shapes: B batch, T tokens, N experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UsageError
from .expert_matrices import SharedInput, Watch
from .layer_pass import Expert, LayerSlot, Mix
from .routed_linear import RoutedLinear
from .router import Router

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)  # linear layers of one module that read the same


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

    @property
    def alone(self) -> int | None:
        """The only expert in its normaliser: its weight is 1 whatever the router says."""
        normalised = self.trained or self.new
        return normalised[0] if len(normalised) == 1 else None


class Turn:
    """Of the thread whose forward pass is under way: slots serve one at a time. A copy is a fresh one."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return Turn, ()


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
        self.turn = Turn()
        self.forced: Expert = None
        self.recorded: list[torch.Tensor] | None = None
        self.settled: object | None = None
        self.still = False
        self.plan: Plan | None = None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(EnterLayer(self, index), with_kwargs=True)
            layer.register_forward_hook(LeaveLayer(self, index), always_call=True)
        self.attach(layers)

    def attach(self, layers: nn.ModuleList) -> None:
        """Give each decoder layer's slot to its routed layers; again after an expert has brought new ones."""
        watched, scalings = [], []
        for layer, slot in zip(layers, self.slots, strict=True):
            sharing: dict[tuple, list[RoutedLinear]] = {}
            for name, module in layer.named_modules():
                if isinstance(module, RoutedLinear):
                    module.slot = slot
                    watched += [*module.lora_A.values(), *module.lora_B.values()]
                    scalings.append(module.scaling)
                    parent, _, leaf = name.rpartition(".")
                    family = next((family for family in SAME_INPUT if leaf in family), leaf)
                    sharing.setdefault((parent, family, module.in_features), []).append(module)
            for members in sharing.values():
                shared = SharedInput(members)
                for module in members:
                    module.shared = shared
        self.watch = Watch(watched, scalings)

    @contextmanager
    def force(self, expert: Expert) -> Iterator[None]:
        """Every token to one expert, with weight 1; NO_EXPERT leaves the base model alone, None changes nothing.

        A tuple: one expert for each row of the batch. Inside, it holds for the passes of all threads.
        """
        with self.its_turn():
            before, self.forced = self.forced, self.forced if expert is None else expert
        try:
            yield
        finally:
            with self.its_turn():
                self.forced = before

    def its_turn(self) -> AbstractContextManager:
        """Inside, no other thread is: around a forward pass, and around what a pass must not see changing."""
        return nullcontext() if torch.compiler.is_compiling() else self.turn

    @contextmanager
    def record(self, wanted: bool = True) -> Iterator[list[torch.Tensor] | None]:
        """Collects the probabilities (B, T, N) of every decoder layer of the forward passes inside."""
        before, self.recorded = self.recorded, [] if wanted else None
        try:
            yield self.recorded
        finally:
            self.recorded = before

    @contextmanager
    def settle(self) -> Iterator[None]:
        """Inside, no parameter changes, so that none need be looked at again for every token."""
        before, self.still, self.settled = self.still, True, None
        try:
            yield
        finally:
            self.still = before

    def enter_layer(self, index: int, hidden: torch.Tensor) -> None:
        """Set the slot of decoder layer `index`, whose input is `hidden` (B, T, hidden_size)."""
        if index == 0 or self.plan is None:
            self.plan = self.make_plan()
            if self.settled is None or not self.still:
                self.settled = self.watch.look()
        expert, mixes = self.forced, None
        if expert is None:
            expert, mixes = self.plan.alone, self._mixes(self.plan, hidden)
        # A later layer may be run by itself, with gradients after a pass without.
        self.slots[index].set(expert, mixes, None if torch.is_grad_enabled() else self.settled)

    def leave_layer(self, index: int) -> None:
        """Let go of what the forward pass has left in the slot."""
        self.slots[index].set()

    def _mixes(self, plan: Plan, hidden: torch.Tensor) -> tuple[Mix, ...]:
        """At most one without gradients. Without `plan.alone`, which is added as PEFT adds it: with others beside it as
        before there were any, operation for operation."""
        trains, noted = torch.is_grad_enabled(), self.recorded is not None
        with_new = trains or noted
        if self.router.num_experts == 1 or (len(plan.trained) <= 1 and not with_new):
            return ()
        if not plan.trained or not plan.new:
            logits = self.router.logits(hidden)  # (B, T, N)
            mix, probs = self._mix(plan.trained or plan.new, logits, plan.sparse)
            self._note(probs)
            return (mix,)
        trained = self.router.logits(hidden, plan.trained)  # (B, T, N trained)
        mixes = () if plan.alone is not None else (self._mix(plan.trained, trained, plan.sparse)[0],)
        if not with_new:
            return mixes
        new = self.router.logits(hidden, plan.new)  # (B, T, N new)
        if trains:  # otherwise it is not worth adding: it is zero
            own = torch.sigmoid(new - trained.logsumexp(-1, keepdim=True))  # e^l / (sum over trained + e^l)
            mixes += (Mix(plan.new, own.flatten(0, -2)),)
        if noted:
            order = torch.tensor(plan.trained + plan.new, device=new.device).argsort()
            self._note(torch.cat([trained, new], -1).softmax(-1).index_select(-1, order))
        return mixes

    def _mix(self, experts: tuple[int, ...], logits: torch.Tensor, sparse: bool) -> tuple[Mix, torch.Tensor | None]:
        """The mix of these experts, and their probabilities where somebody looks at them."""
        flat = logits.flatten(0, -2)  # (B * T, N)
        top = self.router.top(flat) if sparse else None
        if top is None:
            probs = logits.softmax(-1)
            return Mix(experts, probs.flatten(0, -2)), probs
        return Mix(experts, flat, top), logits.softmax(-1) if self.recorded is not None else None

    def _note(self, probs: torch.Tensor | None) -> None:
        if self.recorded is not None:
            self.recorded.append(probs)

    def wrap_checkpointing(self, layers: nn.ModuleList) -> None:
        """Make gradient checkpointing, where it is on, run each layer again with the routing of its first run."""
        for index, layer in enumerate(layers):
            function = layer.__dict__.get("_gradient_checkpointing_func")
            if function is None or isinstance(function, RoutedCheckpointing):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise UsageError("gradient checkpointing of a mixture needs use_reentrant=False")
            layer._gradient_checkpointing_func = RoutedCheckpointing(self, index, function)

    def replaying(self, index: int, function: Callable) -> Callable:
        """`function`, which runs decoder layer `index`, bound to the routing of this moment.

        Gradient checkpointing calls it once now and once in the backward pass, by when another forward pass may have
        changed the slot, the forced expert and the plan. Whether the layer's hooks run again then depends on the
        version of transformers: if not, the weights of the slot are those of now; if they do, they recompute the
        same. Probabilities count the first time only; the second time they go into a list that is thrown away, because
        what is computed, and saved for backward, must be the same both times.
        """
        slot, forced, plan, recording = self.slots[index], self.forced, self.plan, self.recorded is not None
        expert, mixes = slot.expert, slot.mixes
        runs = 0

        def run(*args, **kwargs):
            nonlocal runs, plan
            runs += 1
            if runs == 1:
                result = function(*args, **kwargs)
                plan = self.plan  # where the hook runs inside, layer 0 has just made it
                return result
            before = self.forced, self.plan, self.recorded, self.make_plan
            # Fresh mixes: what the first run derived from them must be derived, and saved for backward, again.
            slot.set(expert, mixes and tuple(mix.fresh() for mix in mixes))
            self.forced, self.plan, self.recorded, self.make_plan = (
                forced,
                plan,
                [] if recording else None,
                lambda: plan,
            )
            try:
                return function(*args, **kwargs)
            finally:
                slot.set()
                self.forced, self.plan, self.recorded, self.make_plan = before

        return run


class EnterLayer:
    """The pre-forward hook of one decoder layer. A class, so that a model can be copied and pickled."""

    def __init__(self, routing: Routing, index: int):
        self.routing = routing
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.routing.enter_layer(self.index, args[0] if args else kwargs["hidden_states"])


class LeaveLayer:
    """The forward hook of one decoder layer."""

    def __init__(self, routing: Routing, index: int):
        self.routing = routing
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, result: object) -> None:
        self.routing.leave_layer(self.index)


class RoutedCheckpointing:
    """Stands in for a decoder layer's `_gradient_checkpointing_func`: checkpoints the layer with its routing."""

    def __init__(self, routing: Routing, index: int, checkpoint: Callable):
        self.routing = routing
        self.index = index
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        return self.checkpoint(self.routing.replaying(self.index, function), *args, **kwargs)
