"""The link between the router and the routed layers during a forward pass.

A pre-forward hook on the decoder computes the routing weights from its input embeddings and puts them into the state of
the pass, where every routed layer reads them; a forward hook removes them and keeps, beside a KV cache, what the router
needs to go on.

Gradient checkpointing runs a decoder layer again during the backward pass. It then finds the state of its own first run
(`CheckpointedLayer`), also if other passes have run since.

Shapes: B batch, T tokens, N experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, StaticLayer
from transformers.utils import ModelOutput

from ..base.structure import decoder_layers
from ..errors import UsageError
from .dispatch import RoutingWeights
from .expert_matrices import Watch
from .experts import ExpertStates
from .forward_pass import CurrentPass, Expert, ForwardPass, Groups
from .routed_linear import RoutedLinear
from .router import Router, count_tokens

# Linear layers of one module that read the same input.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CACHES = ("past_key_values", "cache_params")  # names of the argument, and of the output, that holds the cache


class RouteCache(DynamicLayer):
    """One more layer of a KV cache: the router's sums after each token, so that beams and crops apply to them as well.

    keys: (B, 1, T, K) in float32: the sums (s, n) of each group of experts, and 1 if there was a token that is not
    padding.
    """

    def add(self, sums: torch.Tensor) -> None:
        """Add those (B, T, K) of the next tokens."""
        self.update(sums.unsqueeze(1), sums.new_empty(len(sums), 1, sums.shape[1], 0))

    def last(self) -> torch.Tensor | None:
        """Return those (B, K) after the last token; None if there is none."""
        return self.keys[:, 0, -1] if self.get_seq_length() and self.keys is not None else None


class Routing:
    """Begins forward passes, and computes the routing weights of each.

    Args:
        router: the router.
        base: the base model, with routed layers.
        watch: tells whether parameters have changed.
        states: tell which experts take part in a pass.
    """

    def __init__(self, router: Router, base: PreTrainedModel, watch: Watch, states: ExpertStates):
        self.router = router
        self.watch = watch
        self.states = states
        self.current = CurrentPass()
        self._forced: list[list[Expert]] = []  # of the blocks of `force` that were entered and not left, each in a list
        self.calls = 0  # of the mixture, under way
        decoder = base.get_decoder()
        decoder.register_forward_pre_hook(self.enter, with_kwargs=True)
        decoder.register_forward_hook(self.leave, always_call=True)
        self.attach(decoder_layers(base))

    def attach(self, layers: nn.ModuleList) -> None:
        """Connect the routed layers; again after an expert has brought new ones."""
        self._layers, routed = layers, []
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
            record: whether to record the probabilities, if the tokens are routed.
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
        groups, mature = self.states.routed(unchanged)
        only = groups[0][0] if len(groups[0]) == 1 else None  # its weight is 1 whatever the router says
        return ForwardPass(only, groups, mature and not self.router.training, unchanged, record)

    @contextmanager
    def called(self) -> Iterator[None]:
        """Inside, a forward pass of the base model is one of the mixture."""
        with self.current.turn():
            self.calls += 1
            try:
                yield
            finally:
                self.calls -= 1

    @property
    def forced(self) -> Expert:
        """The expert of the block of `force` that was entered last, of those that are not left."""
        return self._forced[-1][0] if self._forced else None

    @contextmanager
    def force(self, expert: Expert) -> Iterator[None]:
        """Inside, every token goes to one expert, with weight 1; NO_EXPERT leaves the base model alone.

        It holds for the passes of all threads that begin inside. Threads may leave their blocks in any order.
        """
        entry = [expert]
        with self.current.turn():
            self._forced.append(entry)
        try:
            yield
        finally:
            with self.current.turn():
                self._forced = [each for each in self._forced if each is not entry]

    def enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Compute the routing weights for the arguments of the decoder: its pre-forward hook."""
        if decoder.training and torch.is_grad_enabled():
            self._check_called()
            self._wrap_checkpointing([decoder, *self._layers])
        state = self.current.state
        if state is None:  # the base or its decoder was called by itself
            state = self.current.state = self._begin()
            state.lasts = False
        state.sums = None
        state.returns_logits = bool(kwargs.pop("output_router_logits", False))
        if sum(map(len, state.groups)) < 2:
            state.route(())
            return args, kwargs
        arguments = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        state.sums, sums = self._sums(decoder, arguments, state.groups)
        state.route(self._weights(state, sums))
        return args, kwargs

    def _check_called(self) -> None:
        """Refuse to train experts behind a router that is to be trained as well, but is not part of the model."""
        if self.calls == 0 and self.router.num_experts > 1 and self.router.prior.requires_grad:
            raise UsageError(
                "a part of the mixture is trained by itself: the experts would learn, the router would not. Hand the "
                "mixture to the trainer, not its peft_model or base"
            )

    def leave(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        """End the decoder, and keep the sums of its tokens in the cache that it returns, if it does: its forward hook.

        Args:
            output: what the decoder has returned; None if it has failed.
        """
        state = self.current.state
        if state is None:
            return
        state.route(None)
        if not state.lasts:
            self.current.state = None
        if state.returns_logits and isinstance(output, ModelOutput):
            output["router_logits"] = state.router_logits()
        cache = None if state.sums is None or output is None else _find_cache(output)
        if cache is not None and state.sums is not None:
            layer = _route_in(cache)
            if layer is None:
                cache.layers.append(layer := RouteCache())
            layer.add(state.sums)
            if getattr(cache, "offloading", False):
                # The last decoder layer has asked for the next layer, which is this one, and not the first one.
                cache.prefetch(0, cache.only_non_sliding)

    # ---- weights ----

    def _sums(
        self, decoder: nn.Module, arguments: Mapping[str, Any], groups: Groups
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return what a cache keeps of each token, and the router's sums of each group."""
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            embeddings = cast(Any, decoder).get_input_embeddings()(arguments["input_ids"])  # (B, T, D)
        sizes = [len(group) + 1 for group in groups]
        before = _before(arguments, sum(sizes) + 1)
        if before is None:
            before = embeddings.new_zeros(len(embeddings), sum(sizes) + 1, dtype=torch.float32)
        *past, seen = before.split([*sizes, 1], 1)  # seen: (B, 1)
        shape = (embeddings.shape[0], embeddings.shape[1])
        tokens = count_tokens(
            shape, arguments.get("attention_mask"), arguments.get("position_ids"), seen.squeeze(1).bool()
        )
        found = [self.router.sums(embeddings, tokens, *each) for each in zip(groups, past, strict=True)]
        seen = seen.bool() | ((tokens.counted | tokens.begins).cumsum(1) > 0)  # (B, T)
        kept = [part.detach().to(torch.float32) for part in (*found, seen.unsqueeze(-1))]
        return torch.cat(kept, -1), found

    def _weights(self, state: ForwardPass, sums: list[torch.Tensor]) -> tuple[RoutingWeights, ...]:
        """The weights of the first group, and in training those of the new experts beside it.

        An expert that is alone in the first group has none: it is added as PEFT adds it.
        """
        logits = [self.router.logits(*each) for each in zip(sums, state.groups, strict=True)]  # (B, T, N) each
        if state.records or state.returns_logits:
            order = torch.tensor(list(chain(*state.groups)), device=logits[0].device).argsort()
            if torch.is_grad_enabled():
                found = torch.cat(logits, -1).softmax(-1)
            else:  # what new experts add is zero, and the others are not weighed against them
                found = F.pad(logits[0].softmax(-1), (0, sum(map(len, state.groups[1:]))))
            state.probabilities = found.index_select(-1, order)
        weights = []
        if state.expert is None:
            weights.append(self._softmax(state.groups[0], logits[0], state.sparse))
        if len(logits) > 1 and torch.is_grad_enabled():  # otherwise, what the new ones add is zero
            own = torch.sigmoid(logits[1] - logits[0].logsumexp(-1, keepdim=True))  # e^l / (sum over trained + e^l)
            weights.append(RoutingWeights(state.groups[1], own.flatten(0, -2)))
        return tuple(weights)

    def _softmax(self, experts: tuple[int, ...], logits: torch.Tensor, sparse: bool) -> RoutingWeights:
        """logits (B, T, N)"""
        rows = logits.flatten(0, -2)  # (B * T, N)
        top = self.router.top(rows) if sparse else None
        if top is None:
            return RoutingWeights(experts, rows.softmax(-1))
        index, weights = top
        return RoutingWeights(experts, weights, index)

    # ---- gradient checkpointing ----

    def _wrap_checkpointing(self, modules: Iterable[nn.Module]) -> None:
        """Make gradient checkpointing, where it is on, run each layer again with the state of its first run."""
        for module in modules:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is None or isinstance(function, CheckpointedLayer):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise UsageError("gradient checkpointing of a mixture needs use_reentrant=False")
            module.__dict__["_gradient_checkpointing_func"] = CheckpointedLayer(self.current, function)


def _before(arguments: Mapping[str, Any], width: int) -> torch.Tensor | None:
    """Return the router's sums (B, width) in the cache that the decoder is given; None if there is no token in it.

    Raises:
        UsageError: if the cache cannot hold them, or was filled without the router or with other experts.
    """
    cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
    if cache is None:
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    if not isinstance(cache, Cache) or any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise UsageError(
            f"the router keeps its state in a dynamic cache of Transformers, found {type(cache).__name__}; leave "
            "cache_implementation and past_key_values out, or pass use_cache=False"
        )
    route = _route_in(cache)
    last, lengths = None if route is None else route.last(), _lengths(cache)
    if last is None and not lengths:
        return None
    routed = route is not None and (not lengths or route.get_seq_length() in lengths)
    if last is None or last.shape[1] != width or not routed:
        raise UsageError(
            "the cache was filled without these experts' router (by the base model, with one expert for all tokens, or "
            "before an expert was added): go on the same way, or start with a new cache"
        )
    return last


def _lengths(cache: Cache) -> set[int]:
    """Return of how many tokens the layers of a cache have keys: of those of the text, and in some of an image."""
    layers = [layer for layer in cache.layers if not isinstance(layer, RouteCache)]
    return {getattr(layer, "get_seq_length", int)() for layer in layers} - {0}


def _route_in(cache: Cache) -> RouteCache | None:
    return next((layer for layer in reversed(cache.layers) if isinstance(layer, RouteCache)), None)


def _find_cache(output: Any) -> Cache | None:
    """Return the cache among what a decoder has returned."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    found = next((value for value in values if isinstance(value, (Cache, EncoderDecoderCache))), None)
    return getattr(found, "self_attention_cache", found)


@dataclass
class CheckpointedLayer:
    """Stands in for a layer's `_gradient_checkpointing_func`: checkpoints the layer with the state of its pass."""

    current: CurrentPass
    checkpoint: Callable

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        first = self.current.state
        again = first and first.again()

        def run(*args: Any, **kwargs: Any) -> Any:
            if again is None or self.current.state is first:
                return function(*args, **kwargs)
            with self.current.running(again.again()):
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)
