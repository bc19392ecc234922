"""From training blocks to the samples of a skill.

    found = collect(model, blocks, sizes)
    library.update(Skill("python", expert=0, tokens=found.tokens, features=found.features, states=found.states), sizes)

**Features** are what the router reads: the forgetting sum of the input embeddings after some tokens. Long documents are
cut into pieces, each of which counts as a document: their beginnings alone, often a licence, tell little of the rest.
They need no forward pass.

**States** are what novelty is judged by: the mean of the base model's last hidden states, without experts, over windows
of 128 tokens. The first token of a window attracts attention, so its state is unlike all others; it is left out.

Every piece of a document and every window is hashed, and only those with the smallest hashes are read by the model.
Each is read alone, so that its numbers do not depend on what is read with it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from heapq import heappush, heapreplace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..base.preserve import untouched
from ..constants import IGNORED_LABEL
from ..errors import UsageError
from ..mixture.model import Mixture
from ..mixture.router import Tokens, forgetting_sums, normalised
from .samples import Sample
from .sizes import SampleSizes

PLACES = (16, 32, 64, 128, 256)  # tokens of a piece after which a feature is taken; at most 8
WINDOW = 128  # tokens of a state
LEAST_WINDOW = 32  # what is shorter tells too little
COLUMNS = ("input_ids", "position_ids", "attention_mask", "labels")
BATCH = 1024  # rows that are read at once


class Collected(NamedTuple):
    """What was found in some blocks: both samples, and how many tokens there are, padding not counted."""

    features: Sample
    states: Sample
    tokens: int


def collect(model: Mixture, blocks: Iterable[Mapping[str, Any]], sizes: SampleSizes) -> Collected:
    """Draw the samples of a skill from its training blocks. Modes, random generators and gradients are left alone.

    Args:
        blocks: rows with `input_ids`, and with `position_ids` that begin again at 0 where a document begins or an
            `attention_mask`. A document without labels is padding where there are labels.
        sizes: how many rows to keep.

    Raises:
        UsageError: if there is no text, or the base model has no weights.
    """
    if not model.has_base_weights:
        raise UsageError(
            "skills cannot be collected: the base model has no weights here; load it with weights='pretrained'"
        )
    pieces, windows, tokens = Smallest(sizes.features), Smallest(sizes.states), 0
    for documents in _rows(blocks):
        for ids in documents:
            tokens += len(ids)
            for piece in _pieces(ids):
                places = [place for place in PLACES if place < len(piece)] or [len(piece) - 1]
                for key, place in zip(_keys(piece, len(PLACES)), places, strict=False):
                    pieces.add(key, piece[: place + 1])
        for window in windows_of(np.concatenate(documents) if documents else np.empty(0, np.int32)):
            windows.add(_keys(window, 1)[0], window)
    if not tokens:
        raise UsageError("skills cannot be collected: the blocks hold no text; give rows with input_ids")
    with untouched(model):
        return Collected(_features(model, pieces), _states(model, windows), tokens)


def evenly(count: int, most: int) -> list[int]:
    """Return at most so many indices of `count` things, evenly spaced."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def windows_of(ids: np.ndarray) -> list[np.ndarray]:
    """Cut tokens (T,) into windows of 128; the last is left out if it is shorter than 32, and not the only one."""
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [window for window in windows if len(window) >= LEAST_WINDOW] or [w for w in windows[:1] if len(w) > 1]


def read_states(model: Mixture, windows: Iterable[np.ndarray]) -> torch.Tensor:
    """Return the mean last hidden states (K, H) of windows of tokens, in float32 on the CPU.

    Raises:
        UsageError: if there is no window, or the base model has no weights.
    """
    if not model.has_base_weights:
        raise UsageError("text cannot be judged: the base model has no weights here; load it with weights='pretrained'")
    with untouched(model), model.disable_experts():
        states = [_mean_state(model, window) for window in windows]
    if not states:
        raise UsageError("text cannot be judged: there are less than two tokens")
    return torch.stack(states)


# ---- which rows ----


