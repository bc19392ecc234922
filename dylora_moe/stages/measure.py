"""What a run has made of each skill: for `results.json` and `report.html`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerBase

from ..constants import IGNORED_LABEL, NO_EXPERT
from ..data.packing import COLUMNS, PADDED_COLUMNS
from ..errors import UsageError, shown
from ..mixture.model import Mixture
from ..mixture.router import Tokens, Usage, count_tokens
from ..reporting.results import Example, SkillLoss
from ..skills.features import input_embeddings
from .evaluate import Evaluation

HELD_OUT = "held_out.safetensors"  # token ids of the held-out blocks of each skill, to measure what is forgotten
CANDIDATES = 4  # experts that are evaluated alone on a skill, those that the router uses most and the skill's own
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # from each on to the next one, the confidence is averaged
ROWS = 16  # of a skill, for its confidence
EXAMPLE_TOKENS = 96
WORD_BLOCKS = 128  # of a skill, for its words


@dataclass(frozen=True)
class Measured:
    """What was measured on the held-out text of one skill."""

    loss: SkillLoss
    usage: list[float]  # share of the routed weight by expert
    confidence: list[tuple[int, float]]  # (position in the text, mean weight of its own expert there)
    alone: dict[int, float]  # loss of each expert that was evaluated alone


@dataclass(frozen=True)
class Known:
    """What was measured on the held-out text of a skill before, and need not be measured again."""

    routed: tuple[float, Usage | None] | None = None  # what `Evaluation.loss` has returned
    own: float | None = None  # loss of the skill's own expert


def measure(
    evaluation: Evaluation, rows: Any, own: int | None, known: Known = Known(), *, every_expert: bool = False
) -> Measured:
    """Measure a skill on its held-out rows. Every rank calls this.

    Args:
        own: the expert of the skill; None in a jointly trained mixture.
        every_expert: whether each expert is evaluated alone, rather than those that are likely to be good at it.
    """
    model = evaluation.model
    routed, usage = known.routed or evaluation.loss(rows)
    shares = usage.shares() if usage is not None else [1.0]
    alone = {} if own is None or known.own is None else {own: known.own}
    candidates = list(range(model.num_experts)) if every_expert else _candidates(shares, own)
    alone |= {i: evaluation.loss(rows, i)[0] for i in candidates if i not in alone}
    best = min(alone, key=lambda i: (alone[i], i))
    of_own = None if own is None else alone[own]
    loss = SkillLoss(evaluation.loss(rows, NO_EXPERT)[0], routed, of_own, alone[best], best)
    confidence = [] if own is None or usage is None else _confidence(model, rows, own)
    return Measured(loss, shares, confidence, alone)


def _candidates(shares: list[float], own: int | None) -> list[int]:
    order = sorted(range(len(shares)), key=lambda i: (-shares[i], i))[:CANDIDATES]
    return sorted(set(order) | (set() if own is None else {own}))


@torch.no_grad()
def routing_weights(model: Mixture, row: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight of each expert for each token of a row, (T, N) in float32 on the CPU.

    Of all experts, where the mixture itself may use the top ones only. It needs the base's input embeddings only.
    Of a sharded base, every rank calls this.
    """
    embeddings, tokens = _as_routed(model, row)
    return model.router.logits(model.router.sums(embeddings, tokens))[0].softmax(-1).cpu()


@torch.no_grad()
def routing_reasons(model: Mixture, row: Mapping[str, Any]) -> torch.Tensor:
    """Return what each token of a row adds to the router's logits after the last one, (T, N) in float32 on the CPU.

    Like `routing_weights`, it needs the base's input embeddings only.
    """
    return model.router.contributions(*_as_routed(model, row))[0].cpu()


def _as_routed(model: Mixture, row: Mapping[str, Any]) -> tuple[torch.Tensor, Tokens]:
    """Return the input embeddings of a row, (1, T, D), and which of its tokens count."""
    device = model.device
    ids = torch.tensor([row["input_ids"]], device=device)  # (1, T)
    others = ("attention_mask", "position_ids")
    mask, positions = (torch.tensor([row[name]], device=device) if name in row else None for name in others)
    seen = torch.zeros(1, dtype=torch.bool, device=device)
    return input_embeddings(model)(ids), count_tokens((1, ids.shape[1]), mask, positions, seen)


