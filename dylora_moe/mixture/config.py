"""The settings of an expert and of the router.

`MoELoraConfig` is a `peft.LoraConfig` that makes PEFT build routed layers, and that is saved as a plain LoRA.
`RouterConfig` holds the router's settings. Both are validated here, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig
from transformers.pytorch_utils import Conv1D

from ..constants import MAX_EXPERTS
from ..errors import UsageError
from .routed_linear import RoutedLinear

# The fields that a config may set. All others make an adapter more than a plain LoRA on whole linear layers (DoRA,
# biases, ranks by layer, initialisations that change the base), and a routed sum of such adapters is not defined here.
_FREE = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "init_lora_weights"),
}
_INITIALISATIONS = (True, False, "gaussian")


@dataclass
class MoELoraConfig(LoraConfig):
    """A `LoraConfig` for one expert of a DyLoRA-MoE.

    Args:
        r: rank of the update B A, shape (d_out, r) (r, d_in).
        lora_alpha: the update is scaled by lora_alpha / r (or / sqrt(r) with `use_rslora`).
        lora_dropout: probability with which an input of A is dropped in training; the same for all experts.
        target_modules: names of linear layers, or "all-linear"; None takes q/k/v/o_proj where the architecture has
            all four, and otherwise all linear layers inside the decoder layers.

    Raises:
        UsageError: for values out of range and for LoRA variants that cannot be routed (DoRA, biases, ...).
    """

    r: int = field(default=16)
    lora_alpha: int = field(default=32)
    lora_dropout: float = field(default=0.05)
    task_type: Any = field(default="CAUSAL_LM")

    def __post_init__(self) -> None:
        if not _is_count(self.r):
            raise UsageError(f"lora r must be a whole number of at least 1, got {self.r!r}")
        if not _is_number(self.lora_alpha) or self.lora_alpha <= 0:
            raise UsageError(f"lora alpha must be a positive number, got {self.lora_alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora dropout must be at least 0 and less than 1, got {self.lora_dropout!r}")
        super().__post_init__()
        variants = sorted(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if self._differs(f.name))
        if variants:
            raise UsageError(f"an expert is a plain LoRA on linear layers; not supported: {', '.join(variants)}")
        self._register_custom_module({torch.nn.Linear: RoutedLinear, Conv1D: RoutedLinear})

    def _differs(self, name: str) -> bool:
        """Whether a field that must not be set differs from PEFT's default."""
        if name == "init_lora_weights":
            here = self.init_lora_weights  # 1 is not True: PEFT compares by identity
            return not any(type(here) is type(known) and here == known for known in _INITIALISATIONS)
        value, plain = getattr(self, name), getattr(_PLAIN, name, None)
        return name not in _FREE and value != plain and bool(value or plain)

    def to_dict(self) -> dict:
        """The fields of a plain LoRA as JSON values; sets are sorted, so that equal configs give equal bytes."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


_PLAIN = LoraConfig()


@dataclass(frozen=True)
class RouterConfig:
    """Settings of the router.

    Args:
        temperature: the averaged logits are divided by it before the softmax.
        top_k: number of experts per token when all are mature; None means min(2, number of experts).
        balance_coefficient: weight of the load-balancing loss in the training loss.
        decay: what a token counts less with each token after it; 1 forgets nothing.
        prior_tokens: how many tokens the prior counts as.

    Raises:
        UsageError: for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    balance_coefficient: float = 0.01
    decay: float = 0.96
    prior_tokens: float = 4.0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise UsageError(f"router temperature must be a positive number, got {self.temperature!r}")
        if self.top_k is not None and not _is_count(self.top_k):
            raise UsageError(f"router top_k must be a whole number of at least 1, got {self.top_k!r}")
        if not _is_number(self.balance_coefficient) or self.balance_coefficient < 0:
            raise UsageError(f"balance coefficient must be at least 0, got {self.balance_coefficient!r}")
        if not _is_number(self.decay) or not 0 < self.decay <= 1:
            raise UsageError(f"router decay must be above 0 and at most 1, got {self.decay!r}")
        if not _is_number(self.prior_tokens) or self.prior_tokens <= 0:
            raise UsageError(f"router prior_tokens must be a positive number, got {self.prior_tokens!r}")

    def experts_per_token(self, num_experts: int) -> int:
        return min(self.top_k or 2, num_experts)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def expert_configs(experts: int | Sequence[MoELoraConfig], lora: MoELoraConfig | None) -> list[MoELoraConfig]:
    if isinstance(experts, int) and not isinstance(experts, bool):
        if not 1 <= experts <= MAX_EXPERTS:
            raise UsageError(f"the number of experts must be 1 to {MAX_EXPERTS}, got {experts}")
        configs = [MoELoraConfig() if lora is None else lora] * experts
    elif isinstance(experts, (list, tuple)):
        if not 1 <= len(experts) <= MAX_EXPERTS:
            raise UsageError(f"the number of experts must be 1 to {MAX_EXPERTS}, got {len(experts)}")
        if lora is not None:
            raise UsageError("experts has the config of each expert: leave lora out, or give a number of experts")
        configs = list(experts)
    else:
        raise UsageError(f"experts must be a whole number or a list of MoELoraConfig, got {experts!r}")
    check_configs(configs)
    return configs


def check_configs(configs: Sequence[MoELoraConfig]) -> None:
    """Check that the experts can be routed over. They share one dropout, so that their sum is two matmuls."""
    for config in configs:
        if not isinstance(config, MoELoraConfig):
            raise UsageError(f"an expert's config must be a MoELoraConfig, got {type(config).__name__}")
    rates = sorted({config.lora_dropout for config in configs})
    if len(rates) > 1:
        raise UsageError(f"all experts must have the same lora dropout, got {', '.join(map(str, rates))}")
