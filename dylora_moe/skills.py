"""What the experts are good at: a small library of skills, and the question whether a text is a new one."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from .errors import CheckpointError, UsageError
from .tensorfile import write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .model import DyLoRAMoE

EMBEDDING_DIM = 64
NAME_BYTES = 32
NO_EXPERT = -1


@dataclass(frozen=True)
class Skill:
    """A skill's name, the expert that has it (None: not known yet), and how near it is (cosine, -1 to 1)."""

    name: str
    expert: int | None
    similarity: float


class SkillLibrary:
    """Named directions in embedding space.

    Each skill takes the same few hundred bytes: a name of at most 32 bytes in UTF-8, a unit vector (64,) in float32,
    and an expert's index.
    """

    def __init__(self):
        self.names: list[str] = []
        self.experts: list[int] = []
        self.embeddings = torch.empty(0, EMBEDDING_DIM)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, embedding: torch.Tensor, expert: int | None = None) -> None:
        """Add a skill, or replace the one of that name.

        Args:
            embedding: (64,), of any length but zero.

        Raises:
            UsageError: for a name that is empty, too long or not text, or an embedding of another shape, zero or NaN.
        """
        raw = name.encode("utf-8")
        if not 1 <= len(raw) <= NAME_BYTES or "\0" in name:
            raise UsageError(
                f"a skill's name has 1 to {NAME_BYTES} bytes in UTF-8 and no NUL, got {name!r} ({len(raw)})"
            )
        if expert is not None and expert < 0:
            raise UsageError(f"a skill's expert is an index from 0, got {expert}")
        embedding = embedding.detach().to("cpu", torch.float32)
        if embedding.shape != (EMBEDDING_DIM,):
            raise UsageError(f"a skill's embedding has shape ({EMBEDDING_DIM},), got {tuple(embedding.shape)}")
        length = embedding.norm()
        if not torch.isfinite(length) or length == 0:
            raise UsageError(f"the embedding of skill {name!r} must be finite and not zero")
        if name in self.names:
            index = self.names.index(name)
        else:
            index = len(self.names)
            self.names.append(name)
            self.experts.append(NO_EXPERT)
            self.embeddings = torch.cat([self.embeddings, torch.zeros(1, EMBEDDING_DIM)])
        self.embeddings[index] = embedding / length
        self.experts[index] = NO_EXPERT if expert is None else expert

    def nearest(self, embedding: torch.Tensor, k: int = 1) -> list[Skill]:
        """The k skills nearest to an embedding (64,), by cosine, nearest first; fewer where there are fewer."""
        if not self.names:
            return []
        cosine = F.normalize(embedding.detach().to("cpu", torch.float32), dim=0) @ self.embeddings.T  # (n,)
        order = sorted(range(len(self)), key=lambda i: (-float(cosine[i]), self.names[i]))
        return [Skill(self.names[i], self.expert_of(self.names[i]), float(cosine[i])) for i in order[:k]]

    def expert_of(self, name: str) -> int | None:
        expert = self.experts[self.names.index(name)]
        return None if expert == NO_EXPERT else expert

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: names (n, 32) uint8, embeddings (n, 64) float32, experts (n,) int64."""
        names = torch.zeros(len(self), NAME_BYTES, dtype=torch.uint8)
        for row, name in zip(names, self.names, strict=True):
            raw = name.encode("utf-8")
            row[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        tensors = {
            "names": names,
            "embeddings": self.embeddings.contiguous(),
            "experts": torch.tensor(self.experts, dtype=torch.int64),
        }
        write_tensors(Path(path), {name: tensor.numpy() for name, tensor in tensors.items()})

    @classmethod
    def load(cls, path: str | Path) -> SkillLibrary:
        """Read what `save` wrote.

        Raises:
            CheckpointError: for a file that is something else.
        """
        try:
            tensors = load_file(path)
            names, embeddings, experts = tensors["names"], tensors["embeddings"], tensors["experts"]
            n = len(names)
            shapes = [tuple(t.shape) for t in (names, embeddings, experts)]
            if shapes != [(n, NAME_BYTES), (n, EMBEDDING_DIM), (n,)]:
                raise ValueError(f"shapes {shapes}")
            library = cls()
            for raw, embedding, expert in zip(names, embeddings, experts.tolist(), strict=True):
                name = bytes(raw.tolist()).rstrip(b"\0").decode("utf-8")
                library.add(name, embedding, None if expert == NO_EXPERT else expert)
            library.embeddings = embeddings.clone()  # as they were: normalising again may change a bit
            return library
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                path, [f"is not a skill library: {error}; save it again with SkillLibrary.save"]
            ) from None


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
    def embed(model: DyLoRAMoE, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
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


def _hidden_states(model: DyLoRAMoE, input_ids: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """input_ids and keep (B, T) -> the base's last hidden states of the tokens that count: (n, d), float32 on the CPU.

    The first token of each row is left out where there are others: it gathers attention, and looks like no other.
    """
    from .isolation import untouched

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


def _random_tokens(model: DyLoRAMoE) -> torch.Tensor:
    """(4, 128), the same on every machine."""
    size = model.get_input_embeddings().num_embeddings
    length = min(128, getattr(model.config.get_text_config(), "max_position_embeddings", 128))
    return torch.randint(0, size, (4, length), generator=torch.Generator().manual_seed(0))


def _projection(hidden_size: int) -> torch.Tensor:
    """(hidden_size, 64), the same on every machine."""
    generator = torch.Generator().manual_seed(hidden_size)
    return torch.randn(hidden_size, EMBEDDING_DIM, generator=generator) / math.sqrt(EMBEDDING_DIM)
