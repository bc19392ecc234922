"""The config of a mixture, as the Auto classes of Transformers know it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..constants import MODEL_TYPE


class DyLoRAMoEConfig(PreTrainedConfig):
    """The config of a mixture: that of its base model, and the number of experts.

    What it does not have itself it reads from, and writes to, the config of the base model: `hidden_size`,
    `vocab_size`, `pad_token_id` and so on. `AutoConfig.from_pretrained` makes one of a checkpoint's config.json, whose
    further entries are attributes as they are.

    The fields about experts have the names of Mixtral's, by which trainers find the load-balancing loss.

    Attributes:
        base_config: the config of the base model; None if Transformers does not know its type.
        num_experts: how many experts there are.
        num_experts_per_tok: how many of them a token counts for in the load-balancing loss.
        output_router_logits: whether a forward pass returns the logits of the router.
        router_aux_loss_coef: the coefficient of the load-balancing loss.
    """

    model_type = MODEL_TYPE
    # Of an output, what a Trainer does not gather as predictions.
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "lm_loss", "balance_loss", "router_logits"]
    base_config: Any = None
    num_experts: int = 1
    num_experts_per_tok: int = 1
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        # `transformers serve` and TRL load a model by the class of this name in `transformers`.
        self.architectures = self.architectures or ["AutoModelForCausalLM"]
        if self.base_config is None:
            self.base_config = _described(kwargs.get("base_model"))
        elif isinstance(self.base_config, dict):
            self.base_config = CONFIG_MAPPING[self.base_config["model_type"]].from_dict(self.base_config)
        if self.base_config is not None:
            self.dtype = self.dtype or self.base_config.dtype
        self.router_aux_loss_coef = (kwargs.get("router") or {}).get("balance_coefficient", self.router_aux_loss_coef)
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> DyLoRAMoEConfig:
        """Return this config, which reads the text model's."""
        return self

    @property
    def _attn_implementation(self) -> str | None:
        """The attention implementation, which is the base model's."""
        base = self.__dict__.get("base_config")
        return None if base is None else base._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        if (base := self.__dict__.get("base_config")) is not None and value is not None:
            base._attn_implementation = value

    def __getattr__(self, name: str) -> Any:
        base = None if name.startswith("_") else self.__dict__.get("base_config")
        if base is not None:
            for config in (base.get_text_config(), base):
                if hasattr(config, name):
                    return getattr(config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        base = None if name.startswith("_") else self.__dict__.get("base_config")
        if base is not None and name not in self.__dict__ and not hasattr(type(self), name):
            for config in (base.get_text_config(), base):
                if hasattr(config, name):
                    setattr(config, name, value)
                    return
        super().__setattr__(name, value)


def _described(base_model: dict[str, Any] | None) -> PreTrainedConfig | None:
    """Return the config of the base model that a checkpoint's config.json describes; None if it does not."""
    entry = (base_model or {}).get("architecture") or {}
    settings, kind = entry.get("settings"), entry.get("model_type")
    if not settings or not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    known: Any = CONFIG_MAPPING[kind]
    sizes = {key: value for key, value in entry.items() if key not in ("model_type", "settings", "fingerprint")}
    values = {**settings, **{key: value for key, value in sizes.items() if value is not None}}
    return known(text_config=values) if "text_config" in getattr(known, "sub_configs", {}) else known(**values)