class Smallest:
    """Keeps the tokens with the smallest keys."""

    def __init__(self, most: int):
        self.most = most
        self._heap: list[tuple[int, bytes]] = []  # the largest key first
        self._keys: set[int] = set()

    def add(self, key: int, ids: np.ndarray) -> None:
        full = len(self._heap) == self.most
        if (full and key >= -self._heap[0][0]) or key in self._keys:
            return
        entry = (-key, ids.tobytes())
        if full:
            self._keys.remove(-heapreplace(self._heap, entry)[0])
        else:
            heappush(self._heap, entry)
        self._keys.add(key)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield keys and tokens, the smallest key first."""
        for key, raw in sorted(self._heap, reverse=True):
            yield -key, np.frombuffer(raw, dtype=np.int32)


def _pieces(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the pieces of a document from which features are taken; only the first one may be short."""
    size = PLACES[-1] + 1
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        if len(piece) > (PLACES[0] if start else 1):
            yield piece


def _keys(ids: np.ndarray, number: int) -> list[int]:
    """Return keys below 2**63 of some tokens, the same on every machine."""
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8 * number).digest()
    return (np.frombuffer(digest, dtype="<u8") >> np.uint64(1)).tolist()


def _rows(blocks: Iterable[Mapping[str, Any]]) -> Iterator[list[np.ndarray]]:
    """Yield the documents, or pieces of them, of each row."""
    if not isinstance(blocks, Dataset):
        yield from map(_documents, blocks)
        return
    columns = [name for name in COLUMNS if name in blocks.column_names]
    for batch in blocks.with_format("numpy", columns=columns).iter(BATCH):
        for values in zip(*batch.values(), strict=True):
            yield _documents(dict(zip(batch, values, strict=True)))


def _documents(row: Mapping[str, Any]) -> list[np.ndarray]:
    ids = np.asarray(row["input_ids"], dtype=np.int32)
    keep = np.asarray(row.get("attention_mask", np.ones_like(ids)), dtype=bool)
    positions = np.asarray(row.get("position_ids", np.arange(len(ids))))
    labels = np.asarray(row.get("labels", np.zeros_like(ids)))
    begins = np.flatnonzero(positions == 0)
    if not len(begins):
        return []
    pieces = [slice(start, end) for start, end in zip(begins, [*begins[1:], len(ids)], strict=True)]
    learned = [ids[piece][keep[piece]] for piece in pieces if (labels[piece] != IGNORED_LABEL).any()]
    return [piece for piece in learned if len(piece)]


# ---- what is read of them ----


def input_embeddings(model: Mixture) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what embeds token ids, outside of a forward pass, too. Of a sharded base, every rank calls this."""
    embeddings: Any = model.get_input_embeddings()
    if model.sharded:  # the module gathers its weight only inside the model's own forward pass
        return partial(F.embedding, weight=embeddings.weight.full_tensor())
    return cast(Callable[[torch.Tensor], torch.Tensor], embeddings)


def _features(model: Mixture, pieces: Smallest) -> Sample:
    """The sums of the input embeddings after the last token of each piece."""
    device, embed = _device(model), input_embeddings(model)
    keys, sums = [], []
    for key, ids in pieces:
        z = normalised(embed(torch.tensor(ids, dtype=torch.int64, device=device).unsqueeze(0))).cpu()  # (1, T, D)
        begins = torch.zeros(1, len(ids), dtype=torch.bool)
        begins[:, 0] = True
        keys.append(key)
        sums.append(forgetting_sums(z, Tokens(~begins, begins), model.router.config.decay)[0, -1])
    if not keys:
        return Sample()
    found = torch.stack(sums)  # (K, D + 1)
    return Sample.of(torch.tensor(keys), found[:, :-1], found[:, -1])


def _states(model: Mixture, windows: Smallest) -> Sample:
    found = list(windows)
    if not found:
        return Sample()
    keys, tokens = zip(*found, strict=True)
    counts = torch.tensor([len(ids) - 1 for ids in tokens], dtype=torch.float32)
    return Sample.of(torch.tensor(keys), read_states(model, tokens), counts)


def _mean_state(model: Mixture, ids: np.ndarray) -> torch.Tensor:
    row = torch.tensor(ids, dtype=torch.int64, device=_device(model)).unsqueeze(0)
    return _last_hidden_states(model.base, row)[0, 1:].float().mean(0).cpu()


def _device(model: Mixture) -> torch.device:
    return next(model.get_input_embeddings().parameters()).device


def _last_hidden_states(base: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return what the decoder passes to the head, (1, T, H). The whole model runs, which gathers a sharded one."""
    found: list[torch.Tensor] = []
    handle = base.get_decoder().register_forward_hook(lambda _, args, output: found.append(output[0]))
    one = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    try:
        base(input_ids, use_cache=False, **one)
    finally:
        handle.remove()
    return found[0]
