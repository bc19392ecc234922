"""The mixture as a model of vLLM: vLLM's own model of the base, with a router before it and experts on its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .checkpoint import ROUTER, Files
from .config import mixture_of
from .experts import add_experts
from .route import Route

OF_BASE = "base."  # begins the names of the base model's weights


class DyLoRAMoEForCausalLM(nn.Module):
    """Any causal LM of vLLM, with routed experts.

    The router runs before the base model, and outside of what vLLM compiles. It leaves the experts' weights in
    `weights`, (max tokens, N), which the layers read: also those in a compiled model, or in a CUDA graph.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        self.mixture = mixture_of(self.config)
        kind, _ = model_config.registry.resolve_model_cls(self.config.dylora_moe["architectures"], model_config)
        self.base = kind(vllm_config=vllm_config, prefix=prefix)
        self.files = model_config.model, model_config.revision
        # The loader of vLLM reads the base model's weights beside the router's, which `Files` reads again and checks.
        self.allow_patterns_overrides = [ROUTER]
        self.secondary_weights = [DefaultModelLoader.Source(self.mixture.base, self.mixture.revision, prefix=OF_BASE)]
        experts = len(self.mixture.trained)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("weights", torch.ones(most, max(experts, 1), dtype=torch.float32), persistent=False)
        self.route = None
        if experts > 1:
            name = f"route.layers.{self.config.get_text_config().num_hidden_layers}.attn"
            self.route = Route(vllm_config, self.mixture, _attention(vllm_config), name)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.base.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """input_ids (T,), positions (T,) -> the base model's last hidden states (T, D), routed."""
        if input_ids is None or inputs_embeds is not None or positions.ndim != 1:
            raise ValueError("the router reads tokens and their positions in one dimension, and was given others")
        if self.route is not None:
            weights = self.route(self.base.embed_input_ids(input_ids), positions)
            self.weights[: len(weights)].copy_(weights)
        return self.base(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.base.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base model's weights, which `secondary_weights` names, and the checkpoint's."""
        of_base = ((name.removeprefix(OF_BASE), value) for name, value in weights if name.startswith(OF_BASE))
        loaded = {OF_BASE + name for name in self.base.load_weights(of_base)}
        files = Files(*self.files)
        if self.route is not None:
            self.route.load(files.router())
        experts = [self.mixture.experts[i] for i in self.mixture.trained]
        adapters = [files.adapter(expert.name) for expert in experts]
        scalings = [expert.scaling for expert in experts]
        packed = getattr(self.base, "packed_modules_mapping", {})
        add_experts(self.base, adapters, scalings, self.weights, packed)
        return loaded


def _attention(vllm_config: Any) -> Attention:
    """Return an attention layer of the base model, one that sees all tokens if there is one."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    plain = [layer for layer in layers if type(layer) is Attention]
    if not plain or len(plain) < len(layers):
        found = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise ValueError(f"the router needs a base model whose layers have plain attention, found {found}")
    return next((layer for layer in plain if layer.sliding_window is None), plain[0])