def _confidence(model: Mixture, rows: Any, own: int) -> list[tuple[int, float]]:
    found: list[list[float]] = [[] for _ in POSITIONS]
    for row in rows.select(range(min(ROWS, len(rows)))):
        weights = routing_weights(model, row)[:, own]
        positions = row.get("position_ids", list(range(len(weights))))
        bins = np.searchsorted(POSITIONS, positions, side="right") - 1
        for place, weight, label in zip(bins.tolist(), weights.tolist(), row["labels"], strict=True):
            if label >= 0 or place == 0:
                found[place].append(weight)
    return [(start, sum(values) / len(values)) for start, values in zip(POSITIONS, found, strict=True) if values]


# ---- texts ----


def examples(model: Mixture, tokenizer: PreTrainedTokenizerBase, held_out: Mapping[str, Any]) -> list[Example]:
    """Return a few held-out texts with their routing weights; the first one changes its skill in the middle."""
    texts = {name: _first_document(rows) for name, rows in held_out.items() if len(rows)}
    names = [name for name, ids in texts.items() if len(ids) > 1]
    found = []
    if len(names) > 1:
        one, other = names[0], names[1]
        ids = [*texts[one][: EXAMPLE_TOKENS // 2], *texts[other][: EXAMPLE_TOKENS // 2]]
        found.append(_example(model, tokenizer, f"{one}, then {other}", [one, other], ids))
    return found + [_example(model, tokenizer, name, [name], texts[name][:EXAMPLE_TOKENS]) for name in names[:4]]


def _example(
    model: Mixture, tokenizer: PreTrainedTokenizerBase, title: str, skills: list[str], ids: list[int]
) -> Example:
    weights = routing_weights(model, {"input_ids": ids}).tolist()
    texts = [str(tokenizer.decode([i])) for i in ids]
    return Example(title, skills, [(text, each) for text, each in zip(texts, weights, strict=True)])


def _first_document(rows: Any) -> list[int]:
    row = rows[0]
    positions = row.get("position_ids", [])
    later = [i for i, position in enumerate(positions) if position == 0 and i]
    ids = row["input_ids"][: later[0] if later else None]
    return [i for i, keep in zip(ids, row.get("attention_mask", [1] * len(ids)), strict=False) if keep]


def texts_of(rows: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the texts of some blocks, which special tokens divide."""
    special = set(tokenizer.all_special_ids)
    for row in rows.select(range(min(WORD_BLOCKS, len(rows)))):
        keep = row.get("attention_mask", [1] * len(row["input_ids"]))
        ids = [i for i, attended in zip(row["input_ids"], keep, strict=True) if attended]
        for is_special, some in groupby(ids, special.__contains__):
            if not is_special:
                yield str(tokenizer.decode(list(some)))


# ---- held-out text of earlier stages ----


def packed(held_out: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return held-out rows as arrays of int32, by `<skill>/<column>`."""
    arrays: dict[str, np.ndarray] = {}
    for name, rows in held_out.items():
        for column in sorted(set(rows.column_names) - {"source"}):
            arrays[f"{name}/{column}"] = np.asarray(rows[column], dtype=np.int32)
    return arrays


def unpacked(arrays: Mapping[str, np.ndarray], vocabulary: int | None) -> dict[str, Dataset]:
    """Return the rows that `packed` has made arrays of, by skill.

    Raises:
        ValueError: if they are others, or have tokens beyond the vocabulary.
    """
    columns: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        name, _, column = key.rpartition("/")
        columns.setdefault(name, {})[column] = array
    for name, found in columns.items():
        if not _are_rows(found, vocabulary or np.iinfo(np.int32).max):
            raise ValueError(f"{name}: expected rows of tokens that the model knows, with labels, found others")
    return {name: Dataset.from_dict({c: a.tolist() for c, a in found.items()}) for name, found in columns.items()}


def _are_rows(found: Mapping[str, np.ndarray], vocabulary: int) -> bool:
    columns = PADDED_COLUMNS if PADDED_COLUMNS[-1] in found else COLUMNS
    if set(found) != set(columns) or any(array.dtype != np.int32 or array.ndim != 2 for array in found.values()):
        return False
    ids, labels, places = (found[column] for column in columns)
    if not ids.size or labels.shape != ids.shape or places.shape != ids.shape:
        return False
    in_range = ids.min() >= 0 and ids.max() < vocabulary and places.min() >= 0 and places.max() < ids.shape[1]
    return bool(in_range and ((labels == IGNORED_LABEL) | (labels == ids)).all())


def read_held_out(run_dir: Path, vocabulary: int | None) -> dict[str, Any]:
    """Return the held-out rows of each skill that earlier stages have left in a run folder.

    Args:
        vocabulary: the number of tokens that the model knows.

    Raises:
        UsageError: if the file is not sound.
    """
    path = run_dir / HELD_OUT
    if not path.exists():
        return {}
    try:
        return unpacked(load_file(path), vocabulary)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({shown(error)})") from None
