"""The router, with its state in vLLM's own KV cache.

    z_t = rms(h_t)                                        h_t: the input embedding of token t
    logits_t = sum_j decay^(t-j) gate(z_j) / (n_t + prior_tokens) / temperature + prior
    n_t = sum_j decay^(t-j)                               j: the tokens up to t, without the first

The mean of the gate's values, in which a token counts decay^(t-j), is softmax attention: with scores of
j * ln(1 / decay) the softmax over j gives decay^(t-j) / n_t. So the router is one more attention layer, whose keys hold
the position, and whose values hold what the gate makes of the token. Batches, chunked prefill and prefix caching are
then what vLLM makes of any attention layer.

The layer has the shape of the base model's: with the same size of a page of the cache, vLLM keeps it among the others.

Shapes: T tokens, D width of the input embeddings, N experts that are routed over.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.attention import Attention

from .checkpoint import Mixture

RMS_EPSILON = 1e-6
DIGITS = 3  # of a position in base 128; a digit is exact in each floating-point dtype
BASE = 128
MAX_POSITIONS = BASE**DIGITS
PARTS = 3  # of ln(1 / decay), since a bfloat16 has 8 bits of a float32's 24
KEY_WIDTH = PARTS * DIGITS + 1  # the last one is for the first token, which does not count
FIRST_TOKEN_SCORE = -100.0  # e^-100 is nothing beside the others
FORGOTTEN = 1e-6  # the share of a sum beyond a sliding window that does not matter


class Route(nn.Module):
    """Computes the weights of the experts for each token.

    Args:
        vllm_config: the settings of vLLM.
        mixture: the config of the checkpoint.
        like: an attention layer of the base model.
        name: of the attention layer; with exactly one number, by which vLLM sorts layers.
    """

    def __init__(self, vllm_config: Any, mixture: Mixture, like: Attention, name: str):
        super().__init__()
        self.mixture = mixture
        self.experts = len(mixture.trained)
        self.heads, self.kv_heads, self.head_size = like.num_heads, like.num_kv_heads, like.head_size
        scale = float(like.impl.scale)
        self.attn = Attention(
            self.heads,
            self.head_size,
            scale,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=name,
        )
        self._check(vllm_config.model_config.max_model_len)
        for buffer, shape in (("gate", (mixture.router.width,)), ("bias", ()), ("prior", ())):
            zeros = torch.zeros(self.experts, *shape, dtype=torch.float32)
            self.register_buffer(buffer, zeros, persistent=False)
        query = position_query(mixture.router.decay, scale, self.head_size, vllm_config.model_config.dtype)
        self.register_buffer("query", query.repeat(1, self.heads).to(self.gate.device), persistent=False)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the rows of the experts that are routed over, of the tensors of router.safetensors."""
        rows = list(self.mixture.trained)
        for buffer, name in ((self.gate, "gate.weight"), (self.bias, "gate.bias"), (self.prior, "prior")):
            expected = (len(self.mixture.experts), *buffer.shape[1:])
            if name not in tensors or tensors[name].shape != expected:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ValueError(f"router.safetensors: expected {name} of shape {expected}, found {found}")
            buffer.copy_(tensors[name][rows])

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """embeddings (T, D), positions (T,) -> the weights of the experts, (T, N) in float32"""
        logits = self.logits(embeddings, positions)
        k = self.mixture.per_token
        if k == self.experts:
            return logits.softmax(-1)
        best, index = logits.topk(k, dim=-1)
        return torch.zeros_like(logits).scatter(1, index, best.softmax(-1))

    def logits(self, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """embeddings (T, D), positions (T,) -> (T, N) in float32"""
        x = embeddings.float()
        x = x * (x.square().mean(-1, keepdim=True) + RMS_EPSILON).rsqrt()
        dtype, tokens = self.query.dtype, len(x)
        value = F.linear(x, self.gate, self.bias)  # (T, N)
        value = F.pad(value, (0, self.kv_heads * self.head_size - self.experts)).to(dtype)
        key = position_key(positions, self.head_size).to(dtype).repeat(1, self.kv_heads)  # (T, kv_heads * head_size)
        mean = self.attn(self.query.repeat(tokens, 1), key, value)  # (T, heads * head_size)
        mean = mean.view(tokens, self.kv_heads, -1, self.head_size)[:, :, 0].flatten(1)  # the first head of each group
        settings, position = self.mixture.router, positions.float().unsqueeze(1)
        decay = settings.decay
        count = position if decay == 1 else torch.expm1(position * math.log(decay)) / (decay - 1)  # (T, 1)
        evidence = count / (count + settings.prior_tokens) / settings.temperature
        return mean[:, : self.experts].float() * evidence + self.prior

    def _check(self, length: int) -> None:
        """Raise ValueError if the base model's attention cannot hold the router's state."""
        room, window = self.kv_heads * self.head_size, self.attn.sliding_window
        if self.experts > room or self.head_size < KEY_WIDTH:
            raise ValueError(
                f"the checkpoint has {self.experts} experts; with {self.kv_heads} KV heads of size {self.head_size} in "
                f"the base model, there is room for {room if self.head_size >= KEY_WIDTH else 0}"
            )
        if length > MAX_POSITIONS:
            raise ValueError(f"--max-model-len {length}: a mixture reads at most {MAX_POSITIONS} tokens")
        if window is not None and window < length and self.mixture.router.decay**window > FORGOTTEN:
            raise ValueError(
                f"the router (decay {self.mixture.router.decay}) remembers more than the {window} tokens of the base "
                f"model's sliding window; pass --max-model-len {window}"
            )


def position_key(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """positions (T,) -> (T, head_size) in float32: the digits by their weight, and whether it is the first token"""
    digits = [(positions // BASE**i % BASE) * float(BASE) ** (i - 1) for i in range(DIGITS)]
    columns = torch.stack([*digits * PARTS, (positions == 0).float()], -1).float()
    return F.pad(columns, (0, head_size - KEY_WIDTH))


def position_query(decay: float, scale: float, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the query of every token, (head_size,).

    Its product with a `position_key`, times the scale of attention, is the score: position * ln(1 / decay).
    """
    rest, columns = -math.log(decay) / scale, []
    for _ in range(PARTS):
        part = torch.tensor(rest, dtype=torch.float64).to(dtype).item()
        columns += [part * BASE] * DIGITS
        rest -= part
    columns.append(FIRST_TOKEN_SCORE / scale)
    return F.pad(torch.tensor(columns, dtype=torch.float64), (0, head_size - KEY_WIDTH)).to(dtype)
