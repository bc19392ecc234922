"""The router: which experts a token gets, read from the tokens up to it.

    z_t = rms(h_t)                                        h_t: the input embedding of token t
    s_t = decay s_{t-1} + gate(z_t)        n_t = decay n_{t-1} + 1
    logits_t = s_t / (n_t + prior_tokens) / temperature + prior

The gate's view of each token is averaged over the tokens so far, recent ones counting more. Padding and the first token
of a document count nothing, so that the first token is routed by `prior` alone. No token depends on a later one, and no
logit on the experts: with a KV cache, the sums (s, n) are all that must be kept (`routing.RouteCache`).

Shapes: B batch, T tokens, D width of the input embeddings, N experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .config import RouterConfig

RMS_EPSILON = 1e-6
CHUNK = 128  # tokens that are summed up at once


class Tokens(NamedTuple):
    """Which tokens of a batch count, and where documents begin. Both (B, T) bool."""

    counted: torch.Tensor
    begins: torch.Tensor


class Router(nn.Module):
    """One linear gate over input embeddings, in float32. `state_dict()` is what router.safetensors holds.

    Attributes:
        gate: Linear(D, N); its bias centres the embeddings.
        prior: (N,), the logits of a token that nothing is known of.
    """

    def __init__(self, width: int, num_experts: int, config: RouterConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(width, num_experts, dtype=torch.float32, device=device)
        nn.init.zeros_(self.gate.bias)
        self.prior = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32, device=device))

    @property
    def num_experts(self) -> int:
        return self.gate.out_features

    def grow(self) -> None:
        """Add one more expert. The parameters of those that were there keep their bits."""
        old, prior = self.gate, self.prior
        grown = nn.Linear(old.in_features, old.out_features + 1, dtype=torch.float32, device=old.weight.device)
        with torch.no_grad():
            grown.bias.zero_()
            grown.weight[:-1], grown.bias[:-1] = old.weight, old.bias
        grown.requires_grad_(old.weight.requires_grad)
        self.gate = grown
        self.prior = nn.Parameter(F.pad(prior.detach(), (0, 1)), requires_grad=prior.requires_grad)

    def sums(
        self,
        embeddings: torch.Tensor,
        tokens: Tokens,
        experts: tuple[int, ...] | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sums s and n after each token: (B, T, N + 1) in float32, n last.

        Args:
            embeddings: (B, T, D) of any floating-point dtype.
            experts: the experts whose sums are computed; None for all. Others do not change a bit of them.
            before: (B, N + 1), the sums after the token before the first one; None if there is none.
        """
        of_gate = (
            self._of(p, experts).to(embeddings.device, torch.float32) for p in (self.gate.weight, self.gate.bias)
        )
        with torch.autocast(embeddings.device.type, enabled=False):
            return forgetting_sums(F.linear(normalised(embeddings), *of_gate), tokens, self.config.decay, before)

    def logits(self, sums: torch.Tensor, experts: tuple[int, ...] | None = None) -> torch.Tensor:
        """Turn sums (B, T, N + 1) of these experts, all by default, into their logits (B, T, N)."""
        prior = self._of(self.prior, experts).to(sums)
        weight_of_evidence = (sums[..., -1:] + self.config.prior_tokens) * self.config.temperature
        return sums[..., :-1] / weight_of_evidence + prior

    def contributions(self, embeddings: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return what each token adds to the logits after the last one: (B, T, N) in float32.

        With the prior, they sum up to those logits.

        Args:
            embeddings: (B, T, D) of any floating-point dtype.
        """
        age = tokens.counted.flip(1).cumsum(1).flip(1) - tokens.counted.long()  # (B, T): tokens that count after it
        document = tokens.begins.cumsum(1)
        counts = tokens.counted & (document == document[:, -1:])
        left = _left(age, self.config.decay) * counts  # (B, T)
        evidence = (left.sum(1, keepdim=True) + self.config.prior_tokens) * self.config.temperature  # (B, 1)
        gate = F.linear(normalised(embeddings), self.gate.weight, self.gate.bias)  # (B, T, N)
        return gate * (left / evidence).unsqueeze(-1)

    def _of(self, parameter: torch.Tensor, experts: tuple[int, ...] | None) -> torch.Tensor:
        return parameter if experts is None or len(experts) == self.num_experts else parameter[list(experts)]

    def top(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits (..., N) -> the indices of the top-k experts and their weights, which sum to 1, both (..., k).

        None if these are all experts.
        """
        k = self.config.experts_per_token(logits.shape[-1])
        if k == logits.shape[-1]:
            return None
        best, index = logits.topk(k, dim=-1)
        return index, best.softmax(-1)


def normalised(embeddings: torch.Tensor) -> torch.Tensor:
    """Scale embeddings (..., D) to a root mean square of 1 (https://huggingface.co/papers/1910.07467), in float32."""
    x = embeddings.to(torch.float32)
    return x * (x.square().mean(-1, keepdim=True) + RMS_EPSILON).rsqrt()


def forgetting_sums(
    values: torch.Tensor, tokens: Tokens, decay: float, before: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum up values over each document, where a sum shrinks by `decay` with every token that counts.

    Args:
        values: (B, T, K) in float32.
        before: (B, K + 1), what was returned for the token before the first one; None if there is none.

    Returns:
        (B, T, K + 1): the sums of the values and, last, of ones.
    """
    values = F.pad(values, (0, 1), value=1.0) * tokens.counted.unsqueeze(-1)
    age = tokens.counted.cumsum(1)  # (B, T): tokens that have counted, with which sums shrink
    document = tokens.begins.cumsum(1)  # (B, T)
    if before is None:
        before = values.new_zeros(values.shape[0], values.shape[2])
    last_age, last_document = age.new_zeros(len(age)), document.new_zeros(len(document))
    found = []
    for chunk, ages, documents in zip(*(x.split(CHUNK, 1) for x in (values, age, document)), strict=True):
        # What is left, at the row's token, of the value of the column's token.
        left = _left(ages.unsqueeze(2) - ages.unsqueeze(1), decay).tril()  # (B, C, C)
        left = left * (documents.unsqueeze(2) == documents.unsqueeze(1))
        carried = _left(ages - last_age.unsqueeze(1), decay) * (documents == last_document.unsqueeze(1))  # (B, C)
        sums = torch.baddbmm(carried.unsqueeze(2) * before.unsqueeze(1), left, chunk)
        found.append(sums)
        before, last_age, last_document = sums[:, -1], ages[:, -1], documents[:, -1]
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _left(tokens: torch.Tensor, decay: float) -> torch.Tensor:
    return torch.pow(decay, tokens.clamp(min=0).to(torch.float32))


def count_tokens(
    shape: tuple[int, int],
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    seen: torch.Tensor,
) -> Tokens:
    """Tell which tokens of a batch count in the route, and where documents begin.

    A document begins at the first token of a row that is not padding, and where positions begin again at 0.

    Args:
        shape: (B, T).
        attention_mask: (B, at least T), of which the last T count, or what a base has made of such a mask: (B, 1, T,
            at least T), or several by kind of layer.
        position_ids: (B, T) or (1, T); of three dimensions, those of text are the first.
        seen: (B,) bool, whether there were tokens before.
    """
    attended = seen.new_ones(shape)
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()), None)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:  # padding does not see itself
        own = attention_mask.diagonal(attention_mask.shape[3] - shape[1], 2, 3)[:, 0]  # (B, T)
        attention_mask = own == 0 if own.is_floating_point() else own
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        attended = attention_mask[:, -shape[1] :].to(seen.device, torch.bool)
    begins = attended & (attended.cumsum(1) == 1) & ~seen.unsqueeze(1)
    if position_ids is not None:
        position_ids = position_ids[0] if position_ids.dim() == 3 else position_ids
        begins = begins | (attended & (position_ids.to(seen.device).expand(shape) == 0))
    return Tokens(attended & ~begins, begins)


@dataclass
class Usage:
    """How tokens were routed: sums over tokens."""

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
        probs: (B, T, N) routing probabilities.
        mask: (B, T) bool, the tokens that count.

    Returns:
        first (B, N) float32 without gradient, and total (B, N) float32.
    """
    first = F.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype)  # (B, T, N)
    keep = mask.to(probs.dtype).unsqueeze(-1)
    return (first * keep).sum(1), (probs * keep).sum(1)


def balance_loss(first: torch.Tensor, total: torch.Tensor, num_tokens: torch.Tensor | int | float) -> torch.Tensor:
    """The load-balancing loss N * sum_i f_i P_i of the Switch Transformer (https://huggingface.co/papers/2101.03961,
    eq. 4); 1 where the load is even.

    f_i is the fraction of a sequence's tokens whose first choice is expert i, P_i the mean probability of expert i over
    them. The loss is computed for each sequence and averaged over the tokens of all: a sum over sequences, unlike one
    over a micro-batch, gives the same gradients however a batch is cut for accumulation or over processes.

    Args:
        first, total: (B, N) of `balance_statistics`.
        num_tokens: the tokens of the whole batch, all micro-batches and processes.
    """
    tokens = first.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    per_sequence = first.shape[-1] * (first / tokens * total).sum(-1)  # (B,): n_seq * N * sum_i f_i P_i
    return per_sequence.sum() / num_tokens
