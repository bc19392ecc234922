"""A model that answers to Transformers as its base model does."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..errors import UsageError
from .config import DyLoRAMoEConfig


class OnBase(PreTrainedModel):
    """A `PreTrainedModel` around a base model: what Transformers asks of it, the base answers.

    A subclass has the property `base`, which may be used once `__init__` has run.
    """

    config_class = DyLoRAMoEConfig
    supports_gradient_checkpointing = True
    # The base has been asked already whether it supports its attention.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    accepts_loss_kwargs = True  # the Trainer hands over num_items_in_batch
    _is_built = False  # whether `base` can be asked

    def __init__(self, base: PreTrainedModel):
        config = DyLoRAMoEConfig(base_config=base.config)
        config.name_or_path = base.config._name_or_path
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # the Trainer counts labels as the loss does: without the first of each row
        self._no_split_modules = base._no_split_modules

    @property
    def base(self) -> PreTrainedModel:
        raise NotImplementedError

    @property
    def base_model(self) -> nn.Module:
        """The base model's decoder, without the head. The experts are on it."""
        return self.base.base_model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model; experts and router are in float32."""
        return self.base.dtype

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:  # type: ignore[override]
        """The tied parameters of the base model, by their names in this model."""
        names = {id(module): name for name, module in self.named_modules()}
        prefix = names[id(self.base)]
        return {f"{prefix}.{a}": f"{prefix}.{b}" for a, b in self.base.all_tied_weights_keys.items()}

    # ---- generation ----

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @property  # type: ignore[override]
    def generation_config(self) -> GenerationConfig | None:
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if not isinstance(value, GenerationConfig):
            raise UsageError(f"generation_config must be a GenerationConfig, got {type(value).__name__}")
        if self._is_built:  # before that, Transformers makes one from the config
            self.base.generation_config = value

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return cast(Any, self.base).compute_transition_scores(*args, **kwargs)

    def _supports_logits_to_keep(self) -> bool:
        return False  # where it assists the generation of another model

    # ---- adapters of Transformers ----

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise UsageError("a mixture has experts instead of adapters: add one with add_expert()")

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("a mixture has experts instead of adapters: `dylora-moe experts import` makes one of a LoRA")

    # ---- parts of the base ----

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.base.get_decoder(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise _frozen("its input embeddings cannot be replaced")

    def set_output_embeddings(self, value: nn.Module) -> None:
        raise _frozen("its output embeddings cannot be replaced")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the input embeddings, if they have `new_num_tokens` rows."""
        embeddings = self.get_input_embeddings()
        rows = len(cast(torch.Tensor, embeddings.weight))
        if new_num_tokens in (None, rows):
            return embeddings
        raise _frozen(f"its vocabulary stays at {rows} tokens, and cannot become {new_num_tokens}")

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.tie_weights(*args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        self.base.set_attn_implementation(*args, **kwargs)

    # ---- gradient checkpointing ----

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Enable it as Transformers does, without re-entrance: routing weights are no argument of a layer."""
        options = dict(activation_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise UsageError("gradient checkpointing of a mixture needs use_reentrant=False")
        enable = getattr(self.base, "activation_checkpointing_enable", None) or self.base.gradient_checkpointing_enable
        enable(options, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        disable = getattr(self.base, "activation_checkpointing_disable", None)
        (disable or self.base.gradient_checkpointing_disable)()

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    # Earlier names:
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing


def _frozen(what: str) -> UsageError:
    return UsageError(
        f"the base model of a mixture is frozen: {what}; change the base model before DyLoRAMoE(base) is built"
    )
