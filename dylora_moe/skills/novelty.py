"""Whether a text is a new skill, or one that an expert has already."""

from __future__ import annotations

import inspect
import math
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..base.preserve import untouched
from ..errors import UsageError
from ..mixture.model import Mixture
from .library import EMBEDDING_DIM, SkillLibrary


class NoveltyDetector:
    """Says whether a text is far from every skill of a library.

    The embedding is the mean of the base model's last hidden states, without experts. All hidden states of a language
    model point much the same way (https://huggingface.co/papers/1909.00512), so the mean is first centred and whitened
    by what the model makes of random tokens, and then projected by a fixed random matrix to 64 dimensions (which keeps
    cosines to about 1/sqrt(64): https://doi.org/10.1090/conm/026/737400).

    Measured on SmolLM2-135M with 600 tokens each of Python, English prose and C headers, held against the mean of four
    other texts of each kind: without whitening the cosine was 0.97 to the own kind and 0.94 to the nearest other
    (medians; 10 of 12 texts nearest to their own), with it 0.85 and 0.66 (12 of 12), the largest to another kind 0.75.

    Args:
        library: the skills that are known.
        threshold: cosine to the nearest skill below which a text is new.
    """

    def __init__(self, library: SkillLibrary, threshold: float = 0.75):
        if not -1 <= threshold <= 1:
            raise UsageError(f"a novelty threshold is a cosine from -1 to 1, got {threshold!r}")
        self.library = library
        self.threshold = threshold

    @staticmethod
    def embed(model: Mixture, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids (B, T) -> one embedding (64,) in float32 for all of them; mode and RNG stay as found.

        Raises:
            UsageError: where there is no token at all, or the base model has no weights.
        """
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not keep.any():
            raise UsageError("there is no token to embed")
        if not model.has_base_weights:
            raise UsageError("embedding a text needs the weights of the base model")
        if model not in _whitening:
            _whitening[model] = Whitening(_hidden_states(model, _random_tokens(model)))
        mean = _whitening[model](_hidden_states(model, input_ids, keep).mean(0))  # (hidden_size,)
        return F.normalize(mean @ _projection(len(mean)), dim=0)

    def is_novel(self, embedding: torch.Tensor) -> bool:
        """embedding (64,): no skill of the library is as near as the threshold."""
        nearest = self.library.nearest(embedding)
        return not nearest or nearest[0].similarity < self.threshold


class Whitening:
    """Makes the spread of some states the same in all directions; those in which there is little stay small.

    Args:
        states: (n, d) float32; the variance along a direction counts as at least a tenth of the mean variance.
    """

    def __init__(self, states: torch.Tensor):
        self.mean = states.mean(0)
        _, singular, self.directions = torch.linalg.svd(states - self.mean, full_matrices=False)  # (m,), (m, d)
        variances = singular.square() / (len(states) - 1)
        least = 0.1 * variances.sum() / states.shape[1]
        self.rest = least.rsqrt()
        self.scales = (variances + least).rsqrt() - self.rest

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """(d,) -> (d,)"""
        state = state - self.mean
        return self.rest * state + (self.scales * (self.directions @ state)) @ self.directions


_whitening: WeakKeyDictionary = WeakKeyDictionary()  # of each model; its base is frozen


def _hidden_states(model: Mixture, input_ids: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """input_ids and keep (B, T) -> the base's last hidden states of the tokens that count: (n, d), float32 on the CPU.

    The first token of each row is left out where there are others: it gathers attention, and looks like no other.
    """
    input_ids = input_ids.to(model.get_input_embeddings().weight.device)
    keep = (torch.ones_like(input_ids) if keep is None else keep.to(input_ids.device)).bool()
    with untouched(model), model.disable_experts():
        hidden = _last_hidden_states(model.base, input_ids, keep.long())  # (B, T, d)
    later = keep & (keep.cumsum(-1) > 1)
    return hidden[later if later.any() else keep].float().cpu()


def _last_hidden_states(base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What the decoder hands to the head, (B, T, d). Through the whole model: a sharded one is gathered by that."""
    found = []
    handle = base.get_decoder().register_forward_hook(lambda _, args, output: found.append(output[0]))
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    try:
        base(input_ids, attention_mask=attention_mask, use_cache=False, **few)
    finally:
        handle.remove()
    return found[0]


def _random_tokens(model: Mixture) -> torch.Tensor:
    """(4, 128), the same on every machine."""
    size = model.get_input_embeddings().num_embeddings
    length = min(128, getattr(model.config.get_text_config(), "max_position_embeddings", 128))
    return torch.randint(0, size, (4, length), generator=torch.Generator().manual_seed(0))


def _projection(hidden_size: int) -> torch.Tensor:
    """(hidden_size, 64), the same on every machine."""
    generator = torch.Generator().manual_seed(hidden_size)
    return torch.randn(hidden_size, EMBEDDING_DIM, generator=generator) / math.sqrt(EMBEDDING_DIM)
