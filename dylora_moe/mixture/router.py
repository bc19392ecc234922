"""One gate for all decoder layers.

At the input of each decoder layer the gate maps a token's RMS-normalised hidden state to one logit per expert. It sees
one token at a time, so that routing is causal and generation with a KV cache routes as without one.

Shapes: B batch, T tokens, N experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from .config import RouterConfig

RMS_EPSILON = 1e-6


class Router(nn.Module):
    """`gate`: Linear(hidden_size, N) without bias, in float32. `state_dict()` is what router.safetensors holds."""

    def __init__(self, hidden_size: int, num_experts: int, config: RouterConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, dtype=torch.float32, device=device)

    @property
    def num_experts(self) -> int:
        return self.gate.out_features

    def grow(self) -> None:
        """Add a row for one more expert. The rows that were there keep their bits."""
        old = self.gate.weight
        grown = nn.Linear(old.shape[1], old.shape[0] + 1, bias=False, dtype=old.dtype, device=old.device)
        with torch.no_grad():
            grown.weight[:-1] = old
        grown.weight.requires_grad_(old.requires_grad)
        self.gate = grown

    def logits(self, hidden: torch.Tensor, experts: tuple[int, ...] | None = None) -> torch.Tensor:
        """hidden (..., hidden_size) of any dtype -> logits (..., N) in float32, divided by the temperature.

        The hidden state is normalised to a root mean square of 1, a norm without parameters
        (https://huggingface.co/papers/1910.07467); since the gate is linear, it is the logits that are divided.
        With `experts`, only their columns are computed.
        """
        if torch.is_autocast_enabled(hidden.device.type):
            with torch.autocast(hidden.device.type, enabled=False):
                return self.logits(hidden, experts)
        weight = self.gate.weight if experts is None else self.gate.weight[list(experts)]
        x = hidden.to(torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
        # 1 / (rms * temperature) = 1 / sqrt(temperature^2 * (sum of squares / d + epsilon))
        square = self.config.temperature**2
        epsilon = _constant(square * RMS_EPSILON, x.device)
        scale = torch.addcmul(epsilon, norm, norm, value=square / x.shape[-1]).rsqrt()
        return F.linear(x, weight.to(x.device, torch.float32)) * scale  # (..., N)

    def top(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits (..., N) -> the indices of the top-k experts and their weights, which sum to 1, both (..., k).

        None if these are all experts.
        """
        k = self.config.experts_per_token(logits.shape[-1])
        if k == logits.shape[-1]:
            return None
        best, index = logits.topk(k, dim=-1)
        return index, best.softmax(-1)


@lru_cache(maxsize=16)
def _constant(value: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, device=device)


@dataclass
class Usage:
    """How tokens were routed: sums over tokens, averaged over decoder layers."""

    first: torch.Tensor  # (N,) tokens whose first choice was the expert
    total: torch.Tensor  # (N,) sum of the routing probabilities

    def shares(self) -> list[float]:
        """The mean routing probability of each expert; they sum to 1."""
        return (self.total / self.total.sum().clamp(min=1e-12)).tolist()

    def balance(self) -> float:
        """N * sum_i f_i P_i over all tokens: 1 where the load is even, N where one expert takes all."""
        tokens = self.first.sum().clamp(min=1e-12)
        return float(len(self.first) * (self.first / tokens * self.total / tokens).sum())


def balance_statistics(probs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per sequence: how many tokens have each expert as their first choice, and the sum of their probabilities.

    Args:
        probs: (L, B, T, N) routing probabilities of every decoder layer.
        mask: (B, T) bool, the tokens that count.

    Returns:
        first (L, B, N) float32 without gradient, and total (L, B, N) float32.
    """
    first = F.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype)  # (L, B, T, N)
    keep = mask.to(probs.dtype)[None, :, :, None]
    return (first * keep).sum(2), (probs * keep).sum(2)


def balance_loss(first: torch.Tensor, total: torch.Tensor, num_tokens: torch.Tensor | int | float) -> torch.Tensor:
    """The load-balancing loss N * sum_i f_i P_i of the Switch Transformer (https://huggingface.co/papers/2101.03961,
    eq. 4), averaged over layers; 1 where the load is even.

    f_i is the fraction of a sequence's tokens whose first choice is expert i, P_i the mean probability of expert i over
    them. The loss is computed for each sequence and averaged over the tokens of all: a sum over sequences, unlike one
    over a micro-batch, gives the same gradients however a batch is cut for accumulation or over processes.

    Args:
        first, total: (L, B, N) of `balance_statistics`.
        num_tokens: the tokens of the whole batch, all micro-batches and processes.
    """
    tokens = first.sum(-1, keepdim=True).clamp(min=1)  # (L, B, 1)
    per_sequence = first.shape[-1] * (first / tokens * total).sum(-1)  # (L, B): n_seq * N * sum_i f_i P_i
    return per_sequence.sum(1).mean(0) / num_tokens
