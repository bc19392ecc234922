"""The router without the base model: what its gate says of each token of the vocabulary, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..constants import NEW
from ..mixture.model import Mixture
from ..mixture.router import normalised
from ..skills.features import input_embeddings
from ..stages.batches import known_tokens

TOKENS = 4096  # whose embeddings are in memory at once


class GateTable:
    """Routes prompts as the mixture that it was made from does, which is not needed any longer.

    Attributes:
        tokens: how many the base model knows; ids are below it.
        num_experts: of the mixture.
    """

    def __init__(self, model: Mixture):
        embeddings: Any = model.get_input_embeddings()
        self.tokens: int = known_tokens(model.base) or embeddings.weight.shape[0]
        self.num_experts = model.num_experts
        self._votes = _votes(model, self.tokens)  # (V, N) in float32
        self._prior: np.ndarray = model.router.prior.detach().float().cpu().numpy()
        self._config = model.router.config
        trained = [i for i, state in enumerate(model.expert_states) if state != NEW]
        self._allowed = np.array(trained or range(model.num_experts))

    def expert(self, ids: Sequence[int]) -> int:
        """Return the expert that has most weight after the last token. As in the mixture, new ones have none."""
        return int(self._allowed[self.logits(ids)[self._allowed].argmax()])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the router's logits after the last token, (N,) in float32. For the formula see `mixture.router`."""
        ages = np.arange(len(ids) - 1)[::-1]  # of all but the first token, which counts nothing
        left = np.power(self._config.decay, ages, dtype=np.float32)
        evidence = (left.sum() + self._config.prior_tokens) * self._config.temperature
        return left @ self._votes[np.asarray(ids[1:], dtype=np.int64)] / evidence + self._prior


@torch.no_grad()
def _votes(model: Mixture, tokens: int) -> np.ndarray:
    embeddings, gate = input_embeddings(model), model.router.gate
    votes = np.empty((tokens, model.num_experts), dtype=np.float32)
    for start in range(0, tokens, TOKENS):
        ids = torch.arange(start, min(start + TOKENS, tokens), device=model.device)
        votes[start : start + TOKENS] = gate(normalised(embeddings(ids))).float().cpu().numpy()
    return votes
